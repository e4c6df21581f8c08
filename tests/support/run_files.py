"""What a training left in its folder, read and compared."""

import contextlib
import json

import pytest
from safetensors.torch import load_file


def losses_of(folder):
    """The score network's loss of every step, and the student's after them."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss_score_net", "loss_student")
    return [record[name] for name in names for record in records if record[name] is not None]


def distance(own, other):
    """|own - other| / |other| of two {name: tensor}, as one long vector."""
    assert own.keys() == other.keys()
    difference = sum(float((own[name].double() - other[name].double()).square().sum()) for name in other)
    return (difference / sum(float(other[name].double().square().sum()) for name in other)) ** 0.5


def checkpoint(folder, stem, step):
    """One file of a checkpoint, {name: tensor}."""
    return load_file(folder / "checkpoints" / f"step_{step}" / f"{stem}.safetensors")


TIMES = ("seconds", "images_per_second", "preparing_seconds", "measuring_seconds")


def without_times(record):
    """A record of metrics.jsonl or saves.jsonl, or a row of results.json, without what differs from run to run."""
    return {key: value for key, value in record.items() if key not in TIMES}


def files_without_times(path, left_out=("tensorboard/",)):
    """{name: content} of a run's folder, without times; of files whose names begin with `left_out` nothing."""
    found = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_dir() or name.startswith(left_out):
            continue
        if file.suffix == ".jsonl":
            found[name] = [without_times(json.loads(line)) for line in file.read_text().splitlines()]
        elif name == "results.json":
            found[name] = [without_times(row) for row in json.loads(file.read_text())]
        else:
            found[name] = file.read_bytes()
    return found


class Killed(BaseException):
    """What no code of ours catches."""


@contextlib.contextmanager
def killed_at(owner, name, call, when):
    """Inside, call number `call` of the method `name` of a class ends the process's work, `before` or `after` it.

    That has to happen: without it the block fails.
    """
    whole, calls = getattr(owner, name), []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == call and when == "before":
            raise Killed
        result = whole(*arguments)
        if len(calls) == call:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, dying)
        with pytest.raises(Killed):
            yield

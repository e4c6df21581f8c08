"""What a training left in its folder, read and compared."""

import json

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

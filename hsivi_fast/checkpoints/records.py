"""What the JSON files of a run's folder hold, and one reader for all of them.

A file may be valid JSON and of another shape: whoever reads one here gets values of these shapes, or a ValueError of
one line that names the file, the place in it, and what would be right.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

Natural = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Number = Annotated[StrictInt, Field(gt=-(2**63), lt=2**63)] | StrictFloat

# Keys that stand here are checked; others are those of a newer version, and are let through.
shape = dataclass(frozen=True, config=ConfigDict(extra="allow"))


@shape
class State:
    """state.json of a checkpoint."""

    step: Natural
    metric: Number | None = None
    student_updates: Natural | None = None
    score_net_updates: Natural | None = None
    teacher_updates: Natural | None = None
    # Written because the run was stopped there, at a step at which it saves nothing by itself.
    stopped: StrictBool = False
    # Written at the end of a start, whose student is a row of the table: it is kept.
    start: StrictBool = False
    # Of the start's regression beside the student's loss: two running squares, and how many updates are in them.
    anchor: tuple[Number, Number, Natural] | None = None
    # {name: (sum, how many)} of the losses since the last record.
    losses: dict[StrictStr, tuple[Number, Natural]] | None = None
    # {file name: sum} of the files that stand beside it; older checkpoints have none.
    sha256: dict[StrictStr, StrictStr] | None = None


@shape
class Row:
    """One row of results.json."""

    sampler: StrictStr
    nfe: Natural  # 0 for draws that no network makes
    num_samples: Natural
    images_per_second: Number
    evaluations: Natural | None = None
    # Of the row "best": what was chosen.
    solver: StrictStr | None = None
    spacing: StrictStr | None = None
    frechet_distance: Number | None = None
    frechet_std: Number | None = None
    js_divergence: Number | None = None
    js_std: Number | None = None
    sliced_wasserstein: Number | None = None
    sliced_wasserstein_std: Number | None = None
    kernel_inception_distance: Number | None = None
    kernel_inception_std: Number | None = None
    precision: Number | None = None
    recall: Number | None = None
    f_score: Number | None = None
    # Of a run with a target.
    gradient_evaluations: Natural | None = None
    mean_error: Number | None = None
    std_error: Number | None = None
    correlation_error: Number | None = None
    energy_distance: Number | None = None
    energy_std: Number | None = None
    stein_discrepancy: Number | None = None


@shape
class Record:
    """One line of metrics.jsonl."""

    step: Natural
    seconds: Number = 0.0
    loss_student: Number | None = None
    loss_score_net: Number | None = None
    loss_start: Number | None = None
    loss_teacher: Number | None = None
    loss: Number | None = None
    images_per_second: Number | None = None
    preparing_seconds: Number | None = None
    measuring_seconds: Number | None = None
    metric: Number | None = None
    gpu_power_watts: Number | None = None
    gpu_utilisation_percent: Number | None = None
    gpu_memory_bytes: Number | None = None
    joules_per_image: Number | None = None


@shape
class Save:
    """One line of saves.jsonl; the seconds are None where the process was killed before it could note them."""

    step: Natural
    seconds: Number | None
    bytes: Natural


@shape
class WandbName:
    """wandb.json."""

    project: StrictStr
    id: StrictStr


@shape
class Environment:
    """environment.json."""

    device: StrictStr | None = None
    device_name: StrictStr | None = None
    world_size: Natural | None = None
    threads: Natural | None = None
    backend: StrictStr | None = None
    precision: StrictStr | None = None
    versions: dict[StrictStr, StrictStr | None] | None = None


# Columns of a table that are measured.
COLUMNS = ("frechet_distance", "js_divergence", "sliced_wasserstein", "kernel_inception_distance") + (
    "precision",
    "recall",
    "f_score",
    *("mean_error", "std_error", "correlation_error", "energy_distance", "stein_discrepancy"),
)

Inputs = dict[StrictStr, list[StrictStr]]  # inputs.json: {key: sums of what it named when the run began}

# What a file holds, and in words.
SHAPES = {
    "state.json": (State, "the counters of a checkpoint"),
    "results.json": (list[Row], "a list of rows with sampler, nfe, images_per_second and num_samples"),
    "wandb.json": (WandbName, "project and id"),
    "environment.json": (Environment, "names and values"),
    "inputs.json": (Inputs, "keys and sums"),
    "fisher.json": (list[Number], "a number for each layer"),
    "metrics.jsonl": (Record, "numbers of a step"),
    "saves.jsonl": (Save, "step, seconds and bytes of a checkpoint"),
}


class Damaged(ValueError):
    """A file that cannot be read as what it should be; the message says why, in one line."""

    def told(self, advice):
        """What is told of the file, with what can be done."""
        return f"damaged ({self}); {advice}"


class Unreadable(Damaged):
    """A file that is there and may not be read, which says nothing of what it holds."""

    def told(self, advice):
        """What is told of the file: it is not to be deleted."""
        return f"cannot be read ({self}); ask its owner, or change its permissions"


def parse(name, text):
    """The value of a JSON text of the file called `name`, in the shape that `SHAPES` says; raises `Damaged`."""
    return _checked(name, _parsed(text))


def parse_lines(name, data):
    """The values of the lines of a file's bytes.

    A last line that is no JSON is what a killed process left half written, and is skipped. Any other line that is not
    what it should be raises `Damaged`: a run that went on would write the file anew without it.
    """
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    values = []
    for number, line in lines:
        try:
            value = _parsed(line)
        except Damaged as damage:
            if number == lines[-1][0]:
                break
            raise Damaged(f"line {number}: {damage}") from None
        try:
            values.append(_checked(name, value))
        except Damaged as damage:
            raise Damaged(f"line {number}: {damage}") from None
    return values


def _parsed(text):
    try:
        return json.loads(text)
    except RecursionError:
        raise Damaged("nested too deeply") from None
    except ValueError as error:  # of UnicodeDecodeError too
        raise Damaged(f"no JSON ({' '.join(str(error).split())})") from None


def _checked(name, value):
    wanted, words = SHAPES[name]
    try:
        TypeAdapter(wanted).validate_python(value)
    except (ValidationError, RecursionError) as error:
        raise Damaged(f"{_problem(error, value)}; expected {words}") from None
    if name == "results.json":
        _check_columns(value)
    return value


def _check_columns(rows):
    """A table has the same columns in all rows, a distance among them."""
    columns = [column for column in COLUMNS if rows and rows[0].get(column) is not None]
    if rows and not {"frechet_distance", "js_divergence", "stein_discrepancy"} & {*columns}:
        raise Damaged("0 has no distance; expected frechet_distance, js_divergence or stein_discrepancy")
    for number, row in enumerate(rows):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise Damaged(f"{number}.{missing[0]} is missing, which the first row has")


def _problem(error, value):
    if not isinstance(error, ValidationError):
        return "nested too deeply"
    first = error.errors(include_url=False)[0]
    if first["type"] in ("dataclass_type", "list_type", "dict_type") and not first["loc"]:
        return f"holds {_shown(value)}"
    # Branches of a union stand in the location beside the keys.
    where = ".".join(str(part) for part in first["loc"] if part not in ("int", "constrained-int", "float"))
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] in ("dataclass_type", "list_type", "dict_type"):
        return f"{where} is {_shown(first['input'])}"
    return f"{where} is {_shown(first['input'])}, which {_said(first['msg'])}"


def _said(message):
    return message.removeprefix("Input ")


def _shown(value):
    try:
        text = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        return "something else"
    return text if len(text) <= 40 else f"{text[:40]}..."


def finite(value):
    """A number of a record that can be compared and drawn, or None."""
    return value if value is not None and math.isfinite(value) else None


def check_regular(file):
    """Raise `Damaged` for what is there and no file (reading a pipe waits for ever), or FileNotFoundError."""
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        raise Damaged("is a folder" if stat.S_ISDIR(mode) else "is a pipe or a device")


def read_bytes(file):
    """The bytes of a small file; raises `Unreadable` or `Damaged` where it is there, or FileNotFoundError."""
    try:
        check_regular(file)
        return Path(file).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(error.strerror or error) from None

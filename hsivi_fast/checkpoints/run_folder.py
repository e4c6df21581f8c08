"""A run's folder: its files, and checkpoints that a killed process or a full disk cannot harm.

config.yaml, environment.json, results.json, report.html, tensorboard/
samples/               pictures; step_XXXXXXX.png are those of the training
metrics.jsonl          one record per log step
saves.jsonl            what each checkpoint took: seconds, bytes
inputs.json            sums of the files that the configuration names, as they were when the run began
wandb.json             the run's id at Weights & Biases, where log.wandb is set
bridge.safetensors     of a run with a target: its base, its knots and the paths between them
fisher.json            of one with a target: the Fisher divergence of each layer
checkpoints/step_N/    state.json and safetensors files; two, the best and that of the start are kept
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config import config_difference, config_from_dict, read_resolved, resolved_dict, resolved_yaml
from ..density.annealing import Bridge
from . import records
from .files import (
    WriteError,
    append_line,
    as_written,
    file_sha256,
    make_folder,
    remove_unfinished,
    sync,
    write_atomically,
    write_json,
    write_tensors,
    written_beside,
)
from .inputs import input_sums, with_same_content

CHECKPOINTS_KEPT = 2  # besides the best
LOCK = ".lock"
BRIDGE = "bridge.safetensors"


class RunFolder(os.PathLike):
    """The folder of one run. Use `start` to train in it and `RunFolder(path)` to read it.

    `steps_before`: the train.steps that it had before `start` took it up again; None otherwise.
    """

    steps_before = None

    def __init__(self, path):
        """Raises ValueError where `path` does not hold a run."""
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise ValueError(f"run {str(path)!r}: no config.yaml there; give the folder that `hsivi train` wrote")

    @classmethod
    def of(cls, run):
        """The folder of a run: what `train` returned, or a path."""
        return run if isinstance(run, cls) else cls(run)

    def __fspath__(self):
        return str(self.path)

    def __repr__(self):
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def start(cls, path, config, fresh=False):
        """Create the folder, or take it up again if it holds a run of the same configuration; see `taken`."""
        with cls.taken(path, config, fresh) as folder:
            folder.take_up()
            return folder

    @classmethod
    @contextlib.contextmanager
    def taken(cls, path, config, fresh=False):
        """The folder, created or taken up again, and held for one training process within the block.

        In a run that goes on, train.steps may have grown, and `distributed`, `log` and teacher_train.steps may differ.
        A file that the configuration names may stand elsewhere now, if its content is the same.
        config.yaml of a run that goes on stays as it is until `take_up`, which is called when its checkpoint was read.
        Raises ValueError, and has written nothing, where the path is a file, the folder holds something else, the
        configuration differs, `fresh` was asked for and a run is there, or another process trains there.
        """
        path = Path(path)
        cls.check(path, config, fresh)  # before anything is made
        make_folder(path)
        with _held(path):
            before = cls.check(path, config, fresh)  # again, now that nobody else can change it
            if before is None:
                for name in ("checkpoints", "samples"):
                    make_folder(path / name)
                _write_config(path, config, input_sums(config))
            folder = cls(path)
            folder._config = config
            folder.steps_before = before["train"]["steps"] if before else None
            yield folder

    def take_up(self):
        """Make the folder that of the configuration that it was `taken` for, without what killed processes left.

        Raises ValueError, and has written nothing, where one of its small files is damaged.
        """
        sums = self.read_json("inputs.json", {})
        self.metrics(), self.read_lines("saves.jsonl"), self.read_json("results.json"), self.read_json("wandb.json")
        for folder in (self.path, self.path / "checkpoints", self.path / "samples"):
            make_folder(folder)
            remove_unfinished(folder)
        _write_config(self.path, self._config, {**input_sums(self._config), **sums})

    @classmethod
    def check(cls, path, config, fresh=False):
        """The resolved configuration of the run that stands at `path` and may go on with this one; None for no run.

        Raises ValueError as `taken` does; writes nothing.
        """
        path = as_written(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"outdir {str(path)!r}: is a file; give a folder")
        if not (path / "config.yaml").is_file():
            if path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()):
                raise ValueError(f"outdir {str(path)!r}: is not empty and holds no run; choose another folder")
            return None
        if fresh:
            raise ValueError(f"outdir {str(path)!r}: holds a run already and --fresh was given; choose another folder")
        folder = cls(path)
        config_before = folder.config()  # keys that are newer than the run have their defaults
        now = resolved_dict(config)
        before = with_same_content(config_before, config, folder.read_json("inputs.json", {}))
        difference = config_difference(_may_go_on(before, now), now)
        if difference:
            raise ValueError(
                f"outdir {str(path)!r}: its run has {difference}; when a run goes on, only train.steps may grow, "
                "distributed.*, log.* and teacher_train.steps change"
            )
        return before

    @contextlib.contextmanager
    def locked(self):
        """Hold the folder for one training process; ValueError where another one has it."""
        with _held(self.path):
            yield

    def config_dict(self):
        """The resolved configuration as plain values."""
        try:
            return read_resolved(self.path / "config.yaml")
        except ValueError as error:
            raise ValueError(f"run {str(self.path)!r}: {error}") from None

    def config(self):
        """The resolved configuration, checked."""
        return config_from_dict(self.config_dict())

    # Small files

    def write(self, name, data):
        """Write the bytes of a picture or a page, atomically. Raises OSError that names the file it cannot write."""
        write_atomically(self.path / name, data)

    def write_json(self, name, value):
        """Write results.json and the like, atomically."""
        write_json(self.path / name, value)

    def read_json(self, name, default=None):
        """The value of a JSON file of the folder, `default` where there is none.

        Raises ValueError where it is damaged or of another shape (see records.py).
        """
        return self._read(name, records.parse, default, "delete it and run the command again")

    def append(self, name, record):
        """Add one record to metrics.jsonl or saves.jsonl. Raises OSError that names the file it cannot write."""
        append_line(self.path / name, json.dumps(record))

    def metrics(self):
        """All records of metrics.jsonl; see `read_lines`."""
        return self.read_lines("metrics.jsonl")

    def read_lines(self, name):
        """All records of metrics.jsonl or saves.jsonl; a last line that a killed process left half written is skipped.

        Raises ValueError that names the first other line that is no such record.
        """
        return self._read(name, records.parse_lines, [], "delete that line and run the command again")

    def forget_after(self, name, step):
        """Drop the records of steps that will be trained again, from metrics.jsonl or saves.jsonl."""
        if (self.path / name).is_file():
            kept = [record for record in self.read_lines(name) if record["step"] <= step]
            self.write(name, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def forget_metrics_after(self, step):
        """Drop the records of metrics.jsonl of steps that will be trained again."""
        self.forget_after("metrics.jsonl", step)

    def _read(self, name, parse, default, advice):
        file = self.path / name
        try:
            return parse(name, records.read_bytes(file))
        except FileNotFoundError:
            return default
        except records.Damaged as damage:
            raise ValueError(f"{file}: {damage.told(advice)}") from None

    # Checkpoints

    def checkpoints(self):
        """Steps of all complete checkpoints, ascending."""
        folder = self.path / "checkpoints"
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        numbers = [name.removeprefix("step_") for name in names if name.startswith("step_")]
        return sorted(int(number) for number in numbers if number.isdigit())

    def checkpoint_path(self, step):
        """The folder of the checkpoint of a step."""
        return self.path / "checkpoints" / f"step_{step}"

    def save_checkpoint(self, step, tensors, state):
        """Write a checkpoint: `tensors` maps a file's stem to {name: tensor}, `state` is for state.json.

        Afterwards the whole checkpoint is there, or after a full disk or a killed process all that was there before.
        Older checkpoints stay until `drop_old_checkpoints`.
        Returns its size in bytes; raises OSError where it cannot be written.
        """
        final = self.checkpoint_path(step)
        try:
            # It replaces one that is there where a run was stopped at a step that it had saved already.
            with written_beside(final, replace=True) as folder:
                folder.mkdir()
                for stem, values in tensors.items():
                    write_tensors(folder / f"{stem}.safetensors", values)
                sums = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
                write_json(folder / "state.json", {**state, "step": step, "sha256": sums})
                size = sum(file.stat().st_size for file in folder.iterdir())
            sync(final.parent)
        except OSError as error:
            older = self.checkpoints()
            kept = f"the checkpoint of step {older[-1]} is whole" if older else "no checkpoint was there before"
            reason = error.reason if isinstance(error, WriteError) else error.strerror or error
            raise OSError(f"cannot write the checkpoint of step {step} to {final.parent}: {reason}; {kept}") from None
        return size

    def newest_state(self, needed=()):
        """(step, state.json) of the newest checkpoint; (0, None) where there is none. `needed` as of `load_state`."""
        steps = self.checkpoints()
        return (steps[-1], self.load_state(steps[-1], needed)) if steps else (0, None)

    def load_state(self, step, needed=()):
        """state.json of a checkpoint, with the counters `needed`.

        Raises ValueError in one line where it is missing, damaged or of another shape.
        """

        def read(file):
            state = records.parse("state.json", records.read_bytes(file))
            if state["step"] != step:
                raise records.Damaged(f"step is {state['step']}, not {step} as the folder's name says")
            missing = [name for name in needed if state.get(name) is None]
            if missing:
                raise records.Damaged(f"{missing[0]} is missing")
            return state

        return self._readable(self.checkpoint_path(step) / "state.json", read)

    def load_tensors(self, step, stem):
        """{name: tensor} of one file of a checkpoint, on the CPU, compared with its sum where the checkpoint has one.

        Raises ValueError in one line where it is missing or damaged.
        """

        def read(file):
            check_sum(file)
            return _read_tensors(file)

        return self._readable(self.checkpoint_path(step) / f"{stem}.safetensors", read)

    def save_bridge(self, bridge):
        """Write the `Bridge` of a run with a target. Raises OSError that names the file it cannot write."""
        write_tensors(self.path / BRIDGE, bridge.tensors())

    def bridge(self):
        """The `Bridge` of a run with a target, None where none was found yet.

        Raises ValueError in one line where it is damaged, not of the run's target, or missing beside a checkpoint.
        """
        file = self.path / BRIDGE
        if not file.exists():
            if self.checkpoints():
                raise ValueError(f"run {str(self.path)!r}: has no {BRIDGE}; its copy is not whole")
            return None
        config, advice = self.config(), "train the run again in another folder"

        def read(file):
            bridge = Bridge.of_tensors(_read_tensors(file))
            if (len(bridge.mean), len(bridge.levels)) != (config.target.dim, config.nfe + 1):
                raise ValueError("it is of another target or of other layers")
            return bridge

        return _readable(f"run file {file}", file, read, advice)

    def best_checkpoint(self):
        """(step, metric) of the checkpoint with the lowest metric, or None where none was measured."""
        best = None
        for step in self.checkpoints():
            metric = records.finite(self._known(step).get("metric"))
            if metric is not None and (best is None or metric < best[1]):
                best = step, metric
        return best

    def start_checkpoint(self):
        """The step of the checkpoint at the end of the run's start, or None."""
        return next((step for step in self.checkpoints() if self._known(step).get("start")), None)

    def _known(self, step):
        """state.json of a checkpoint, empty where it is not readable."""
        try:
            return self.load_state(step)
        except ValueError:
            return {}

    def _readable(self, file, read):
        return _readable(f"checkpoint {file}", file, read, f"delete {file.parent} to go on from an older one")

    def drop_old_checkpoints(self):
        """Delete all but the last two checkpoints, the best, and that of the end of the start.

        One that was written because the run was stopped does not count among these, and stays while it is the newest:
        the run that went on keeps what it would have kept without the stop.
        """
        steps, best = self.checkpoints(), self.best_checkpoint()
        scheduled = [step for step in steps if not self._known(step).get("stopped")]
        ends_of_start = [step for step in steps if self._known(step).get("start")]
        kept = {*scheduled[-CHECKPOINTS_KEPT:], *steps[-1:], *ends_of_start}
        if best is not None:
            kept.add(best[0])
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.checkpoint_path(step), ignore_errors=True)


def _read_tensors(file):
    records.check_regular(file)
    with open(file, "rb"):  # safetensors calls a file that may not be read a missing one
        pass
    return load_file(file)


def _readable(what, file, read, advice):
    """read(file), with one line for whatever may be wrong with the file."""
    try:
        return read(file)
    except FileNotFoundError:
        raise ValueError(f"{what}: missing; {advice}") from None
    except records.Damaged as damage:
        raise ValueError(f"{what}: {damage.told(advice)}") from None
    except OSError as error:
        told = records.Unreadable(error.strerror or error).told(advice)
        raise ValueError(f"{what}: {told}") from None
    except (ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: damaged ({reason}); {advice}") from None


def _write_config(path, config, sums):
    write_json(path / "inputs.json", sums)
    write_atomically(path / "config.yaml", resolved_yaml(config).encode())


def check_sum(file):
    """Raise `Damaged` where a file of a checkpoint has not the sum that state.json beside it has, if that has one."""
    file = Path(file)
    with contextlib.suppress(FileNotFoundError):
        state = records.parse("state.json", records.read_bytes(file.with_name("state.json")))
        wanted = (state.get("sha256") or {}).get(file.name)
        if wanted is not None and wanted != file_sha256(file):
            raise records.Damaged("its sha256 is not the one that state.json has")


@contextlib.contextmanager
def _held(path):
    """Hold a folder for one training process; ValueError where another one has it."""
    try:
        # Not blocking: a pipe of that name would wait for ever. No link: it would be made where that leads.
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
        file = open(os.open(path / LOCK, flags, 0o666), "rb+", buffering=0)
    except OSError as error:
        raise OSError(f"cannot write {path / LOCK}: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"outdir {str(path)!r}: another process is training there") from None
        yield


def _may_go_on(before, now):
    """`before` with what may change when a run goes on taken from `now`.

    That is more steps, how many processes do the work and how, what is shown of it, and the length of a teacher's
    training, whose rate follows the new one.
    """
    before = {
        **before,
        "distributed": now["distributed"],
        "log": now["log"],
        "teacher_train": {**before["teacher_train"], "steps": now["teacher_train"]["steps"]},
    }
    if now["train"]["steps"] > before["train"]["steps"]:
        before["train"] = {**before["train"], "steps": now["train"]["steps"]}
    return before

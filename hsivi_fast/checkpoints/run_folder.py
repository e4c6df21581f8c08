"""A run's folder: its files, and checkpoints that a killed process or a full disk cannot harm.

config.yaml, environment.json, results.json, report.html, tensorboard/
samples/               pictures; step_XXXXXXX.png are those of the training
metrics.jsonl          one record per log step
saves.jsonl            what each checkpoint took: seconds, bytes
wandb.json             the run's id at Weights & Biases, where log.wandb is set
checkpoints/step_N/    state.json and safetensors files; the last two checkpoints and the best are kept
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import config_difference, config_from_dict, read_resolved, resolved_dict, resolved_yaml
from .files import as_written, sync, write_atomically, written_beside

CHECKPOINTS_KEPT = 2  # besides the best


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
        """Create the folder, or take it up again if it holds a run of the same configuration.

        In a run that goes on, train.steps may have grown, and `distributed`, `log` and teacher_train.steps may differ.
        Raises ValueError where the path is a file, the folder holds something else, the configuration differs, or
        `fresh` was asked for and a run is there.
        """
        path = as_written(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"outdir {str(path)!r}: is a file; give a folder")
        holds_run, steps_before = (path / "config.yaml").is_file(), None
        if fresh and holds_run:
            raise ValueError(f"outdir {str(path)!r}: holds a run already and --fresh was given; choose another folder")
        if holds_run:
            before = resolved_dict(cls(path).config())  # keys that are newer than the run have their defaults
            now, steps_before = resolved_dict(config), before["train"]["steps"]
            difference = config_difference(_may_go_on(before, now), now)
            if difference:
                raise ValueError(
                    f"outdir {str(path)!r}: its run has {difference}; when a run goes on, only train.steps may grow, "
                    "distributed.*, log.* and teacher_train.steps change"
                )
        elif path.is_dir() and any(path.iterdir()):
            raise ValueError(f"outdir {str(path)!r}: is not empty and holds no run; choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.yaml", resolved_yaml(config).encode())
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "samples").mkdir(exist_ok=True)
        folder = cls(path)
        folder.steps_before = steps_before
        return folder

    @contextlib.contextmanager
    def locked(self):
        """Hold the folder for one training process; ValueError where another one has it."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"outdir {str(self.path)!r}: another process is training there") from None
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
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, name, default=None):
        """The value of a JSON file of the folder, `default` where there is none; ValueError where it is damaged."""
        file = self.path / name
        if not file.is_file():
            return default
        try:
            return json.loads(file.read_text())
        except ValueError:
            raise ValueError(f"{file}: not readable as JSON; delete it and run the command again") from None

    def append(self, name, record):
        """Add one record to metrics.jsonl or saves.jsonl. Raises OSError that names the file it cannot write."""
        try:
            with open(self.path / name, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {self.path / name}: {error.strerror or error}") from None

    def metrics(self):
        """All records of metrics.jsonl; a last line that a killed process left half written is skipped."""
        file = self.path / "metrics.jsonl"
        records = []
        for line in file.read_text().splitlines() if file.is_file() else []:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def forget_metrics_after(self, step):
        """Drop the records of steps that will be trained again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())

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
                    on_cpu = {name: value.detach().cpu().contiguous() for name, value in values.items()}
                    save_file(on_cpu, folder / f"{stem}.safetensors")
                (folder / "state.json").write_text(json.dumps({**state, "step": step}, indent=1) + "\n")
                size = sum(file.stat().st_size for file in folder.iterdir())
            sync(final.parent)
        except (OSError, SafetensorError) as error:
            older = self.checkpoints()
            kept = f"the checkpoint of step {older[-1]} is whole" if older else "no checkpoint was there before"
            raise OSError(f"cannot write the checkpoint of step {step} to {final.parent}: {error}; {kept}") from None
        return size

    def newest_state(self):
        """(step, state.json) of the newest checkpoint; (0, None) where there is none."""
        steps = self.checkpoints()
        return (steps[-1], self.load_state(steps[-1])) if steps else (0, None)

    def load_state(self, step):
        """state.json of a checkpoint; ValueError in one line where it is missing or damaged."""
        return self._readable(self.checkpoint_path(step) / "state.json", lambda file: json.loads(file.read_text()))

    def load_tensors(self, step, stem):
        """{name: tensor} of one file of a checkpoint, on the CPU.

        Raises ValueError in one line where it is missing or damaged.
        """
        return self._readable(self.checkpoint_path(step) / f"{stem}.safetensors", load_file)

    def best_checkpoint(self):
        """(step, metric) of the checkpoint with the lowest metric, or None where none was measured."""
        best = None
        for step in self.checkpoints():
            metric = self._metric(step)
            if metric is not None and (best is None or metric < best[1]):
                best = step, metric
        return best

    def _metric(self, step):
        try:
            return self.load_state(step).get("metric")
        except ValueError:
            return None

    def _readable(self, file, read):
        try:
            return read(file)
        except FileNotFoundError:
            raise ValueError(f"checkpoint {file}: missing; delete {file.parent} to go on from an older one") from None
        except (ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"checkpoint {file}: damaged ({reason}); delete {file.parent} to go on from an older one"
            ) from None

    def drop_old_checkpoints(self):
        """Delete all but the last two checkpoints and the best."""
        best = self.best_checkpoint()
        kept = set(self.checkpoints()[-CHECKPOINTS_KEPT:])
        if best is not None:
            kept.add(best[0])
        for step in self.checkpoints():
            if step not in kept:
                shutil.rmtree(self.checkpoint_path(step), ignore_errors=True)


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

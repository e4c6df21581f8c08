"""A run's folder: its files, and checkpoints that a killed process or a full disk cannot harm.

config.yaml, environment.json, results.json, report.html, tensorboard/
samples/               pictures; step_XXXXXXX.png are those of the training
metrics.jsonl          one record per log step
saves.jsonl            what each checkpoint took: seconds, bytes
wandb.json             the run's id at Weights & Biases, where log.wandb is set
checkpoints/step_N/    state.json and safetensors files; written beside and renamed; the last two and the best are kept
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

CHECKPOINTS_KEPT = 2  # besides the best


class RunFolder(os.PathLike):
    """The folder of one run. Use `start` to train in it and `RunFolder(path)` to read it."""

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
        """Create the folder, or take it up again if it holds a run of the same configuration (train.steps may have grown, `distributed`, `log` and teacher_train.steps may differ).

        Raises ValueError where the path is a file, the folder holds something else, the configuration differs, or `fresh`
        was asked for and a run is there.
        """
        from ..config import resolved_dict, resolved_yaml

        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"outdir {str(path)!r}: is a file; give a folder")
        holds_run = (path / "config.yaml").is_file()
        if fresh and holds_run:
            raise ValueError(f"outdir {str(path)!r}: holds a run already and --fresh was given; choose another folder")
        if holds_run:
            before, now = (
                resolved_dict(cls(path).config()),
                resolved_dict(config),
            )  # keys that are newer than the run have their defaults
            difference = config_difference(_may_go_on(before, now), now)
            if difference:
                raise ValueError(
                    f"outdir {str(path)!r}: its run has {difference}; when a run goes on, only train.steps may grow, distributed.*, log.* and teacher_train.steps change"
                )
        elif path.is_dir() and any(path.iterdir()):
            raise ValueError(f"outdir {str(path)!r}: is not empty and holds no run; choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        _write_atomically(path / "config.yaml", resolved_yaml(config).encode())
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "samples").mkdir(exist_ok=True)
        return cls(path)

    @contextlib.contextmanager
    def locked(self):
        """Hold the folder for one training process; ValueError where another one has it."""
        import fcntl

        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"outdir {str(self.path)!r}: another process is training there") from None
            yield

    def config_dict(self):
        """The resolved configuration as plain values."""
        from omegaconf import OmegaConf

        try:
            return OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))
        except Exception as error:
            raise ValueError(
                f"run {str(self.path)!r}: config.yaml is not readable: {' '.join(str(error).split())}"
            ) from None

    def config(self):
        """The resolved configuration, checked."""
        from ..config import config_from_dict

        return config_from_dict(self.config_dict())

    # Small files

    def write(self, name, data):
        """Write the bytes of a picture or a page, atomically. Raises OSError that names the file where the disk is full."""
        _write_atomically(self.path / name, data)

    def write_json(self, name, value):
        """Write results.json and the like, atomically."""
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, name, default=None):
        """Read a JSON file of the folder, or `default` where there is none."""
        file = self.path / name
        if not file.is_file():
            return default
        try:
            return json.loads(file.read_text())
        except ValueError:
            raise ValueError(f"{file}: not readable as JSON; delete it and run the command again") from None

    def append(self, name, record):
        """Add one record to metrics.jsonl or saves.jsonl."""
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
        return sorted(
            int(name.removeprefix("step_"))
            for name in names
            if name.startswith("step_") and name.removeprefix("step_").isdigit()
        )

    def checkpoint_path(self, step):
        """The folder of the checkpoint of a step."""
        return self.path / "checkpoints" / f"step_{step}"

    def save_checkpoint(self, step, tensors, state):
        """Write a checkpoint: `tensors` maps a file's stem to {name: tensor}, `state` is for state.json.

        Either the whole checkpoint is there afterwards, or (full disk, killed process) everything that was there before; older ones stay until
        `drop_old_checkpoints`. Returns its size in bytes; raises OSError where it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        final = self.checkpoint_path(step)
        beside = final.with_name(f".{final.name}.unfinished")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir()
            for stem, values in tensors.items():
                save_file(
                    {name: value.detach().cpu().contiguous() for name, value in values.items()},
                    beside / f"{stem}.safetensors",
                )
            (beside / "state.json").write_text(json.dumps({**state, "step": step}, indent=1) + "\n")
            size = sum(file.stat().st_size for file in beside.iterdir())
            for file in beside.iterdir():
                _sync(file)
            if final.exists():  # a run that was stopped at a step that it had saved already
                shutil.rmtree(final)
            beside.rename(final)
            _sync(final.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            older = self.checkpoints()
            kept = f"the checkpoint of step {older[-1]} is whole" if older else "no checkpoint was there before"
            raise OSError(f"cannot write the checkpoint of step {step} to {final.parent}: {error}; {kept}") from None
        return size

    def newest_state(self):
        """(step, state.json) of the newest checkpoint; (0, None) where there is none."""
        steps = self.checkpoints()
        return (steps[-1], self.load_state(steps[-1])) if steps else (0, None)

    def load_state(self, step):
        """state.json of a checkpoint."""
        return self._readable(self.checkpoint_path(step) / "state.json", lambda file: json.loads(file.read_text()))

    def load_tensors(self, step, stem):
        """{name: tensor} of one file of a checkpoint, on the CPU; ValueError in one line where it is missing or damaged."""
        from safetensors.torch import load_file

        return self._readable(self.checkpoint_path(step) / f"{stem}.safetensors", load_file)

    def best_checkpoint(self):
        """(step, metric) of the checkpoint with the lowest metric, or None where none was measured."""
        measured = [
            (state["metric"], step)
            for step in self.checkpoints()
            if (state := self._metric_state(step)).get("metric") is not None
        ]
        return (min(measured)[1], min(measured)[0]) if measured else None

    def _metric_state(self, step):
        try:
            return self.load_state(step)
        except ValueError:
            return {}

    def _readable(self, file, read):
        from safetensors import SafetensorError

        try:
            return read(file)
        except FileNotFoundError:
            raise ValueError(f"checkpoint {file}: missing; delete {file.parent} to go on from an older one") from None
        except (ValueError, SafetensorError) as error:
            raise ValueError(
                f"checkpoint {file}: damaged ({' '.join(str(error).split())}); delete {file.parent} to go on from an older one"
            ) from None

    def drop_old_checkpoints(self):
        """Delete all but the last two checkpoints and the best."""
        best = self.best_checkpoint()
        kept = set(self.checkpoints()[-CHECKPOINTS_KEPT:]) | ({best[0]} if best else set())
        for step in self.checkpoints():
            if step not in kept:
                shutil.rmtree(self.checkpoint_path(step), ignore_errors=True)


def _write_atomically(file, data):
    beside = file.with_name(f".{file.name}.unfinished")
    try:
        beside.write_bytes(data)
        _sync(beside)
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {file}: {error.strerror or error}") from None


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def config_difference(before, now, prefix=""):
    """The first key in which two resolved configurations differ, in words, the value of `before` first; None where they agree."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            difference = config_difference(old, new, f"{prefix}{key}.")
            if difference:
                return difference
        elif old != new:
            return f"{prefix}{key} = {old!r}, not {new!r}"
    return None


def _may_go_on(before, now):
    """`before` with what may change when a run goes on taken from `now`: more steps, how many processes do the work and how, what is shown of it, and how long a
    teacher's schedule is (its rate follows the new one)."""
    before = {
        **before,
        "distributed": now["distributed"],
        "log": now["log"],
        "teacher_train": {**before["teacher_train"], "steps": now["teacher_train"]["steps"]},
    }
    if now["train"]["steps"] > before["train"]["steps"]:
        before["train"] = {**before["train"], "steps": now["train"]["steps"]}
    return before

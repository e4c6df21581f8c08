"""What a training leaves for the eye: bar, metrics.jsonl, TensorBoard, Weights & Biases, and pictures on the way."""

import contextlib
import io
import secrets
import sys
import time

import numpy as np
import torch
from PIL import Image

from .. import ops
from ..build import checkpoint_to_start_from
from ..config import phases_of, resolved_dict, without_passwords
from ..data import to_uint8
from ..report.figures import image_grid, log_gamma_picture
from .telemetry import GpuMonitor

TRAINED = ("loss_start", "loss_score_net")  # one of them is noted at every step, with all of its images


def check_journal(config):
    """ValueError where the configuration asks for Weights & Biases and its package is missing.

    Asked before a training has cost anything.
    """
    if config.log.wandb is not None and _wandb() is None:
        needed = f"{config.log.wandb!r} needs the package wandb, which is not installed"
        raise ValueError(f"log.wandb: {needed}; pip install wandb")


def pictures_due(config, step, measured):
    """Whether a step ends with pictures; measured: whether it ends with a measurement.

    By the configuration and the step alone: all ranks have to agree.
    """
    if config.log.images_every:
        return step % config.log.images_every == 0 or step == phases_of(config).total
    ends_with_table = config.eval.num_samples > 0 and step == phases_of(config).total  # which is a measurement too
    return measured or ends_with_table


class Journal:
    """The progress bar, metrics.jsonl, TensorBoard and Weights & Biases of a run.

    Losses are summed on the device between log steps, and averaged over ranks there.
    """

    def __init__(self, context, folder, progress):
        self.context, self.folder, self.progress = context, folder, progress
        self.config, self.execution, self.world = context.config, context.execution, context.world
        self.sums, self.counts = {}, {}
        self.bar = self.tensorboard = self.wandb = self.gpu = None

    def __enter__(self):
        return self

    def start(self, step, state=None):
        """Take up the records at a step, and open the bar and the writers there; state: that of its checkpoint."""
        self.prepared, self.drawing, self.measuring, self.images = self.execution.seconds, 0.0, 0.0, 0
        for name, (total, count) in ((state or {}).get("losses") or {}).items():
            self.sums[name] = torch.tensor(total if self.world.is_main else 0.0, device=self.context.device)
            self.counts[name] = count
        if not self.world.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second, and only a training writes there
        from tqdm import tqdm  # here: the other ranks draw no bar

        self.folder.forget_metrics_after(step)
        self._take_up_saves(step, stopped=(state or {}).get("stopped", False))
        self.seconds = max((record.get("seconds", 0.0) for record in self.folder.metrics()), default=0.0)
        total = phases_of(self.config).total
        if self.progress:
            tqdm.write(self._opening(step), file=sys.stderr)
        if self._rates_differ(step):
            rule, before = self.config.train.lr_rule, self.folder.steps_before
            grew = f"which grew from {before} to {self.config.train.steps}"
            warning = f"warning: rates of lr_rule {rule} fall over train.steps, {grew}"
            tqdm.write(f"{warning}: this is not the run that was long from the start", file=sys.stderr)
        self.bar = tqdm(
            total=total,
            initial=step,
            desc=f"train {self.config.name}",
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
        )
        self.tensorboard = SummaryWriter(self.folder.path / "tensorboard", purge_step=step + 1)
        if self.config.log.wandb is not None:
            self.wandb = WandbRun(self.folder, self.config, self.bar.write)
        self.gpu = GpuMonitor(self.context.device)
        self.logged_time = time.perf_counter()

    def _take_up_saves(self, step, stopped):
        """Make saves.jsonl that of a run which was neither stopped nor killed."""
        self.folder.forget_after("saves.jsonl", step - 1 if stopped else step)
        if step and not stopped and step not in [record["step"] for record in self.folder.read_lines("saves.jsonl")]:
            size = sum(file.stat().st_size for file in self.folder.checkpoint_path(step).iterdir())
            self.folder.append("saves.jsonl", {"step": step, "seconds": None, "bytes": size})

    @contextlib.contextmanager
    def bar_of(self, what, evaluations):
        """A bar of its own for what precedes the first step, where that takes more than 5 seconds.

        evaluations: of a network, by this rank. It gives what has to be called with the samples of each evaluation.
        """
        from tqdm import tqdm  # here: as in `start`

        shown = {"desc": what, "unit": "evaluation", "unit_scale": True, "dynamic_ncols": True, "leave": False}
        with tqdm(total=evaluations, disable=not self.progress, delay=5, **shown) as bar:
            yield bar.update

    def _opening(self, step):
        """The line above the bar: what runs where."""
        backend = self.context.backend
        interpreted = " (interpreted)" if backend == "triton" and ops.triton_is_interpreted() else ""
        total = phases_of(self.config).total
        going_on = f", going on from step {step} of {total}" if step else ""
        if step == total:
            going_on = f", trained already to step {step}"
        elif not step and self.config.init is not None:
            going_on = f", starting from {checkpoint_to_start_from(self.config)[1]}"
        place = f"device {self.context.device}, run folder {self.folder.path}"
        return f"backend {backend}{interpreted}, {place}{going_on}"

    def _rates_differ(self, step):
        """Whether a run that was made longer has had other learning rates than one that was long from the start."""
        settings, before = self.config.train, self.folder.steps_before
        grown = before is not None and before < settings.steps
        return bool(step) and grown and settings.lr_rule in ("cosine", "linear")

    def add(self, name, losses):
        """Add the mean of losses [B] to what the next log step reports."""
        mean = losses.detach().mean()
        if name in TRAINED:
            self.images += len(losses) * self.world.size
        self.sums[name] = self.sums[name] + mean if name in self.sums else mean
        self.counts[name] = self.counts.get(name, 0) + self.world.size

    def losses(self):
        """{name: (sum, how many)} since the last record, over all ranks: what a run that is stopped goes on with."""
        sums = {name: float(self.world.sum(total.clone())) for name, total in self.sums.items()}
        return {name: (total, self.counts[name]) for name, total in sums.items()}

    def log(self, step, student_lr, score_net_lr, metric):
        """Write one record; the host waits for the device here, and the ranks for each other."""
        means = {name: float(self.world.sum(total)) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        if not self.world.is_main:
            return
        now = time.perf_counter()
        elapsed, images = now - self.logged_time, self.images
        self.seconds += elapsed
        # Compiling and recording are not the speed of training.
        preparing = self.execution.seconds - self.prepared
        training = elapsed - preparing - self.drawing - self.measuring
        record = {
            "step": step,
            "loss_student": means.get("loss_student"),
            "loss_score_net": means.get("loss_score_net"),
            **{name: means[name] for name in ("loss_start", "loss_teacher") if name in means},
            "student_lr": student_lr,
            "score_net_lr": score_net_lr,
            "images_per_second": images / training if training > 0 else None,
            "seconds": self.seconds,
        }
        if preparing:
            record["preparing_seconds"] = preparing
        if self.measuring:
            record["measuring_seconds"] = self.measuring
        record.update(self.gpu.record(images / self.world.size))  # of this rank's GPU, and its share of the images
        if metric is not None:
            record["metric"] = metric
        self.folder.append("metrics.jsonl", record)
        scalars = {name: value for name, value in record.items() if name != "step" and value is not None}
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(step, scalars)
        names = {"start": "loss_start", "f": "loss_score_net", "f's start": "loss_teacher", "student": "loss_student"}
        shown = {title: means.get(name) for title, name in names.items()} | {"distance (1 set)": metric}
        if preparing >= 1 and self.progress:
            took = f"compiling and recording took {preparing:.0f} s of {elapsed:.0f} s"
            self.bar.write(f"step {step}: {took}", file=sys.stderr)
        postfix = {name: f"{value:.3g}" for name, value in shown.items() if value is not None}
        self.bar.set_postfix(postfix, refresh=False)
        self.logged_time, self.prepared, self.images = now, preparing + self.prepared, 0
        self.drawing = self.measuring = 0.0

    @contextlib.contextmanager
    def measurement(self):
        """Around measuring the student, a time that is kept out of the rate and recorded by itself."""
        began, prepared = time.perf_counter(), self.execution.seconds
        yield
        self.measuring += time.perf_counter() - began - (self.execution.seconds - prepared)

    def show(self, step, samples, log_gamma, began):
        """Write pictures of the averaged student: samples/step_XXXXXXX.png, and both to TensorBoard and W&B.

        samples: images [N, C, H, W] in -1 .. 1 of fixed seeds, or points [N, 2], which are not shown.
        log_gamma: as of `Layers`; began: when sampling them began (`time.perf_counter()`), a time that is kept out of
        the rate.
        """
        if not self.world.is_main:
            return
        gamma = self.config.gamma
        pictures = {"log_gamma": log_gamma_picture(log_gamma.detach().cpu().numpy(), gamma.per_step, gamma.per_pixel)}
        if samples.ndim == 4:
            pictures["samples"] = image_grid(to_uint8(samples).cpu().numpy())
            self.folder.write(f"samples/step_{step:07d}.png", pictures["samples"])
        arrays = {name: _pixels(png) for name, png in pictures.items()}
        for name, pixels in arrays.items():
            self.tensorboard.add_image(name, pixels, step, dataformats="HWC")
        if self.wandb:
            self.wandb.show(step, arrays)
        self.drawing += time.perf_counter() - began

    def saved(self, step, seconds, size):
        """Note in saves.jsonl what a checkpoint of a step took, and on the terminal where it took long."""
        if self.world.is_main:
            self.folder.append("saves.jsonl", {"step": step, "seconds": seconds, "bytes": size})
        if seconds >= 1 and self.progress:
            self.bar.write(f"step {step}: saving {size / 1e6:.0f} MB took {seconds:.1f} s", file=sys.stderr)

    def advance(self, step):
        """Move the bar."""
        if self.world.is_main:
            self.bar.update(step - self.bar.n)

    def __exit__(self, kind, *exception):
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.gpu is not None:
            self.gpu.stop()
        if self.wandb is not None:
            self.wandb.finish(failed=kind is not None)


class WandbRun:
    """A run at Weights & Biases, whose name there (wandb.json in the run's folder) a resumed run takes up again.

    Trouble there (no network, no account, a full quota) is told once by `warn(line, file)`. From then on nothing is
    sent, and training goes on.
    """

    def __init__(self, folder, config, warn):
        self.warn, self.run, self.broken = warn, None, False
        name = folder.read_json("wandb.json", {})
        if name.get("project") != config.log.wandb:
            name = {"project": config.log.wandb, "id": secrets.token_hex(4)}
            folder.write_json("wandb.json", name)
        self._try(lambda: self._open(name, folder, config))

    def log(self, step, scalars):
        """Send numbers of a step."""
        self._try(lambda: self.run.log({"step": step, **scalars}))

    def show(self, step, pictures):
        """Send pictures of a step, {name: uint8 [H, W, 3]}."""
        self._try(lambda: self.run.log({"step": step, **_as_wandb_images(pictures)}))

    def finish(self, failed):
        """Send what is left, and how it ended."""
        self._try(lambda: self.run.finish(exit_code=int(failed)))

    def _open(self, name, folder, config):
        self.run = _wandb().init(
            project=name["project"],
            id=name["id"],
            resume="allow",
            name=config.name,
            dir=str(folder.path),
            config=without_passwords(resolved_dict(config)),
        )
        # Our own step on all x axes: wandb's may only grow, and a resumed run repeats the steps since its checkpoint.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _try(self, call):
        if self.broken:
            return
        try:
            call()
        except Exception as error:
            # Whatever its client, its network layer and its service raise: none of it is the training's affair.
            self.broken = True
            reason = " ".join(str(error).split())
            self.warn(f"warning: Weights & Biases: {reason}; nothing more is sent there", sys.stderr)


def _as_wandb_images(pictures):
    return {name: _wandb().Image(pixels) for name, pixels in pictures.items()}


def _wandb():
    """The package, or None where there is none."""
    try:
        import wandb  # here: it is optional
    except ImportError:
        return None
    # A folder `wandb` where the command runs, which offline runs leave, is importable too.
    return wandb if hasattr(wandb, "init") else None


def _pixels(png):
    """uint8 [H, W, 3] of a picture's bytes."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

"""What a training leaves for the eye: its bar, metrics.jsonl, TensorBoard, Weights & Biases where it is asked for, and pictures on the way."""

import io
import secrets
import sys
import time

from .. import ops
from ..config import resolved_dict
from ..data import to_uint8
from ..parallel.world import ALONE
from .telemetry import GpuMonitor


def check_journal(config):
    """ValueError where the configuration asks for Weights & Biases and its package is missing; before a training has cost anything."""
    if config.log.wandb is not None and _wandb() is None:
        raise ValueError(
            f"log.wandb: {config.log.wandb!r} needs the package wandb, which is not installed; pip install wandb"
        )


def pictures_due(config, step, measured):
    """Whether a step ends with pictures; measured: whether it ends with a measurement. By the configuration and the step alone: all ranks have to agree."""
    if config.log.images_every:
        return step % config.log.images_every == 0 or step == config.train.steps
    return (
        measured or config.eval.num_samples > 0 and step == config.train.steps
    )  # the final table is a measurement too


class Journal:
    """The progress bar, metrics.jsonl, TensorBoard and Weights & Biases of a run. Losses are summed on the device between log steps, and averaged over ranks there."""

    def __init__(self, folder, config, execution, progress, world=ALONE):
        self.folder, self.config, self.execution, self.progress, self.world = folder, config, execution, progress, world
        self.sums, self.counts = {}, {}

    def __enter__(self):
        return self

    def start(self, step, backend, device):
        """Take up the records at a step, and open the bar and the writers there."""
        self.logged_step, self.prepared, self.drawing = step, self.execution.seconds, 0.0
        if not self.world.first:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.folder.forget_metrics_after(step)
        self.seconds = max((record["seconds"] for record in self.folder.metrics()), default=0.0)
        total = self.config.train.steps
        if self.progress:
            tqdm.write(
                f"backend {backend}{' (interpreted)' if backend == 'triton' and ops.triton_is_interpreted() else ''}, device {device}, run folder {self.folder.path}"
                + (f", going on from step {step} of {total}" if step else ""),
                file=sys.stderr,
            )
        self.bar = tqdm(
            total=total,
            initial=step,
            desc=f"train {self.config.name}",
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
        )
        self.tensorboard = SummaryWriter(self.folder.path / "tensorboard", purge_step=step + 1)
        self.wandb = WandbRun(self.folder, self.config, self.bar.write) if self.config.log.wandb is not None else None
        self.gpu = GpuMonitor(device)
        self.logged_time = time.perf_counter()

    def add(self, name, losses):
        """Add the mean of losses [B] to what the next log step reports."""
        mean = losses.detach().mean()
        self.sums[name] = self.sums[name] + mean if name in self.sums else mean
        self.counts[name] = self.counts.get(name, 0) + 1

    def log(self, step, student_lr, score_net_lr, metric):
        """Write one record; the host waits for the device here, and the ranks for each other."""
        means = {
            name: float(self.world.sum(total)) / (self.counts[name] * self.world.size)
            for name, total in self.sums.items()
        }
        self.sums, self.counts = {}, {}
        if not self.world.first:
            return
        now = time.perf_counter()
        elapsed, images = now - self.logged_time, (step - self.logged_step) * self.config.train.batch_size
        self.seconds += elapsed
        preparing = (
            self.execution.seconds - self.prepared
        )  # compiling and recording, which are not the speed of training
        training = elapsed - preparing - self.drawing
        record = {
            "step": step,
            "loss_student": means.get("loss_student"),
            "loss_score_net": means.get("loss_score_net"),
            "student_lr": student_lr,
            "score_net_lr": score_net_lr,
            "images_per_second": images / training if training > 0 else None,
            "seconds": self.seconds,
        }
        if preparing:
            record["preparing_seconds"] = preparing
        record.update(self.gpu.record(images / self.world.size))  # of this rank's GPU, and its share of the images
        if metric is not None:
            record["metric"] = metric
        self.folder.append("metrics.jsonl", record)
        scalars = {name: value for name, value in record.items() if name != "step" and value is not None}
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(step, scalars)
        shown = {"f": means.get("loss_score_net"), "student": means.get("loss_student"), "distance": metric}
        if preparing >= 1 and self.progress:
            self.bar.write(
                f"step {step}: compiling and recording took {preparing:.0f} s of {elapsed:.0f} s", file=sys.stderr
            )
        self.bar.set_postfix(
            {name: f"{value:.3g}" for name, value in shown.items() if value is not None}, refresh=False
        )
        self.logged_step, self.logged_time, self.prepared, self.drawing = step, now, preparing + self.prepared, 0.0

    def show(self, step, samples, log_gamma, began):
        """Write pictures of the averaged student: samples/step_XXXXXXX.png, and both to TensorBoard and Weights & Biases.

        samples: images [N, C, H, W] in -1 .. 1 of fixed seeds, or points [N, 2], which are not shown; log_gamma: as of `Layer`; began: when sampling them began (`time.perf_counter()`): the time is kept out of the rate.
        """
        if not self.world.first:
            return
        from ..report.figures import image_grid, log_gamma_picture

        pictures = {
            "log_gamma": log_gamma_picture(
                log_gamma.detach().cpu().numpy(), self.config.gamma.per_step, self.config.gamma.per_pixel
            )
        }
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
        """Note that a checkpoint of a step took so many seconds and bytes: in saves.jsonl, and on the terminal where it is worth a line."""
        if self.world.first:
            self.folder.append("saves.jsonl", {"step": step, "seconds": seconds, "bytes": size})
        if seconds >= 1 and self.progress:
            self.bar.write(f"step {step}: saving {size / 1e6:.0f} MB took {seconds:.1f} s", file=sys.stderr)

    def advance(self, step):
        """Move the bar."""
        if self.world.first:
            self.bar.update(step - self.bar.n)

    def __exit__(self, kind, *exception):
        if hasattr(self, "bar"):
            self.bar.close()
        if hasattr(self, "tensorboard"):
            self.tensorboard.close()
        if hasattr(self, "gpu"):
            self.gpu.stop()
        if getattr(self, "wandb", None):
            self.wandb.finish(failed=kind is not None)


class WandbRun:
    """A run at Weights & Biases, whose name there (wandb.json in the run's folder) a resumed run takes up again.

    Trouble there (no network, no account, a full quota) is told once by `warn(line, file)`; from then on nothing is sent, and training goes on.
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
        self._try(
            lambda: self.run.log({"step": step, **{name: _wandb().Image(pixels) for name, pixels in pictures.items()}})
        )

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
            config=resolved_dict(config),
        )
        # Our own step on all x axes: wandb's may only grow, and a resumed run repeats the steps since its checkpoint.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _try(self, call):
        if self.broken:
            return
        try:
            call()
        except (
            Exception
        ) as error:  # whatever its client, its network layer and its service raise: none of it is the training's affair
            self.broken = True
            self.warn(
                f"warning: Weights & Biases: {' '.join(str(error).split())}; nothing more is sent there", sys.stderr
            )


def _wandb():
    """The package, or None where there is none."""
    try:
        import wandb
    except ImportError:
        return None
    return (
        wandb if hasattr(wandb, "init") else None
    )  # a folder `wandb` where the command runs, which offline runs leave, is importable too


def _pixels(png):
    """uint8 [H, W, 3] of a picture's bytes."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

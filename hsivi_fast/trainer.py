"""Distillation: train(config) from a frozen teacher to a few-step student. Read it from `train` down.

With several processes every rank runs this same code on its part of each batch (see distributed.py); what is read, written or shown is rank 0's.
"""

import contextlib
import sys
import time
from pathlib import Path

import torch

from . import ops
from .distributed import ALONE, connect, processes, refuse_strangers
from .engine import build_engine, check_distribution
from .evaluation import build_metric, final_table, measure_row
from .frozen import EAGER
from .interrupt import Interrupted, StopRequest
from .method.losses import score_net_loss_and_grads, student_loss_and_grads
from .models import build_execution, build_layer, build_score_net, build_student, load_teacher, prepare_device
from .optim import learning_rate
from .report import write_report
from .rollout import Batch, build_rollout
from .run_folder import RunFolder
from .sampler import Sampler
from .telemetry import describe_environment


def train(config, outdir=None, fresh=False, progress=False):
    """Train a run, or go on with it where it stopped, and end with its table, pictures and report.

    config: from `load_config`; outdir: the run's folder, runs/NAME by default; fresh: refuse to go on with a run that is
    there; progress: show a bar on stderr. Returns the `RunFolder`. Started once per process by a launcher, the processes train it together.

    Raises ValueError for a configuration or folder that does not fit, FloatingPointError where a loss stops being finite,
    OSError where the disk is full, and `Interrupted` after SIGINT or SIGTERM, when the run has been saved.
    """
    check_distribution(config, processes())  # before anybody waits for anybody
    world = connect(config)
    with world.watched(config.distributed.timeout):
        refuse_strangers(world, config)
        return _train(config, outdir or Path("runs") / config.name, fresh, progress and world.first, world)


def _train(config, outdir, fresh, progress, world):
    device, backend = prepare_device(config, world=world)
    execution = build_execution(config, device)
    layer = build_layer(config, device)
    teacher = load_teacher(config, device)
    world.send_from_first([*teacher.parameters(), *teacher.buffers()])  # should a machine have another file under that name
    world.mark("preparing the student")
    student = build_engine(config, build_student(config, teacher, layer), execution, world)
    world.mark("preparing the score network")
    score_net = build_engine(config, build_score_net(config, teacher), execution, world)
    rollout = build_rollout(config, layer, student.network, execution, world)
    updates = Updates(student, score_net, teacher, layer, execution)
    metric = build_metric(config, teacher) if config.eval.num_samples else None
    measured = MeasuredStudent(student, config, teacher, layer, execution, world)

    folder = world.from_first(lambda: RunFolder.start(outdir, config, fresh))
    settings, every = config.train, config.train.f_learning_times
    rates = lambda step: [learning_rate(settings.lr_rule, base, step, settings.warmup, settings.steps) for base in (settings.student_lr, settings.score_net_lr)]
    with folder.locked() if world.first else contextlib.nullcontext():
        with StopRequest() as stop, Journal(folder, config, execution, progress, world) as journal:
            world.mark("loading")
            step = _load_newest(folder, student, score_net, world)
            if world.first:
                folder.write_json("environment.json", describe_environment(config, backend, device, world))
            journal.start(step, backend, device)
            guard = FiniteGuard(device, world)
            if step < settings.steps:
                if world.first:
                    (folder.path / "results.json").unlink(missing_ok=True)  # the table of a shorter run
                world.mark(f"step {step}")
                rollout.start_cycle(step // every)

            while step < settings.steps:
                step += 1
                world.mark(f"step {step}")
                student_lr, score_net_lr = rates(step)
                if step % every == 0:
                    losses, k = updates.student(rollout.student_batch(step), student_lr)
                    guard.watch(losses, k, step)
                    journal.add("loss_student", losses)
                    rollout.start_cycle(step // every)  # with the new student: the score network must never lag behind it
                losses, k = updates.score_net(rollout.score_net_batch(step), score_net_lr)
                guard.watch(losses, k, step)
                journal.add("loss_score_net", losses)

                # The host waits for the device only here. A wish to stop is read once: a signal that comes later in this step waits for the next one's save.
                # Ranks have to agree on it, which they do when they have to meet anyway.
                meeting = world.size == 1 or step % every == 0 or step % config.log_every == 0
                stopping = world.greatest(stop.requested or 0) if meeting else 0
                measure = metric is not None and config.eval.every > 0 and step % config.eval.every == 0
                save = measure or stopping or step % config.save_every == 0 or step == settings.steps
                distance = None
                if save or step % config.log_every == 0:
                    guard.check(folder)
                    distance = measured.distance(metric, config.eval.num_samples) if measure else None
                    journal.log(step, student_lr, score_net_lr, distance)
                if save:
                    journal.saved(step, *_save(folder, step, student, score_net, distance, world))
                journal.advance(step)
                if stopping:
                    raise Interrupted(f"stopped at step {step} of {settings.steps}; saved in {folder.path}; the same command goes on from there", stopping)

        if metric is not None and world.from_first(lambda: folder.read_json("results.json")) is None:
            table = final_table(folder, config, teacher, metric, execution, progress, world)
            if world.first:
                folder.write_json("results.json", table)
        if world.first:
            write_report(folder, teacher)
    return folder


class Updates:
    """The two updates of a training, on networks that stay where they are in memory.

    student, score_net: engines; teacher: a module; layer: `Layer`. Each method takes a `Batch` and a learning rate and returns (losses [B], k [B]).
    """

    def __init__(self, student, score_net, teacher, layer, execution=EAGER):
        self._student, self._score_net, self.teacher, self.layer = student, score_net, teacher, layer
        # Parameters of these two want no gradient here, and what is compiled from them computes none.
        self._frozen_score_net, self._teacher = score_net.frozen(), execution.compiled(teacher)
        self._pull_back, self._descend = execution.graphed(self._student_loss_pull_back), score_net.graphed(self._score_net_update)

    def student(self, batch, lr):
        """One update of the student at states x_k.

        The gradient is taken in two stages, so that the networks never share a graph: the loss is pulled back through the score network and the
        teacher to x_{k-1} alone, and what arrives there goes into the student's own backward.
        """
        log_gamma, all_losses = self._student.network.log_scaled_gamma, []
        for part in batch.split(self._student.accumulation):
            eps_hat = self._student.predict(part.x, self.layer.tau[part.k])
            x = self.layer.step(part.x, eps_hat, part.k, log_gamma, part.seeds, part.redraw, part.noise)  # x_{k-1}
            losses, grad_x, grad_log_gamma = self._pull_back(x.detach(), part.k, part.seeds, part.redraw, part.noise)
            self._student.backward([x, log_gamma], [grad_x, grad_log_gamma])
            all_losses.append(losses)
        self._student.step(lr)
        return torch.cat(all_losses), batch.k

    def score_net(self, batch, lr):
        """One update of the score network at states x_{k-1}."""
        self._score_net.prepare_step(lr)
        return self._descend(batch.x, batch.k, batch.seeds, batch.redraw, batch.noise), batch.k

    def _student_loss_pull_back(self, x, k, seeds, redraw, noise):
        """(losses [B], the loss's gradient at x = x_{k-1} [B, *event], its direct gradient at log_gamma), by input-only backward passes of both networks."""
        leaf = x.detach().requires_grad_(True)
        f, e = self._frozen_score_net(leaf, self.layer.tau[k - 1]), self._teacher(leaf, self.layer.tau[k - 1])
        losses, grad_f, grad_e, grad_log_gamma = student_loss_and_grads(
            f.detach(), e.detach(), self.layer, k, self._student.network.log_scaled_gamma.detach(), seeds, redraw, noise)
        (grad_x,) = torch.autograd.grad([f, e], leaf, [grad_f, grad_e])
        return losses, grad_x, grad_log_gamma

    def _score_net_update(self, x, k, seeds, redraw, noise):
        """Losses [B] of the score network before the whole update that follows: backward, clipping, optimizer, average."""
        all_losses = []
        for part in Batch(x, k, seeds, redraw, noise).split(self._score_net.accumulation):
            f = self._score_net.predict(part.x, self.layer.tau[part.k - 1])
            losses, grad_f = score_net_loss_and_grads(f.detach(), self.layer, part.k, self._student.network.log_scaled_gamma.detach(), part.seeds, part.redraw, part.noise)
            self._score_net.backward([f], [grad_f])
            all_losses.append(losses)
        self._score_net.apply_step()
        return torch.cat(all_losses)


class FiniteGuard:
    """Remembers, on the device, the first update with a loss that is not finite; the host looks only when it waits anyway."""

    def __init__(self, device, world=ALONE):
        self.world = world
        self.first = torch.zeros(2, dtype=torch.int64, device=device)  # (step, layer); step 0: none

    def watch(self, losses, k, step):
        """Note the step and the highest layer with a bad loss, unless an earlier one is noted."""
        layer = torch.where(torch.isfinite(losses), 0, k).amax()
        found = torch.stack([torch.full_like(layer, step), layer])
        self.first = torch.where((self.first[0] == 0) & (layer > 0), found, self.first)

    def check(self, folder):
        """Raise FloatingPointError, in one line, on every rank if anything was noted on one of them."""
        noted = [(step, rank, layer) for rank, (step, layer) in enumerate(self.world.gather(self.first).tolist()) if step]
        if noted:
            step, rank, layer = min(noted)
            saved = self.world.from_first(folder.checkpoints)
            where = f" on rank {rank}" if self.world.size > 1 else ""
            kept = f"the last good checkpoint is {folder.checkpoint_path(saved[-1])}" if saved else "no checkpoint was saved before"
            raise FloatingPointError(f"the loss is not finite at step {step}, layer {layer}{where}; {kept}; try smaller learning rates")


class Journal:
    """The progress bar, metrics.jsonl and TensorBoard of a run. Losses are summed on the device between log steps, and averaged over ranks there."""

    def __init__(self, folder, config, execution, progress, world=ALONE):
        self.folder, self.config, self.execution, self.progress, self.world = folder, config, execution, progress, world
        self.sums, self.counts = {}, {}

    def __enter__(self):
        return self

    def start(self, step, backend, device):
        """Take up the records at a step, and open the bar and the writers there."""
        self.logged_step, self.logged_time, self.prepared = step, time.perf_counter(), self.execution.seconds
        if not self.world.first:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.folder.forget_metrics_after(step)
        self.seconds = max((record["seconds"] for record in self.folder.metrics()), default=0.0)
        total = self.config.train.steps
        if self.progress:
            tqdm.write(f"backend {backend}{' (interpreted)' if backend == 'triton' and ops.triton_is_interpreted() else ''}, device {device}, run folder {self.folder.path}" + (f", going on from step {step} of {total}" if step else ""), file=sys.stderr)
        self.bar = tqdm(total=total, initial=step, desc=f"train {self.config.name}", unit="step", disable=not self.progress, dynamic_ncols=True)
        self.tensorboard = SummaryWriter(self.folder.path / "tensorboard", purge_step=step + 1)

    def add(self, name, losses):
        """Add the mean of losses [B] to what the next log step reports."""
        mean = losses.detach().mean()
        self.sums[name] = self.sums[name] + mean if name in self.sums else mean
        self.counts[name] = self.counts.get(name, 0) + 1

    def log(self, step, student_lr, score_net_lr, metric):
        """Write one record; the host waits for the device here, and the ranks for each other."""
        means = {name: float(self.world.sum(total)) / (self.counts[name] * self.world.size) for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        if not self.world.first:
            return
        now = time.perf_counter()
        elapsed, steps = now - self.logged_time, step - self.logged_step
        self.seconds += elapsed
        preparing = self.execution.seconds - self.prepared  # compiling and recording, which are not the speed of training
        record = {"step": step, "loss_student": means.get("loss_student"), "loss_score_net": means.get("loss_score_net"),
                  "student_lr": student_lr, "score_net_lr": score_net_lr,
                  "images_per_second": steps * self.config.train.batch_size / (elapsed - preparing) if elapsed > preparing else None, "seconds": self.seconds}
        if preparing:
            record["preparing_seconds"] = preparing
        if metric is not None:
            record["metric"] = metric
        self.folder.append("metrics.jsonl", record)
        for name, value in record.items():
            if name != "step" and value is not None:
                self.tensorboard.add_scalar(name, value, step)
        shown = {"f": means.get("loss_score_net"), "student": means.get("loss_student"), "distance": metric}
        if preparing >= 1 and self.progress:
            self.bar.write(f"step {step}: compiling and recording took {preparing:.0f} s of {elapsed:.0f} s", file=sys.stderr)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items() if value is not None}, refresh=False)
        self.logged_step, self.logged_time, self.prepared = step, now, preparing + self.prepared

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

    def __exit__(self, *exception):
        if hasattr(self, "bar"):
            self.bar.close()
            self.tensorboard.close()


class MeasuredStudent:
    """The student with its averaged weights, for measurements during a run: one network and sampler, whose weights are replaced in place."""

    def __init__(self, student, config, teacher, layer, execution, world=ALONE):
        self.student, self.config, self.teacher, self.layer, self.execution, self.world = student, config, teacher, layer, execution, world
        self.sampler = None

    def distance(self, metric, num_samples):
        """The metric's first column, on one set of seeds; every rank draws its part of them."""
        averaged = self.student.averaged()
        if self.sampler is None:
            network = build_student(self.config, self.teacher, self.layer).requires_grad_(False)
            self.sampler = Sampler(network, self.layer, network.log_scaled_gamma, self.execution)
        with torch.no_grad():
            for name, parameter in self.sampler.network.named_parameters():
                parameter.copy_(averaged[name])
        return measure_row("hsivi_ema", self.sampler, metric, num_samples, 1, world=self.world)[metric.columns[0]]


def _load_newest(folder, student, score_net, world):
    """Restore both engines from the newest checkpoint and return its step; 0 where there is none."""
    step, state = world.from_first(lambda: folder.newest_state())
    if step:
        for name, engine in (("student", student), ("score_net", score_net)):
            engine.load(name, lambda stem: world.tensors_from_first(lambda: folder.load_tensors(step, stem)), state)
    return step


def _save(folder, step, student, score_net, metric, world):
    """Write a checkpoint, and let old ones go when all ranks know that it is there; returns (seconds, bytes)."""
    start = time.perf_counter()
    world.mark(f"saving step {step}")
    tensors, state = {}, {"metric": metric}
    for name, engine in (("student", student), ("score_net", score_net)):
        files, numbers = engine.state(name)
        tensors.update(files)
        state.update(numbers)
    size = world.from_first(lambda: folder.save_checkpoint(step, tensors, state))
    if world.first:
        folder.drop_old_checkpoints()
    return time.perf_counter() - start, size

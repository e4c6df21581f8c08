"""Distillation: train(config) from a frozen teacher to a few-step student. Read it from `train` down.

With several processes every rank runs this same code on its part of each batch (see distributed.py); what is read, written or shown is rank 0's.
"""

import contextlib
import dataclasses
import time
from pathlib import Path

import torch

from ..build import build_execution, build_layer, build_score_net, build_student, load_teacher, prepare_device
from ..checkpoints.run_folder import RunFolder
from ..execution import EAGER
from ..method.losses import score_net_loss_and_grads, student_loss_and_grads
from ..metrics.evaluation import build_metric, final_table, measure_row
from ..parallel.interrupt import Interrupted, StopRequest
from ..parallel.world import ALONE, connect, processes, refuse_strangers
from ..report.run_report import write_report
from ..sampling.sampler import Sampler
from ..sampling.solvers import check_baselines
from .engine import build_engine, check_distribution
from .journal import Journal, check_journal, pictures_due
from .optim import learning_rate
from .rollout import Batch, build_rollout
from .telemetry import describe_environment

PICTURED = 64  # samples of a grid during training


def train(config, outdir=None, fresh=False, progress=False):
    """Train a run, or go on with it where it stopped, and end with its table, pictures and report.

    config: from `load_config`; outdir: the run's folder, runs/NAME by default; fresh: refuse to go on with a run that is
    there; progress: show a bar on stderr. Returns the `RunFolder`. Started once per process by a launcher, the processes train it together.

    Raises ValueError for a configuration or folder that does not fit, FloatingPointError where a loss stops being finite,
    OSError where the disk is full, and `Interrupted` after SIGINT or SIGTERM, when the run has been saved.
    """
    check_distribution(config, processes())  # before anybody waits for anybody
    check_journal(config)
    if config.eval.num_samples:
        check_baselines(config)
    world = connect(config)
    with world.watched(config.distributed.timeout):
        refuse_strangers(world, config)
        return _train(config, outdir or Path("runs") / config.name, fresh, progress and world.first, world)


def _train(config, outdir, fresh, progress, world):
    device, backend = prepare_device(config, world=world)
    execution = build_execution(config, device)
    layer = build_layer(config, device)
    teacher = load_teacher(config, device)
    world.send_from_first(
        [*teacher.parameters(), *teacher.buffers()]
    )  # should a machine have another file under that name
    world.mark("preparing the student")
    # A run that goes on has its own checkpoint: what it started from may be gone.
    start = (
        dataclasses.replace(config, init=None)
        if world.from_first(lambda: any((Path(outdir) / "checkpoints").glob("step_*")))
        else config
    )
    student = build_engine(config, build_student(start, teacher, layer), execution, world)
    world.mark("preparing the score network")
    score_net = build_engine(config, build_score_net(start, teacher), execution, world)
    rollout = build_rollout(config, layer, student.network, execution, world)
    updates = Updates(student, score_net, teacher, layer, execution)
    metric = build_metric(config, teacher, world=world) if config.eval.num_samples else None
    measured = MeasuredStudent(student, config, teacher, layer, execution, world)

    folder = world.from_first(lambda: RunFolder.start(outdir, config, fresh))
    settings, every = config.train, config.train.f_learning_times
    rates = lambda step: [
        learning_rate(settings.lr_rule, base, step, settings.warmup, settings.steps)
        for base in (settings.student_lr, settings.score_net_lr)
    ]
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
                    rollout.start_cycle(
                        step // every
                    )  # with the new student: the score network must never lag behind it
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
                if pictures_due(config, step, measure) and not stopping:
                    guard.check(folder)
                    began = time.perf_counter()
                    journal.show(step, *measured.pictures(), began)
                journal.advance(step)
                if stopping:
                    raise Interrupted(
                        f"stopped at step {step} of {settings.steps}; saved in {folder.path}; the same command goes on from there",
                        stopping,
                    )

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
        self._pull_back, self._descend = (
            execution.graphed(self._student_loss_pull_back),
            score_net.graphed(self._score_net_update),
        )

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
            f.detach(), e.detach(), self.layer, k, self._student.network.log_scaled_gamma.detach(), seeds, redraw, noise
        )
        (grad_x,) = torch.autograd.grad([f, e], leaf, [grad_f, grad_e])
        return losses, grad_x, grad_log_gamma

    def _score_net_update(self, x, k, seeds, redraw, noise):
        """Losses [B] of the score network before the whole update that follows: backward, clipping, optimizer, average."""
        all_losses = []
        for part in Batch(x, k, seeds, redraw, noise).split(self._score_net.accumulation):
            f = self._score_net.predict(part.x, self.layer.tau[part.k - 1])
            losses, grad_f = score_net_loss_and_grads(
                f.detach(),
                self.layer,
                part.k,
                self._student.network.log_scaled_gamma.detach(),
                part.seeds,
                part.redraw,
                part.noise,
            )
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
        noted = [
            (step, rank, layer) for rank, (step, layer) in enumerate(self.world.gather(self.first).tolist()) if step
        ]
        if noted:
            step, rank, layer = min(noted)
            saved = self.world.from_first(folder.checkpoints)
            where = f" on rank {rank}" if self.world.size > 1 else ""
            kept = (
                f"the last good checkpoint is {folder.checkpoint_path(saved[-1])}"
                if saved
                else "no checkpoint was saved before"
            )
            raise FloatingPointError(
                f"the loss is not finite at step {step}, layer {layer}{where}; {kept}; try smaller learning rates"
            )


class MeasuredStudent:
    """The student with its averaged weights, for measurements and pictures during a run: one network, whose weights are replaced in place.

    All ranks have to ask at the same step: in ZeRO 3 putting the weights together is a collective, and each rank draws its part of the samples.
    """

    def __init__(self, student, config, teacher, layer, execution, world=ALONE):
        self.student, self.config, self.teacher, self.layer, self.execution, self.world = (
            student,
            config,
            teacher,
            layer,
            execution,
            world,
        )
        self.network = self.sampler = None

    def distance(self, metric, num_samples):
        """The metric's first column, on one set of seeds; every rank draws its part of them."""
        network = self._averaged()
        self.sampler = self.sampler or Sampler(network, self.layer, network.log_scaled_gamma, self.execution)
        return measure_row("hsivi_ema", self.sampler, metric, num_samples, 1, world=self.world)[metric.columns[0]]

    def pictures(self):
        """(samples of the seeds 0 .. 63 in the sampler's form, log_gamma). Of a 2-D run no samples are shown, and few are drawn."""
        network, count = self._averaged(), PICTURED if self.config.teacher.target is None else 1
        self.world.mark("drawing pictures")
        # Called eagerly: a sampler that is compiled or recorded keeps the batch of its first call, and measurements have a larger one.
        sampler = Sampler(network, self.layer, network.log_scaled_gamma)
        samples = sampler(self.world.share(range(count)), on_batch=self.world.counting(None))
        return self.world.gather_shares(samples, count), network.log_scaled_gamma

    def _averaged(self):
        """The network with the weights of now."""
        averaged = self.student.averaged()
        if self.network is None:
            self.network = build_student(
                dataclasses.replace(self.config, init=None), self.teacher, self.layer
            ).requires_grad_(False)
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(averaged[name])
        return self.network


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

"""Distillation: train(config) from a frozen teacher to a few-step student. Read it from `train` down.

With several processes every rank runs this same code on its share of each batch (see parallel/world.py). What is read,
written or shown is rank 0's.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ..build import build_context, build_score_net, build_student, choose_device
from ..checkpoints.files import as_written
from ..checkpoints.inputs import changed_files
from ..checkpoints.run_folder import RunFolder
from ..config import phases_of
from ..data import check_image_size
from ..density.annealing import find_bridge
from ..density.target import check_target
from ..density.teacher import target_of
from ..metrics.evaluation import build_metric, density_table, final_table
from ..metrics.needed_files import fetch_needed
from ..parallel.agreement import refuse_strangers
from ..parallel.interrupt import Interrupted, StopRequest
from ..parallel.out_of_memory import memory_advice
from ..parallel.world import connect, processes
from ..report.run_report import write_report
from ..sampling.solvers import check_baselines
from .averaged import AveragedStudent
from .estimate import check_disk, check_memory, gradient_evaluations
from .journal import Journal, check_journal, pictures_due
from .optim import learning_rate
from .rollout import build_rollout
from .start import build_paths, start_learning_rate
from .telemetry import describe_environment
from .updates import FiniteGuard, Updates
from .zero import build_engine, check_distribution

SINGLE_LAYER = "single_layer"  # the folder, in a run's own, of that run with one layer, for the row of that name
FISHER_DRAWS = 2000  # of each layer, on which the Fisher divergence is measured at the end


def train(config, outdir=None, fresh=False, progress=False):
    """Train a run, or go on with it where it stopped, and end with its table, pictures and report.

    config: from `load_config`; outdir: the run's folder, runs/NAME by default.
    fresh: refuse to go on with a run that is there; progress: show a bar on stderr.
    Returns the `RunFolder`. Started once per process by a launcher, the processes train it together.

    Raises ValueError for a configuration or folder that does not fit, FloatingPointError where a loss stops being
    finite, OSError where the disk is full, MemoryError where memory is not enough, and `Interrupted` after SIGINT,
    SIGTERM or SIGHUP, when the run has been saved.
    """
    check_distribution(config, processes())  # before anybody waits for anybody
    check_journal(config)
    if config.eval.num_samples:
        check_baselines(config)
        if "single_layer" in config.eval.baselines and processes() > 1:
            problem = f"single_layer is another training, and is made by one process, not by {processes()}"
            raise ValueError(f"eval.baselines: {problem}; leave it out and compare two runs by `hsivi report`")
    outdir = as_written(outdir or Path("runs") / config.name)
    world = connect(config)
    with world.watched(config.distributed.timeout), memory_advice(_what_to_lower(config)):
        refuse_strangers(world, config)
        training = Training(config, world, outdir, fresh, progress=progress and world.is_main)
        with training.in_its_folder():
            with StopRequest() as stop, training.journal:
                training.resume()
                while training.step < training.phases.total:
                    training.advance()
                    training.record(stop)
            training.finish()
    return training.folder


def single_layer_config(config):
    """A run with a target as plain semi-implicit inference: one layer, and nothing measured."""
    return replace(config, nfe=1, name=SINGLE_LAYER, eval=replace(config.eval, num_samples=0, baselines=()))


def _what_to_lower(config):
    """What is said where memory is not enough after all."""
    batch, accumulation, chunk = config.train.batch_size, config.distributed.accumulation, config.rollout.chunk
    return (
        f"train.batch_size: {batch} in distributed.accumulation: {accumulation} parts; lower the batch, raise "
        f"accumulation, or lower rollout.chunk ({chunk})"
    )


@dataclass(frozen=True)
class Due:
    """What is due at the end of a step, on every rank alike."""

    stopping: int  # the number of the signal that asks the run to end, 0 for none
    measure: bool
    log: bool
    save: bool
    scheduled: bool  # the save, which a stop asks for at any step
    pictures: bool


class Training:
    """A run while it is trained: its networks, where their states come from, and what is kept of it.

    `step` counts the run's steps from 1: those of its start, if it has one, then those of the distillation, each an
    update of the score network. `resume` sets it to that of the newest checkpoint.
    """

    def __init__(self, config, world, outdir, fresh, progress):
        self.config, self.world, self.progress = config, world, progress
        self.outdir, self.fresh, self.step = outdir, fresh, 0
        self.phases = phases_of(config)
        check_memory(config, world.size, choose_device(config.device) if world.size == 1 else world.device)
        # Told before anything is built. The folder is made and held in `in_its_folder`.
        has_run = world.from_main(lambda: RunFolder.check(outdir, config, fresh) is not None)
        world.mark("fetching files")
        fetch_needed(config, teacher=True, measured=config.eval.num_samples > 0)
        self.context = context = self._with_teacher(build_context(config, world))
        check_image_size(config, context.image_shape(context.teacher.event_shape))
        # A machine may have another file under that name.
        read = [context.teacher] if context.decoder is None else [context.teacher, context.decoder]
        world.broadcast([tensor for module in read for tensor in (*module.parameters(), *module.buffers())])
        # A run that goes on has its own checkpoint: what it started from may be gone.
        is_new = world.from_main(lambda: not (has_run and RunFolder(outdir).checkpoints()))
        self.is_new = is_new
        if is_new:
            world.from_main(lambda: check_disk(config, outdir))
        world.mark("preparing the student")
        self.student = build_engine(context, build_student(context, from_init=is_new))
        world.mark("preparing the score network")
        self.score_net = build_engine(context, build_score_net(context, from_init=is_new))
        self.rollout = build_rollout(context, self.student.network, self.student.frozen())
        self.paths = build_paths(context, self.bridge) if config.start.kind == "trajectory" else None
        self.updates = Updates(context, self.student, self.score_net)
        self.guard = FiniteGuard(context)
        self.metric = build_metric(context) if config.eval.num_samples else None
        self.averaged = AveragedStudent(context, self.student)

    def _with_teacher(self, context):
        """The context with its teacher: what the configuration names, or the bridge to the run's target."""
        self.bridge = None
        if self.config.target is None:
            return context.with_teacher()
        target = target_of(self.config.target, context.device)
        self.world.from_main(lambda: check_target(target))
        known = self.world.from_main(self._known_bridge)
        if known is None:
            self.world.mark("finding the bridge")
            known = self.world.from_main(lambda: self._find_bridge(target, context.device))
        self.bridge = known
        return context.with_bridge(known, target)

    def _known_bridge(self):
        """That of a run that goes on."""
        if RunFolder.check(self.outdir, self.config, self.fresh) is None:
            return None
        run = RunFolder(self.outdir)
        changed = changed_files(self.config, run.read_json("inputs.json", {}), "target")
        if changed:
            problem = f"{changed[0][1]!r} is not what it was when the run began"
            raise ValueError(f"{changed[0][0]}: {problem}; undo that, or train in another folder")
        return run.bridge()

    def _find_bridge(self, target, device):
        """On the main rank alone: others wait for what it finds."""
        start = self.config.start
        shown = {"desc": "bridge", "unit": "evaluation", "unit_scale": True, "dynamic_ncols": True, "leave": False}
        with tqdm(disable=not self.progress, delay=5, **shown) as bar:

            def told(evaluations):
                bar.update(evaluations)
                self.world.mark_detail("finding the bridge")

            settings = (self.config.bridge, start.trajectories, start.substeps, self.config.seed, device, told)
            return find_bridge(target, self.config.nfe, *settings)

    @contextlib.contextmanager
    def in_its_folder(self):
        """Hold the run's folder for this training, from before it is looked at to the end; rank 0 does it for all."""
        with contextlib.ExitStack() as held:
            self.folder = self.world.from_main(lambda: held.enter_context(self._taken()))
            self.journal = Journal(self.context, self.folder, self.progress)
            if self.bridge is not None and self.world.is_main:
                self.folder.save_bridge(self.bridge)
            yield

    def _taken(self):
        return RunFolder.taken(self.outdir, self.config, self.fresh)

    def resume(self):
        """Take up the newest checkpoint, if there is one, and make ready for the step after it."""
        self.world.mark("loading")
        state = self._load_newest()
        if self.world.is_main:
            self.folder.take_up()
            self.folder.drop_old_checkpoints()  # which a process that was killed may have left
            self.folder.write_json("environment.json", describe_environment(self.context))
        self.journal.start(self.step, state)
        if self.step < self.phases.total:
            if self.world.is_main:
                (self.folder.path / "results.json").unlink(missing_ok=True)  # the table of a shorter run
            self.world.mark(f"step {self.step}")
            if self.step < self.phases.start or self.updates.anchor:
                self._prepare_paths(self.step + 1)
            if self.step >= self.phases.start:
                self._roll_pool()

    def _prepare_paths(self, update):
        """Roll the paths that an update of the start needs, or the anchor after it, unless they are there."""
        with self.journal.bar_of("teacher's paths", self.paths.evaluations) as told:
            self.paths.on_evaluations = told
            self.paths.prepare(update)
            self.paths.on_evaluations = None

    def _roll_pool(self):
        """Roll the pool of the distillation's present step: the first one, or that of a run that goes on."""
        with self.journal.bar_of("first pool", getattr(self.rollout, "share", 0) * self.config.nfe) as told:
            self.rollout.on_layer = told
            self.rollout.start_cycle((self.step - self.phases.start) // self.config.train.f_learning_times)
            self.rollout.on_layer = None

    def advance(self):
        """One step, of the start or of the distillation."""
        self.step += 1
        self.world.mark(f"step {self.step}")
        if self.step <= self.phases.start:
            self._advance_start()
        else:
            self._advance_distillation(self.step - self.phases.start)

    def _advance_start(self):
        """An update of the student on paths. After the last one the distillation begins with a new optimizer."""
        self._prepare_paths(self.step)
        student_lr, _ = self._learning_rates()
        self._note("loss_start", *self.updates.start(self.paths.batch(self.step), student_lr))
        if self.step == self.phases.start:
            self.student.restart()
            if not self.updates.anchor:
                self.paths.let_go()
            self._roll_pool()

    def _advance_distillation(self, step):
        """At the end of a cycle an update of the student and a new pool, and always one of the score network.

        The new pool is rolled by the new student: the score network must never lag behind it. Before the student moves
        for the first time, the score network may have a head start, in which its loss is shown beside the teacher's.
        """
        cycle_length, head = self.config.train.f_learning_times, self.phases.head
        student_lr, score_net_lr = self._learning_rates()
        if step % cycle_length == 0:
            if step > head:
                anchored = self.paths.anchor_batch(step) if self.updates.anchor else None
                student_batch = self.rollout.student_batch(step)
                self._note("loss_student", *self.updates.student(student_batch, student_lr, anchored))
            self.rollout.start_cycle(step // cycle_length)
        batch = self.rollout.score_net_batch(step)
        if step <= head:
            self._note("loss_teacher", *self.updates.teacher(batch))
        self._note("loss_score_net", *self.updates.score_net(batch, score_net_lr))

    def record(self, stop):
        """Log, measure, save and show what is due at this step; the host waits for the device only here.

        stop: a `StopRequest`. Raises `Interrupted` where it asks the run to end, after a save.
        """
        due = self._due(stop)
        if due.save or due.log or due.pictures:
            self.guard.check(self.folder)
        distance = None
        if due.measure:
            with self.journal.measurement():
                distance = self.averaged.distance(self.metric)
        if due.log:
            self.journal.log(self.step, *self._learning_rates(), distance)
        # Before the checkpoint: a process that is killed in between trains these steps again and draws them again.
        if due.pictures:
            began = time.perf_counter()
            self.journal.show(self.step, *self.averaged.pictures(), began)
        if due.save:
            self._save(distance, stopped=not due.scheduled)
        self.journal.advance(self.step)
        if due.stopping:
            where = f"stopped at step {self.step} of {self.phases.total}; saved in {self.folder.path}"
            raise Interrupted(f"{where}; the same command goes on from there", due.stopping)

    def finish(self):
        """The final table, if the run is measured and has none yet, and the report."""
        if self.metric is not None and self.world.from_main(lambda: self.folder.read_json("results.json")) is None:
            table = self._table()
            if self.world.is_main:
                self.folder.write_json("results.json", table)
        if self.bridge is not None:
            divergences = self.updates.fisher_divergences(self.averaged.states(FISHER_DRAWS), self.bridge.scales)
            if self.world.is_main:
                self.folder.write_json("fisher.json", divergences)
        if self.world.is_main:
            # Where nothing is measured, the teacher's samples were not asked for; `hsivi report` draws them.
            beside = self.config.eval.num_samples > 0
            write_report(self.folder, self.context.teacher, beside_teacher=beside, progress=self.progress)

    def _table(self):
        if self.bridge is None:
            return final_table(self.context, self.folder, self.metric, self.progress)
        of_run, single = gradient_evaluations(self.config, self.bridge), None
        if "single_layer" in self.config.eval.baselines:
            config = single_layer_config(self.config)
            folder = train(config, self.folder.path / SINGLE_LAYER, progress=self.progress)
            single = folder, gradient_evaluations(config, folder.bridge())
        return density_table(self.context, self.folder, self.metric, self.bridge, of_run, single, self.progress)

    def _due(self, stop):
        """What this step ends with. Ranks that are to do something together have to agree on it."""
        config, step = self.config, self.step
        log = step % config.log_every == 0
        # A wish to stop is read once: a signal that comes later in this step waits for the next one's save. Ranks agree
        # on it when they have to meet anyway.
        meeting = self.world.size == 1 or step % config.train.f_learning_times == 0 or log
        stopping = self.world.greatest(stop.requested or 0) if meeting else 0
        measure = self.metric is not None and config.eval.every > 0 and step % config.eval.every == 0
        ends = step in (self.phases.start, self.phases.total)
        scheduled = measure or step % config.save_every == 0 or ends
        pictures = pictures_due(config, step, measure)
        return Due(stopping, measure, log or scheduled, bool(stopping) or scheduled, scheduled, pictures)

    def _note(self, name, losses, k):
        self.guard.watch(losses, k, self.step)
        self.journal.add(name, losses)

    def _learning_rates(self):
        """The student's and the score network's rate at this step."""
        settings, phases = self.config.train, self.phases
        if self.step <= phases.start:
            return [start_learning_rate(self.config, self.step), 0.0]
        step = self.step - phases.start
        rule, warmup = settings.lr_rule, settings.warmup
        of_score_net = learning_rate(rule, settings.score_net_lr, step, warmup, phases.head + phases.train)
        if step <= phases.head:
            return [0.0, of_score_net]
        return [learning_rate(rule, settings.student_lr, step - phases.head, warmup, phases.train), of_score_net]

    def _engines(self):
        return {"student": self.student, "score_net": self.score_net}.items()

    def _load_newest(self):
        """Restore both engines from the newest checkpoint and return its state, with its step; None where none is."""
        needed = [f"{name}_updates" for name, _ in self._engines()]
        self.step, state = self.world.from_main(lambda: self.folder.newest_state(needed))
        if self.is_new != (state is None):
            problem = "another process has trained there, or deleted what it had, while this one was starting"
            raise ValueError(f"outdir {str(self.outdir)!r}: {problem}; start the command again")
        if state is not None:
            for name, engine in self._engines():
                engine.load(name, lambda stem: self._tensors(self.step, stem), state)
            if self.updates.anchor:
                self.updates.anchor.load(state)
        return state

    def _tensors(self, step, stem):
        return self.world.tensors_from_main(lambda: self.folder.load_tensors(step, stem))

    def _save(self, distance, stopped):
        """Write a checkpoint, and let old ones go when all ranks know that it is there.

        stopped: whether it is written because the run is asked to end, and not by itself.
        """
        start = time.perf_counter()
        self.world.mark(f"saving step {self.step}")
        tensors, state = {}, {"metric": distance, "stopped": stopped, "losses": self.journal.losses()}
        for name, engine in self._engines():
            files, numbers = engine.state(name)
            tensors.update(files)
            state.update(numbers)
        if self.updates.anchor:
            state.update(self.updates.anchor.state())
        if self.step == self.phases.start:
            state["start"] = True
        size = self.world.from_main(lambda: self.folder.save_checkpoint(self.step, tensors, state))
        if self.world.is_main:
            self.folder.take_up()
            self.folder.drop_old_checkpoints()
        self.journal.saved(self.step, time.perf_counter() - start, size)

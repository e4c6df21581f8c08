"""The start on the teacher's own trajectories: states of good paths at the knots, and the regression onto them.

Before the distillation the student learns the paths of a solver with more steps than it has layers. Layer k is to take
x_k to the path's x_{k-1} by one deterministic DDIM step, so its target is

    eps = (x_{k-1} - A_k x_k) / B_k        with A, B of eta = 0.

The paths may come from above the top knot (`start.top`). The top layer is then shown their noise at its own timestep.
What it makes of it is the path's next state all the same, and it has less far to go: B_K is smaller there, and with it
the error of the state for the same error of the network.

It needs no data and no score network. Every number is a function of (run seed, counter), as in rollout.py: paths are
rolled again when a run goes on. With several processes each rolls an equal share, and all have the whole.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch.utils._pytree import register_pytree_node

from .. import ops
from ..build import build_ddim_layers
from ..method.class_labels import if_given
from ..method.schedule import make_schedule, signal_levels
from ..method.trajectory import path_steps, roll_path
from .rollout import (
    ANCHOR_LAYERS,
    ANCHOR_ROWS,
    START_LAYERS,
    START_ROWS,
    START_SEEDS,
    draw_layers,
    equal_slices,
    labels_at,
)

PATH_BYTES = 2**30  # of states that are held at once; more trajectories are rolled in parts, one after the other
WARM_UP = 20  # updates of a start


def start_learning_rate(config, update):
    """The rate of update 1, 2, ... of a start: a short warm-up, and linearly to zero."""
    settings = config.start
    return settings.lr * min(1.0, update / WARM_UP) * (1 - (update - 1) / settings.updates)


def parts_of(config, event_size):
    """(parts that the trajectories are rolled in, trajectories of each)."""
    count = config.start.trajectories
    most = max(PATH_BYTES // (4 * (config.nfe + 1) * event_size), 1)
    parts = -(-count // most)
    return parts, -(-count // parts)


def path_knots(config):
    """The timesteps of the paths' states x_0 .. x_K: the run's knots, but for x_K that of start.top.

    Raises ValueError where that is none above the others.
    """
    steps, top = config.teacher.steps, config.start.top
    *lower, own_top = make_schedule(config.teacher.betas, steps, config.spacing, config.nfe).timesteps.tolist()
    if top is not None and not lower[-1] < top < steps:
        raise ValueError(f"start.top: {top} is no timestep between the run's knot {lower[-1]} and {steps}")
    return [*lower, own_top if top is None else top]


@dataclass(frozen=True)
class PathBatch:
    """States of paths: x = x_k [B, *event], the target eps there, the layer k [B], and the class of each or None."""

    x: torch.Tensor
    target: torch.Tensor
    k: torch.Tensor
    labels: torch.Tensor | None = None

    def split(self, count):
        """As many batches of equal size, whose samples follow each other."""
        parts = equal_slices(len(self.x), count)
        return [
            PathBatch(self.x[part], self.target[part], self.k[part], labels_at(self.labels, part)) for part in parts
        ]


# As of `Batch`: a recorded update takes it apart into tensors.
register_pytree_node(
    PathBatch,
    lambda batch: ([batch.x, batch.target, batch.k, batch.labels], None),
    lambda fields, _: PathBatch(*fields),
)


class _Batches:
    """What batches of the start and of the anchor have in common, whatever their paths: which states they are of.

    A subclass says how many paths there are, `count`, and has `_states(k, row)`, the `PathBatch` of them.
    """

    def __init__(self, context):
        config, self.world, self.device = context.config, context.world, context.device
        self.run_seed, self.nfe = config.seed, config.nfe
        self.batch_size = config.start.batch_size or config.train.batch_size
        self.anchor_batch_size = config.objective.anchor_batch or config.train.batch_size

    def batch(self, update):
        """This rank's share of the states of an update of the start."""
        return self._batch(update, START_LAYERS, START_ROWS, self.batch_size)

    def anchor_batch(self, step):
        """This rank's share of the states that the student's update at a step is anchored to."""
        return self._batch(step, ANCHOR_LAYERS, ANCHOR_ROWS, self.anchor_batch_size)

    def _batch(self, step, layers_purpose, rows_purpose, batch_size):
        shard = self.world.shard(batch_size)
        k = draw_layers(self.run_seed, layers_purpose, step, batch_size, self.nfe, self.device)[shard]
        row = ops.integers_below(self.count, self.run_seed, rows_purpose, step, batch_size, self.device)[shard]
        return self._states(k, row)


class Paths(_Batches):
    """The teacher's paths of a run at its knots.

    on_evaluations(n), where it is set, is told of n evaluations of the teacher.
    """

    on_evaluations = None

    def __init__(self, context):
        super().__init__(context)
        config, self.updates = context.config, context.config.start.updates
        self.chunk, self.event_shape, self.layers = config.rollout.chunk, context.teacher.event_shape, context.layers
        self.parts, self.count = parts_of(config, math.prod(self.event_shape))
        self.share = -(-self.count // self.world.size)
        self.part = None  # whose states are held
        teacher = config.teacher
        levels = signal_levels(teacher.betas, teacher.steps)
        self.steps = path_steps(path_knots(config), levels, config.start.substeps, config.start.solver)
        ddim = build_ddim_layers(config, config.nfe, 0.0, self.device, own_knots=True)
        self.a, self.b, self.class_labels = ddim.a, ddim.b, context.class_labels
        self._teacher = context.execution.graphed(context.execution.compiled(context.prepared_teacher))

    @property
    def evaluations(self):
        """Of the teacher, by this rank, for one part."""
        return self.share * len(self.steps)

    def prepare(self, update):
        """Have the paths that update 1, 2, ... of the start needs; later ones keep the last part."""
        part = (min(update, self.updates) - 1) * self.parts // self.updates
        if part != self.part:
            self._roll(part)
            self.part = part

    def let_go(self):
        """Give the memory of the states back."""
        self.states = self.labels = self.part = None

    def _states(self, k, row):
        x, below = self._at(k, row), self._at(k - 1, row)
        target = (below - _column(self.a[k], x) * x) / _column(self.b[k], x)
        return PathBatch(x, target, k, labels_at(self.labels, row))

    def _at(self, k, row):
        return self.states[row // self.share, k, row % self.share]

    @torch.no_grad()
    def _roll(self, part):
        """Fill `states` [ranks, K + 1, share, *event] with the paths of a part."""
        self.states = self.labels = None  # before the next ones are there
        count = self.share * self.world.size
        seeds = ops.integers(self.run_seed, START_SEEDS, part, count, self.device)
        labels = self.class_labels(seeds)
        seeds = seeds[self.world.rank * self.share :][: self.share]
        rolled = torch.empty(self.nfe + 1, self.share, *self.event_shape, device=self.device)
        size = min(self.chunk, self.share)
        for start in range(0, self.share, size):
            start = min(start, self.share - size)  # every call has one shape; the last ones may be rolled twice
            chunk = slice(start, start + size)
            x = rolled[self.nfe, chunk] = ops.draw_noise(seeds[chunk], 0, self.event_shape)
            predict = functools.partial(self._predict, self.class_labels(seeds[chunk]))
            for k, state in roll_path(predict, self.steps, x):
                rolled[k, chunk] = state
        if self.world.size > 1:
            self.world.mark_detail("gathering the paths")
        self.states = self.world.gather(rolled) if self.world.size > 1 else rolled[None]
        self.labels = labels

    def _predict(self, labels, x, t):
        if self.on_evaluations:
            self.on_evaluations(len(x))
        return self._teacher(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device), *if_given(labels))


def _column(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1))


class BridgePaths(_Batches):
    """The paths of a bridge, in the place of `Paths`: they have been found with it, and all are held.

    A layer's target is the eps that makes its mean the path's next state: eps = x_k - x_{k-1}.
    """

    def __init__(self, context, bridge):
        super().__init__(context)
        self.count = bridge.above.shape[1]
        self.above, self.below = bridge.above.to(self.device), bridge.below.to(self.device)
        self.evaluations = 0

    def prepare(self, update):
        """Nothing: the paths are there."""

    def let_go(self):
        """Give the memory of the states back."""
        self.above = self.below = None

    def _states(self, k, row):
        x, below = self.above[k - 1, row], self.below[k - 1, row]
        return PathBatch(x, x - below, k)


def build_paths(context, bridge=None):
    """The paths of a start: those of the teacher, or of a `Bridge` for a run with a target."""
    return Paths(context) if bridge is None else BridgePaths(context, bridge)


class Anchor:
    """How much of the start's regression is kept beside the student's loss.

    Both are measured by the norm of their gradient at the student's prediction, a running one: from the update before,
    so that nobody waits for it.
    """

    MEMORY = 0.9  # of the running squares

    def __init__(self, context):
        self.weight, self.world = context.objective.anchor, context.world
        self.squares = torch.zeros(2, device=context.device)  # of the loss's gradient and of the regression's
        self._seen = torch.zeros_like(self.squares)
        self.updates = 0

    def scale(self):
        """What the regression's gradient is multiplied by, a tensor []; 0 in the first update."""
        loss, regression = self.squares
        return torch.where(regression > 0, self.weight * (loss / regression).sqrt(), 0.0)

    def see(self, of_loss, of_regression):
        """Note the gradients of one micro-batch."""
        self._seen += torch.stack([of_loss.square().sum(), of_regression.square().sum()])

    def update(self):
        """Take what was seen in an update of the student into the running norms."""
        seen = self.world.sum(self._seen.clone())
        memory = self.MEMORY if self.updates else 0.0
        self.squares.mul_(memory).add_((1 - memory) * seen)  # in place: a recorded update reads them
        self._seen.zero_()
        self.updates += 1

    def state(self):
        """What a checkpoint needs: numbers for state.json."""
        return {"anchor": [*self.squares.tolist(), self.updates]}

    def load(self, state):
        """The inverse of `state`; nothing where the checkpoint is of before the first update."""
        if state.get("anchor"):
            *squares, self.updates = state["anchor"]
            self.squares.copy_(torch.tensor(squares))

"""Where training states come from: trajectories of the student.

`pooled` rolls them once a cycle, `fresh` for every update. A cycle is `f_learning_times` updates of the score network.
Between two student updates the student does not change, so one rollout serves a whole cycle: each trajectory gives K
training pairs. Every number here is a function of (run seed, counter), so nothing of a rollout has to be saved: it is
rolled again when a run goes on.

With several processes the batch of an update is the same set of samples. Numbers are addressed by a sample's place in
the whole batch or pool, and each rank takes its shard. A pool is rolled in equal shares and gathered, so that every
rank has all of it and the shuffle goes over the whole.
"""

from dataclasses import dataclass

import torch
from torch.utils._pytree import register_pytree_node

from .. import ops
from ..method.class_labels import if_given
from ..nets.prepared import Prepared

# Purposes of the run seed's random numbers (the last word of the Philox counter), so that no two uses share numbers.
POOL_SEEDS, POOL_ORDER, STUDENT_LAYERS, STUDENT_STATES, STUDENT_SEEDS, SCORE_NET_LAYERS, SCORE_NET_SEEDS = range(1, 8)
STUDENT_WINDOWS, SCORE_NET_WINDOWS = range(8, 10)
START_SEEDS, START_LAYERS, START_ROWS, ANCHOR_LAYERS, ANCHOR_ROWS = range(10, 15)


def equal_slices(length, count):
    """As many slices of equal size, one after the other."""
    size = length // count
    return [slice(start, start + size) for start in range(0, count * size, size)]


@dataclass(frozen=True)
class Batch:
    """The states of one update, with the noise of the step from x_k to x_{k-1}.

    x: [B, *event], what the layer makes for the score network, x_{k-1} or x_t of its window, and x_k for the student.
    noise: `ops.Noise`, whose stream [B] is the layer k of each sample, or the virtual one of `Windows`.
    labels: [B] int64, the class of each sample, which is its trajectory's; None for a network without classes.
    """

    x: torch.Tensor
    noise: ops.Noise
    labels: torch.Tensor | None = None

    def split(self, count):
        """As many batches of equal size, whose samples follow each other."""
        parts = equal_slices(len(self.x), count)
        return [Batch(self.x[part], self.noise[part], labels_at(self.labels, part)) for part in parts]


def labels_at(labels, samples):
    """The labels of some samples, a slice or an index tensor; None where there are no labels."""
    return None if labels is None else labels[samples]


# A recorded update (`execution.GraphedCall`) takes its batch apart into tensors.
register_pytree_node(
    Batch, lambda batch: ([batch.x, batch.noise, batch.labels], None), lambda fields, _: Batch(*fields)
)


def draw_layers(run_seed, purpose, step, batch_size, nfe, device="cpu"):
    """The layers k in 1 .. nfe of one update, int64 [B], in antithetic pairs.

    B // 2 + 1 draws k, then nfe + 1 - k, cut to B.
    """
    k = 1 + ops.integers_below(nfe, run_seed, purpose, step, batch_size // 2 + 1, device)
    return torch.cat([k, nfe + 1 - k])[:batch_size]


def window_bits(run_seed, purpose, step, batch_size, device):
    """32 random bits for each sample of an update, int64 [B]: which timestep of its window it has."""
    return ops.integers(run_seed, purpose, step, batch_size, device) & 0xFFFFFFFF


@torch.no_grad()
def roll_down(predict, layers, log_gamma, x, k, seeds, lowest, given=None, labels=None):
    """Roll x = x_K [B, *event] down to x_lowest and return each sample's x_k, k [B].

    The whole batch goes down to the lowest layer drawn.
    predict: the student (x, t) -> noise, or (x, t, labels); labels: [B] or None.
    seeds [B]: of the noise; given [K - lowest, B, *event]: the noise itself in its place, layer K first.
    """
    picked = x
    for index, current in enumerate(range(layers.nfe, lowest, -1)):
        stream = torch.full_like(k, current)
        noise = ops.Noise(seeds, stream, given=None if given is None else given[index])
        x = layers.step(x, predict(x, layers.tau[stream], *if_given(labels)), log_gamma, noise)
        picked = torch.where((k == current - 1).reshape(-1, *[1] * (x.ndim - 1)), x, picked)
    return picked


@torch.no_grad()
def one_layer_on(predict, layers, log_gamma, batch, matching=None):
    """The batch one layer further down: x_{k-1} in the place of x_k, its noise at the same address.

    matching: `Windows`, for x_t in the place of x_{k-1}.
    """
    matching = matching or layers
    eps_hat = predict(batch.x, layers.tau[matching.layer[batch.noise.stream]], *if_given(batch.labels))
    return Batch(matching.step(batch.x, eps_hat, log_gamma, batch.noise), batch.noise, batch.labels)


class FreshRollout:
    """New trajectories of the whole batch for every update, as the published code does."""

    on_layer = None  # see `start_cycle`

    def __init__(self, context, student, prepared):
        config, self.layers, self.student = context.config, context.layers, student
        self.prepared = prepared.at(self.layers.tau)
        self.matching, self.class_labels = context.matching, context.class_labels
        self.predict = context.execution.compiled(self.prepared)
        self.run_seed, self.batch_size = config.seed, config.train.batch_size
        self.shard = context.world.shard(self.batch_size)

    def start_cycle(self, cycle):
        """Take over the student as it is now; nothing is rolled beforehand."""
        self.prepared.refresh()

    def student_batch(self, step):
        """States x_k for a student update."""
        return self._roll(step, STUDENT_LAYERS, STUDENT_SEEDS, STUDENT_WINDOWS)

    def score_net_batch(self, step):
        """States that layers make, x_{k-1} or x_t, for an update of the score network."""
        batch = self._roll(step, SCORE_NET_LAYERS, SCORE_NET_SEEDS, SCORE_NET_WINDOWS)
        return one_layer_on(self.predict, self.layers, self.student.log_scaled_gamma, batch, self.matching)

    def _roll(self, step, layers_purpose, seeds_purpose, windows_purpose):
        device, nfe = self.layers.tau.device, self.layers.nfe
        # Drawn twice, so that the host knows the lowest without waiting for the device. It is the whole batch's: ranks
        # have to make equally many calls.
        lowest = int(draw_layers(self.run_seed, layers_purpose, step, self.batch_size, nfe, "cpu").min())
        k = draw_layers(self.run_seed, layers_purpose, step, self.batch_size, nfe, device)[self.shard]
        seeds = ops.integers(self.run_seed, seeds_purpose, step, self.batch_size, device)[self.shard]
        x, labels = ops.draw_noise(seeds, 0, self.student.event_shape), self.class_labels(seeds)  # x_K
        x = roll_down(self.predict, self.layers, self.student.log_scaled_gamma, x, k, seeds, lowest, labels=labels)
        if self.matching is self.layers:
            return Batch(x, ops.Noise(seeds, k), labels)
        bits = window_bits(self.run_seed, windows_purpose, step, self.batch_size, device)[self.shard]
        # Virtual layers have the numbers of layers too: another draw keeps the rollout's noise apart.
        return Batch(x, ops.Noise(seeds, self.matching.choose(k, bits), draw=1), labels)


class PooledRollout:
    """One rollout of ceil(f_learning_times B / (K redraw)) trajectories right after each student update.

    All their transitions, shuffled, are the cycle's minibatches. With `redraw` r > 1 each stored mean is used r times,
    with new noise each time. The next student update takes its x_k from the same pool: they are still on-policy.
    on_layer(n), where it is set, is told of n samples that have come one layer further.
    """

    on_layer = None

    def __init__(self, context, student, prepared):
        config, self.layers, self.world = context.config, context.layers, context.world
        self.student, self.prepared = student, prepared.at(self.layers.tau)
        self.matching, self.class_labels = context.matching, context.class_labels
        self.predict = context.execution.compiled(self.prepared)
        self.run_seed, self.batch_size = config.seed, config.train.batch_size
        self.shard = self.world.shard(self.batch_size)
        self.cycle_length = config.train.f_learning_times
        self.draws, self.chunk = config.rollout.redraw, config.rollout.chunk
        self.trajectories = -(-self.cycle_length * self.batch_size // (self.layers.nfe * self.draws))
        self.share = -(-self.trajectories // self.world.size)  # rolled by each rank; the last ones may be unused
        # The pool stays where it is in memory: a recorded rollout writes it again and again. A trajectory's rank comes
        # first in the index.
        self.states = self._zeros(self.layers.nfe + 1)  # x_k at index k
        # The mean of x_{k-1} at k - 1, where it is noised in other ways than by the rollout itself.
        self.means = self._zeros(self.layers.nfe) if self.draws > 1 or self.matching is not self.layers else None
        # What this rank rolls; of one process, the pool itself.
        self.rolled_states, self.rolled_means = self._share_of(self.states), self._share_of(self.means)
        self._roll = context.execution.graphed(self._roll_share)

    def _zeros(self, states):
        shape = (self.world.size, states, self.share, *self.student.event_shape)
        return torch.zeros(shape, device=self.layers.tau.device)

    def _share_of(self, pool):
        return pool if pool is None or self.world.size == 1 else torch.zeros_like(pool[:1])

    def start_cycle(self, cycle):
        """Roll the pool of a cycle with the student as it is now."""
        self.prepared.refresh()
        device, transitions = self.layers.tau.device, self.layers.nfe * self.trajectories
        count, start = self.share * self.world.size, self.world.rank * self.share
        self.seeds = ops.integers(self.run_seed, POOL_SEEDS, cycle, count, device)  # [N and the unused]
        self.labels = self.class_labels(self.seeds)
        self._roll(self.seeds[start : start + self.share])
        if self.world.size > 1:
            self.world.mark_detail("gathering the pool")
            self.world.gather(self.rolled_states[0], into=self.states)
            if self.means is not None:
                self.world.gather(self.rolled_means[0], into=self.means)
        # Every draw goes through all transitions in an order of its own: position -> transition.
        orders = []
        for draw in range(self.draws):
            keys = ops.integers(self.run_seed, POOL_ORDER, cycle * self.draws + draw, transitions, device)
            orders.append(keys.argsort(stable=True))
        self.order = torch.cat(orders)

    @torch.no_grad()
    def _roll_share(self, all_seeds):
        """Fill this rank's states and means with the trajectories of these seeds [share]."""
        states, means = self.rolled_states[0], None if self.means is None else self.rolled_means[0]
        for start in range(0, self.share, self.chunk):
            chunk = slice(start, start + self.chunk)
            seeds = all_seeds[chunk]
            x = states[self.layers.nfe, chunk] = ops.draw_noise(seeds, 0, self.student.event_shape)
            labels = self.class_labels(seeds)
            for current in range(self.layers.nfe, 0, -1):
                k = torch.full_like(seeds, current)
                eps_hat = self.predict(x, self.layers.tau[k], *if_given(labels))
                if means is not None:
                    means[current - 1, chunk] = self.layers.mean(x, eps_hat, k)
                x = self.layers.step(x, eps_hat, self.student.log_scaled_gamma, ops.Noise(seeds, k))
                states[current - 1, chunk] = x
                if self.on_layer:
                    self.on_layer(len(seeds))

    @torch.no_grad()
    def score_net_batch(self, step):
        """Minibatch number step % f_learning_times of the pool: x_{k-1} or x_t, and the noise that made it."""
        start = (step % self.cycle_length) * self.batch_size + self.shard.start
        transition = self.order[start : start + self.shard.stop - self.shard.start]  # trajectory + count * (k - 1)
        k, trajectory = transition // self.trajectories + 1, transition % self.trajectories  # [B of this rank]
        seeds, labels = self.seeds[trajectory], labels_at(self.labels, trajectory)
        if self.means is None:
            return Batch(self._at(self.states, k - 1, trajectory), ops.Noise(seeds, k), labels)
        position = torch.arange(start, start + len(transition), device=k.device)
        stream, draw = k, position // (self.layers.nfe * self.trajectories)
        if self.matching is not self.layers:
            whole = self.batch_size, k.device
            bits = window_bits(self.run_seed, SCORE_NET_WINDOWS, step, *whole)[self.shard]
            stream, draw = self.matching.choose(k, bits), draw + 1  # as of `FreshRollout`
        noise = ops.Noise(seeds, stream, draw=draw)
        mean = self._at(self.means, k - 1, trajectory)
        return Batch(self.matching.step_from_mean(mean, self.student.log_scaled_gamma, noise), noise, labels)

    def student_batch(self, step):
        """States x_k from the pool, with antithetic layers and new noise."""
        device = self.layers.tau.device
        k = draw_layers(self.run_seed, STUDENT_LAYERS, step, self.batch_size, self.layers.nfe, device)[self.shard]
        places = (self.run_seed, STUDENT_STATES, step, self.batch_size, device)
        trajectory = ops.integers_below(self.trajectories, *places)[self.shard]
        seeds = ops.integers(self.run_seed, STUDENT_SEEDS, step, self.batch_size, device)[self.shard]
        bits = None
        if self.matching is not self.layers:
            bits = window_bits(self.run_seed, STUDENT_WINDOWS, step, self.batch_size, device)[self.shard]
        noise, labels = ops.Noise(seeds, self.matching.choose(k, bits)), labels_at(self.labels, trajectory)
        return Batch(self._at(self.states, k, trajectory), noise, labels)

    def _at(self, pool, index, trajectory):
        return pool[trajectory // self.share, index, trajectory % self.share]


def build_rollout(context, student, prepared=None):
    """The rollout of `student`, a network with `log_scaled_gamma`, that the configuration names.

    prepared: the student as its engine's `frozen` has it, which knows whether its weights are cut.
    `rollout.redraw` belongs to the pool: fresh states are used once.
    """
    rollout = PooledRollout if context.config.rollout.mode == "pooled" else FreshRollout
    return rollout(context, student, prepared or Prepared(student))

"""Where training states come from: trajectories of the student, rolled `pooled` (once a cycle) or `fresh` (for every update).

A cycle is `f_learning_times` updates of the score network; between two student updates the student does not change, so one
rollout serves a whole cycle: each trajectory gives K training pairs. Every number here is a function of (run seed,
counter), so nothing of a rollout has to be saved: it is rolled again when a run goes on.

With several processes the batch of an update is the same set of samples: numbers are addressed by a sample's place in the whole batch or pool, and each rank
takes its part. A pool is rolled in equal shares and gathered, so that every rank has all of it and the shuffle goes over the whole.
"""

from dataclasses import dataclass

import torch

from .. import ops
from ..execution import EAGER
from ..parallel.world import ALONE

# Purposes of the run seed's random numbers (the last word of the Philox counter), so that no two uses share numbers.
POOL_SEEDS, POOL_ORDER, STUDENT_LAYERS, STUDENT_STATES, STUDENT_SEEDS, SCORE_NET_LAYERS, SCORE_NET_SEEDS = range(1, 8)


@dataclass(frozen=True)
class Batch:
    """States of one update: x is x_{k-1} for the score network and x_k for the student, [B, *event]; k [B].

    The noise that makes x_{k-1} from x_k has the address (seeds [B], stream k, redraw [B] or None for 0), unless `noise` [B, *event] is given.
    """

    x: torch.Tensor
    k: torch.Tensor
    seeds: torch.Tensor
    redraw: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    def split(self, parts):
        """As many batches of equal size, whose samples follow each other."""
        size = len(self.k) // parts
        cut = lambda value, part: None if value is None else value[part * size : (part + 1) * size]
        return (
            [self]
            if parts == 1
            else [
                Batch(*(cut(value, part) for value in (self.x, self.k, self.seeds, self.redraw, self.noise)))
                for part in range(parts)
            ]
        )


def draw_layers(run_seed, purpose, step, batch_size, nfe, device="cpu"):
    """Layers k in 1 .. nfe for one update, int64 [B], in antithetic pairs: B//2 + 1 draws k, then nfe + 1 - k, cut to B."""
    bits = ops.integers(run_seed, purpose, step, batch_size // 2 + 1, device) & 0xFFFFFFFF
    k = 1 + (bits * nfe >> 32)
    return torch.cat([k, nfe + 1 - k])[:batch_size]


@torch.no_grad()
def roll_down(predict, layer, log_gamma, x, k, seeds, lowest, noise=None):
    """Roll x = x_K [B, *event] down to x_lowest and return each sample's x_k, k [B]: the whole batch goes to the lowest layer drawn.

    predict: the student (x, t) -> noise. seeds [B] address the noise; `noise` [K - lowest, B, *event] replaces it, layer K first.
    """
    picked = x
    for index, current in enumerate(range(layer.nfe, lowest, -1)):
        layers = torch.full_like(k, current)
        x = layer.step(
            x, predict(x, layer.tau[layers]), layers, log_gamma, seeds, noise=None if noise is None else noise[index]
        )
        picked = torch.where((k == current - 1).reshape(-1, *[1] * (x.ndim - 1)), x, picked)
    return picked


@torch.no_grad()
def one_layer_on(predict, layer, log_gamma, batch):
    """The batch one layer further down: x_{k-1} in the place of x_k, its noise at the same address."""
    eps_hat = predict(batch.x, layer.tau[batch.k])
    x = layer.step(batch.x, eps_hat, batch.k, log_gamma, batch.seeds, batch.redraw, batch.noise)
    return Batch(x, batch.k, batch.seeds, batch.redraw, batch.noise)


class FreshRollout:
    """New trajectories of the whole batch for every update, as the published code does."""

    def __init__(self, config, layer, student, execution=EAGER, world=ALONE):
        self.layer, self.student, self.predict = layer, student, execution.compiled(student)
        self.run_seed, self.batch_size, self.part = (
            config.seed,
            config.train.batch_size,
            world.part(config.train.batch_size),
        )

    def start_cycle(self, cycle):
        """Nothing to prepare."""

    def student_batch(self, step):
        """States x_k for a student update."""
        return self._roll(step, STUDENT_LAYERS, STUDENT_SEEDS)

    def score_net_batch(self, step):
        """States x_{k-1} for an update of the score network."""
        return one_layer_on(
            self.predict, self.layer, self.student.log_scaled_gamma, self._roll(step, SCORE_NET_LAYERS, SCORE_NET_SEEDS)
        )

    def _roll(self, step, layers_purpose, seeds_purpose):
        device = self.layer.tau.device
        draw = lambda where: draw_layers(self.run_seed, layers_purpose, step, self.batch_size, self.layer.nfe, where)
        # Drawn twice, so that the host knows the lowest without waiting for the device. It is the whole batch's: ranks have to make equally many calls.
        lowest, k = int(draw("cpu").min()), draw(device)[self.part]
        seeds = ops.integers(self.run_seed, seeds_purpose, step, self.batch_size, device)[self.part]
        x = ops.draw_noise(seeds, 0, self.student.event_shape)  # x_K
        return Batch(roll_down(self.predict, self.layer, self.student.log_scaled_gamma, x, k, seeds, lowest), k, seeds)


class PooledRollout:
    """One rollout of ceil(f_learning_times B / (K redraw)) trajectories right after each student update.

    All their transitions, shuffled, are the cycle's minibatches. With `redraw` r > 1 each stored mean is used r times,
    with new noise each time. The next student update takes its x_k from the same pool: they are still on-policy.
    """

    def __init__(self, config, layer, student, execution=EAGER, world=ALONE):
        self.layer, self.student, self.predict, self.world = layer, student, execution.compiled(student), world
        self.run_seed, self.batch_size, self.part = (
            config.seed,
            config.train.batch_size,
            world.part(config.train.batch_size),
        )
        self.cycle_length = config.train.f_learning_times
        self.redraws, self.chunk = config.rollout.redraw, config.rollout.chunk
        self.trajectories = -(-self.cycle_length * self.batch_size // (layer.nfe * self.redraws))
        self.share = -(
            -self.trajectories // world.size
        )  # rolled by each rank; the last ones roll some that are not used
        # The pool stays where it is in memory: a recorded rollout writes it again and again. A trajectory's rank comes first in the index.
        device, event_shape = layer.tau.device, student.event_shape
        pool = lambda states: torch.zeros(world.size, states, self.share, *event_shape, device=device)
        self.states, self.means = (
            pool(layer.nfe + 1),
            pool(layer.nfe) if self.redraws > 1 else None,
        )  # x_k at index k; the mean of x_{k-1} at k - 1
        # This rank's share; of one process, the pool itself.
        self.own_states, self.own_means = (
            value if value is None or world.size == 1 else torch.zeros_like(value[:1])
            for value in (self.states, self.means)
        )
        self._roll = execution.graphed(self._roll_share)

    def start_cycle(self, cycle):
        """Roll the pool of a cycle with the student as it is now."""
        device, transitions = self.layer.tau.device, self.layer.nfe * self.trajectories
        self.seeds = ops.integers(
            self.run_seed, POOL_SEEDS, cycle, self.share * self.world.size, device
        )  # [N and the unused]
        self._roll(self.seeds[self.world.rank * self.share : (self.world.rank + 1) * self.share])
        if self.world.size > 1:
            self.world.mark_part("gathering the pool")
            for own, whole in ((self.own_states, self.states), (self.own_means, self.means)):
                if own is not None:
                    self.world.gather(own[0], into=whole)
        # Every redraw goes through all transitions in an order of its own: position -> transition.
        orders = [
            ops.integers(self.run_seed, POOL_ORDER, cycle * self.redraws + r, transitions, device).argsort(stable=True)
            for r in range(self.redraws)
        ]
        self.order = torch.cat(orders)

    @torch.no_grad()
    def _roll_share(self, all_seeds):
        """Fill this rank's states and means with the trajectories of these seeds [share]."""
        states, means = self.own_states[0], None if self.own_means is None else self.own_means[0]
        for first in range(0, self.share, self.chunk):
            part = slice(first, first + self.chunk)
            seeds = all_seeds[part]
            x = states[self.layer.nfe, part] = ops.draw_noise(seeds, 0, self.student.event_shape)
            for current in range(self.layer.nfe, 0, -1):
                k = torch.full_like(seeds, current)
                eps_hat = self.predict(x, self.layer.tau[k])
                if means is not None:
                    means[current - 1, part] = self.layer.mean(x, eps_hat, k)
                x = states[current - 1, part] = self.layer.step(x, eps_hat, k, self.student.log_scaled_gamma, seeds)

    @torch.no_grad()
    def score_net_batch(self, step):
        """Minibatch number step % f_learning_times of the pool: x_{k-1} and the address of its noise."""
        first = (step % self.cycle_length) * self.batch_size + self.part.start
        transition = self.order[
            first : first + self.part.stop - self.part.start
        ]  # [B of this rank], trajectory + count * (k - 1)
        k, trajectory = transition // self.trajectories + 1, transition % self.trajectories
        seeds = self.seeds[trajectory]
        if self.redraws == 1:
            return Batch(self._of(self.states, k - 1, trajectory), k, seeds)
        position = torch.arange(first, first + len(transition), device=k.device)
        redraw = position // (self.layer.nfe * self.trajectories)  # [B]
        x = self.layer.redraw(self._of(self.means, k - 1, trajectory), k, self.student.log_scaled_gamma, seeds, redraw)
        return Batch(x, k, seeds, redraw)

    def student_batch(self, step):
        """States x_k from the pool, with antithetic layers and new noise."""
        device = self.layer.tau.device
        k = draw_layers(self.run_seed, STUDENT_LAYERS, step, self.batch_size, self.layer.nfe, device)[self.part]
        bits = ops.integers(self.run_seed, STUDENT_STATES, step, self.batch_size, device)[self.part] & 0xFFFFFFFF
        trajectory = bits * self.trajectories >> 32
        return Batch(
            self._of(self.states, k, trajectory),
            k,
            ops.integers(self.run_seed, STUDENT_SEEDS, step, self.batch_size, device)[self.part],
        )

    def _of(self, pool, index, trajectory):
        return pool[trajectory // self.share, index, trajectory % self.share]


def build_rollout(config, layer, student, execution=EAGER, world=ALONE):
    """The rollout of `student` that the configuration names. `rollout.redraw` belongs to the pool: fresh states are used once."""
    return (PooledRollout if config.rollout.mode == "pooled" else FreshRollout)(
        config, layer, student, execution, world
    )

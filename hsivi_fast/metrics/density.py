"""Runs with a target: what measures their draws, and what they are compared with."""

import math
import sys

import torch

from ..data import npz_arrays, read_npz_array
from ..density.reference import gaussian_fit, langevin_draws, reference_for
from ..execution import EAGER
from .posterior import compare_draws, kernel_stein_discrepancy, median_distance

COMPARED = (
    *("sliced_wasserstein", "mean_error", "std_error", "correlation_error", "energy_distance", "stein_discrepancy"),
)
ALONE = ("stein_discrepancy",)
AT_ONCE = 65_536  # draws of one call: a set of seeds


class PosteriorMetric:
    """How good draws are: against a reference, where there is one, and against the target's score.

    context: of a run with a target, with its teacher. The reference is that of a shipped target (`reference_for`), or
    the draws of `eval.reference`, an npz file with `draws` [N, D] of the parameters.
    Draws are compared on `Target.summary`: the parameters, but for targets that say otherwise.
    """

    batch_size = AT_ONCE

    def __init__(self, context):
        self.context, self.world = context, context.world
        self.target, settings = context.teacher.target, context.config.eval
        self.reference = None
        if settings.reference is not None:
            self.reference = _read_reference(settings.reference, len(self.target.summary_names))
        elif (known := reference_for(self.target)) is not None:
            self.reference = self.target.summary(known.float()).double()
        self.scale = None if self.reference is None else median_distance(self.reference)
        self.columns = ALONE if self.reference is None else COMPARED
        if self.reference is not None and self.reference.shape[1] == 1:
            self.columns = tuple(column for column in COMPARED if column != "correlation_error")

    def measure(self, samples, count):
        """{column: value} of `count` draws over all ranks.

        samples: this rank's share of them as the run's sampler draws them, coordinates [N, d], or batches of these.
        """
        u = samples if torch.is_tensor(samples) else torch.cat(list(samples))
        x = self.context.decoder.unconstrained(self.world.gather_shares(u, count))
        values = {}
        if self.reference is not None:
            values = compare_draws(self.target.summary(x), self.reference)
        scale = self.scale if self.scale is not None and len(self.target.summary_names) == x.shape[1] else None
        stein = kernel_stein_discrepancy(x, self.target.score, scale)
        return {column: {**values, **stein}[column] for column in self.columns}

    def distance_alone(self):
        """Itself: there is no search among its columns."""
        return self


def _read_reference(path, columns):
    where = f"eval.reference: {str(path)!r}"
    shape, dtype = npz_arrays(path, where, "draws").get("draws", ((), None))
    if len(shape) != 2 or shape[1] != columns or shape[0] < 2 or dtype.kind != "f":
        raise ValueError(f"{where} has draws {list(shape)}; expected floats [N, {columns}], one column a parameter")
    return torch.from_numpy(read_npz_array(path, "draws", where)).double()


class DrawnBefore:
    """Draws of something else in the place of a `Sampler`: a function (n, seed) -> x [n, d], unconstrained."""

    nfe, execution = 0, EAGER

    def __init__(self, context, draw):
        self.decoder, self.draw = context.decoder, draw

    def __call__(self, seeds, batch_size=AT_ONCE, on_batch=None, labels=None):
        """As of `Sampler`: the coordinates of as many draws as seeds; the first seed counts."""
        x = self.draw(len(seeds), int(seeds[0])).to(self.decoder.mean)
        if on_batch:
            on_batch(len(seeds))
        return self.coordinates(x)

    def coordinates(self, x):
        """u [n, d] of unconstrained x [n, d], float32."""
        return torch.linalg.solve_triangular(self.decoder.factor, (x - self.decoder.mean).T, upper=False).T


class OfAnotherRun:
    """The sampler of another run with the same target, in the coordinates of this one's base.

    context: of this run; sampler, other: of the other.
    """

    def __init__(self, context, sampler, other):
        self.nfe, self.execution = sampler.nfe, sampler.execution
        self.sampler, self.to_target, self.back = sampler, other.decoder, DrawnBefore(context, None)

    def __call__(self, seeds, batch_size=AT_ONCE, on_batch=None, labels=None):
        """As of `Sampler`."""
        return self.back.coordinates(self.to_target.unconstrained(self.sampler(seeds, batch_size, on_batch)))


def baselines(context, bridge, evaluations, warn=lambda line: print(line, file=sys.stderr)):
    """{name of a row: (sampler, gradient evaluations that it took)} for the `eval.baselines` of a run with a target.

    base: the bridge's Gaussian. particles: the sequential Monte Carlo sampler's, which the student has learned from.
    mean_field, full_rank: the Gaussians of ADVI; langevin: Metropolis-adjusted chains. These have the run's own number
    of gradient evaluations. Where Pyro is missing, its rows are left out, and `warn` is told.
    """
    target, found = context.teacher.target, {}
    for name in context.config.eval.baselines:
        if name == "base":
            found[name] = DrawnBefore(context, lambda n, seed: _from_base(context, n, seed)), None
        elif name == "particles":
            found[name] = DrawnBefore(context, lambda n, seed: _some(bridge, n, seed)), bridge.evaluations
        elif name == "langevin":
            found[name] = DrawnBefore(context, _Chains(context, evaluations)), evaluations
        elif name in ("mean_field", "full_rank"):
            try:
                fit = gaussian_fit(target, name, evaluations, context.config.seed)
            except ValueError as error:
                warn(f"warning: {name} is left out of the table: {error}")
                continue
            found[name] = DrawnBefore(context, fit.sample), fit.evaluations
    return found


class _Chains:
    """Draws of Langevin chains for all sets of seeds of a table, made at the first call."""

    def __init__(self, context, evaluations):
        settings = context.config.eval
        self.make = lambda: langevin_draws(
            context.teacher.target, settings.num_samples * settings.seeds, evaluations, context.config.seed
        )
        self.draws = None

    def __call__(self, n, seed):
        if self.draws is None:
            # In an order of its own, so that each set is of all chains and all their steps.
            draws = self.make()
            order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(0))
            self.draws = draws[order]
        return self.draws[seed : seed + n]


def _from_base(context, n, seed):
    random = torch.Generator().manual_seed(seed)
    u = torch.randn(n, context.teacher.target.dim, generator=random)
    return context.decoder.unconstrained(u.to(context.device))


def _some(bridge, n, seed):
    """n of the particles at the target, with repetition where there are fewer."""
    random = torch.Generator().manual_seed(seed)
    particles = bridge.to_target(bridge.below[0])
    rounds = [torch.randperm(len(particles), generator=random) for _ in range(math.ceil(n / len(particles)))]
    return particles[torch.cat(rounds)[:n]]

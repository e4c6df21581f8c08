"""From a target to its bridge: a Gaussian base, the densities between, and paths from one knot to the next.

It is a sequential Monte Carlo sampler (Del Moral, Doucet and Jasra 2006). Particles begin at the base and come down a
ladder of densities: at each rung they are weighed, resampled, and moved by Metropolis-adjusted Langevin steps. What is
kept are the particles at the knots and how they are paired, which is what a student learns its first paths from.

Everything is drawn from one generator on the CPU: on one machine the same seed gives the same bridge.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..method.bridge import path_knots

NEWTON_STEPS = 60  # of the fit of a Gaussian
STEEPEST = 20.0  # what a whitened score counts at most there, for targets with heavy tails
TRUST = 4.0  # and how much a variance may change in one step
LEAST_EFFECTIVE = 0.7  # the share of particles that counts after a rung's weights
ACCEPTED = 0.57  # the best share of accepted moves (Roberts and Rosenthal 1998)
SMALLEST_STEP = 0.01  # of a move, relative to the largest
PROPER = 0.1  # what Stein's identity, which is 1 of a density, has to be at least at a given base's particles
JITTER = 1e-6  # on a covariance, relative to its mean variance
LONGEST_LADDER = 500  # rungs, after which a target counts as improper
NOISE = {"transport": 0.1, "descent": 0.5}  # of a pair's last step, where the run does not say it
TRANSPORTED = 3  # dimensions up to which states are paired by the cheapest transport


@dataclass(frozen=True)
class Bridge:
    """What belongs to one target: the base N(mean, factor factor^T), the knots, and paths between them.

    mean: [d]; factor: lower triangular [d, d]. In coordinates u with x = mean + factor u the base is N(0, I).
    levels, scales: lambda_k and how wide p_k is, 1 / sqrt(mean squared score in a coordinate); float64 [K + 1].
    above, below: [K, N, d], states u = x_k of paths and where they are at the next knot, x_{k-1}; k = 1 first.
    evaluations: gradient evaluations of the target that finding all this took.
    """

    mean: torch.Tensor
    factor: torch.Tensor
    levels: np.ndarray
    scales: np.ndarray
    above: torch.Tensor
    below: torch.Tensor
    evaluations: int

    def tensors(self):
        """All of it as {name: tensor}, for a file."""
        return {name: torch.as_tensor(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def of_tensors(cls, tensors):
        """The inverse of `tensors`. Raises ValueError where one is missing or they do not fit each other."""
        missing = [name for name in cls.__dataclass_fields__ if name not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        dim, knots = tensors["mean"].numel(), tensors["levels"].numel()
        paths = (knots - 1, tensors["above"].shape[1] if tensors["above"].ndim == 3 else 0, dim)
        shapes = {"mean": (dim,), "factor": (dim, dim), "levels": (knots,), "scales": (knots,)}
        for name, shape in {**shapes, "above": paths, "below": paths, "evaluations": ()}.items():
            if tuple(tensors[name].shape) != shape or not torch.isfinite(tensors[name]).all():
                raise ValueError(
                    f"{name} is of shape {list(tensors[name].shape)} or not finite; expected {list(shape)}"
                )
            wanted = {"levels": torch.float64, "scales": torch.float64, "evaluations": torch.int64}
            if tensors[name].dtype != wanted.get(name, torch.float32):
                raise ValueError(f"{name} is of type {str(tensors[name].dtype)[6:]}")
        levels, factor = tensors["levels"], tensors["factor"]
        if levels[0] != 1 or levels[-1] != 0 or not (levels.diff() < 0).all():
            raise ValueError("levels do not fall from 1 to 0")
        if not (tensors["scales"] > 0).all():
            raise ValueError("scales are not positive")
        if factor.triu(1).any() or not (factor.diagonal() > 0).all():
            raise ValueError("factor is not lower triangular with a positive diagonal")
        values = {name: tensors[name] for name in cls.__dataclass_fields__}
        values |= {name: tensors[name].numpy() for name in ("levels", "scales")}
        values["evaluations"] = int(tensors["evaluations"])
        return cls(**values)

    def to_target(self, u):
        """x = mean + factor u, of coordinates u [B, d]."""
        return self.mean.to(u) + u @ self.factor.to(u).T


class Standardised:
    """A target in the coordinates u of its base, with the auxiliary densities of the bridge.

    count(n): called with the gradient evaluations that each call takes.
    """

    def __init__(self, target, mean, factor, count):
        self.target, self.mean, self.factor, self.count = target, mean, factor, count

    def value_and_score(self, u):
        """(log p [B], its gradient at u [B, d]); what is no number is so improbable that it is never accepted."""
        value, score = self.target.value_and_score(self.mean + u @ self.factor.T)
        self.count(len(u))
        score = score @ self.factor
        fine = torch.isfinite(value) & torch.isfinite(score).all(1)
        return torch.where(fine, value, -torch.inf), torch.where(fine[:, None], score, 0.0)

    def auxiliary(self, u, level):
        """(log p_k [B], its gradient [B, d], log p - log base [B]) at u [B, d], for lambda_k = level."""
        value, score = self.value_and_score(u)
        base = -u.square().sum(1) / 2
        return (1 - level) * base + level * value, level * score - (1 - level) * u, value - base


def find_bridge(target, nfe, settings, particles, moves, seed, device="cpu", on_progress=None):
    """The `Bridge` of a target with K = `nfe` layers.

    settings: a run's `bridge`, see `BridgeConfig`. particles: N, as many as there are paths. moves: of each particle at
    each rung. on_progress(n): called with gradient evaluations as they are made.
    Raises ValueError where the chains leave for infinity or the ladder does not end: the target is improper then, or
    far wider or narrower than `settings.spread`.
    """
    finder = _Finder(target, settings, seed, device, on_progress)
    mean, factor = finder.base()
    rungs, distances, particles_at = finder.ladder(mean, factor, particles, moves)
    levels = path_knots(settings.schedule, nfe, rungs, distances)
    return finder.paths(levels, rungs, particles_at, moves)


class _Finder:
    def __init__(self, target, settings, seed, device, on_progress):
        self.target, self.settings, self.device = target, settings, torch.device(device)
        self.random = torch.Generator().manual_seed(seed)
        self.on_progress, self.evaluations, self.step = on_progress, 0, 0.3

    def base(self):
        """(mean [d], lower triangular factor [d, d]) of the Gaussian that the bridge begins with."""
        given, dim = self.settings, self.target.dim
        if given.mean is not None:
            mean, scale = (
                torch.tensor(values, dtype=torch.float32).expand(dim) for values in (given.mean, given.scale)
            )
            return mean.clone().to(self.device), torch.diag(scale).to(self.device)
        mean, factor = self._gaussian()
        points = self._chains(mean, factor)
        mean = points.mean(0)
        if not (torch.isfinite(mean).all() and points.abs().max() < 1e6):
            raise ValueError(f"target.log_density: {_improper(self.settings)}")
        return mean, _factor(torch.cov(points.T).reshape(dim, dim))

    def _gaussian(self):
        """A Gaussian near a mode, by damped Newton steps in its own whitened coordinates.

        At z ~ N(0, I), x = mean + factor z, the best Gaussian has E[score in z] = 0 and -E[score z^T] = I.
        """
        dim, chains = self.target.dim, self.settings.chains
        mean, factor = torch.zeros(dim, device=self.device), torch.eye(dim, device=self.device)
        for step in range(NEWTON_STEPS):
            z = self._normal(chains, dim)
            score = self._score(mean + z @ factor.T) @ factor
            score = score.clamp(-STEEPEST, STEEPEST)
            curvature = -(score - score.mean(0)).T @ z / chains
            values, axes = torch.linalg.eigh((curvature + curvature.T) / 2)
            values = values.clamp(1 / TRUST, TRUST)
            rate = min(1.0, 10 / (step + 1))
            move = (axes / values) @ (axes.T @ score.mean(0))
            longest = move.norm() / math.sqrt(dim)
            mean = mean + rate * factor @ move / longest.clamp_min(1.0)
            factor = factor @ (axes * values ** (-rate / 2)) @ axes.T
            factor = _factor(factor @ factor.T)
        return mean, factor

    def _chains(self, mean, factor):
        """States [chains, d] of Langevin chains that began wide apart, so that they find all modes.

        factor: what they are preconditioned with. In the first half no step is refused and none is longer than the
        noise allows, since a chain that begins far out would never move otherwise.
        """
        settings, dim = self.settings, self.target.dim
        started = settings.spread * self._normal(settings.chains, dim)
        z = torch.linalg.solve_triangular(factor, (started - mean).T, upper=False).T
        at, step = Standardised(self.target, mean, factor, self._count), 0.3 / dim ** (1 / 3)
        for _ in range(settings.moves // 2):
            score = at.value_and_score(z)[1]
            drift = step * score
            drift = drift * (math.sqrt(dim) / 2 / drift.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)
            z = z + drift + math.sqrt(2 * step) * self._normal(*z.shape)
        return mean + self._moved(at, z, 1.0, settings.moves - settings.moves // 2) @ factor.T

    def ladder(self, mean, factor, particles, moves):
        """(lambda of each rung, how far it is from the base, the particles there), from lambda 0 to 1.

        Each rung is as far from the one before as `LEAST_EFFECTIVE` allows.
        """
        self.at, self.mean, self.factor = Standardised(self.target, mean, factor, self._count), mean, factor
        u = self._normal(particles, self.target.dim)
        rungs, distances, kept = [0.0], [0.0], [u]
        while rungs[-1] < 1:
            ratio = self._log_ratio(u)
            level = _next_level(ratio, rungs[-1])
            effective = _effective((level - rungs[-1]) * ratio)
            distances.append(distances[-1] + math.sqrt(max(-math.log(effective), 1e-9)))
            u = self._moved(self.at, self._resampled(u, (level - rungs[-1]) * ratio), level, moves)
            rungs.append(level)
            kept.append(u)
            if len(rungs) > LONGEST_LADDER:
                raise ValueError(f"target.log_density: {_improper(self.settings)}")
        if self.settings.mean is not None and self._stein(u) < PROPER:  # no chains have been there
            raise ValueError(f"target.log_density: {_improper(self.settings)}")
        return np.array(rungs), np.array(distances), kept

    def paths(self, levels, rungs, particles_at, moves):
        """The `Bridge` of these levels, from the ladder's particles."""
        states = []
        for level in levels:
            rung = int(np.searchsorted(rungs, level + 1e-9)) - 1
            u, rest = particles_at[rung], level - rungs[rung]
            if rest > 1e-9:
                u = self._resampled(u, rest * self._log_ratio(u))
            if level > 0:
                u = self._moved(self.at, u, level, moves)
            states.append(u)
        scales = [self._scale(u, level) for u, level in zip(states, levels)]
        below = [self._below(k, states, levels, scales[k - 1]) for k in range(1, len(levels))]
        return Bridge(
            self.mean.cpu(),
            self.factor.cpu(),
            levels,
            np.array(scales),
            torch.stack(states[1:]).cpu(),
            torch.stack(below).cpu(),
            self.evaluations,
        )

    def _below(self, k, states, levels, scale):
        """Where the particles of knot k are at knot k - 1: paired there, and moved by a short Langevin step.

        The step leaves the density as it is and gives the pair the noise that a layer has.
        """
        u, settings = states[k], self.settings
        coupling = settings.coupling or ("transport" if u.shape[1] <= TRANSPORTED else "descent")
        noise = NOISE[coupling] if settings.noise is None else settings.noise
        if coupling == "transport":
            paired = states[k - 1]
        else:  # those that the weights kill go to the nearest that they keep (Reich 2013)
            paired = self._resampled(u, (levels[k - 1] - levels[k]) * self._log_ratio(u))
        paired = paired[_assignment(u, paired)]
        step, moved = noise * scale**2 / 8, paired
        for _ in range(4):  # 4 steps of variance 2 step: together noise * scale^2
            score = self.at.auxiliary(moved, levels[k - 1])[1]
            moved = moved + step * score + math.sqrt(2 * step) * self._normal(*u.shape)
        sane = torch.isfinite(moved).all(1) & ((moved - paired).norm(dim=1) < 10 * scale * math.sqrt(u.shape[1]))
        return torch.where(sane[:, None], moved, paired)

    def _stein(self, u):
        """-E (u - E u).score / d at particles of the target, 1 where it is a density; 0 where it is even."""
        score = self.at.value_and_score(u)[1]
        return -float(((u - u.mean(0)) * score).sum(1).mean()) / u.shape[1]

    def _scale(self, u, level):
        squares = self.at.auxiliary(u, level)[1].square().sum(1)
        return min(1.0, math.sqrt(u.shape[1] / max(float(squares.median()), 1e-12)))

    def _log_ratio(self, u):
        return self.at.auxiliary(u, 0.0)[2]

    def _moved(self, at, u, level, moves):
        """u after so many Metropolis-adjusted Langevin steps at a level.

        Each particle draws the size of each of its steps, over two powers of ten: where the density is narrower than
        elsewhere, as in a funnel, small ones are accepted. The largest is kept where `ACCEPTED` of all are.
        """
        value, score, _ = at.auxiliary(u, level)
        for _ in range(moves):
            drawn = torch.rand(len(u), 1, generator=self.random).to(self.device)
            step, noise = self.step * SMALLEST_STEP**drawn, self._normal(*u.shape)
            proposed = u + step * score + (2 * step).sqrt() * noise
            value_there, score_there, _ = at.auxiliary(proposed, level)
            back = (u - proposed - step * score_there) / (2 * step).sqrt()
            log_ratio = value_there - value + (noise.square() - back.square()).sum(1) / 2
            drawn = torch.rand(len(u), generator=self.random).to(self.device)
            accepted = torch.isfinite(value_there) & (drawn.log() < log_ratio)
            u = torch.where(accepted[:, None], proposed, u)
            value, score = (
                torch.where(accepted, value_there, value),
                torch.where(accepted[:, None], score_there, score),
            )
            self.step = min(self.step * math.exp(0.2 * (float(accepted.float().mean()) - ACCEPTED)), 1.0)
        return u

    def _resampled(self, u, log_weights):
        """As many particles, drawn by their weights (systematic resampling)."""
        weights = _weights(log_weights).cumsum(0)
        at = (torch.arange(len(u)) + torch.rand(1, generator=self.random, dtype=torch.float64)) / len(u)
        return u[torch.searchsorted(weights, at.to(weights)).clamp_max(len(u) - 1)]

    def _score(self, x):
        value, score = self.target.value_and_score(x)
        self._count(len(x))
        return torch.where(torch.isfinite(value)[:, None] & torch.isfinite(score), score, 0.0)

    def _normal(self, *shape):
        return torch.randn(*shape, generator=self.random).to(self.device)

    def _count(self, evaluations):
        self.evaluations += evaluations
        if self.on_progress:
            self.on_progress(evaluations)


def _improper(settings):
    problem = "its chains do not settle: it has no finite integral, or is not of the size of bridge.spread"
    return f"{problem} = {settings.spread}"


def _factor(covariance):
    """Cholesky's factor of a covariance [d, d], with a little on its diagonal."""
    jitter = JITTER * covariance.diagonal().mean()
    return torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance), device=covariance.device))


def _weights(log_weights):
    """Normalised weights, float64 [N]; a particle whose density is no number has none."""
    log_weights = torch.nan_to_num(log_weights.double(), nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    if not bool((log_weights > -torch.inf).any()):
        raise ValueError("target.log_density: it is finite at none of the particles; give bridge.mean and bridge.scale")
    return torch.softmax(log_weights, 0)


def _effective(log_weights):
    """The share of particles that counts: 1 where all weights are equal."""
    return float(1 / _weights(log_weights).square().sum()) / len(log_weights)


def _next_level(log_ratio, level):
    """The highest lambda above `level` that leaves `LEAST_EFFECTIVE` of the particles, by bisection."""
    if _effective((1 - level) * log_ratio) >= LEAST_EFFECTIVE:
        return 1.0
    low, high = level, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _effective((middle - level) * log_ratio) >= LEAST_EFFECTIVE else (low, middle)
    return max(low, min(level + 1e-4, 1.0))


def _assignment(points, others):
    """For each of the points [N, d] its partner among the others [N, d], the sum of squared distances least: [N]."""
    if points.shape[1] == 1:  # in their order; on a line what is below takes a hundred times longer than elsewhere
        partner = torch.empty(len(points), dtype=torch.int64, device=points.device)
        partner[points[:, 0].argsort()] = others[:, 0].argsort()
        return partner
    from scipy.optimize import linear_sum_assignment  # here: it takes a tenth of a second, and few runs need it

    _, partner = linear_sum_assignment(torch.cdist(points, others).square().cpu().numpy())
    return torch.from_numpy(partner).to(points.device)

"""Noise levels of the teacher and the knots at which a few-step sampler visits them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Names of whole schedules, and of kinds that need where they start and end.
BETAS = ("linear", "cosine", "cosine_4000", "edm")
BETA_KINDS = ("linear", "scaled_linear", "sigmoid")
EDM_RHO = 7


def signal_levels(betas, steps):
    """alpha_bar_t = prod (1 - beta) for t = 0 .. steps-1, float64 [steps].

    `linear`: beta from 1e-4 to 0.02 (Ho et al. 2020, section 4). `cosine`: Nichol & Dhariwal 2021, eq. 17.
    `cosine_4000`: every fourth level of `cosine` in 4000 steps, for 1000 steps. It is what a network was trained on
    that was shown t / 4 for t = 0 .. 3999, as improved-diffusion's with `rescale_timesteps`: at its timestep t the
    level of the formula at (t + 1/4) / 1000, where `cosine` in 1000 steps has that at (t + 1) / 1000.
    `edm`: the noise levels of EDM's sampler in as many steps, sigma_t from 0.002 to 80 evenly in sigma^(1/7), with
    alpha_bar = 1 / (1 + sigma^2) (Karras et al. 2022, arXiv 2206.00364, eq. 5); for teachers of every sigma.
    {kind, start, end}, a mapping or an object with these: betas between two, as diffusers' schedulers have them.
    `linear` is even in beta, `scaled_linear` in its square root (Rombach et al. 2022), `sigmoid` one from -6 to 6.
    A sequence: these betas themselves, one a step.
    Raises ValueError for another name, for `cosine_4000` with another number of steps, and for betas that are not
    `steps` numbers between 0 and 1.
    """
    if not isinstance(betas, str):
        beta = _between(betas, steps) if _has_kind(betas) else np.asarray(betas, dtype=np.float64)
        if beta.shape != (steps,):
            raise ValueError(f"teacher.betas: {len(beta)} of them for teacher.steps={steps}; give one a step")
        if not ((beta > 0) & (beta < 1)).all():
            raise ValueError("teacher.betas: one of them is not between 0 and 1")
    elif betas == "linear":
        beta = np.linspace(1e-4, 0.02, steps)
    elif betas == "cosine":
        level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - level[1:] / level[:-1], 0.999)
    elif betas == "cosine_4000":
        if steps != 1000:
            raise ValueError(
                f"teacher.steps: {steps} does not go with teacher.betas=cosine_4000, which has 1000 levels"
            )
        return signal_levels("cosine", 4000)[::4]
    elif betas == "edm":
        lowest, highest = 0.002 ** (1 / EDM_RHO), 80 ** (1 / EDM_RHO)
        return 1 / (1 + np.linspace(lowest, highest, steps) ** (2 * EDM_RHO))
    else:
        raise ValueError(f"teacher.betas: {betas!r} is unknown; choose one of {', '.join(BETAS)}")
    return np.cumprod(1 - beta)


def _has_kind(betas):
    return hasattr(betas, "kind") or isinstance(betas, Mapping)


def _between(betas, steps):
    """The betas of {kind, start, end}, float64 [steps]."""
    kind, start, end = (
        betas[key] if isinstance(betas, Mapping) else getattr(betas, key) for key in ("kind", "start", "end")
    )
    if kind == "linear":
        return np.linspace(start, end, steps)
    if kind == "scaled_linear":
        return np.linspace(np.sqrt(start), np.sqrt(end), steps) ** 2
    if kind == "sigmoid":
        return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps)))
    raise ValueError(f"teacher.betas.kind: {kind!r} is unknown; choose one of {', '.join(BETA_KINDS)}")


def knots(spacing, nfe, steps, drop_doubles=False, alpha_bar=None):
    """tau_0 < ... < tau_K, int64 [K + 1], K = nfe.

    `quad`: round(linspace(0, sqrt(0.8 steps), K + 1)^2). `uniform`: i (steps // (K + 1)). `angle`: evenly in
    arctan(sigma_t / sqrt(alpha_bar_t)) from 0 to 0.8 steps, the angle from x_0 to the noise in x_t, with alpha_bar
    [steps]. A sequence of K + 1 timesteps
    is these knots; for another number of layers than it is of, as a baseline has, `quad` takes its place.
    Raises ValueError where two knots fall together. With `drop_doubles` there are fewer than K layers then, which a
    DDIM baseline of many steps wants.
    """
    if nfe < 1 or nfe >= steps:
        raise ValueError(f"nfe: {nfe} layers do not fit a teacher of {steps} steps")
    if not isinstance(spacing, str):
        if len(spacing) == nfe + 1:
            return np.array(spacing, dtype=np.int64)
        spacing = "quad"
    if spacing == "angle":
        top = round(0.8 * steps)
        angle = np.arctan(np.sqrt(1 / alpha_bar[: top + 1] - 1))
        even = np.linspace(angle[0], angle[top], nfe + 1)
        times = np.interp(even, angle, np.arange(top + 1)).round().astype(np.int64)
    elif spacing == "quad":
        times = np.round(np.linspace(0, np.sqrt(0.8 * steps), nfe + 1) ** 2).astype(np.int64)
    elif spacing == "uniform":
        times = np.arange(nfe + 1, dtype=np.int64) * (steps // (nfe + 1))
    else:
        raise ValueError(f"spacing: {spacing!r} is unknown; choose quad, uniform or angle")
    distinct = np.unique(times)
    if len(distinct) <= nfe and not drop_doubles:
        raise ValueError(
            f"nfe: {nfe} layers with {spacing} spacing repeat a timestep; use fewer layers or another spacing"
        )
    return distinct


@dataclass(frozen=True)
class Schedule:
    """Knots tau_k (int64) and alpha_bar at them (float64), both [K + 1]."""

    timesteps: np.ndarray
    alpha_bar: np.ndarray

    ends_with_noise = False  # whether the last layer adds its noise: in images it would only be seen as noise

    @property
    def nfe(self):
        """K, the number of layers."""
        return len(self.timesteps) - 1

    def coefficients(self, eta):
        """{"a", "b", "c1", "variance"}, float64 [K] each, of the layers k = 1 .. K.

        They are A_k, B_k, DDIM's noise with that eta, and sigma_{k-1}^2.
        """
        variance = 1 - self.alpha_bar  # sigma^2, float64 [K + 1]
        low, high = variance[:-1], variance[1:]  # of x_{k-1} and x_k
        c1 = eta * np.sqrt((1 - (1 - high) / (1 - low)) * low / high)  # DDIM's sigma
        a = np.sqrt((1 - low) / (1 - high))
        b = np.sqrt(np.maximum(low - c1**2, 0)) - a * np.sqrt(high)
        return {"a": a, "b": b, "c1": c1, "variance": low}


def make_schedule(betas, steps, spacing, nfe, drop_doubles=False):
    """The schedule of a sampler with `nfe` layers for a teacher of `steps` steps; see `knots` and `signal_levels`."""
    alpha_bar = signal_levels(betas, steps)
    timesteps = knots(spacing, nfe, steps, drop_doubles, alpha_bar)
    return Schedule(timesteps, alpha_bar[timesteps])

"""The teacher's own path from noise to image, by a solver of the probability-flow ODE, with more steps than layers.

DPM-Solver++(2M): Lu et al. 2022, arXiv 2211.01095, algorithm 2, on the prediction of x_0. DDIM is its first order.
"""

import math
from dataclasses import dataclass

import numpy as np

SOLVERS = ("dpmpp", "ddim")


@dataclass(frozen=True)
class Step:
    """One step: x' = ratio x + now x_0 + before x_0', where x_0' is the prediction one step earlier.

    t: the timestep that the network is called at, where x_0 = (x - sigma eps_hat) / alpha.
    reaches: the layer's index k - 1 where x' is the path's state at the knot tau_{k-1}, None between two knots.
    """

    t: int
    alpha: float
    sigma: float
    ratio: float
    now: float
    before: float
    reaches: int | None


def path_steps(timesteps, alpha_bar, substeps, solver="dpmpp"):
    """The `Step`s from tau_K down to tau_0.

    timesteps: the knots tau_0 < ... < tau_K, ints; alpha_bar: of every timestep of the teacher, float64 [T].
    substeps: of each layer, evenly spaced in sqrt(t); those that fall together are one. solver: "dpmpp" or "ddim".
    """
    knots = [int(t) for t in timesteps]
    times = _fine_timesteps(knots, substeps)
    alpha, sigma = np.sqrt(alpha_bar[times]), np.sqrt(1 - alpha_bar[times])
    half_log_snr = np.log(alpha / sigma)
    steps = []
    for i in range(len(times) - 1):
        h = half_log_snr[i + 1] - half_log_snr[i]
        whole = -alpha[i + 1] * math.expm1(-h)
        before = 0.0
        if i and solver == "dpmpp":
            before = -whole * h / (2 * (half_log_snr[i] - half_log_snr[i - 1]))
        reaches = knots.index(times[i + 1]) if times[i + 1] in knots else None
        ratio = sigma[i + 1] / sigma[i]
        steps.append(Step(times[i], *map(float, (alpha[i], sigma[i], ratio, whole - before, before)), reaches))
    return steps


def _fine_timesteps(knots, substeps):
    """All timesteps of a path, descending; every knot is one of them."""
    times = set(knots)
    for low, high in zip(knots, knots[1:]):
        times |= set(np.round(np.linspace(math.sqrt(low), math.sqrt(high), substeps + 1) ** 2).astype(int).tolist())
    return sorted(times, reverse=True)


def roll_path(predict, steps, x):
    """Yield (k, state x_k) at each knot below x = x_K [B, *event], K - 1 first and 0 last.

    predict: the teacher, (x, t) -> noise, called with t an int; steps: as of `path_steps`.
    """
    earlier = None
    for step in steps:
        x_0 = (x - step.sigma * predict(x, step.t)) * (1 / step.alpha)
        x = step.ratio * x + step.now * x_0
        if step.before:
            x = x + step.before * earlier
        earlier = x_0
        if step.reaches is not None:
            yield step.reaches, x

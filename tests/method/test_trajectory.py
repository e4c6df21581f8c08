"""Paths of the teacher, against the exact solution where the data are Gaussian."""

import numpy as np
import pytest
import torch

from hsivi_fast.method.layers import Layers
from hsivi_fast.method.schedule import make_schedule, signal_levels
from hsivi_fast.method.trajectory import path_steps, roll_path

LEVELS = signal_levels("linear", 1000)
SCALE = 0.5  # of the data, N(0, SCALE^2)
KNOTS = make_schedule("linear", 1000, "quad", 5).timesteps


def _deviation(t):
    """The standard deviation of x_t."""
    return np.sqrt(LEVELS[t] * SCALE**2 + 1 - LEVELS[t])


def _exact_noise(x, t):
    """E[eps | x_t = x] of Gaussian data."""
    return x * float(np.sqrt(1 - LEVELS[t]) / _deviation(t) ** 2)


def _error(substeps, solver):
    """The largest relative error at the knots: on the exact path x_t keeps its number of standard deviations."""
    x = torch.tensor([[1.5], [-0.3]], dtype=torch.float64)
    states = dict(roll_path(_exact_noise, path_steps(KNOTS, LEVELS, substeps, solver), x))
    assert sorted(states, reverse=True) == [4, 3, 2, 1, 0]
    exact = {k: x * float(_deviation(KNOTS[k]) / _deviation(KNOTS[5])) for k in states}
    return max(float(((states[k] - exact[k]) / exact[k]).abs().max()) for k in states)


def test_the_path_is_the_exact_one_in_second_order():
    coarse, fine = _error(4, "dpmpp"), _error(8, "dpmpp")
    assert fine < 0.006 and coarse / fine > 3
    first_order = _error(8, "ddim")
    assert first_order > 4 * fine and 1.7 < _error(4, "ddim") / first_order < 2.3


def test_one_step_a_layer_of_first_order_is_ddim():
    layers = Layers(make_schedule("linear", 1000, "quad", 5), 0.0)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    states = dict(roll_path(_exact_noise, path_steps(KNOTS, LEVELS, 1, "ddim"), x))
    for k in range(5, 0, -1):
        x = layers.mean(x, _exact_noise(x, KNOTS[k]), torch.full((3,), k))
        torch.testing.assert_close(states[k - 1], x)


@pytest.mark.parametrize("knots", [[0, 1, 2], [0, 200, 800], [3, 700]])
def test_every_knot_is_reached_whatever_the_substeps(knots):
    for substeps in (1, 4, 30):
        steps = path_steps(knots, LEVELS, substeps)
        times = [step.t for step in steps]
        assert times == sorted(set(times), reverse=True) and times[0] == knots[-1]
        assert [step.reaches for step in steps if step.reaches is not None] == list(range(len(knots) - 1))[::-1]
        assert len(steps) <= substeps * (len(knots) - 1)

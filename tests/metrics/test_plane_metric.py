"""The metric of 2-D runs: it tells the target from a Gaussian, and agrees with cases that can be done by hand."""

import math

import numpy as np
import pytest
import torch

from hsivi_fast.method.schedule import signal_levels
from hsivi_fast.metrics.evaluation import PlaneMetric
from hsivi_fast.nets.mixture import MixtureTeacher
from hsivi_fast.parallel.world import ALONE

LEVELS = signal_levels("linear", 1000)


def test_plane_metric_knows_the_target_from_a_gaussian():
    teacher = MixtureTeacher("ring", LEVELS)
    metric = PlaneMetric(teacher, ALONE)
    exact = metric.measure(teacher.samples(20000, seed=5), 20000)
    gaussian = metric.measure(torch.randn(20000, 2, generator=torch.Generator().manual_seed(0)), 20000)
    assert exact["js_divergence"] < 0.012 and exact["sliced_wasserstein"] < 0.04
    assert gaussian["js_divergence"] > 0.3 and gaussian["sliced_wasserstein"] > 0.2
    assert gaussian["js_divergence"] < math.log(2)


def test_plane_metric_on_a_case_that_can_be_done_by_hand():
    teacher = MixtureTeacher("ring", LEVELS)
    metric = PlaneMetric(teacher, ALONE)
    far = metric.measure(
        torch.full((1000, 2), 10.0), 1000
    )  # all in the outside cell, where the target has almost nothing
    assert far["js_divergence"] == pytest.approx(math.log(2), abs=1e-3)
    exact = teacher.samples(1000, seed=1)  # the very samples that the metric compares with, moved by (0.3, 0.4)
    moved = metric.measure(exact + torch.tensor([0.3, 0.4]), 1000)
    angles = np.arange(32) * np.pi / 32
    assert moved["sliced_wasserstein"] == pytest.approx(
        np.sqrt(np.mean((0.3 * np.cos(angles) + 0.4 * np.sin(angles)) ** 2)), rel=1e-5
    )

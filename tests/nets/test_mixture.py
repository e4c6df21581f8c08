"""The 2-D mixtures: exact scores, masses and samples, and the metric that compares with them."""

import math

import numpy as np
import pytest
import torch

from hsivi_fast.method.schedule import signal_levels
from hsivi_fast.metrics.evaluation import PlaneMetric
from hsivi_fast.nets.mixture import TARGETS, CorrectedTeacher, MixtureTeacher

LEVELS = signal_levels("linear", 1000)


@pytest.mark.parametrize("name", TARGETS)
def test_noise_prediction_is_the_score_of_the_mixture(name):
    teacher = MixtureTeacher(name, LEVELS)
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.arange(20) * 50
    alpha_bar = torch.from_numpy(LEVELS)[t]
    variance = alpha_bar * teacher.std**2 + 1 - alpha_bar
    squares = (x[:, None] - alpha_bar.sqrt()[:, None, None] * teacher.means.double()).square().sum(2)
    log_density = torch.logsumexp(-squares / (2 * variance[:, None]), 1) - torch.log(2 * math.pi * variance)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    expected = -(1 - alpha_bar).sqrt()[:, None] * score
    torch.testing.assert_close(teacher(x.detach().float(), t).double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_masses_samples_and_scale_agree(name):
    teacher = MixtureTeacher(name, LEVELS)
    edges = torch.linspace(-3, 3, 25, dtype=torch.float64)
    masses = teacher.bin_masses(edges)
    assert 0.995 < float(masses.sum()) <= 1 + 1e-12
    points = teacher.samples(200000)
    counts, _ = torch.histogramdd(points.double(), [edges, edges])
    assert float((counts / len(points) - masses).abs().sum()) < 0.03
    assert 0.8 < float(points.square().mean()) < 1.2
    assert torch.equal(teacher.samples(10), teacher.samples(10))
    assert not torch.equal(teacher.samples(10), teacher.samples(10, seed=1))


def test_plane_metric_knows_the_target_from_a_gaussian():
    teacher = MixtureTeacher("ring", LEVELS)
    metric = PlaneMetric(teacher)
    exact = metric.measure(teacher.samples(20000, seed=5))
    gaussian = metric.measure(torch.randn(20000, 2, generator=torch.Generator().manual_seed(0)))
    assert exact["js_divergence"] < 0.012 and exact["sliced_wasserstein"] < 0.04
    assert gaussian["js_divergence"] > 0.3 and gaussian["sliced_wasserstein"] > 0.2
    assert gaussian["js_divergence"] < math.log(2)


def test_plane_metric_on_a_case_that_can_be_done_by_hand():
    teacher = MixtureTeacher("ring", LEVELS)
    metric = PlaneMetric(teacher)
    far = metric.measure(torch.full((1000, 2), 10.0))  # all in the overflow cell, where the target has almost nothing
    assert far["js_divergence"] == pytest.approx(math.log(2), abs=1e-3)
    exact = teacher.samples(1000, seed=1)  # the very samples that the metric compares with, moved by (0.3, 0.4)
    moved = metric.measure(exact + torch.tensor([0.3, 0.4]))
    angles = np.arange(32) * np.pi / 32
    assert moved["sliced_wasserstein"] == pytest.approx(
        np.sqrt(np.mean((0.3 * np.cos(angles) + 0.4 * np.sin(angles)) ** 2)), rel=1e-5
    )


def test_corrected_teacher_starts_exact_and_trains_the_correction_alone():
    teacher, correction = MixtureTeacher("ring", LEVELS), torch.nn.Module()
    correction.event_shape = (2,)
    correction.weight = torch.nn.Parameter(torch.zeros(2))
    correction.forward = lambda x, t: x * correction.weight
    network = CorrectedTeacher(teacher, correction)
    x, t = torch.randn(4, 2), torch.tensor([1, 10, 100, 800])
    assert torch.equal(network(x, t), teacher(x, t))
    assert [name for name, _ in network.named_parameters()] == ["correction.weight"]
    assert list(network.state_dict()) == ["correction.weight"]


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="teacher.target: 'moons'"):
        MixtureTeacher("moons", LEVELS)

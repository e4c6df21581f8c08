"""The 2-D mixtures: exact scores, masses and samples."""

import math

import pytest
import torch

from hsivi_fast.method.schedule import signal_levels
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

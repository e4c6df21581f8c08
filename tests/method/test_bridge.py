"""The bridge's tables and knots in closed form, and the likelihood of its paths against torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from hsivi_fast import ops
from hsivi_fast.method.bridge import BridgeSchedule, path_knots
from hsivi_fast.method.layers import Layers
from hsivi_fast.method.losses import path_likelihood_and_grads, student_loss_and_grads

SHAPES = [(False, False), (True, False), (False, True), (True, True)]
NFE, DIM, BATCH = 3, 4, 7


def test_a_bridge_has_the_same_tables_for_every_layer():
    schedule = BridgeSchedule(3)
    assert schedule.timesteps.tolist() == [0, 1, 2, 3] and schedule.timesteps.dtype == np.int64
    layers = Layers(schedule, 1.0, per_step=True, per_pixel=False)
    assert layers.tau.tolist() == [0, 1, 2, 3] and layers.ends_with_noise
    expected = {"a": 1, "b": -1, "c1": 1, "weight": 1, "scale": 1}
    for name, value in expected.items():
        assert getattr(layers, name)[1:].tolist() == [value] * 3, name
    layers.weigh(np.array([0.5, 0.25, 2.0, 1.0]))  # of knots 0 to 3: layer k is compared at knot k - 1
    assert layers.weight[1:].tolist() == [0.5, 0.25, 2.0]


@pytest.mark.parametrize("per_step, per_pixel", SHAPES)
def test_a_layer_subtracts_the_prediction_and_adds_its_noise(per_step, per_pixel, backend_device):
    layers = Layers(BridgeSchedule(NFE), 1.0, per_step, per_pixel).to(backend_device)
    log_gamma = torch.randn(layers.log_gamma_shape((DIM,)), generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(1)
    x, eps, z = (torch.randn(BATCH, DIM, generator=random) for _ in range(3))
    k = torch.tensor([1, 2, 3, 1, 2, 3, 1])
    deviation = _of_samples(log_gamma, k, per_step, per_pixel).exp()
    on = backend_device
    noise = ops.Noise(None, k.to(on), given=z.to(on))
    got = layers.step(x.to(on), eps.to(on), log_gamma.to(on), noise).cpu()
    torch.testing.assert_close(got, x - eps + deviation * z)


@pytest.mark.parametrize("schedule, expected", [("linear", [1, 0.75, 0.5, 0.25, 0]), ("cosine", None)])
def test_knots_in_closed_form(schedule, expected):
    expected = expected or [math.sin(math.pi / 2 * part) ** 2 for part in (1, 0.75, 0.5, 0.25, 0)]
    knots = path_knots(schedule, 4)
    assert knots.dtype == np.float64 and knots.tolist() == pytest.approx(expected, abs=1e-15)
    assert path_knots(schedule, 1).tolist() == pytest.approx([1, 0])


def test_adaptive_knots_are_even_in_distance():
    """Where the distance of lambda is its root, even steps of the distance are squares of even steps."""
    rungs = np.linspace(0, 1, 20_001)
    knots = path_knots("adaptive", 5, rungs, 3 * np.sqrt(rungs))
    assert knots.tolist() == pytest.approx([1, 0.64, 0.36, 0.16, 0.04, 0], abs=1e-8)
    # Between few rungs it is linear: half of the distance is half of the way from 0.1 to 1.
    assert path_knots("adaptive", 2, np.array([0, 0.1, 1]), np.array([0, 1, 3])).tolist() == pytest.approx(
        [1, 0.1 + 0.9 / 4, 0]
    )
    assert path_knots("adaptive", 3, np.array([0.0, 1.0]), np.array([0.0, 2.0])).tolist() == pytest.approx(
        path_knots("linear", 3).tolist()
    )


def _of_samples(log_gamma, k, per_step, per_pixel):
    """log_gamma of each sample and coordinate, [B, DIM], in the plainest words."""
    rows = []
    for layer in k.tolist():
        row = log_gamma[layer - 1] if per_step else log_gamma
        rows.append(row.reshape(-1).expand(DIM) if not per_pixel else row)
    return torch.stack(rows)


@pytest.mark.parametrize("per_step, per_pixel", SHAPES)
def test_the_likelihood_of_paths_is_that_of_a_normal_and_its_gradients_are_autograd_s(per_step, per_pixel):
    layers = Layers(BridgeSchedule(NFE), 1.0, per_step, per_pixel).double()
    random = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    log_gamma = (normal(*layers.log_gamma_shape((DIM,))) / 2 - 1).requires_grad_()
    k = torch.tensor([1, 3, 3, 1, 1, 3, 1])  # layer 2 has none: its gradient is zero
    x, below, eps_hat = normal(BATCH, DIM), normal(BATCH, DIM), normal(BATCH, DIM).requires_grad_()
    with torch.no_grad():
        losses, grad_eps, grad_log_gamma = path_likelihood_and_grads(eps_hat, x - below, layers, log_gamma, k)
    deviation = _of_samples(log_gamma, k, per_step, per_pixel).exp()
    exact = -Normal(x - eps_hat, deviation).log_prob(below).sum(1)
    torch.testing.assert_close(losses, exact - DIM * math.log(2 * math.pi) / 2, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(exact.mean(), [eps_hat, log_gamma])
    assert grad_log_gamma.shape == log_gamma.shape
    torch.testing.assert_close(grad_eps, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_log_gamma, expected[1], rtol=1e-12, atol=1e-12)
    if per_step:
        assert not grad_log_gamma[1].any() and bool((grad_log_gamma[[0, 2]] != 0).all())


def test_the_likelihood_is_highest_where_the_noise_is_the_residuals_deviation():
    layers = Layers(BridgeSchedule(1), 1.0, per_step=True, per_pixel=True).double()
    residuals = torch.randn(50, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    residuals = residuals * torch.tensor([0.3, 2.0])
    fitting = residuals.square().mean(0, keepdim=True).log() / 2
    ones = torch.ones(50, dtype=torch.int64)
    _, _, gradient = path_likelihood_and_grads(residuals, torch.zeros_like(residuals), layers, fitting, ones)
    torch.testing.assert_close(gradient, torch.zeros_like(fitting), rtol=0, atol=1e-12)


def test_the_losses_of_a_bridge_are_weighed_by_its_scales(backend_device):
    """A layer's loss is in squared scales of the density that it makes."""
    layers = Layers(BridgeSchedule(2), 1.0).to(backend_device)
    f, e = (torch.randn(6, 2, generator=torch.Generator().manual_seed(seed)).to(backend_device) for seed in (0, 1))
    k = torch.tensor([1, 1, 1, 2, 2, 2], device=backend_device)
    noise = ops.Noise(None, k, given=torch.randn(6, 2, generator=torch.Generator().manual_seed(2)).to(backend_device))
    log_gamma = torch.zeros(2, device=backend_device)
    plain = student_loss_and_grads(f, e, layers, log_gamma, noise)[0]
    layers.weigh(np.array([0.25, 0.5, 1.0]))
    weighed = student_loss_and_grads(f, e, layers, log_gamma, noise)[0]
    torch.testing.assert_close(weighed, plain * torch.tensor([0.25] * 3 + [0.5] * 3, device=backend_device))

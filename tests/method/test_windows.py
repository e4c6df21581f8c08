"""Virtual layers between the knots: their noise, their gradients, and HSIVI-SM at one end."""

import numpy as np
import pytest
import torch

from hsivi_fast import ops
from hsivi_fast.method.layers import Layers
from hsivi_fast.method.losses import student_loss_and_grads
from hsivi_fast.method.schedule import make_schedule, signal_levels
from hsivi_fast.method.windows import Windows

LEVELS = signal_levels("linear", 1000)
SHAPES = [(per_step, per_pixel) for per_step in (False, True) for per_pixel in (False, True)]


def _windows(gamma_min=0.5, nfe=3, eta=0.6, per_step=False, per_pixel=True):
    schedule = make_schedule("linear", 1000, "quad", nfe)
    layers = Layers(schedule, eta, per_step, per_pixel)
    return schedule, layers, Windows(layers, schedule.timesteps, LEVELS, gamma_min)


def _log_gamma(layers, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(layers.log_gamma_shape((2,)), generator=generator, dtype=dtype)


def test_a_window_goes_from_its_lower_knot_to_below_the_upper_and_gamma_is_not_small():
    schedule, layers, windows = _windows(gamma_min=0.0)
    for k in range(1, 4):
        t = windows.t[windows.layer == k]
        assert t.tolist() == list(range(schedule.timesteps[k - 1], schedule.timesteps[k]))
    assert torch.equal(windows.layer[windows.first[1:]], torch.arange(1, 4))
    every, some = windows, _windows(gamma_min=0.7)[2]
    gamma = every.rows(torch.zeros(1))[:, 0].exp() / every.scale[1:]
    kept = {(int(k), int(t)) for k, t, g in zip(every.layer[1:], every.t[1:], gamma) if g >= 0.7}
    assert {*zip(some.layer[1:].tolist(), some.t[1:].tolist())} == kept
    assert some.count[1:].sum() == len(kept) < every.count[1:].sum()


def test_every_timestep_of_a_window_has_the_same_chance():
    _, _, windows = _windows()
    for k in range(1, 4):
        count = int(windows.count[k])
        bits = torch.arange(count) * 2**32 // count + 1
        j = windows.choose(torch.full((count,), k), bits)
        assert (windows.layer[j] == k).all() and j.tolist() == sorted(set(j.tolist()))
        ends = windows.choose(torch.tensor([k, k]), torch.tensor([0, 2**32 - 1]))
        assert ends.tolist() == [int(windows.first[k]), int(windows.first[k]) + count - 1]


@pytest.mark.parametrize("per_step, per_pixel", SHAPES)
def test_at_the_lower_knot_it_is_the_layer(per_step, per_pixel):
    _, layers, windows = _windows(gamma_min=0.0, per_step=per_step, per_pixel=per_pixel)
    log_gamma, k = _log_gamma(layers), torch.tensor([1, 2, 3, 3])
    x, eps_hat, given = (torch.randn(4, 2, generator=torch.Generator().manual_seed(n)) for n in range(3))
    e = torch.ones(4, 2)
    j = windows.first[k]
    at_knot, at_window = ops.Noise(None, k, given=given), ops.Noise(None, j, given=given)
    assert torch.equal(windows.t[j], layers.t[k]) and torch.equal(layers.t[k], layers.tau[k - 1])
    torch.testing.assert_close(
        windows.step(x, eps_hat, log_gamma, at_window), layers.step(x, eps_hat, log_gamma, at_knot)
    )
    of_window = student_loss_and_grads(eps_hat, e, windows, log_gamma, at_window, 1.0)
    of_layer = student_loss_and_grads(eps_hat, e, layers, log_gamma, at_knot, 1.0)
    for own, expected in zip(of_window, of_layer, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_step, per_pixel", SHAPES)
def test_the_noise_is_that_of_the_layer_noised_on(per_step, per_pixel):
    """x_t = r x_{k-1} + sqrt(1 - r^2) n has the mean and the variance that the tables say."""
    schedule, layers, windows = _windows(per_step=per_step, per_pixel=per_pixel)
    log_gamma = _log_gamma(layers)
    for j in range(1, len(windows.t), 37):
        k, t = int(windows.layer[j]), int(windows.t[j])
        r2 = LEVELS[t] / schedule.alpha_bar[k - 1]
        rows = layers.rows(log_gamma)[k - 1 if per_step else 0]
        variance = r2 * (rows.double().exp() * layers.c1[k].double()) ** 2 + 1 - r2
        torch.testing.assert_close((2 * windows.rows(log_gamma)[j - 1]).exp(), variance.float(), rtol=1e-5, atol=0)
        stream = torch.tensor([j])
        x, eps_hat, zero = torch.randn(1, 2), torch.randn(1, 2), torch.zeros(1, 2)
        mean = windows.step(x, eps_hat, log_gamma, ops.Noise(None, stream, given=zero))
        below = layers.mean(x, eps_hat, torch.tensor([k]))
        torch.testing.assert_close(mean, float(np.sqrt(r2)) * below)
        from_mean = windows.step_from_mean(below, log_gamma, ops.Noise(None, stream, given=zero))
        torch.testing.assert_close(from_mean, mean)
        assert float(windows.weight[j]) == pytest.approx(1 - LEVELS[t], rel=1e-6)


@pytest.mark.parametrize("per_step, per_pixel", SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_student_s_gradients_are_autograd_s(per_step, per_pixel, alpha):
    """Of the whole loss: through x_t, through z / gamma, and through S in both, in eps_hat and log_gamma."""
    _, layers, windows = _windows(per_step=per_step, per_pixel=per_pixel)
    log_gamma = _log_gamma(layers).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    x, eps_hat, z = (torch.randn(6, 2, generator=generator) for _ in range(3))
    eps_hat.requires_grad_()
    j = torch.linspace(1, len(windows.t) - 1, 6).long()
    networks = [torch.randn(2, 2, generator=generator) for _ in range(2)]  # of f and of e, linear in x_t

    def column(table):
        return table[j][:, None]

    s = windows.rows(log_gamma)[j - 1].exp()
    x_t = column(windows.a) * x + column(windows.b) * eps_hat + s * z
    f, e = (x_t @ matrix for matrix in networks)
    target, g = z * column(windows.scale) / s, f - e
    loss = (2 * column(windows.weight) * ((1 - alpha) * g**2 + g * (target - f))).sum(1).mean()
    expected = torch.autograd.grad(loss, [eps_hat, log_gamma])

    noise = ops.Noise(None, j, given=z)
    made = windows.step(x, eps_hat, log_gamma, noise)
    f, e = (made.detach() @ matrix for matrix in networks)
    losses, grad_f, grad_e, grad_log_gamma = student_loss_and_grads(f, e, windows, log_gamma.detach(), noise, alpha)
    assert float(losses.mean()) == pytest.approx(float(loss.detach()), rel=1e-4)
    grad_x = grad_f @ networks[0].T + grad_e @ networks[1].T
    own = torch.autograd.grad([made, log_gamma], [eps_hat, log_gamma], [grad_x, grad_log_gamma])
    for gradient, by_autograd in zip(own, expected, strict=True):
        torch.testing.assert_close(gradient, by_autograd, rtol=1e-3, atol=1e-4)


def test_a_gamma_that_no_timestep_has_is_named():
    with pytest.raises(ValueError, match=r"objective.gamma_min: 0.999 leaves layer 2 no timestep in 89 .. 355, where"):
        _windows(gamma_min=0.999, eta=0.01)

"""Schedule, layer and losses: the published numbers, DDIM as the special case, and the two-stage gradient."""

import numpy as np
import pytest
import torch
from golden_values import load_golden, relative_error

from hsivi_fast import ops
from hsivi_fast.method.layers import Layers
from hsivi_fast.method.losses import student_loss_and_grads
from hsivi_fast.method.schedule import knots, make_schedule, signal_levels

SCHEDULES = load_golden("schedules")


@pytest.mark.parametrize("name", sorted({key.rpartition(".")[0] for key in SCHEDULES}))
def test_schedules_are_the_published_ones(name):
    betas, spacing, nfe = name.split(".")
    schedule = make_schedule(betas, 1000, spacing, int(nfe.removeprefix("nfe")))
    assert schedule.timesteps.tolist() == SCHEDULES[f"{name}.timesteps"].tolist()
    np.testing.assert_allclose(schedule.alpha_bar, SCHEDULES[f"{name}.alpha_bar"], rtol=1e-6)


def test_repeated_knots_are_refused_in_training_and_dropped_in_a_baseline():
    with pytest.raises(ValueError, match="nfe: 50"):
        knots("quad", 50, 1000)
    times = knots("quad", 50, 1000, drop_doubles=True)
    assert (np.diff(times) > 0).all() and times[0] == 0 and times[-1] == 800 and len(times) <= 51


def test_knots_at_even_angles_and_by_hand():
    levels = signal_levels("linear", 1000)
    for nfe, times in ((1, [0, 800]), (2, [0, 253, 800]), (5, [0, 95, 197, 313, 461, 800])):
        schedule = make_schedule("linear", 1000, "angle", nfe)
        assert schedule.timesteps.tolist() == times
        angles = np.arccos(np.sqrt(schedule.alpha_bar))
        assert np.ptp(np.diff(angles)) < 0.01 and np.array_equal(schedule.alpha_bar, levels[times])
    cosine = make_schedule("cosine", 1000, "angle", 4).timesteps  # whose angle is even in t, but for its offset
    assert np.abs(cosine - [0, 200, 400, 600, 800]).max() < 5
    assert make_schedule("linear", 1000, (0, 200, 800), 2).timesteps.tolist() == [0, 200, 800]
    assert np.array_equal(knots((0, 200, 800), 5, 1000), knots("quad", 5, 1000))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: knots("cubic", 5, 1000), "spacing: 'cubic'"),
        (lambda: knots("quad", 0, 1000), "nfe: 0"),
        (lambda: knots("uniform", 1000, 1000), "nfe: 1000"),
        (lambda: signal_levels("sigmoid", 1000), "betas: 'sigmoid'"),
        (lambda: signal_levels("cosine_4000", 4000), "teacher.steps: 4000 does not go with teacher.betas=cosine_4000"),
        (lambda: Layers(make_schedule("linear", 1000, "quad", 5), 1.5), "eta: 1.5"),
    ],
)
def test_bad_schedules_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cosine_4000_is_the_noise_of_a_teacher_that_was_shown_t_over_4():
    """Its levels by hand, from F(u) = cos^2((u + 0.008) / 1.008 * pi / 2): at t they are F((t + 1/4) / 1000) / F(0)."""
    level, published = signal_levels("cosine_4000", 1000), signal_levels("cosine", 1000)
    by_hand = {0: 0.9999901341811863, 500: 0.49345397967426585, 999: 1.3661818690274595e-06}
    assert len(level) == 1000
    for t, value in by_hand.items():
        assert level[t] == pytest.approx(value, rel=1e-12)
    # The published table is that of 3/4 of a step later, and 2.05 times too much noise at tau_0.
    np.testing.assert_allclose(published[:990], signal_levels("cosine", 4000)[3::4][:990], rtol=1e-12)
    assert np.sqrt((1 - published[0]) / (1 - level[0])) == pytest.approx(2.0456, abs=1e-4)


@pytest.mark.parametrize("eta", ["0.2", "1.0"])
@pytest.mark.parametrize("per_pixel", [0, 1])
@pytest.mark.parametrize("per_step", [0, 1])
def test_layer_is_the_published_one(per_step, per_pixel, eta, backend_device):
    golden = load_golden("layer")
    case = f"per_step_{per_step}.per_pixel_{per_pixel}.eta{eta}"

    def value(name):
        return torch.from_numpy(golden[f"{case}.{name}"]).to(backend_device)

    layers = Layers(make_schedule("linear", 1000, "quad", 5), float(eta), bool(per_step), bool(per_pixel)).to(
        backend_device
    )
    log_gamma, eps_hat, k = value("log_gamma").requires_grad_(), value("eps_hat").requires_grad_(), value("k")
    assert layers.log_gamma_shape(eps_hat.shape[1:]) == tuple(log_gamma.shape)
    x_prev = layers.step(value("x"), eps_hat, log_gamma, ops.Noise(None, k, given=value("noise")))
    gamma = layers.gamma(k, log_gamma, eps_hat.shape[1:])
    ((value("w") * x_prev).sum() + (value("h") * value("noise") / gamma).sum()).backward()
    assert relative_error(x_prev, value("x_prev").cpu().numpy()) < 1e-5
    assert relative_error(gamma, np.broadcast_to(value("gamma").cpu().numpy(), gamma.shape)) < 1e-5
    assert relative_error(eps_hat.grad, value("grad_eps_hat").cpu().numpy()) < 1e-5
    assert relative_error(log_gamma.grad, value("grad_log_gamma").cpu().numpy()) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
def test_a_student_that_is_the_teacher_is_ddim(eta):
    """DDIM in its own words: predict x_0, go to the next level, add sigma z (Song et al. 2021, eq. 12 and 16)."""
    schedule = make_schedule("linear", 1000, "quad", 5)
    layers = Layers(schedule, eta, per_step=False, per_pixel=False)
    generator = torch.Generator().manual_seed(0)
    x, eps, z = (torch.randn(4, 1, 3, 3, generator=generator) for _ in range(3))
    for k in range(1, 6):
        high, low = (torch.tensor(schedule.alpha_bar[index]) for index in (k, k - 1))
        sigma = eta * ((1 - low) / (1 - high)).sqrt() * (1 - high / low).sqrt()
        x_0 = (x.double() - (1 - high).sqrt() * eps.double()) / high.sqrt()
        expected = low.sqrt() * x_0 + (1 - low - sigma**2).sqrt() * eps.double() + sigma * z.double()
        noise = ops.Noise(None, torch.full((4,), k), given=z)
        got = layers.step(x, eps, torch.zeros(1), noise)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0, 1.2])
@pytest.mark.parametrize("per_step, per_pixel", [(False, False), (True, True)])
def test_two_stage_gradient_is_the_gradient_through_one_graph(per_step, per_pixel, alpha):
    """The student's gradient, in float64: pulled back to x_{k-1} first, against autograd through everything."""
    torch.manual_seed(0)
    layers = Layers(make_schedule("linear", 1000, "quad", 4), 0.7, per_step, per_pixel).double()
    nets = [
        torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)).double() for _ in range(3)
    ]
    student, score_net, teacher = nets
    log_gamma = (0.2 * torch.randn(layers.log_gamma_shape((6,)), dtype=torch.float64)).requires_grad_()
    x_k, z = (torch.randn(8, 6, dtype=torch.float64) for _ in range(2))
    k = torch.tensor([1, 2, 3, 4, 4, 1, 2, 2])
    noise = ops.Noise(None, k, given=z)

    x = layers.step(x_k, student(x_k), log_gamma, noise)
    target = noise.given / layers.gamma(k, log_gamma, (6,))
    f, e = score_net(x), teacher(x)
    g = f - e
    loss = 2 * (layers.weight[k][:, None] * ((1 - alpha) * g.square() + g * (target - f))).sum() / 8
    wanted = [*student.parameters(), log_gamma]
    expected = torch.autograd.grad(loss, wanted)

    x = layers.step(x_k, student(x_k), log_gamma, noise)
    leaf = x.detach().requires_grad_()
    f, e = score_net(leaf), teacher(leaf)
    losses, grad_f, grad_e, direct = student_loss_and_grads(
        f.detach(), e.detach(), layers, log_gamma.detach(), noise, alpha
    )
    (grad_x,) = torch.autograd.grad([f, e], leaf, [grad_f, grad_e])
    got = torch.autograd.grad([x, log_gamma * 1], wanted, [grad_x, direct])

    torch.testing.assert_close(losses.mean(), loss.detach(), rtol=1e-10, atol=1e-12)
    for ours, autograds in zip(got, expected):
        torch.testing.assert_close(ours, autograds, rtol=1e-9, atol=1e-12)

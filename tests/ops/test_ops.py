"""The operations: closed-form gradients against float64 autograd, in all shapes of log_gamma, and what is refused."""

import pytest
import torch
from pretended_gpu import pretended_gpu

from hsivi_fast import ops
from hsivi_fast.ops import philox, reference

B, LAYERS, EVENT = 5, 3, (2, 3, 4)
SIZE = 24
SHAPES = [(1, 1), (LAYERS, 1), (1, SIZE), (LAYERS, SIZE)]


def _inputs(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=dtype)

    return {
        "x": randn(B, *EVENT),
        "e": randn(B, *EVENT),
        "a": randn(LAYERS + 1),
        "b": randn(LAYERS + 1),
        "s": randn(LAYERS + 1).abs() + 0.1,
        "log_gamma": 0.3 * randn(*shape),
        "noise": randn(B, *EVENT),
        "k": torch.tensor([1, 3, 2, 3, 1]),
        "w": randn(LAYERS + 1).abs(),
        "cotangent": randn(B, *EVENT),
    }


def _given(i):
    return ops.Noise(None, i["k"], given=i["noise"])


def _expanded(log_gamma, k):
    """log_gamma of each sample, [B, *EVENT], by plain indexing."""
    return log_gamma.expand(LAYERS, SIZE)[k - 1].reshape(B, *EVENT)


def _entries(i, name):
    """Each sample's entry of a table, [B, 1, 1, 1]."""
    return i[name][i["k"]].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_affine_noise_step_is_its_equation(shape):
    i = _inputs(shape)
    x, e, log_gamma = (i[name].clone().requires_grad_() for name in ("x", "e", "log_gamma"))
    y = ops.affine_noise_step(x, e, i["a"], i["b"], i["s"], log_gamma, _given(i))
    expected = (
        _entries(i, "a") * i["x"]
        + _entries(i, "b") * i["e"]
        + _entries(i, "s") * _expanded(i["log_gamma"], i["k"]).exp() * i["noise"]
    )
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    (y * i["cotangent"]).sum().backward()
    torch.testing.assert_close(x.grad, _entries(i, "a") * i["cotangent"])
    torch.testing.assert_close(e.grad, _entries(i, "b") * i["cotangent"])
    direct = (i["cotangent"] * (expected - _entries(i, "a") * i["x"] - _entries(i, "b") * i["e"])).flatten(1)
    by_layer = torch.stack([direct[i["k"] == k].sum(0) for k in range(1, LAYERS + 1)])  # [LAYERS, SIZE]
    by_layer = by_layer if shape[0] > 1 else by_layer.sum(0, keepdim=True)
    torch.testing.assert_close(log_gamma.grad, by_layer if shape[1] > 1 else by_layer.sum(1, keepdim=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_loss_gradient_is_autograds(shape):
    i = _inputs(shape)
    f = i["x"].clone().requires_grad_()
    target = i["noise"] * _entries(i, "s") / _expanded(i["log_gamma"], i["k"]).exp()
    loss = (_entries(i, "w") * (f - target).square()).sum() / B
    loss.backward()
    losses, grad = ops.denoising_loss_and_grads(i["x"], i["w"], i["s"], i["log_gamma"], _given(i))
    torch.testing.assert_close(losses.mean(), loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, f.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0, 1.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_loss_gradients_are_autograds(shape, alpha):
    i = _inputs(shape)
    f, e, log_gamma = (
        i["x"].clone().requires_grad_(),
        i["e"].clone().requires_grad_(),
        i["log_gamma"].clone().requires_grad_(),
    )
    target = i["noise"] * _entries(i, "s") / _expanded(log_gamma, i["k"]).exp()
    g = f - e
    loss = 2 * (_entries(i, "w") * ((1 - alpha) * g.square() + g * (target - f))).sum() / B
    loss.backward()
    losses, grad_f, grad_e, grad_log_gamma = ops.fisher_loss_and_grads(
        i["x"], i["e"], i["w"], i["s"], i["log_gamma"], _given(i), alpha
    )
    torch.testing.assert_close(losses.mean(), loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_f, f.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_e, e.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_log_gamma, log_gamma.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fisher_loss_at_one_half_is_the_formula_without_alpha(dtype):
    """To the bit: the published 2 g (t - e) - g^2, and its gradients."""
    i = _inputs((LAYERS, SIZE), torch.float32)
    f, e = i["x"].to(dtype), i["e"].to(dtype)
    arguments = (f, e, i["w"], i["s"], i["log_gamma"], _given(i))
    values, weight = ops.fisher_loss_and_grads(*arguments, alpha=0.5), _entries(i, "w")
    target = i["noise"] * _entries(i, "s") * (-_expanded(i["log_gamma"], i["k"])).exp()
    g = f.float() - e.float()
    assert torch.equal(values[0], (weight * (2.0 * g * (target - e) - g.square())).flatten(1).sum(1))
    assert torch.equal(values[1], (2.0 * weight * (target - f) / B).to(dtype))
    assert torch.equal(values[2], (-2.0 * weight * (target - e) / B).to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(values, ops.fisher_loss_and_grads(*arguments)))


def test_addressed_noise_is_the_given_noise():
    i = _inputs((1, SIZE), torch.float32)
    addressed = ops.Noise(torch.arange(B), i["k"], draw=torch.tensor([0, 1, 2, 0, 1]))
    alone = [addressed[n : n + 1] for n in range(B)]
    numbers = torch.cat([ops.draw_noise(one.seeds, int(one.stream), EVENT, int(one.draw)) for one in alone])
    given = ops.Noise(None, i["k"], given=numbers)
    steps = [
        ops.affine_noise_step(i["x"], i["e"], i["a"], i["b"], i["s"], i["log_gamma"], n) for n in (addressed, given)
    ]
    assert torch.equal(*steps)
    grads = [ops.denoising_loss_and_grads(i["x"], i["w"], i["s"], i["log_gamma"], n)[1] for n in (addressed, given)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_group_norm_silu_is_its_equation(silu, modulated):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(3, 6, 4, 5, generator=generator),
        torch.randn(6, generator=generator),
        torch.randn(6, generator=generator),
    )
    scale, shift = (torch.randn(3, 6, generator=generator) for _ in range(2)) if modulated else (None, None)
    y = ops.group_norm_silu(x, 2, weight, bias, 1e-5, silu=silu, scale=scale, shift=shift)
    grouped = x.double().reshape(3, 2, -1)
    normed = (
        (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    ).reshape(x.shape)
    expected = normed * weight.double().reshape(1, 6, 1, 1) + bias.double().reshape(1, 6, 1, 1)
    if modulated:
        expected = expected * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    expected = expected * torch.sigmoid(expected) if silu else expected
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_normalisation_of_parts_is_its_equation(backend):
    """The whole is [(x + add + residual) factor, beside]; parts that are not there are zeros, one, or no channels."""
    generator = torch.Generator().manual_seed(1)
    x, residual, beside, add, weight, bias = (
        torch.randn(*shape, generator=generator)
        for shape in ((3, 4, 4, 5), (3, 4, 4, 5), (3, 8, 4, 5), (3, 4), (12,), (12,))
    )
    for parts, expected in (
        ({}, x),
        ({"residual": residual, "factor": 0.5}, (x + residual) * 0.5),
        ({"add": add, "beside": beside}, torch.cat([x + add[:, :, None, None], beside], 1)),
        (
            {"add": add, "residual": residual, "factor": 0.5, "beside": beside},
            torch.cat([(x + add[:, :, None, None] + residual) * 0.5, beside], 1),
        ),
    ):
        w, b = weight[: expected.shape[1]], bias[: expected.shape[1]]
        y, whole = ops.joined_group_norm_silu(x, 2, w, b, 1e-5, silu=False, **parts, backend=backend)
        torch.testing.assert_close(whole, expected)
        torch.testing.assert_close(y, torch.nn.functional.group_norm(expected, 2, w, b), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    i = _inputs((1, 1), torch.float32)
    low = [i[name].to(torch.bfloat16) for name in ("x", "e")]
    y = ops.affine_noise_step(*low, i["a"], i["b"], i["s"], i["log_gamma"], _given(i))
    high = ops.affine_noise_step(*(t.float() for t in low), i["a"], i["b"], i["s"], i["log_gamma"], _given(i))
    assert y.dtype == torch.bfloat16 and torch.equal(y, high.to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"e": torch.zeros(B, 2, 3, 5)}, "tensors differ"),
        ({"e": torch.zeros(B, *EVENT, dtype=torch.bfloat16)}, "tensors differ"),
        ({"log_gamma": torch.zeros(SIZE)}, r"log_gamma of shape \(24,\)"),
        ({"log_gamma": torch.zeros(1, 7)}, r"log_gamma of shape \(1, 7\)"),
        ({"log_gamma": torch.zeros(2, 1)}, r"log_gamma of shape \(2, 1\)"),
        ({"log_gamma": torch.zeros(1, 1, device="meta")}, "on meta"),
        ({"e": torch.zeros(B, *EVENT, device="meta")}, "tensors differ"),
        ({"s": torch.zeros(2)}, "a table of shape"),
        ({"k": torch.tensor([1, 3, 4, 3, 1])}, "stream 4 is outside 1 .. 3"),
        ({"k": torch.tensor([1, 3, 0, 3, 1])}, "stream 0 is outside 1 .. 3"),
        ({"k": torch.tensor([1, 2])}, "stream of shape"),
        ({"noise": torch.zeros(B, 3)}, "noise of shape"),
        ({"noise": None, "seeds": torch.zeros(2)}, "seeds of shape"),
        ({"noise": None, "seeds": torch.zeros(B)}, "they are int64"),
        ({"x": torch.zeros(0, *EVENT), "e": torch.zeros(0, *EVENT)}, "has no elements"),
    ],
)
def test_what_does_not_fit_is_named(change, message, backend):
    i = {**_inputs((1, 1), torch.float32), "seeds": None, **change}
    with pytest.raises(ValueError, match=message):
        noise = ops.Noise(i["seeds"], i["k"], given=i["noise"])
        ops.affine_noise_step(i["x"], i["e"], i["a"], i["b"], i["s"], i["log_gamma"], noise, backend=backend)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"groups": 4}, "6 channels cannot be cut into 4 groups"),
        ({"weight": torch.ones(5)}, r"weight of shape \(5,\)"),
        ({"bias": None}, "come in pairs"),
        ({"scale": torch.ones(2, 6)}, "come in pairs"),
        ({"add": torch.ones(2, 5)}, r"add of shape \(2, 5\)"),
        ({"x": torch.ones(0, 6, 4, 4)}, "nothing to normalise"),
        ({"add": torch.ones(2, 6, device="meta")}, "on meta"),
    ],
)
def test_what_cannot_be_normalised_is_named(change, message):
    arguments = {
        **{"x": torch.ones(2, 6, 4, 4), "groups": 2, "weight": torch.ones(6), "bias": torch.ones(6), "eps": 1e-5},
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"groups": 5}, "9 channels cannot be cut into 5 groups"),
        ({"weight": torch.ones(6)}, r"weight of shape \(6,\)"),
        ({"add": torch.ones(2, 9)}, r"add of shape \(2, 9\)"),
        ({"residual": torch.ones(2, 6, 4, 5)}, r"residual of shape \(2, 6, 4, 5\)"),
        ({"beside": torch.ones(1, 3, 4, 4)}, r"beside of shape \(1, 3, 4, 4\)"),
        ({"residual": torch.ones(2, 6, 4, 4, device="meta")}, "on meta"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    arguments = {"x": torch.ones(2, 6, 4, 4), "groups": 3, "weight": torch.ones(9), "bias": torch.ones(9), "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        ops.joined_group_norm_silu(**{**arguments, "beside": torch.ones(2, 3, 4, 4), **change})


def test_the_torch_backend_makes_no_host_wait():
    """On a GPU a number that is copied there would, and under capture it is an error: numbers are filled in there."""
    shapes = {name: value.shape for name, value in _inputs((LAYERS, SIZE)).items()}
    with pretended_gpu():
        x, e, a, b, s, log_gamma = (
            torch.empty(*shapes[name], device="cuda") for name in ("x", "e", "a", "b", "s", "log_gamma")
        )
        seeds, stream = (torch.empty(B, dtype=torch.int64, device="cuda") for _ in range(2))
        for draw in (None, stream):
            noise = (log_gamma, seeds, stream, draw)
            reference.affine_noise_step(x, e, a, b, s, *noise)
            reference.affine_noise_step_backward(x, e, b, s, *noise)
            reference.denoising_loss_and_grads(e, a, s, *noise)
            reference.fisher_loss_and_grads(x, e, a, s, *noise)
        assert reference.draw_noise(seeds, 2, EVENT, 1).shape == (B, *EVENT)
        assert philox.integers_below(5, 1, 2, 3, 4, "cuda").is_cuda and philox.integers_of_seeds(seeds, 10).is_cuda


def test_what_would_make_the_host_wait_is_seen():
    with pretended_gpu(), pytest.raises(AssertionError, match="joins host and device"):
        torch.as_tensor(0, device="cuda")

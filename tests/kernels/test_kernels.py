"""The kernels against the float64 reference: for real where there is a GPU, in Triton's interpreter otherwise.

An error may be twice what plain torch makes (its arithmetic in float32, rounded to the type) plus one unit in the
last place, or `UNITS` of float32 on a GPU. Memory that a kernel should write holds NaN before.
"""

import functools

import pytest
import torch
import triton
import triton.language as tl
from devices import KERNEL_DEVICE
from random123 import KNOWN_ANSWERS

from bench.shapes import PAPER, network_norms
from hsivi_fast.kernels import adam_step, memory, noise_scale, philox, score_losses
from hsivi_fast.kernels import affine_noise_step as step
from hsivi_fast.kernels import group_norm_silu as norm
from hsivi_fast.nets import NETWORKS
from hsivi_fast.ops import philox as plain_philox
from hsivi_fast.ops import reference

B, K = 5, 3
EVENTS = {"image": (3, 8, 8), "odd": (3, 7, 5), "plane": (2,), "one": (1, 1, 1)}
# A GPU's own exp (ex2.approx) and division (div.full) are good to 2 units each, which SiLU needs both of; its square
# root (sqrt.approx) to 1. The interpreter's are numpy's, rounded once. All are float32, whatever the result's type.
UNITS = 1 if memory.INTERPRETED else 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_as_good_as_torch(value, plain, exact, magnitude=None):
    """|value - exact| <= 2 max |plain - exact| + a unit, and what `UNITS` says, in the last place of exact.

    magnitude: in its place; for a sum, the sum of the absolute values of its terms.
    """
    exact = exact.to(torch.float64)
    unit = torch.finfo(value.dtype).eps + (UNITS - 1) * torch.finfo(torch.float32).eps
    unit = unit * (exact.abs() if magnitude is None else magnitude.to(torch.float64))
    allowed = 2 * (plain.to(torch.float64) - exact).abs().max() + unit + torch.finfo(value.dtype).tiny
    error = (value.to(torch.float64) - exact).abs()
    assert value.shape == plain.shape and value.dtype == plain.dtype
    assert bool((error <= allowed).all()), f"error {error.max():.3e}, allowed {allowed.min():.3e} at least"


def _method_inputs(event, dtype, shape, channels_last=False, sliced=False, batch=B):
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(event).numel()

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(KERNEL_DEVICE)

    def tensor():
        x = randn(batch, 2 * event[0], *event[1:]).to(dtype) if sliced else randn(batch, *event).to(dtype)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        return x[:, : event[0]] if sliced else x

    rows, columns = (K if shape[0] else 1), (size if shape[1] else 1)
    k = torch.tensor([1, 3, 2, 3, 1], device=KERNEL_DEVICE).repeat(-(-batch // 5))[:batch]
    return {
        "x": randn(batch, *event).to(dtype),
        "e": tensor(),
        "dy": tensor(),
        "a": randn(K + 1),
        "b": randn(K + 1),
        "s": randn(K + 1).abs() + 0.1,
        "weight": randn(K + 1).abs(),
        "log_gamma": 0.3 * randn(rows, columns),
        "noise": randn(batch, *event),
        "seeds": torch.arange(batch, device=KERNEL_DEVICE) - 2,
        "k": k,
    }


def _exact(function, *tensors):
    return function(*(None if t is None else t.to(torch.float64) if t.is_floating_point() else t for t in tensors))


def _check_step(i, block=None):
    y = step.affine_noise_step(
        i["x"], i["e"], i["a"], i["b"], i["s"], i["log_gamma"], None, i["k"], None, i["noise"], block
    )
    arguments = (i["x"], i["e"], i["a"], i["b"], i["s"], i["log_gamma"], None, i["k"], None, i["noise"])
    assert_as_good_as_torch(y, reference.affine_noise_step(*arguments), _exact(reference.affine_noise_step, *arguments))
    assert y.stride() == torch.empty_like(i["x"]).stride()
    arguments = (i["dy"], i["e"], i["b"], i["s"], i["log_gamma"], None, i["k"], None, i["noise"])
    de, dlog_gamma = step.affine_noise_step_backward(*arguments, block)
    plain = reference.affine_noise_step_backward(*arguments)
    exact = _exact(reference.affine_noise_step_backward, *arguments)
    assert de.stride() == torch.empty_like(i["e"]).stride()
    assert_as_good_as_torch(de, plain[0], exact[0])
    assert_as_good_as_torch(dlog_gamma, plain[1], exact[1], reference._sum_to_rows(_terms(i), i["log_gamma"], i["k"]))


def _terms(i):
    """|s exp(log_gamma) n dy|, the terms of dL/dlog_gamma."""
    scale = reference._entries(i["s"], i["k"], i["dy"], torch.float64)
    scale = scale * reference._rows(i["log_gamma"], i["k"], i["dy"], torch.float64).exp()
    return (scale * i["noise"].double() * i["dy"].double()).abs()


def _check_losses(i, block=None, alphas=(0.5,)):
    arguments = (i["e"], i["weight"], i["s"], i["log_gamma"], None, i["k"], None, i["noise"])
    losses, df = score_losses.denoising_loss_and_grads(*arguments, block)
    plain = reference.denoising_loss_and_grads(*arguments)
    exact = _exact(reference.denoising_loss_and_grads, *arguments)
    f, weight = i["e"], reference._entries(i["weight"], i["k"], i["e"], torch.float64)
    target = reference._target(f, i["s"], i["log_gamma"], None, i["k"], None, i["noise"], torch.float64).abs()
    # Three units: the target's factor scale exp(-log_gamma) is common to all terms and enters squared, so its
    # rounding does not average out.
    terms = (weight * (f.double().abs() + target).square()).flatten(1)
    assert_as_good_as_torch(losses, plain[0], exact[0], 3 * terms.sum(1))
    magnitude = None if f.dtype != torch.float32 else 2 * weight * (f.double().abs() + target) / len(f)
    assert_as_good_as_torch(df, plain[1], exact[1], magnitude)
    assert df.stride() == torch.empty_like(i["e"]).stride()

    for alpha in alphas:
        _check_fisher_loss(i, weight, target, alpha, block)


def _check_fisher_loss(i, weight, target, alpha, block):
    """weight, target: of each sample, and of each element without its sign, in float64."""
    f, e = i["x"], i["e"]
    arguments = (f, e, i["weight"], i["s"], i["log_gamma"], None, i["k"], None, i["noise"])
    values = score_losses.fisher_loss_and_grads(*arguments, alpha, block)
    fisher_loss_and_grads = functools.partial(reference.fisher_loss_and_grads, alpha=alpha)
    plain, exact = fisher_loss_and_grads(*arguments), _exact(fisher_loss_and_grads, *arguments)
    g = (f.double() - e.double()).abs()
    terms = (weight * g * (2 * target + 2 * e.double().abs() + g + abs(1 - 2 * alpha) * g)).flatten(1)
    assert_as_good_as_torch(values[0], plain[0], exact[0], terms.sum(1))
    assert_as_good_as_torch(values[1], plain[1], exact[1])
    assert_as_good_as_torch(values[2], plain[2], exact[2])
    assert_as_good_as_torch(
        values[3], plain[3], exact[3], reference._sum_to_rows(2 * weight * g * target / len(f), i["log_gamma"], i["k"])
    )
    assert values[1].stride() == torch.empty_like(f).stride() and values[2].stride() == torch.empty_like(e).stride()


# ---- the method kernels ----------------------------------------------------------------------------------------------

SHAPES = [(False, False), (True, False), (False, True), (True, True)]  # (per layer, per element)
NAMES = ["[1]", "[K]", "[event]", "[K,event]"]


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("event", EVENTS)
def test_step_and_losses_in_every_type_and_shape_of_log_gamma(event, dtype, shape):
    i = _method_inputs(EVENTS[event], dtype, shape)
    _check_step(i)
    _check_losses(i, alphas=(0.5, 0.75, 1.0, 1.2) if event == "odd" else (0.5,))


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sliced", [False, True])
def test_channels_last_and_slices_of_channels(sliced, dtype, shape):
    i = _method_inputs((3, 6, 4), dtype, shape, channels_last=True, sliced=sliced)
    _check_step(i)
    _check_losses(i)


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_several_blocks_groups_of_several_samples_and_a_batch_of_one(shape, monkeypatch):
    for batch, programs in ((20, 4), (70, 1056), (1, 1056)):
        monkeypatch.setattr(noise_scale, "PROGRAMS", programs)
        i = _method_inputs((3, 12, 10) if batch < 70 else (3, 5, 4), torch.float32, shape, batch=batch)
        _check_step(i, block=128)
        _check_losses(i, block=128)


@pytest.mark.parametrize("event", [(3, 32, 32), (3, 64, 64)], ids=str)
def test_real_image_sizes(event):
    i = _method_inputs(event, torch.float32, (False, True), batch=2)
    _check_step(i)
    _check_losses(i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addressed_noise_is_the_drawn_noise(dtype):
    """The noise that a kernel makes in registers is what the draw kernel writes, in both orders of the lanes."""
    i = _method_inputs((3, 7, 6), dtype, (True, True))
    draw = torch.tensor([0, 1, 7, 0, 2], device=KERNEL_DEVICE)
    noise = philox.draw_noise(i["seeds"], i["k"], draw, (3, 7, 6), block=128)
    tables = (i["a"], i["b"], i["s"], i["log_gamma"])
    address, given = (i["seeds"], i["k"], draw, None), (None, i["k"], None, noise)
    pairs = [
        (
            step.affine_noise_step(i["x"], i["e"], *tables, *address),
            step.affine_noise_step(i["x"], i["e"], *tables, *given),
        )
    ]
    pairs += zip(
        step.affine_noise_step_backward(i["dy"], i["e"], *tables[1:], *address),
        step.affine_noise_step_backward(i["dy"], i["e"], *tables[1:], *given),
    )
    loss_tables = (i["weight"], i["s"], i["log_gamma"])
    pairs += zip(
        score_losses.denoising_loss_and_grads(i["e"], *loss_tables, *address),
        score_losses.denoising_loss_and_grads(i["e"], *loss_tables, *given),
    )
    pairs += zip(
        score_losses.fisher_loss_and_grads(i["x"], i["e"], *loss_tables, *address),
        score_losses.fisher_loss_and_grads(i["x"], i["e"], *loss_tables, *given),
    )
    for by_address, by_value in pairs:
        torch.testing.assert_close(
            by_address, by_value, rtol=0 if memory.INTERPRETED else 1e-6, atol=0 if memory.INTERPRETED else 1e-6
        )


@pytest.mark.parametrize("e", [True, False])
def test_without_noise_and_without_e(e):
    i = _method_inputs((3, 8, 8), torch.float32, (False, False))
    if e:
        y = step.affine_noise_step(i["x"], i["e"], i["a"], i["b"], None, None, None, i["k"], None, None)
        arguments = (i["x"], i["e"], i["a"], i["b"], None, None, None, i["k"])
    else:
        y = step.affine_noise_step(i["x"], None, i["a"], None, i["s"], i["log_gamma"], None, i["k"], None, i["noise"])
        arguments = (i["x"], None, i["a"], None, i["s"], i["log_gamma"], None, i["k"], None, i["noise"])
    assert_as_good_as_torch(y, reference.affine_noise_step(*arguments), _exact(reference.affine_noise_step, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_product_is_rounded_as_torch_rounds_it(dtype):
    """To nearest even, which the interpreter by itself does not do for bfloat16."""
    i = _method_inputs((3, 32, 32), dtype, (False, False))
    y = step.affine_noise_step(i["x"], None, i["a"], None, None, None, None, i["k"], None, None)
    assert torch.equal(y, (i["a"][i["k"]].reshape(-1, 1, 1, 1) * i["x"].float()).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_the_same_bits_in_every_run(shape):
    """Nothing is added in an order that could change. Noise and elementwise results do not depend on the block size."""
    i = _method_inputs((3, 12, 10), torch.float32, shape, batch=8)
    runs = []
    for block in (128, 128, 512):
        y = step.affine_noise_step(
            i["x"], i["e"], i["a"], i["b"], i["s"], i["log_gamma"], i["seeds"], i["k"], None, None, block
        )
        grads = step.affine_noise_step_backward(
            i["dy"], i["e"], i["b"], i["s"], i["log_gamma"], i["seeds"], i["k"], None, None, block
        )
        loss = score_losses.fisher_loss_and_grads(
            i["x"], i["e"], i["weight"], i["s"], i["log_gamma"], i["seeds"], i["k"], None, None, block=block
        )
        runs.append((y, grads[0], loss[1], loss[2], grads[1], loss[0], loss[3]))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:4], runs[2][:4]))
    for a, b in zip(runs[0][4:], runs[2][4:]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_fisher_loss_at_one_half_is_the_one_without_alpha(shape):
    """To the bit. The limit of other alphas is the same but for rounding, so that the two codes are one formula."""
    i = _method_inputs((3, 7, 5), torch.float32, shape)
    arguments = (i["x"], i["e"], i["weight"], i["s"], i["log_gamma"], i["seeds"], i["k"], None, None)
    without = score_losses.fisher_loss_and_grads(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(score_losses.fisher_loss_and_grads(*arguments, 0.5), without))
    for value, limit in zip(score_losses.fisher_loss_and_grads(*arguments, 0.5 + 1e-9), without):
        torch.testing.assert_close(value, limit, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
@pytest.mark.parametrize("bad", [0, K + 1, -5, 2**40])
def test_a_layer_that_is_not_there_gives_nan_for_its_sample_alone(bad, shape):
    i = _method_inputs((2, 4, 4), torch.float32, shape)
    k = i["k"].clone()
    k[2] = bad
    y = step.affine_noise_step(i["x"], i["e"], i["a"], i["b"], i["s"], i["log_gamma"], i["seeds"], k, None, None)
    losses, df, de, _ = score_losses.fisher_loss_and_grads(
        i["x"], i["e"], i["weight"], i["s"], i["log_gamma"], i["seeds"], k, None, None
    )
    more, _ = score_losses.denoising_loss_and_grads(
        i["x"], i["weight"], i["s"], i["log_gamma"], i["seeds"], k, None, None
    )
    for tensor in (y, losses, df, de, more):
        assert torch.isnan(tensor[2]).all() and torch.isfinite(tensor[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.float64), "float64 is not supported"),
        (torch.zeros(2, 3, 4, 5).transpose(2, 3), r"strides \(60, 20, 1, 5\) is neither contiguous nor channels_last"),
        (torch.zeros(2, 1, 1, 1).expand(2, 3, 4, 4), "repeats elements"),
        (torch.zeros(1, 1).expand(1, 2**31), "is too large"),
    ],
)
def test_layouts_that_no_kernel_has_are_named(tensor, message):
    with pytest.raises(ValueError, match=message):
        memory.sample_layout(tensor)


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_the_plain_version_s():
    """Normals to 2e-6, for seeds of every kind; the wide lanes give the same bits."""
    seeds = torch.tensor([0, 1, -1, 0x123456789ABCDEF0, -(2**63)], device=KERNEL_DEVICE)
    stream = torch.tensor([0, 1, 7, 10, 2**31 - 1], device=KERNEL_DEVICE)
    draw = torch.tensor([0, 3, 0, 1, 9], device=KERNEL_DEVICE)
    drawn = philox.draw_noise(seeds, stream, draw, (4099,))
    assert float((drawn - plain_philox.normal(seeds, stream, (4099,), draw)).abs().max()) < 2e-6
    assert torch.equal(
        philox.draw_noise(seeds, stream, None, (4099,), block=128),
        philox.draw_noise(seeds, stream, torch.zeros_like(draw), (4099,)),
    )


@triton.jit
def _known_answer_kernel(given_ptr, out_ptr):
    words = philox.philox4x32(
        tl.load(given_ptr),
        tl.load(given_ptr + 1),
        tl.load(given_ptr + 2),
        tl.load(given_ptr + 3),
        tl.load(given_ptr + 4),
        tl.load(given_ptr + 5),
    )
    for index in tl.static_range(4):
        tl.store(out_ptr + index, words[index])


@pytest.mark.parametrize("key, counter, expected", KNOWN_ANSWERS)
def test_the_integers_are_random123_s(key, counter, expected):
    given = torch.tensor([*key, *counter], dtype=torch.int64).to(torch.uint32).to(KERNEL_DEVICE)
    out = torch.zeros(4, dtype=torch.uint32, device=KERNEL_DEVICE)
    _known_answer_kernel[(1,)](given, out)
    assert out.tolist() == list(expected)


ADDRESSES = [(0, 0, 0), (7, 1, 3), (2**31, 4, 2**31), (-5, 2, 1), (2**63 - 1, 3, 2**40 + 5), (-(2**63), 15, 2**32 - 1)]


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_integers_are_the_plain_version_s_to_the_bit(address):
    """Run seed, purpose and counter of every kind, for one block with a rest and for less than one."""
    for n in (1, 300):
        plain = plain_philox.integers(*address, n, KERNEL_DEVICE)
        assert torch.equal(philox.integers(*address, n, KERNEL_DEVICE), plain)
        for limit in (1, 10, 2**31 - 1):
            plain = plain_philox.integers_below(limit, *address, n, KERNEL_DEVICE)
            assert torch.equal(philox.integers(*address, n, KERNEL_DEVICE, limit), plain)


def test_integers_of_seeds_are_the_plain_version_s_to_the_bit():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345] * 50, device=KERNEL_DEVICE)
    for limit in (1, 10, 2**31 - 1):
        ours = philox.integers_of_seeds(seeds, plain_philox.LAST_STREAM, limit)
        assert torch.equal(ours, plain_philox.integers_of_seeds(seeds, limit))


# ---- group normalisation ---------------------------------------------------------------------------------------------


def _norm_inputs(channels, size, dtype, layout, modulated, added, batch):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(KERNEL_DEVICE, dtype)

    height, width = size if isinstance(size, tuple) else (size, size)
    x, dy = ((1.5 * randn(batch, channels, height, width) + 0.7).to(memory_format=layout) for _ in range(2))
    # Rows with a stride, as the ADM network has them.
    scale, shift = randn(batch, 2 * channels).chunk(2, dim=1) if modulated else (None, None)
    return x, dy, 1 + 0.5 * randn(channels), randn(channels), scale, shift, randn(batch, channels) if added else None


def _check_norm(
    channels,
    size,
    groups,
    dtype=torch.float32,
    layout=torch.channels_last,
    silu=True,
    modulated=False,
    added=False,
    affine=True,
    batch=1,
):
    x, dy, weight, bias, scale, shift, add = _norm_inputs(channels, size, dtype, layout, modulated, added, batch)
    if not affine:
        weight = bias = None

    def plain(cast):
        inputs = [None if t is None else cast(t).requires_grad_() for t in (x, weight, bias, scale, shift, add)]
        y = reference.group_norm_silu(inputs[0], groups, inputs[1], inputs[2], 1e-5, silu, *inputs[3:])
        return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], cast(dy).detach())]

    y, mean, rstd = norm.group_norm_silu(x, groups, weight, bias, 1e-5, silu, scale, shift, add)
    dx, sums, dadd = norm.group_norm_silu_backward(dy, x, groups, weight, bias, silu, scale, shift, add, mean, rstd)
    rest = (*norm.parameter_grads(sums, weight, bias, scale), None if add is None else dadd.to(dtype))
    values = [y, dx, *(grad for grad in rest if grad is not None)]
    assert y.stride() == dx.stride() == x.stride()
    exact = plain(lambda t: t.detach().to(torch.float64))
    # In a 16-bit type plain torch rounds in between; the kernel is held to torch's float32 arithmetic, rounded once.
    float32 = [t.to(value.dtype) for t, value in zip(plain(lambda t: t.detach().to(torch.float32)), values)]
    sizes = _norm_magnitudes(x, dy, groups, weight, bias, silu, scale, shift, add)
    names = ["y", "x", *["weight", "bias"] * affine, *["scale", "shift"] * modulated, *["add"] * added]
    magnitudes = [sizes[name] for name in names]
    assert len(values) == len(exact) == len(magnitudes)
    for value, torchs, truth, magnitude in zip(values, float32, exact, magnitudes):
        assert_as_good_as_torch(value, torchs, truth, magnitude if value.dtype == torch.float32 else truth.abs())


def _norm_magnitudes(x, dy, groups, weight, bias, silu, scale, shift, add):
    """What the rounding of each output is relative to: the sum of the absolute values of its terms, in float64."""
    x, dy, weight, bias, scale, shift, add = (
        None if t is None else t.to(torch.float64) for t in (x, dy, weight, bias, scale, shift, add)
    )
    many = 16 if memory.INTERPRETED else 2  # in the interpreter numpy adds many pixels one after the other

    def pixels(t):
        return t[:, :, None, None]

    def mean(t):
        return t.reshape(len(x), groups, -1).mean(2).repeat_interleave(x.shape[1] // groups, 1)

    def sums(t):
        return many * t.sum((2, 3))

    if weight is None:
        weight, bias = torch.ones_like(x[0, :, 0, 0]), torch.zeros_like(x[0, :, 0, 0])
    one_more, shifted = torch.ones_like(x[:, :, 0, 0]), torch.zeros_like(x[:, :, 0, 0])
    if scale is not None:
        one_more, shifted = 1 + scale, shift
    x = x if add is None else x + pixels(add)
    grouped = x.reshape(len(x), groups, -1)
    rstd = (grouped.var(2, unbiased=False) + 1e-5).rsqrt().repeat_interleave(x.shape[1] // groups, 1)
    normed = torch.nn.functional.group_norm(x, groups)
    u = normed * pixels(weight * one_more) + pixels(bias * one_more + shifted)
    gate = torch.sigmoid(u)
    du = (dy * gate * (1 + u * (1 - gate)) if silu else dy).abs()
    w = pixels((weight * one_more).abs())
    # x - mean is of the size of x, and normalised with it.
    sizes = (x.abs() + pixels(mean(x.abs()))) * pixels(rstd)
    dx = pixels(rstd) * (du * w + pixels(mean(du * w)) + normed.abs() * pixels(mean(du * w * normed.abs())))
    p, q = sums(du * sizes), sums(du)
    return {
        "y": 2 * (sizes * w + pixels((bias * one_more).abs() + shifted.abs())),
        "x": 4 * dx,
        "weight": (p * one_more.abs()).sum(0),
        "bias": (q * one_more.abs()).sum(0),
        "scale": weight.abs() * p + bias.abs() * q,
        "shift": q,
        "add": sums(dx),
    }


def _check_joined(
    channels,
    beside,
    size,
    groups,
    dtype=torch.float32,
    layout=torch.channels_last,
    silu=True,
    added=True,
    residual=True,
    factor=1.0,
    used=True,
    batch=1,
):
    """`channels` of x and `beside` of the other tensor; used: whether a gradient comes in of the whole input too.

    What is normalised is the whole input as it is stored, so it is that in what y and the gradients are held to.
    """
    of_x = _norm_inputs(channels, size, dtype, layout, False, added, batch)
    x, add, residual = of_x[0], of_x[-1], of_x[1] if residual else None
    rows = torch.linspace(-1, 2, beside)[:, None, None]
    other = (x[:, :1].cpu() + rows).to(x).contiguous(memory_format=layout) if beside else None
    dwhole, dy, weight, bias, *_ = _norm_inputs(channels + beside, size, dtype, layout, False, False, batch)
    parts = (x, add, residual, factor, other)

    y, whole, mean, rstd = norm.joined_group_norm_silu(x, groups, weight, bias, 1e-5, silu, *parts[1:])
    assert_as_good_as_torch(whole, reference.joined(*_cast(parts, torch.float32)).to(dtype), _joined_exactly(parts))
    dx, dother, sums, dadd = norm.joined_group_norm_silu_backward(
        *(dy, dwhole if used else None, whole, channels, groups, weight, bias, silu, factor, mean, rstd, added)
    )
    dweight, dbias, *_ = norm.parameter_grads(sums, weight, bias, None)
    assert y.stride() == whole.stride() == dy.stride() and dx.stride() == x.stride()
    assert (dother is None) == (other is None) and (dadd is None) == (add is None)

    def plain(precision):
        leaf, w, b = (tensor.detach().to(precision).requires_grad_() for tensor in (whole, weight, bias))
        result = reference.group_norm_silu(leaf, groups, w, b, 1e-5, silu)
        d, dw, db = torch.autograd.grad(result, (leaf, w, b), dy.to(precision))
        d = d + dwhole.to(precision) if used else d
        dx, dother = d[:, :channels] * factor, d[:, channels:]
        found = {"y": result.detach(), "x": dx, "beside": dother, "weight": dw, "bias": db, "add": dx.sum((2, 3))}
        return found

    sizes = _norm_magnitudes(whole, dy, groups, weight, bias, silu, None, None, None)
    d_size = sizes["x"] + (dwhole.abs() if used else 0)
    many = 16 if memory.INTERPRETED else 2
    sizes |= {"x": d_size[:, :channels], "beside": d_size[:, channels:]}
    sizes["add"] = many * sizes["x"].sum((2, 3))
    float32, exact = plain(torch.float32), plain(torch.float64)
    values = {"y": y, "x": dx, "beside": dother, "weight": dweight, "bias": dbias}
    values["add"] = None if dadd is None else dadd.to(dtype)
    for name, value in values.items():
        if value is not None:
            truth = exact[name]
            magnitude = sizes[name] if dtype == torch.float32 else truth.abs()
            assert_as_good_as_torch(value, float32[name].to(value.dtype), truth, magnitude)


def _cast(parts, dtype):
    return [part.to(dtype) if isinstance(part, torch.Tensor) else part for part in parts]


def _joined_exactly(parts):
    return reference.joined(*_cast(parts, torch.float64))


UNETS = [name for name, settings in NETWORKS.items() if settings["family"] != "mlp"]
CHECKED = set()  # shapes, in this process: networks share many


@pytest.mark.parametrize("name", UNETS)
def test_group_norm_at_every_shape_of_a_network(name):
    for use in network_norms([name]):
        if use not in CHECKED:
            CHECKED.add(use)
            print(use)  # shown where it fails
            _check_use(use)


def _check_use(use):
    layout = torch.channels_last if (use.channels // use.groups + use.silu) % 2 else torch.contiguous_format
    groups = _groups_enough(use, layout) if memory.INTERPRETED else use.groups
    channels = use.channels // use.groups * groups
    if use.joined:
        beside = use.beside * groups // use.groups
        parts = {"added": use.added, "residual": use.residual, "factor": use.factor}
        _check_joined(channels - beside, beside, use.size, groups, torch.float32, layout, use.silu, **parts)
    else:
        _check_norm(channels, use.size, groups, torch.float32, layout, use.silu, use.modulated, use.added)


def _groups_enough(use, layout):
    """The fewest groups of the same size that are cut into the same tiles and chunks, by two programs or more.

    The programs of further groups do the same, and an interpreted one takes its time.
    """

    def plans(groups):
        channels, pixels = use.channels // use.groups * groups, use.size**2
        ways = (norm.FORWARD, norm.BACKWARD)
        return [norm.plan(channels, groups, pixels, 4, layout == torch.channels_last, way) for way in ways]

    def is_enough(groups):
        pairs = zip(plans(groups), plans(use.groups))
        return all({**few, "GROUPS": 0} == {**all_, "GROUPS": 0} and groups > few["GROUPS_HERE"] for few, all_ in pairs)

    divisors = (groups for groups in range(1, use.groups) if use.groups % groups == 0)
    return next(filter(is_enough, divisors), use.groups)


def test_the_list_of_shapes_is_complete():
    """Found by running the networks; what the three published ones use is known."""
    published = network_norms(PAPER)
    assert {use.channels // use.groups for use in published} == {4, 8, 12, 16, 20, 24, 28, 32}
    assert {use.size for use in published} == {4, 8, 16, 32, 64} and {use.groups for use in published} == {32}
    shapes = {(use.size, use.channels) for use in published}
    assert (
        shapes >= {(64, 384), (64, 256), (32, 640), (32, 384)}
        and max(size * size * channels for size, channels in shapes) == 64 * 64 * 384
    )
    assert set(PAPER) <= set(UNETS)
    assert (
        any(use.modulated for use in published)
        and any(use.added for use in published)
        and not all(use.silu for use in published)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["row-major", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "silu, modulated, added, affine",
    [
        (True, False, False, True),
        (False, True, False, True),
        (True, True, True, True),
        (True, True, False, False),
        (False, False, True, False),
    ],
)
def test_group_norm_in_every_type_layout_and_variant(dtype, layout, silu, modulated, added, affine):
    _check_norm(24, (7, 5), 3, dtype, layout, silu, modulated, added, affine, batch=3)  # nothing here is a power of two


def _limit_tiles(monkeypatch, one_pass, split):
    """Have fewer elements in a program, of one that holds whole groups and of one that does not."""
    monkeypatch.setattr(norm, "ONE_PASS_ELEMENTS", one_pass)
    monkeypatch.setattr(norm, "SPLIT_ELEMENTS", split)
    monkeypatch.setattr(norm, "plan", norm.plan.__wrapped__)  # what is kept was made for other limits


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["row-major", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_in_the_split_form(dtype, layout, monkeypatch):
    """Three chunks, so that neither their number nor the pixels of the last one are a power of two."""
    _limit_tiles(monkeypatch, 64, 128)
    for direction in (norm.FORWARD, norm.BACKWARD):
        assert norm.plan(24, 3, 45, dtype.itemsize, layout == torch.channels_last, direction)["chunks"] == 3
    for modulated, added in ((True, False), (False, True)):
        _check_norm(24, (9, 5), 3, dtype, layout, True, modulated, added, batch=2)


JOINED = [  # (channels, beside, added, residual, factor, used) of 24 in 3 groups; 11 and 13 share the one between them
    (11, 13, True, True, 0.7, True),
    (11, 13, False, False, 1.0, True),
    (16, 8, True, True, 1.0, False),
    (24, 0, True, True, 0.7, True),
    (24, 0, False, True, 1.0, False),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["row-major", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, beside, added, residual, factor, used", JOINED)
def test_group_norm_of_parts(dtype, layout, channels, beside, added, residual, factor, used, monkeypatch):
    """In one pass and split; a group may have channels of both tensors. Nothing here is a power of two."""
    _check_joined(channels, beside, (7, 5), 3, dtype, layout, factor < 1, added, residual, factor, used, batch=2)
    _limit_tiles(monkeypatch, 64, 128)
    _check_joined(channels, beside, (9, 5), 3, dtype, layout, True, added, residual, factor, used)


def test_the_whole_of_one_part_is_that_part_and_the_parts_in_a_row():
    """To the bit: nothing but the address of an element is new."""
    x, other, weight, bias, *_ = _norm_inputs(24, 7, torch.bfloat16, torch.channels_last, False, False, 2)
    one, two = (tensor[:, :11].contiguous(memory_format=torch.channels_last) for tensor in (x, other))
    last = x[:, 11:].contiguous(memory_format=torch.channels_last)
    plain = norm.group_norm_silu(x, 3, weight, bias, 1e-5, True, None, None, None)
    y, whole, *statistics = norm.joined_group_norm_silu(one, 3, weight, bias, 1e-5, True, None, None, 1.0, last)
    assert torch.equal(whole, x) and all(torch.equal(a, b) for a, b in zip((y, *statistics), plain, strict=True))
    _, whole, *_ = norm.joined_group_norm_silu(one, 3, weight, bias, 1e-5, True, None, two, 1.0, last)
    assert torch.equal(whole, torch.cat([one + two, last], 1))


def test_narrow_segments_are_split():
    """Bytes beside each other that a program reads of a pixel's row in channels_last memory, and chunks of pixels."""

    def segment_and_chunks(size, channels, dtype, direction, channels_last=True):
        chosen = norm.plan(channels, 32, size * size, dtype.itemsize, channels_last, direction)
        return chosen["GROUPS_HERE"] * chosen["GROUP_CHANNELS"] * dtype.itemsize, chosen["chunks"]

    f32, bf16 = torch.float32, torch.bfloat16
    for direction in (norm.FORWARD, norm.BACKWARD):
        assert segment_and_chunks(64, 128, bf16, direction) == (128, 64)  # one pass would have 8 bytes
        assert segment_and_chunks(64, 128, bf16, direction, channels_last=False)[1] == 1
        assert segment_and_chunks(32, 128, bf16, direction) == (32, 1)  # as far as registers go
        for channels, segment in ((768, 96), (896, 112), (256, 64), (512, 64)):
            assert segment_and_chunks(8, channels, bf16, direction) == (segment, 1)
    # 24 and 16 bytes: worth three launches less, but not worth one less.
    assert segment_and_chunks(32, 384, bf16, norm.BACKWARD) == (24, 1)
    assert segment_and_chunks(32, 384, bf16, norm.FORWARD) == (192, 32)
    assert segment_and_chunks(64, 128, f32, norm.BACKWARD) == (16, 1)
    assert segment_and_chunks(64, 128, f32, norm.FORWARD) == (128, 32)
    assert norm.plan(4, 1, 64, 2, True)["chunks"] == 1  # the row has no more


def test_large_tiles_that_would_spill_have_more_warps():
    """Those of one or two channels a group, and in float32 those of two sources, in the backward."""

    def tile_and_warps(size, channels, dtype, channels_last, joined):
        chosen = norm.plan(channels, 32, size * size, dtype.itemsize, channels_last, norm.BACKWARD, joined)
        tile = chosen["GROUPS_HERE"] * chosen["PIXEL_TILE"] * chosen["CHANNEL_TILE"]
        return tile, chosen["num_warps"], chosen["maxnreg"]

    f32, bf16 = torch.float32, torch.bfloat16
    for channels, channels_last in ((384, True), (768, True), (896, False)):
        assert tile_and_warps(16, channels, f32, channels_last, joined=True) == (8192, 8, 255)
        assert tile_and_warps(16, channels, f32, channels_last, joined=False) == (8192, 4, 255)
    assert tile_and_warps(16, 128, bf16, True, joined=True) == (8192, 4, 255)
    assert tile_and_warps(64, 64, bf16, False, joined=False) == (8192, 8, 255)  # two channels
    assert tile_and_warps(32, 384, f32, True, joined=True) == (16384, 8, 255)


@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_of_narrow_segments(modulated, monkeypatch):
    """Split although a group fits into one program."""
    _limit_tiles(monkeypatch, 256, 256)
    for direction in (norm.FORWARD, norm.BACKWARD):
        assert norm.plan(16, 4, 48, 2, True, direction)["chunks"] == 3
    _check_norm(16, (8, 6), 4, torch.bfloat16, torch.channels_last, True, modulated, not modulated, batch=2)


def test_group_norm_of_large_means_keeps_its_variance():
    """The variance is of centred values, also when joined from chunks: a mean of 1000 costs what it costs torch."""
    for limit in (norm.ONE_PASS_ELEMENTS, 64):
        with pytest.MonkeyPatch.context() as patch:
            _limit_tiles(patch, limit, limit)
            x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE) + 1000
            y, mean, rstd = norm.group_norm_silu(x, 2, None, None, 1e-5, False, None, None, None)
            exact = torch.nn.functional.group_norm(x.double(), 2)
            assert float((y.double() - exact).abs().max()) < 2e-4 and float((mean - 1000).abs().max()) < 1


def test_group_norm_gives_the_same_bits_in_every_run():
    x, dy, weight, bias, scale, shift, _ = _norm_inputs(64, 8, torch.float32, torch.channels_last, True, False, 2)
    runs = []
    for _ in range(2):
        y, mean, rstd = norm.group_norm_silu(x, 8, weight, bias, 1e-5, True, scale, shift, None)
        dx, sums, _ = norm.group_norm_silu_backward(dy, x, 8, weight, bias, True, scale, shift, None, mean, rstd)
        runs.append((y, dx, sums, *norm.parameter_grads(sums, weight, bias, scale)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(2, 8, 4, 4, dtype=torch.float64), "float64 is not supported"),
        (torch.zeros(2, 8, 4, 5).transpose(2, 3), "neither contiguous nor channels_last"),
    ],
)
def test_group_norm_layouts_that_no_kernel_has_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        norm.group_norm_silu(x, 2, None, None, 1e-5, True, None, None, None)


# ---- the optimizer step ----------------------------------------------------------------------------------------------

STEP = (0.5, 0.9, 0.999, 1e-8)  # clip, betas, eps


def _step_inputs(aligned=True):
    """Six lists of tensors: of several blocks with a rest, of one whole block, small, channels_last, and a scalar."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(300,), (128,), (3, 5), (4, 3, 3, 3), ()]

    def tensor(shape):
        whole = torch.randn(torch.Size(shape).numel() + 4, generator=generator).to(KERNEL_DEVICE)
        value = whole[0 if aligned else 1 :][: len(whole) - 4].reshape(shape)
        return value.to(memory_format=torch.channels_last) if len(shape) == 4 else value

    lists = [[tensor(shape) for shape in shapes] for _ in range(6)]
    for tensors in lists[2:4]:  # both second moments
        for value in tensors:
            value.abs_()
    return lists


def _step_in_float64(gradients, lists, norm, numbers, factors):
    """What a step makes of the five lists, by the formulas at the top of the kernel's file."""
    clip, beta1, beta2, eps = STEP
    rate, correction, weight = numbers.double()
    made = []
    for g, p, m, v, h, a, factor in zip(gradients, *lists, factors):
        g, p, m, v, h, a = (t.double() for t in (g, p, m, v, h, a))
        g = g * min(1.0, clip / (float(norm) + 1e-6))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        h = torch.maximum(h, v)
        p = p - factor * rate * m / (h.sqrt() / correction + eps)
        made.append((p, m, v, h, a + weight * (p - a)))
    return list(zip(*made))


@pytest.mark.parametrize("norm", [30.0, 0.1], ids=["clipped", "whole"])
@pytest.mark.parametrize("aligned", [True, False])
def test_an_optimizer_step_is_the_formula(aligned, norm):
    m, p, v, h, a, gradients = _step_inputs(aligned)
    lists, factors = (p, m, v, h, a), [1.0, 1.0, 20.0, 1.0, 0.5]
    table, found = adam_step.adam_table(*lists, factors, block=128)
    assert found == aligned and len(table[0]) == 3 + 1 + 1 + 1 + 1
    norm, numbers = (torch.tensor(value, device=KERNEL_DEVICE) for value in (norm, [1e-2, 0.3, 0.2]))
    exact = _step_in_float64(gradients, lists, norm, numbers, factors)
    adam_step.adam_step(p, gradients, norm, numbers, table, found, *STEP, block=128)
    for values, truths in zip(lists, exact):
        for value, truth in zip(values, truths):
            torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_seen_in_the_parameters(norm):
    """NaN in all of them. An infinite norm leaves infinite gradients, which become NaN, and makes the others zero."""
    m, p, v, h, a, gradients = _step_inputs()
    gradients[1][3] = norm
    table, aligned = adam_step.adam_table(p, m, v, h, a, [1.0] * 5)
    norm, numbers = (torch.tensor(value, device=KERNEL_DEVICE) for value in (norm, [1e-2, 0.3, 0.2]))
    adam_step.adam_step(p, gradients, norm, numbers, table, aligned, *STEP)
    assert torch.isnan(p[1][3]) and torch.isnan(a[1][3])
    assert all(torch.isnan(value).all() == torch.isnan(norm) for value in (p[0], p[4]))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, dtype=torch.float64), torch.zeros(4, 2)[:, 0], torch.zeros(2, 2).t()],
    ids=["float64", "holes", "another layout"],
)
def test_tensors_that_no_step_takes_are_named(tensor):
    parameter = torch.zeros(tensor.shape)
    with pytest.raises(ValueError, match="an optimizer step takes dense float32 tensors"):
        adam_step.adam_table([parameter], [tensor], [parameter], [parameter], [parameter], [1.0])

"""Sums and concatenations that a normalisation makes on its way: which are left over, and that the values stay."""

import pytest
import torch
from devices import KERNEL_DEVICE
from small_networks import FAMILIES, small_network
from torch.utils._python_dispatch import TorchDispatchMode

from bench.roofline import as_on_a_gpu
from hsivi_fast import ops
from hsivi_fast.nets.blocks import ConvBeforeSum, JoiningNorm, NoNorm, Parts, whole, with_channels
from hsivi_fast.nets.prepared import Prepared


class _OfImages(TorchDispatchMode):
    """Notes the operators that make feature maps [B, C, H, W]."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 4:
            self.found.append(function._schema.name)
        return result


def _operators(network, backward):
    """Of a call with the kernels, on tensors without memory."""
    with torch.device("meta"), as_on_a_gpu(), _OfImages() as images:
        x, t = torch.empty(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
        y = network(x, t)
        if backward:
            y.backward(torch.empty_like(y))
    return images.found


# Sums that are left to torch in a frozen call, and biases with them: those before a change of resolution that has no
# normalisation in front, and those of an attention that makes tensors of the other memory format than it is given.
SUMS = {
    ("ddpm", "row_major"): 10,
    ("ddpm", "channels_last"): 4,
    ("adm", "row_major"): 3,
    ("adm", "channels_last"): 6,
    ("song", "row_major"): 6,
    ("song", "channels_last"): 0,
    ("dhariwal", "row_major"): 8,
    ("dhariwal", "channels_last"): 0,
}


@pytest.mark.parametrize("layout", ["row_major", "channels_last"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "training"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_with_the_kernels_concatenates_nothing(family, frozen, layout):
    """Nor does its backward take gradients apart again. What is left of sums is known."""
    network = small_network(family).to("meta").requires_grad_(not frozen)
    if layout == "channels_last":
        network.in_channels_last()
    found = _operators(Prepared(network) if frozen else network, backward=not frozen)
    assert not {name for name in found if "cat" in name or "slice" in name}
    if frozen:
        assert found.count("aten::add") == SUMS[family, layout]


def test_plain_calls_have_them():
    """Eight blocks add the embedding of time, and make a sum as four attentions do."""
    network = small_network("ddpm").to("meta")
    with torch.device("meta"), _OfImages() as images:
        ops.choose_backend("torch", "meta")
        network(torch.empty(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    assert images.found.count("aten::cat") == 4 and images.found.count("aten::add") == 8 + 12


@pytest.mark.parametrize("family, settings", [("ddpm", {"middle": False}), ("song", {"encoder": "residual"})])
def test_a_prepared_network_has_the_values_of_torch_with_the_kernels(family, settings):
    """In bfloat16 and channels_last, as a sampler runs it, with the gradient at its input."""
    network = small_network(family, **settings).in_channels_last().to(KERNEL_DEVICE)
    network.precision = "bf16"
    generator = torch.Generator().manual_seed(0)
    given, cotangent = (torch.randn(1, 3, 8, 8, generator=generator).to(KERNEL_DEVICE) for _ in range(2))
    results = []
    for backend in ("torch", "triton"):
        ops.choose_backend(backend, KERNEL_DEVICE)
        x = given.clone().requires_grad_()
        y = Prepared(network)(x, torch.tensor([3], device=KERNEL_DEVICE))
        results.append((y.detach(), *torch.autograd.grad((y * cotangent).sum(), x)))
    for found, expected in zip(*results):
        assert (found - expected).norm() < 4e-2 * expected.norm()


def test_a_bias_is_left_to_the_sum_where_a_kernel_makes_it(monkeypatch):
    conv = ConvBeforeSum(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 5)
    h, add = conv(x)
    assert add is None and torch.equal(h, torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1))
    monkeypatch.setattr(ops, "running_backend", lambda device: "triton")
    torch.testing.assert_close(whole(Parts(*conv(x))), h, rtol=1e-5, atol=1e-5)
    assert torch.equal(conv(x)[1], conv.bias.expand(2, -1))


def test_a_normalisation_gives_back_what_it_was_given_as_a_whole():
    norm = JoiningNorm(2, 6)
    x, residual, beside = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3)
    parts = with_channels(Parts(x, residual=residual, factor=0.5), beside)
    expected = torch.cat([(x + residual) * 0.5, beside], 1)
    y, given = norm(parts)
    assert torch.equal(given, expected) and torch.equal(whole(parts), expected)
    assert torch.equal(y, torch.nn.functional.group_norm(expected, 2, norm.weight, norm.bias))
    assert norm(expected)[1] is expected and all(torch.equal(each, expected) for each in NoNorm()(parts))

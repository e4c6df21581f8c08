"""A prepared network has the values and the input gradients of the network itself, and follows its weights."""

import pytest
import torch
from small_networks import FAMILIES, small_network
from torch.utils._python_dispatch import TorchDispatchMode

from hsivi_fast.build import build_context, build_score_net
from hsivi_fast.config import load_config
from hsivi_fast.nets import prepared
from hsivi_fast.nets.blocks import BeforeNorm, GroupNorm, TimeBlock, UpsamplingConv
from hsivi_fast.nets.edm_blocks import ResamplingConv
from hsivi_fast.nets.prepared import FoldedUpsampling, Prepared, as_prepared, folded_weight
from hsivi_fast.parallel.world import ALONE


def _value_and_gradient(network):
    """Of a call: (y, the gradient at x)."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = network(x, torch.tensor([3, 0]))
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


def _places(network):
    return {tensor.data_ptr() for tensor in network.state_dict().values()}


def test_in_float32_it_shares_memory_and_wants_no_gradient():
    network = build_score_net(build_context(load_config("toy2d", ["device=cpu"]), ALONE, teacher=True))
    view = Prepared(network)
    assert as_prepared(view) is view and view.event_shape == (2,) and view.own_bytes == 0
    assert not any(parameter.requires_grad for parameter in view.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert _places(view) == _places(network)
    x, t = torch.randn(5, 2), torch.tensor([0, 10, 100, 500, 999])
    with torch.no_grad():
        network.correction.layers[-1].weight.normal_()
    assert torch.equal(view(x, t), network(x, t))
    leaf = x.requires_grad_()
    torch.autograd.grad(view(leaf, t).sum(), leaf)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["row_major", "channels_last"])
def test_in_bfloat16_it_is_autocast_bit_for_bit(family, layout, monkeypatch):
    """But for the upsampling, whose folded weight rounds otherwise, and for two biases that are added in float32."""
    monkeypatch.setattr(prepared, "upsamples_by_3x3", lambda module: False)
    monkeypatch.setattr(prepared, "biases_in_one", lambda module: None)
    network = small_network(family)
    network.precision = "bf16"
    if layout == "channels_last":
        network.in_channels_last()
    ready = Prepared(network)
    places = _places(ready)
    for module in ready.modules():
        for parameter in module.parameters(recurse=False):
            assert parameter.dtype == (torch.float32 if isinstance(module, GroupNorm) else torch.bfloat16)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(_value_and_gradient(ready), _value_and_gradient(network)))
        for parameter in network.parameters():
            parameter.mul_(1.1)
        ready.refresh()
    assert _places(ready) == places


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 3e-2)])
def test_a_prepared_network_is_the_network_up_to_rounding(family, precision, tolerance):
    network = small_network(family).in_channels_last()
    network.precision = precision
    ready = Prepared(network)
    assert any(isinstance(module, FoldedUpsampling) for module in ready.modules())
    for parameter in network.parameters():
        parameter.mul_(1.1)
    ready.refresh()
    for found, expected in zip(_value_and_gradient(ready), _value_and_gradient(network)):
        assert (found - expected).norm() < tolerance * expected.norm()


class _SmallSums(TorchDispatchMode):
    """Counts the operators that add tensors [B, C]: a launch each, for a few numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.count += function._schema.name == "aten::add" and result.ndim == 2
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "family, settings, folds",
    [("ddpm", {}, True), ("song", {}, True), ("adm", {"scale_shift": False}, True)]
    + [("ddpm", {"scale_shift": True}, False), ("adm", {}, False), ("dhariwal", {}, False)],
)
def test_a_bias_before_a_norm_is_in_that_of_the_embeddings_layer(family, settings, folds, precision):
    """Where the embedding is added there, so that no call adds two rows of a few numbers. Of an upsampling block too."""
    network = small_network(family, **settings)
    network.precision = precision
    ready, counts = Prepared(network), []
    for parameter in network.parameters():
        parameter.mul_(1.1)
    ready.refresh()
    for module in (network, ready):
        with _SmallSums() as sums:
            module(torch.zeros(2, 3, 8, 8), torch.tensor([3, 0]))
        counts.append(sums.count)
    blocks = [module for module in network.modules() if isinstance(module, TimeBlock)]
    assert counts == [len(blocks) if folds else 0, 0]
    for block, own in zip(blocks, (module for module in ready.modules() if isinstance(module, TimeBlock)), strict=True):
        if folds:
            expected = (block.of_embedding.bias + block.added_to.bias).to(own.of_embedding.bias.dtype)
            assert torch.equal(own.of_embedding.bias, expected) and own.added_to.bias is None
        else:
            assert own.added_to is None
            assert all(module.bias is not None for module in own.modules() if isinstance(module, BeforeNorm))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [UpsamplingConv, lambda channels: ResamplingConv(channels, 7, 3, "up", (1, 1))])
def test_upsampling_and_a_convolution_are_one(make, layout, dtype, tolerance):
    """At the border too, with odd widths and sides, and the gradient at the input."""
    conv = make(5).to(dtype).requires_grad_(False)
    weight = folded_weight(conv.weight).contiguous(memory_format=layout)
    x = torch.randn(2, 5, 3, 7, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    results = []
    for module in (FoldedUpsampling(torch.nn.Parameter(weight, requires_grad=False), conv.bias), conv):
        y = module(x)
        results.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[3]).to(dtype)).sum(), x)))
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_weights_that_do_not_lie_here_as_a_whole_are_not_copied():
    network = small_network("ddpm")
    network.precision = "bf16"
    assert Prepared(network, whole=False).network is network

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
    monkeypatch.setattr(prepared, "biases_in_one", lambda module: [])
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
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 4e-2)])
def test_a_prepared_network_is_the_network_up_to_rounding(family, precision, tolerance):
    """In bfloat16 either is a few per cent from the network in float32, in directions of its own."""
    network = small_network(family).in_channels_last()
    network.precision = precision
    ready = Prepared(network)
    assert any(isinstance(module, FoldedUpsampling) for module in ready.modules())
    for parameter in network.parameters():
        parameter.mul_(1.1)
    ready.refresh()
    for found, expected in zip(_value_and_gradient(ready), _value_and_gradient(network)):
        assert (found - expected).norm() < tolerance * expected.norm()


class _Rows(TorchDispatchMode):
    """Notes the operators that make tensors [B, C], which are a launch each for a few numbers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 2:
            self.found.append(function._schema.name)
        return result


def _operators_on_rows(network):
    with _Rows() as rows, torch.no_grad():
        network(torch.zeros(2, 3, 8, 8), torch.tensor([3, 0]))
    return rows.found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "family, settings, folds",
    [("ddpm", {}, True), ("song", {}, True), ("adm", {"scale_shift": False}, True)]
    + [("ddpm", {"scale_shift": True}, False), ("adm", {}, False), ("dhariwal", {}, False)],
)
def test_layers_whose_results_are_added_have_one_bias(family, settings, folds, precision):
    """A convolution's is in that of the embedding's layer, if that is added there: no call adds two rows of numbers.

    A skip connection's is in that of the last convolution.
    """
    network = small_network(family, **settings)
    network.precision = precision
    ready = Prepared(network)
    for parameter in network.parameters():
        parameter.mul_(1.1)
    ready.refresh()
    counts = [_operators_on_rows(module).count("aten::add") for module in (network, ready)]
    blocks = [module for module in network.modules() if isinstance(module, TimeBlock)]
    assert counts == [len(blocks) if folds else 0, 0]
    skips = 0
    for block, own in zip(blocks, (module for module in ready.modules() if isinstance(module, TimeBlock)), strict=True):
        for (gives, takes), (without, with_both) in zip(block.sums, own.sums, strict=True):
            given = getattr(gives, "bias", None)  # a skip connection may have no weights
            expected = takes.bias if given is None else takes.bias + given
            assert torch.equal(with_both.bias, expected.to(with_both.bias.dtype))
            assert getattr(without, "bias", None) is None
            skips += given is not None and takes is not block.of_embedding
        before_norm = [module for module in own.modules() if isinstance(module, BeforeNorm)]
        assert len(before_norm) == 1 and (before_norm[0].bias is None) == folds
    assert 0 < skips < len(blocks)


TIMES = torch.tensor([7, 3, 0, 3])  # in any order, and one twice


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_calls_at_known_timesteps_read_what_the_blocks_make_of_them(family, precision, tolerance):
    """From a table, which follows the weights; the other weights are those of the copy that it is made of."""
    network = small_network(family)
    network.precision = precision
    ready = Prepared(network)
    at_times = ready.at(TIMES)
    places = _places(at_times)
    assert {tensor.data_ptr() for tensor in at_times.network.parameters()} <= _places(ready)
    assert (at_times.event_shape, at_times.classes, at_times.own_bytes) == ((3, 8, 8), None, ready.own_bytes)
    for parameter in network.parameters():
        parameter.mul_(1.1)
    at_times.refresh()
    for found, expected in zip(_value_and_gradient(at_times), _value_and_gradient(ready), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()
    assert _places(at_times) == places
    # A row of the table for each sample, and views: of its columns, and of a convolution's bias for all samples.
    assert set(_operators_on_rows(at_times)) <= {"aten::index", "aten::slice", "aten::expand"}
    assert _operators_on_rows(at_times).count("aten::index") == 1


@pytest.mark.parametrize("network", [small_network("ddpm"), small_network("adm").convert_by(torch.rand(4, 10))])
@pytest.mark.parametrize("timestep_scale", [1.0, 0.25])
def test_the_table_is_of_what_the_network_is_shown(network, timestep_scale):
    """Be it a share of the timestep, or what the coefficients say."""
    network.timestep_scale = timestep_scale
    found, expected = _value_and_gradient(Prepared(network).at(TIMES)), _value_and_gradient(Prepared(network))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_at_a_timestep_that_the_table_does_not_have_is_nan():
    ready = Prepared(small_network("ddpm")).at(TIMES)
    of_each = ready(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 6, 7])).flatten(1)
    assert of_each.isnan().all(1).tolist() == [False, True, True, False] and of_each[::3].isfinite().all()
    with pytest.raises(IndexError):
        ready(torch.zeros(1, 3, 8, 8), torch.tensor([8]))


def test_there_is_no_table_without_blocks_with_classes_or_for_weights_in_pieces():
    point = build_score_net(build_context(load_config("toy2d", ["device=cpu"]), ALONE, teacher=True))
    with_classes, in_pieces = small_network("ddpm", classes=3), Prepared(small_network("ddpm"), whole=False)
    for ready in (Prepared(point), Prepared(with_classes), in_pieces):
        assert ready.at(TIMES) is ready


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

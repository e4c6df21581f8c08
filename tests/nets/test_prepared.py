"""A prepared network has the values and the input gradients of the network itself, and follows its weights."""

import pytest
import torch
from small_networks import FAMILIES, small_network

from hsivi_fast.build import build_context, build_score_net
from hsivi_fast.config import load_config
from hsivi_fast.nets.blocks import GroupNorm
from hsivi_fast.nets.prepared import Prepared, as_prepared
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
def test_in_bfloat16_it_is_autocast_bit_for_bit(family, layout):
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


def test_weights_that_do_not_lie_here_as_a_whole_are_not_copied():
    network = small_network("ddpm")
    network.precision = "bf16"
    assert Prepared(network, whole=False).network is network

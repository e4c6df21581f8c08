"""What reaches torch's attention: the layout that its flash kernels take, in every family and memory layout.

The numbers themselves are held by the golden values of each family. A CPU in bfloat16 has plain products in its place.
"""

import pytest
import torch
from small_networks import FAMILIES, small_network
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hsivi_fast.nets.blocks import pixel_attention


def _called(network, device="cpu"):
    x = torch.randn(2, *network.event_shape, generator=torch.Generator().manual_seed(0)).to(device)
    return network.to(device)(x, torch.tensor([3, 0], device=device))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_a_pixel_lie_beside_each_other(family, monkeypatch):
    attend, seen = F.scaled_dot_product_attention, []

    def noted(*tensors):
        seen.append([tuple(tensor.stride()) for tensor in tensors])
        return attend(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    row_major = _called(small_network(family))
    calls = len(seen)
    channels_last = _called(small_network(family).in_channels_last())
    assert calls > 1 and len(seen) == 2 * calls
    assert all(strides[-1] == 1 for call in seen for strides in call)
    assert (row_major - channels_last).norm() < 1e-5 * row_major.norm()


@pytest.mark.parametrize("pixels, products", [(64, True), (256, True), (257, False)])
@pytest.mark.parametrize("layout", ["row_major", "channels_last"])
def test_plain_products_in_bfloat16_on_a_cpu(pixels, products, layout, monkeypatch):
    """They give what torch's attention gives in float64, with its gradients, and leave the layout as it is."""
    inputs = torch.randn(2, 3 * 4 * 8, pixels, 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    if layout == "channels_last":
        inputs = inputs.to(memory_format=torch.channels_last)
    outward = torch.randn(2, 4, 8, pixels, generator=torch.Generator().manual_seed(1)).bfloat16()

    def attended(images):
        images = images.detach().requires_grad_()
        y = pixel_attention(images.view(2, 3, 4, 8, pixels).transpose(0, 1))
        y.backward(outward.to(y.dtype))
        return y.detach(), images.grad

    exact = attended(inputs.double())
    calls = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *tensors: calls.append(0) or attend(*tensors))
    found = attended(inputs)
    assert len(calls) == (0 if products else 1)
    for value, wanted in zip(found, exact):
        assert value.dtype == torch.bfloat16 and (value - wanted).norm() < 0.01 * wanted.norm()
    if products:
        assert (found[0].stride(2) == 1) == (layout == "channels_last")


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["row_major", "channels_last"])
def test_the_flash_kernel_takes_it(family, layout):
    """In bfloat16, which is what it is made for; any other kernel is forbidden here."""
    network = small_network(family)
    expected = _called(network)
    network.precision = "bf16"
    if layout == "channels_last":
        network.in_channels_last()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = _called(network, "cuda").cpu()
    assert (found - expected).norm() < 0.05 * expected.norm()

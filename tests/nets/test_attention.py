"""What reaches torch's attention: the layout that its flash kernels take, in every family and memory layout.

The numbers themselves are held by the golden values of each family.
"""

import pytest
import torch
from small_networks import FAMILIES, small_network
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


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

"""What blocks are made of, against the same in torch's own modules, in float64."""

import pytest
import torch
from torch import nn

from hsivi_fast.nets.blocks import ConvBeforeNorm, GroupNorm, upsample
from hsivi_fast.nets.edm_blocks import ResamplingConv, ResamplingConvBeforeNorm


@pytest.mark.parametrize("with_add", [True, False])
@pytest.mark.parametrize(
    "leaving, whole, sizes",
    [
        (ConvBeforeNorm, nn.Conv2d, (3, 8, 3)),
        (ResamplingConvBeforeNorm, ResamplingConv, (3, 8, 3, "up", (1, 1))),
        (ResamplingConvBeforeNorm, ResamplingConv, (3, 8, 3, "down", (1, 3, 3, 1))),
    ],
)
def test_a_bias_that_the_normalisation_adds_is_the_convolution_s(leaving, whole, sizes, with_add):
    """With the gradients of input, weight, bias and what is added."""
    leaving, norm = leaving(*sizes).double(), GroupNorm(4, 8).double()
    whole = whole(*sizes).double()
    whole.load_state_dict(leaving.state_dict())
    x, add = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    add = add if with_add else None

    def normed(x, add):
        h, add = leaving(x, add)
        return norm(h, add=add)

    found = _value_and_gradients(normed, leaving, x, add)
    expected = _value_and_gradients(lambda x, add: norm(whole(x), add=add), whole, x, add)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _value_and_gradients(function, module, x, add):
    inputs = [tensor.clone().requires_grad_() for tensor in (x, add) if tensor is not None]
    y = function(*inputs, *[None] * (2 - len(inputs)))
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y, *torch.autograd.grad((weights * y.sin()).sum(), [*inputs, module.weight, module.bias])


def test_one_by_one_before_the_repetition_is_one_by_one_after_it():
    conv = ResamplingConv(5, 3, 1, "up", (1, 1)).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(upsample(x), conv.weight, conv.bias), rtol=1e-12, atol=0)

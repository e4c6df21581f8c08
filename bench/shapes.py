"""The shapes at which the networks use an operation, found by running them on tensors without memory."""

from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hsivi_fast import ops
from hsivi_fast.nets import build_unet
from hsivi_fast.ops import library

PAPER = ("cifar10", "celeba64", "imagenet64")  # the networks that HSIVI-SM was published with


@dataclass(frozen=True, order=True)
class Norm:
    """One use of group normalisation: channels, height = width, groups, and what is fused with it.

    joined: whether its input is in parts, of which the last `beside` channels are one, `residual` says whether there is
    a sum, and `factor` is that sum's.
    """

    size: int
    channels: int
    groups: int
    silu: bool
    modulated: bool
    added: bool
    joined: bool = False
    beside: int = 0
    residual: bool = False
    factor: float = 1.0


class CudnnLayouts(TorchDispatchMode):
    """Lays out what convolutions make as cuDNN's do. Without memory, torch's are row-major.

    A result is channels_last where the image or the weight is, and a gradient is like what it is of.
    """

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function._schema.name == "aten::convolution" and result.ndim == 4:
            last = torch.channels_last
            if any(each.is_contiguous(memory_format=last) and not each.is_contiguous() for each in arguments[:2]):
                return torch.empty_like(result, memory_format=last)
        if function._schema.name == "aten::convolution_backward":
            pairs = zip(result, (*arguments[1:3], None), strict=True)
            return tuple(of if of is None or like is None else torch.empty_like(like) for of, like in pairs)
        return result


def network_norms(networks):
    """The distinct uses of group normalisation in the named UNets with the kernels, sorted.

    They are of both memory formats: a sum of tensors of two is made before its normalisation.
    """
    uses = set()
    alone, joined = library.group_norm_silu, library.joined_group_norm_silu

    def note_alone(x, groups, weight, bias, eps, silu, scale, shift, add):
        uses.add(Norm(x.shape[2], x.shape[1], groups, silu, scale is not None, add is not None))
        return alone(x, groups, weight, bias, eps, silu, scale, shift, add)

    def note_joined(x, groups, weight, bias, eps, silu, add, residual, factor, beside):
        more = 0 if beside is None else beside.shape[1]
        what = (silu, False, add is not None, True, more, residual is not None, factor)
        uses.add(Norm(x.shape[2], x.shape[1] + more, groups, *what))
        return joined(x, groups, weight, bias, eps, silu, add, residual, factor, beside)

    with (
        CudnnLayouts(),
        mock.patch.object(ops, "_resolve", lambda backend, device: "triton"),
        mock.patch.object(library, "group_norm_silu", note_alone),
        mock.patch.object(library, "joined_group_norm_silu", note_joined),
        torch.device("meta"),
    ):
        for name in networks:
            network = build_unet(name)
            if len(network.event_shape) == 3:
                x, t = torch.empty(1, *network.event_shape), torch.zeros(1, dtype=torch.int64)
                network(x, t)
                network.in_channels_last()(x, t)
    return sorted(uses)

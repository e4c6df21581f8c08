"""The shapes at which the networks use an operation, found by running them on tensors without memory."""

from dataclasses import dataclass

import torch

from hsivi_fast import ops
from hsivi_fast.nets import build_unet


@dataclass(frozen=True, order=True)
class Norm:
    """One use of group normalisation: channels, height = width, groups, and what is fused with it."""

    size: int
    channels: int
    groups: int
    silu: bool
    modulated: bool
    added: bool


def network_norms(networks):
    """The distinct uses of group normalisation in the named UNets, sorted."""
    uses = set()
    original = ops.group_norm_silu

    def noted(x, groups, weight, bias, eps, silu=True, scale=None, shift=None, add=None, backend=None):
        uses.add(Norm(x.shape[2], x.shape[1], groups, silu, scale is not None, add is not None))
        return original(x, groups, weight, bias, eps, silu, scale, shift, add, backend)

    ops.group_norm_silu = noted
    try:
        for name in networks:
            with torch.device("meta"):
                network = build_unet(name)
                if len(network.event_shape) == 3:
                    network(torch.empty(1, *network.event_shape), torch.zeros(1, dtype=torch.int64))
    finally:
        ops.group_norm_silu = original
    return sorted(uses)

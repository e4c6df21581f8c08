"""Building blocks that the networks share: their precision, group normalisation through `ops`, attention, timestep embeddings."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops


class NoisePredictor(nn.Module):
    """A noise prediction eps_hat(x, t) of which `predict(x, t)` is the arithmetic; weights, input and result are float32.

    `precision` is "fp32", "tf32" (float32 here too: models.py turns the device's switch) or "bf16": matrix products, convolutions
    and what lies between them in bfloat16 by autocast, statistics of normalisations in float32. A network computes in it wherever it is called.
    With `channels_last` what lies inside an image network has that memory layout (its weights are converted by `in_channels_last`); input and result stay row-major.
    """

    precision = "fp32"
    channels_last = False

    def in_channels_last(self):
        """Lay the convolutions' weights and everything inside out as channels_last; returns the network."""
        self.channels_last = len(self.event_shape) == 3
        return self.to(memory_format=torch.channels_last) if self.channels_last else self

    def forward(self, x, t):
        """x [B, *event_shape] float, t [B] integers in 0..999 -> [B, *event_shape]."""
        inside = x.to(memory_format=torch.channels_last) if self.channels_last else x
        if self.precision == "bf16":
            with torch.autocast(x.device.type, torch.bfloat16):
                noise = self.predict(inside, t).to(x.dtype)
        else:
            noise = self.predict(inside, t)
        return noise.contiguous() if self.channels_last else noise


class GroupNorm(nn.GroupNorm):
    """Group normalisation with what stands around it in a UNet, as one call of `ops`: an addition before it, a per-sample scale and shift and SiLU after it.

    It holds exactly the parameters of `torch.nn.GroupNorm` (`weight` [C], `bias` [C]), so checkpoints keep their layout.
    """

    def forward(self, x, silu=False, scale=None, shift=None, add=None):
        """y = norm(x + add) (1 + scale) + shift, then SiLU where asked; x [B, C, H, W], scale, shift and add [B, C] or None."""
        return ops.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, silu=silu, scale=scale, shift=shift, add=add
        )


def attention(q, k, v):
    """Scaled dot-product attention over pixels; q, k, v are [B, heads, d, N] and so is the result."""
    q, k, v = (tensor.transpose(2, 3) for tensor in (q, k, v))  # [B, heads, N, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3)


def timestep_frequencies(half, spread, device):
    """Geometric frequencies 1 .. 1/10000, [half]; `spread` is how many steps the factor 10000 is spread over."""
    return torch.exp(torch.arange(half, dtype=torch.float32, device=device) * (-math.log(10000.0) / spread))


def upsample(x):
    """Double the resolution of x [B, C, H, W] by repeating pixels."""
    return F.interpolate(x, scale_factor=2, mode="nearest")

"""What the UNets of EDM are made of: blocks, changes of resolution by a filter, random frequencies.

Karras et al. 2022 (arXiv 2206.00364), appendix C, with the names of EDM's checkpoints inside each.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import (
    BeforeNorm,
    ConvBeforeNorm,
    ConvBeforeSum,
    GroupNorm,
    JoiningNorm,
    Parts,
    TimeBlock,
    pixel_attention,
    upsample,
)

FOURIER_SCALE = 16  # standard deviation of random frequencies


class ResamplingConv(nn.Module):
    """A convolution that halves ("down") or doubles ("up") the resolution by a separable low-pass filter.

    `taps` are the filter's in one dimension, an even number of them. Kernel 0 is the filter alone. The filter comes
    first, with `filter_last` the convolution, which differs at the image's border.
    """

    def __init__(self, in_channels, out_channels, kernel, change, taps, filter_last=False):
        super().__init__()
        self.kernel, self.change, self.filter_last = kernel, change, filter_last
        self.margin = (len(taps) - 1) // 2  # pixels of zeros around the image that the filter sees
        self.is_box = len(taps) == 2 and taps[0] == taps[1]
        if kernel:
            like = nn.Conv2d(in_channels, out_channels, kernel)
            self.weight, self.bias = like.weight, like.bias
        taps = torch.tensor(taps, dtype=torch.float32)
        # The network's description says it, so no file of ours does.
        self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum().square())[None, None], persistent=False)

    @property
    def repeats(self):
        """Whether it doubles the resolution by repeating pixels."""
        return self.change == "up" and self.is_box

    def forward(self, x):
        return self.convolved(x, self.bias) if self.kernel else self._filter(x, padding=self.margin)

    def convolved(self, x, bias):
        if self.filter_last:  # on the way down alone
            h = F.conv2d(x, self.weight, bias, padding=self.kernel // 2 + self.margin)
            return self._filter(h, padding=0)
        if self.kernel == 1 and self.repeats:  # the same numbers, four of each
            return upsample(F.conv2d(x, self.weight, bias))
        return F.conv2d(self._filter(x, padding=self.margin), self.weight, bias, padding=self.kernel // 2)

    def _filter(self, x, padding):
        """Half or double the resolution of x [B, C, H, W]."""
        if self.is_box:  # the same numbers, faster than a convolution of each channel
            return F.avg_pool2d(x, 2) if self.change == "down" else upsample(x)
        channels = x.shape[1]
        taps = self.resample_filter.expand(channels, 1, -1, -1)
        if self.change == "down":
            return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)


class ResamplingConvBeforeNorm(BeforeNorm, ResamplingConv):
    """`ResamplingConv` that leaves its bias to the normalisation after it."""


class Block(TimeBlock):
    """conv(SiLU(norm)) twice with a skip connection, and self-attention where it has heads.

    The embedding scales and shifts the second normalisation (`adaptive`), or is added before it. `change` is None,
    "down" or "up". Both sums are multiplied by `skip_scale`. The skip connection is a convolution where the width
    changes, and with `project_skip` where the resolution does too.
    Called with a tensor or `Parts`, it returns (that as a whole, its result as `Parts`).
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        embed_channels,
        norm_eps,
        adaptive,
        skip_scale,
        project_skip=False,
        taps=(1, 1),
        heads=0,
        change=None,
    ):
        super().__init__()
        self.adaptive, self.skip_scale, self.heads = adaptive, skip_scale, heads
        self.norm0 = norm(in_channels, norm_eps, JoiningNorm)
        if change is None:
            self.conv0 = ConvBeforeNorm(in_channels, out_channels, 3, padding=1)
        else:
            self.conv0 = ResamplingConvBeforeNorm(in_channels, out_channels, 3, change, taps)
        self.affine = nn.Linear(embed_channels, out_channels * (2 if adaptive else 1))
        self.norm1 = norm(out_channels, norm_eps, GroupNorm)
        self.conv1 = ConvBeforeSum(out_channels, out_channels, 3, padding=1)
        projects = project_skip or in_channels != out_channels
        if change is not None:
            self.skip = ResamplingConv(in_channels, out_channels, 1 if projects else 0, change, taps)
        else:
            self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        if heads:
            self.norm2 = norm(out_channels, norm_eps, JoiningNorm)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = ConvBeforeSum(out_channels, out_channels, 1)

    @property
    def of_embedding(self):
        return self.affine

    @property
    def sums(self):
        into_embedding = [] if self.adaptive else [(self.conv0, self.affine)]
        return [*into_embedding, (self.skip, self.conv1)]

    def forward(self, x, embedding):
        h, x = self.norm0(x, silu=True)
        of_time = self.affine(embedding)
        if self.adaptive:
            scale, shift = of_time.chunk(2, dim=1)  # each [B, out_channels]
            h, add = self.conv0(h)  # [B, out_channels, H, W] of the new resolution, [B, out_channels]
            h = self.norm1(h, silu=True, scale=scale, shift=shift, add=add)
        else:
            h, add = self.conv0(h, of_time)
            h = self.norm1(h, silu=True, add=add)
        parts = Parts(*self.conv1(h), residual=self.skip(x), factor=self.skip_scale)
        if self.heads:
            normed, h = self.norm2(parts)
            batch, channels, height, width = h.shape
            qkv = self.qkv(normed).reshape(batch, self.heads, channels // self.heads, 3, height * width)
            attended = pixel_attention(qkv.permute(3, 0, 1, 2, 4))  # q, k, v alternate, after the heads
            projected, add = self.proj(attended.reshape(batch, channels, height, width))
            parts = Parts(h, add, residual=projected, factor=self.skip_scale)
        return x, parts


class FourierFrequencies(nn.Module):
    """Random frequencies, which are part of a checkpoint: c_noise [B] -> angles [B, half].

    They are a parameter, as all that checkpoints, averages and ranks know are. It never moves: its gradient is zero.
    """

    def __init__(self, half):
        super().__init__()
        self.freqs = nn.Parameter(FOURIER_SCALE * torch.randn(half))

    def forward(self, t):
        return t[:, None] * (2 * math.pi * (self.freqs.detach() + 0 * self.freqs))


def norm(channels, eps, kind):
    """`GroupNorm` or `JoiningNorm` (`kind`) with 32 groups, or fewer groups of 4 channels where a level is narrow."""
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise ValueError(
            f"network.channels: a width of {channels} cannot be cut into {max(groups, 1)} groups of at least 4 "
            "channels; use a multiple of 32, or of 4 where all widths are below 128"
        )
    return kind(groups, channels, eps=eps)

"""The DDPM UNet (Ho et al. 2020, arXiv 2006.11239, appendix B).

It has the parameters of ddpm-torch's checkpoints, name for name, and is used for CIFAR-10, CelebA-64, MNIST and digits.
Level i works at resolution H / 2^i with channels * multipliers[i] channels.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import GroupNorm, NoisePredictor, pixel_attention, timestep_frequencies, upsample


class ResidualBlock(nn.Module):
    """conv(SiLU(norm)) twice, the time embedding added in between, and a skip connection."""

    def __init__(self, in_channels, out_channels, embed_channels, norm_groups, norm_eps):
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.fc = nn.Linear(embed_channels, out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, embedding):
        h = self.conv1(self.norm1(x, silu=True))  # [B, out_channels, H, W]
        h = self.conv2(self.norm2(h, silu=True, add=self.fc(embedding)))
        return h + self.skip(x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels, norm_groups, norm_eps):
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=norm_eps)
        self.project_in = nn.Conv2d(channels, 3 * channels, 1)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, embedding=None):
        batch, channels, height, width = x.shape
        q, k, v = self.project_in(self.norm(x)).flatten(2).unsqueeze(1).chunk(3, dim=2)  # each [B, 1, C, H W]
        return x + self.project_out(pixel_attention(q, k, v).reshape(batch, channels, height, width))


class DDPMUNet(NoisePredictor):
    """Noise prediction eps_hat(x, t): x [B, C, H, W] float, t [B] integers in 0..999 -> [B, C, H, W].

    `attention` says for each level whether self-attention follows each residual block.
    `res_blocks` counts the residual blocks of a level on the way down; the way up has one more.
    Without `middle` and with `res_blocks` 0 the network is small enough for checks.
    Raises ValueError where a width is no multiple of `norm_groups`, the image size none of 2^(levels - 1),
    or `attention` has another length than `multipliers`.
    """

    def __init__(
        self,
        image_channels,
        image_size,
        channels,
        multipliers,
        res_blocks,
        attention,
        middle=True,
        norm_groups=32,
        norm_eps=1e-5,
    ):
        super().__init__()
        levels = len(multipliers)
        if len(attention) != levels:
            raise ValueError(
                f"network.attention: {len(attention)} entries for {levels} levels; give one true or false a level"
            )
        if image_size % 2 ** (levels - 1):
            raise ValueError(
                f"network.image_size: {image_size} cannot be halved {levels - 1} times; "
                f"use a multiple of {2 ** (levels - 1)}"
            )
        if channels % norm_groups:
            raise ValueError(f"network.channels: {channels} is not a multiple of norm_groups = {norm_groups}")
        self.event_shape = (image_channels, image_size, image_size)
        self.channels = channels
        embed_channels = 4 * channels
        widths = [channels * multiplier for multiplier in multipliers]

        def block(level, in_channels):
            """One residual block, with attention where this level has it."""
            residual = ResidualBlock(in_channels, widths[level], embed_channels, norm_groups, norm_eps)
            if not attention[level]:
                return residual
            return nn.ModuleList([residual, AttentionBlock(widths[level], norm_groups, norm_eps)])

        def resample(width, stride, padding):
            """The convolution of a change of resolution; entry 0, padding or repetition, has no parameters."""
            return nn.ModuleDict({"1": nn.Conv2d(width, width, 3, stride=stride, padding=padding)})

        self.embed = nn.Sequential(
            nn.Linear(channels, embed_channels), nn.SiLU(), nn.Linear(embed_channels, embed_channels)
        )
        self.in_conv = nn.Conv2d(image_channels, channels, 3, padding=1)

        self.downsamples = nn.ModuleDict()
        width = channels
        skips = [channels]  # the widths that the way up takes back, last in first out
        for level in range(levels):
            layers = nn.ModuleList()
            for _ in range(res_blocks):
                layers.append(block(level, width))
                width = widths[level]
                skips.append(width)
            if level < levels - 1:
                layers.append(resample(width, stride=2, padding=0))
                skips.append(width)
            self.downsamples[f"level_{level}"] = layers

        self.middle = nn.ModuleList()
        if middle:
            self.middle.append(ResidualBlock(width, width, embed_channels, norm_groups, norm_eps))
            self.middle.append(AttentionBlock(width, norm_groups, norm_eps))
            self.middle.append(ResidualBlock(width, width, embed_channels, norm_groups, norm_eps))

        upsamples = {}
        for level in reversed(range(levels)):
            layers = nn.ModuleList()
            for _ in range(res_blocks + 1):
                layers.append(block(level, width + skips.pop()))
                width = widths[level]
            if level > 0:
                layers.append(resample(width, stride=1, padding=1))
            upsamples[f"level_{level}"] = layers
        self.upsamples = nn.ModuleDict({name: upsamples[name] for name in sorted(upsamples)})

        self.out_conv = nn.ModuleDict(
            {"0": GroupNorm(norm_groups, width, eps=norm_eps), "2": nn.Conv2d(width, image_channels, 3, padding=1)}
        )

    def predict(self, x, t):
        half = self.channels // 2
        angles = t.to(torch.float32)[:, None] * timestep_frequencies(half, half - 1, x.device)  # [B, channels / 2]
        embedding = F.silu(self.embed(torch.cat([angles.sin(), angles.cos()], dim=1)))  # [B, 4 channels]

        h = self.in_conv(x)
        skips = [h]
        for layers in self.downsamples.values():
            for layer in layers:
                if isinstance(layer, nn.ModuleDict):
                    h = layer["1"](F.pad(h, (0, 1, 0, 1)))  # "same" padding of a stride-2 convolution on an even size
                else:
                    h = _apply(layer, h, embedding)
                skips.append(h)

        for layer in self.middle:
            h = layer(h, embedding)

        for name in reversed(self.upsamples.keys()):
            for layer in self.upsamples[name]:
                if isinstance(layer, nn.ModuleDict):
                    h = layer["1"](upsample(h))
                else:
                    h = _apply(layer, torch.cat([h, skips.pop()], dim=1), embedding)

        return self.out_conv["2"](self.out_conv["0"](h, silu=True))


def _apply(layer, h, embedding):
    """Run a residual block, or a list of a residual block and its attention."""
    for block in layer if isinstance(layer, nn.ModuleList) else [layer]:
        h = block(h, embedding)
    return h

"""The improved-diffusion UNet (Nichol & Dhariwal 2021, arXiv 2102.09672).

It has the parameters of that code's checkpoints, name for name, and is used for ImageNet-64.
The published network predicts a mean and a variance: the first half of its output channels is the noise.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import (
    ConvBeforeNorm,
    ConvBeforeSum,
    GroupNorm,
    JoiningNorm,
    Parts,
    TimeBlock,
    UNet,
    UpsamplingConv,
    check_halvings,
    class_embedding,
    pixel_attention,
    timestep_frequencies,
    whole,
    with_channels,
)


class ResidualBlock(TimeBlock):
    """conv(SiLU(norm)) twice, and a skip connection.

    The time embedding scales and shifts the second normalisation; without `scale_shift` it is added before that.
    Called with a tensor or `Parts`, it returns (that as a whole, its result as `Parts`).
    """

    def __init__(self, in_channels, out_channels, embed_channels, norm_groups, norm_eps, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.ModuleDict(
            {
                "0": JoiningNorm(norm_groups, in_channels, eps=norm_eps),
                "2": ConvBeforeNorm(in_channels, out_channels, 3, padding=1),
            }
        )
        self.emb_layers = nn.ModuleDict(
            {"1": nn.Linear(embed_channels, 2 * out_channels if scale_shift else out_channels)}
        )
        self.out_layers = nn.ModuleDict(
            {
                "0": GroupNorm(norm_groups, out_channels, eps=norm_eps),
                "3": ConvBeforeSum(out_channels, out_channels, 3, padding=1),
            }
        )
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    @property
    def of_embedding(self):
        return self.emb_layers["1"]

    @property
    def sums(self):
        into_embedding = [] if self.scale_shift else [(self.in_layers["2"], self.emb_layers["1"])]
        return [*into_embedding, (self.skip_connection, self.out_layers["3"])]

    def forward(self, x, embedding):
        h, x = self.in_layers["0"](x, silu=True)
        of_time = self.emb_layers["1"](embedding)
        conv, norm = self.in_layers["2"], self.out_layers["0"]
        if self.scale_shift:
            scale, shift = of_time.chunk(2, dim=1)  # each [B, out_channels]
            h, add = conv(h)  # [B, out_channels, H, W], [B, out_channels]
            h = norm(h, silu=True, scale=scale, shift=shift, add=add)
        else:
            h, add = conv(h, of_time)
            h = norm(h, silu=True, add=add)
        return x, Parts(*self.out_layers["3"](h), residual=self.skip_connection(x))


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all pixels; called as `ResidualBlock`."""

    def __init__(self, channels, heads, norm_groups, norm_eps):
        super().__init__()
        self.heads = heads
        self.norm = JoiningNorm(norm_groups, channels, eps=norm_eps)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, embedding=None):
        normed, x = self.norm(x)
        batch, channels, height, width = x.shape
        qkv = self.qkv(normed.flatten(2))  # [B, 3 C, H W]; the heads come first, then q, k, v
        qkv = qkv.reshape(batch, self.heads, 3, channels // self.heads, height * width).permute(2, 0, 1, 3, 4)
        h = pixel_attention(qkv).reshape(batch, channels, height * width)
        return x, Parts(x, residual=self.proj_out(h).reshape(batch, channels, height, width))


class ADMUNet(UNet):
    """Noise prediction eps_hat(x, t): x [B, C, H, W] float, t [B] integers in 0..999 -> [B, C, H, W].

    With `classes` it also takes class_labels, [B] integers in 0 .. classes - 1, or None for no class.

    `attention` lists the downsampling factors (1, 2, 4, ...) at which self-attention follows each residual block. It
    has `heads` heads, and `up_heads` on the way up where that differs.
    `out_channels` may be larger than the image's channels: the first `image_channels` of them are the noise.
    `scale_shift` is of the residual blocks.
    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        image_channels,
        image_size,
        channels,
        multipliers,
        res_blocks,
        attention,
        heads=4,
        out_channels=None,
        norm_groups=32,
        norm_eps=1e-5,
        up_heads=None,
        scale_shift=True,
        classes=None,
    ):
        super().__init__()
        levels = len(multipliers)
        check_halvings(image_size, levels - 1)
        if channels % norm_groups or channels % heads:
            raise ValueError(
                f"network.channels: {channels} is not a multiple of norm_groups = {norm_groups} and of heads = {heads}"
            )
        up_heads = heads if up_heads is None else up_heads
        if channels % up_heads:
            raise ValueError(f"network.channels: {channels} is not a multiple of up_heads = {up_heads}")
        out_channels = image_channels if out_channels is None else out_channels
        if out_channels < image_channels:
            raise ValueError(f"network.out_channels: {out_channels} is less than image_channels = {image_channels}")
        self.event_shape = (image_channels, image_size, image_size)
        self.channels = channels
        embed_channels = 4 * channels

        def residual(in_channels, width):
            return ResidualBlock(in_channels, width, embed_channels, norm_groups, norm_eps, scale_shift)

        def stage(in_channels, width, factor, heads):
            """One residual block, with attention where this downsampling factor has it."""
            layers = nn.ModuleList([residual(in_channels, width)])
            if factor in attention:
                layers.append(AttentionBlock(width, heads, norm_groups, norm_eps))
            return layers

        self.time_embed = nn.Sequential(
            nn.Linear(channels, embed_channels), nn.SiLU(), nn.Linear(embed_channels, embed_channels)
        )
        self.classes = classes
        self.label_emb = None if classes is None else nn.Embedding(classes, embed_channels)

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(image_channels, channels, 3, padding=1)])])
        width = channels
        skips = [channels]  # the widths that the way up takes back, last in first out
        factor = 1  # by which the resolution is lower than the image's
        for level, multiplier in enumerate(multipliers):
            for _ in range(res_blocks):
                self.input_blocks.append(stage(width, channels * multiplier, factor, heads))
                width = channels * multiplier
                skips.append(width)
            if level < levels - 1:
                halving = nn.ModuleDict({"op": nn.Conv2d(width, width, 3, stride=2, padding=1)})
                self.input_blocks.append(nn.ModuleList([halving]))
                skips.append(width)
                factor *= 2

        self.middle_block = nn.ModuleList(
            [
                residual(width, width),
                AttentionBlock(width, heads, norm_groups, norm_eps),
                residual(width, width),
            ]
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for index in range(res_blocks + 1):
                layers = stage(width + skips.pop(), channels * multiplier, factor, up_heads)
                width = channels * multiplier
                if level > 0 and index == res_blocks:
                    layers.append(nn.ModuleDict({"conv": UpsamplingConv(width)}))
                    factor //= 2
                self.output_blocks.append(layers)

        self.out = nn.ModuleDict(
            {"0": JoiningNorm(norm_groups, width, eps=norm_eps), "2": nn.Conv2d(width, out_channels, 3, padding=1)}
        )

    def embedded(self, t, class_labels, dtype):
        half = self.channels // 2
        angles = t.to(torch.float32)[:, None] * timestep_frequencies(half, half, t.device)  # [B, channels / 2]
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))  # [B, 4 channels]
        of_class = class_embedding(self.label_emb, class_labels, len(t))
        return F.silu(embedding if of_class is None else embedding + of_class)

    def through(self, x, embedding):
        h, skips = x, []
        for layers in self.input_blocks:
            given, h = _apply(layers, h, embedding)
            skips.append(given)
        given, h = _apply(self.middle_block, h, embedding)
        skips = [*skips[1:], given]  # what each stage gives: the first is given the image
        for layers in self.output_blocks:
            _, h = _apply(layers, with_channels(h, skips.pop()), embedding)
        h, _ = self.out["0"](h, silu=True)
        return self.out["2"](h)[:, : x.shape[1]]


def _apply(layers, h, embedding):
    """Run the layers of a stage in order: a convolution, residual blocks, attention, a change of resolution.

    h is a tensor or `Parts`. Returns (h as a whole, the result, which may be `Parts`).
    """
    all_given = []
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.ModuleDict)):
            given = whole(h)
            # A convolution, or half or double the resolution.
            h = (layer if isinstance(layer, nn.Conv2d) else layer["op" if "op" in layer else "conv"])(given)
        else:
            given, h = layer(h, embedding)
        all_given.append(given)
    return all_given[0], h

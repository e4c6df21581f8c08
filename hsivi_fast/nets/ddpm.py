"""The DDPM UNet (Ho et al. 2020, arXiv 2006.11239, appendix B), and what diffusers' UNet2DModel has made of it.

It has the parameters of ddpm-torch's checkpoints, name for name, and is used for CIFAR-10, CelebA-64, MNIST and digits.
Level i works at resolution H / 2^i with channels * multipliers[i] channels.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import (
    ConvBeforeNorm,
    ConvBeforeSum,
    GroupNorm,
    JoiningNorm,
    NoNorm,
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

    The time embedding is added in between. With `scale_shift` it scales and shifts the second normalisation instead.
    Called with a tensor or `Parts`, it returns (that as a whole, its result as `Parts`).
    """

    def __init__(self, in_channels, out_channels, embed_channels, norm_groups, norm_eps, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = JoiningNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = ConvBeforeNorm(in_channels, out_channels, 3, padding=1)
        self.fc = nn.Linear(embed_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.conv2 = ConvBeforeSum(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    @property
    def of_embedding(self):
        return self.fc

    @property
    def sums(self):
        into_embedding = [] if self.scale_shift else [(self.conv1, self.fc)]
        return [*into_embedding, (self.skip, self.conv2)]

    def forward(self, x, embedding):
        h, x = self.norm1(x, silu=True)
        of_time = self.fc(embedding)
        if self.scale_shift:
            scale, shift = of_time.chunk(2, dim=1)  # each [B, out_channels]
            h, add = self.conv1(h)  # [B, out_channels, H, W], [B, out_channels]
            h = self.norm2(h, silu=True, scale=scale, shift=shift, add=add)
        else:
            h, add = self.conv1(h, of_time)
            h = self.norm2(h, silu=True, add=add)
        return x, Parts(*self.conv2(h), residual=self.skip(x))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, by one head or several; `norm_groups` 0 is no normalisation before it.

    Called as `ResidualBlock`.
    """

    def __init__(self, channels, heads, norm_groups, norm_eps):
        super().__init__()
        self.heads = heads
        self.norm = JoiningNorm(norm_groups, channels, eps=norm_eps) if norm_groups else NoNorm()
        self.project_in = nn.Conv2d(channels, 3 * channels, 1)
        self.project_out = ConvBeforeSum(channels, channels, 1)

    def forward(self, x, embedding=None):
        normed, x = self.norm(x)
        batch, channels, height, width = x.shape
        qkv = self.project_in(normed).flatten(2)  # [B, 3 C, H W]: q, k, v come first, then the heads
        qkv = qkv.reshape(batch, 3, self.heads, channels // self.heads, height * width).transpose(0, 1)
        projected, add = self.project_out(pixel_attention(qkv).reshape(batch, channels, height, width))
        return x, Parts(x, add, residual=projected)


class DDPMUNet(UNet):
    """Noise prediction eps_hat(x, t): x [B, C, H, W] float, t [B] integers in 0..999 -> [B, C, H, W].

    With `classes` it also takes class_labels, [B] integers in 0 .. classes - 1, or None for no class.

    `attention` says for each level whether self-attention follows each residual block. `attention_up` says so of the
    way up where that differs. A head has `head_channels` channels, by default all of its level.
    `res_blocks` counts the residual blocks of a level on the way down; the way up has one more.
    Without `middle` and with `res_blocks` 0 the network is small enough for checks. `middle_attention` false leaves the
    attention out of it, `middle_norm_groups` are those of that attention if others (0 for no normalisation), and
    `middle_scale` divides what comes out of each of its blocks.
    `out_channels` may be larger than the image's channels: the first `image_channels` of them are the noise.
    `scale_shift` is of the residual blocks. `time_channels` is the width of the time embedding, 4 channels by default.
    The sinusoids' frequencies fall by 10000 over channels / 2 - `freq_shift` of them; `cos_first` puts the cosines
    before the sines. `down_padding` 1 pads a halving convolution on all sides, 0 at the bottom and on the right alone.
    `center_input` takes images in 0 .. 1 to -1 .. 1.
    Raises ValueError where a width is no multiple of `norm_groups` or `head_channels`, the image size none of
    2^(levels - 1), `attention` or `attention_up` has another length than `multipliers`, and for other sizes that do not
    fit each other.
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
        out_channels=None,
        attention_up=None,
        head_channels=None,
        middle_attention=True,
        middle_norm_groups=None,
        middle_scale=1.0,
        scale_shift=False,
        time_channels=None,
        classes=None,
        freq_shift=1,
        cos_first=False,
        down_padding=0,
        center_input=False,
    ):
        super().__init__()
        levels = len(multipliers)
        attention_up = attention if attention_up is None else attention_up
        for key, given in (("attention", attention), ("attention_up", attention_up)):
            if len(given) != levels:
                raise ValueError(
                    f"network.{key}: {len(given)} entries for {levels} levels; give one true or false a level"
                )
        check_halvings(image_size, levels - 1)
        if channels % norm_groups:
            raise ValueError(f"network.channels: {channels} is not a multiple of norm_groups = {norm_groups}")
        if channels % 2 or channels // 2 <= freq_shift:
            raise ValueError(f"network.channels: {channels} must be even, and more than {2 * freq_shift}")
        out_channels = image_channels if out_channels is None else out_channels
        if out_channels < image_channels:
            raise ValueError(f"network.out_channels: {out_channels} is less than image_channels = {image_channels}")
        for key, value in (("freq_shift", freq_shift), ("down_padding", down_padding)):
            if value not in (0, 1):
                raise ValueError(f"network.{key}: {value!r} must be 0 or 1")
        widths = [channels * multiplier for multiplier in multipliers]
        middle_norm_groups = norm_groups if middle_norm_groups is None else middle_norm_groups
        if middle_norm_groups and widths[-1] % middle_norm_groups:
            raise ValueError(
                f"network.middle_norm_groups: the {widths[-1]} channels of the last level are no multiple of "
                f"{middle_norm_groups}"
            )
        self.event_shape = (image_channels, image_size, image_size)
        self.channels, self.freq_shift, self.cos_first = channels, freq_shift, cos_first
        self.down_padding, self.center_input, self.middle_scale = down_padding, center_input, middle_scale
        embed_channels = 4 * channels if time_channels is None else time_channels

        def residual(in_channels, width):
            return ResidualBlock(in_channels, width, embed_channels, norm_groups, norm_eps, scale_shift)

        def self_attention(width, norm_groups):
            if head_channels and width % head_channels:
                raise ValueError(
                    f"network.head_channels: a level of {width} channels is no multiple of {head_channels}"
                )
            return AttentionBlock(width, width // head_channels if head_channels else 1, norm_groups, norm_eps)

        def block(width, in_channels, attended):
            """One residual block, with attention where its level has it."""
            if not attended:
                return residual(in_channels, width)
            return nn.ModuleList([residual(in_channels, width), self_attention(width, norm_groups)])

        def resample(conv):
            """The convolution of a change of resolution; entry 0, padding or repetition, has no parameters."""
            return nn.ModuleDict({"1": conv})

        self.embed = nn.Sequential(
            nn.Linear(channels, embed_channels), nn.SiLU(), nn.Linear(embed_channels, embed_channels)
        )
        self.classes = classes
        self.class_embed = None if classes is None else nn.Embedding(classes, embed_channels)
        self.in_conv = nn.Conv2d(image_channels, channels, 3, padding=1)

        self.downsamples = nn.ModuleDict()
        width = channels
        skips = [channels]  # the widths that the way up takes back, last in first out
        for level in range(levels):
            layers = nn.ModuleList()
            for _ in range(res_blocks):
                layers.append(block(widths[level], width, attention[level]))
                width = widths[level]
                skips.append(width)
            if level < levels - 1:
                layers.append(resample(nn.Conv2d(width, width, 3, stride=2, padding=down_padding)))
                skips.append(width)
            self.downsamples[f"level_{level}"] = layers

        self.middle = nn.ModuleList()
        if middle:
            self.middle.append(residual(width, width))
            if middle_attention:
                self.middle.append(self_attention(width, middle_norm_groups))
            self.middle.append(residual(width, width))

        upsamples = {}
        for level in reversed(range(levels)):
            layers = nn.ModuleList()
            for _ in range(res_blocks + 1):
                layers.append(block(widths[level], width + skips.pop(), attention_up[level]))
                width = widths[level]
            if level > 0:
                layers.append(resample(UpsamplingConv(width)))
            upsamples[f"level_{level}"] = layers
        self.upsamples = nn.ModuleDict({name: upsamples[name] for name in sorted(upsamples)})

        self.out_conv = nn.ModuleDict(
            {"0": JoiningNorm(norm_groups, width, eps=norm_eps), "2": nn.Conv2d(width, out_channels, 3, padding=1)}
        )

    def embedded(self, t, class_labels, dtype):
        half = self.channels // 2
        frequencies = timestep_frequencies(half, half - self.freq_shift, t.device)
        angles = t.to(torch.float32)[:, None] * frequencies  # [B, channels / 2]
        waves = [angles.cos(), angles.sin()] if self.cos_first else [angles.sin(), angles.cos()]
        embedding = self.embed(torch.cat(waves, dim=1))  # [B, 4 channels], or the width that was asked for
        of_class = class_embedding(self.class_embed, class_labels, len(t))
        return F.silu(embedding if of_class is None else embedding + of_class)

    def through(self, x, embedding):
        h = self.in_conv(2 * x - 1 if self.center_input else x)
        skips = []  # what each layer on the way down is given, and what the last one gives
        for layers in self.downsamples.values():
            for layer in layers:
                if isinstance(layer, nn.ModuleDict):
                    skip = whole(h)
                    # Without padding of its own: the "same" padding of a stride-2 convolution on an even size.
                    h = layer["1"](skip if self.down_padding else F.pad(skip, (0, 1, 0, 1)))
                else:
                    skip, h = _apply(layer, h, embedding)
                skips.append(skip)

        skip = h = h if len(self.middle) else whole(h)
        for index, layer in enumerate(self.middle):
            given, h = layer(h, embedding)
            skip = skip if index else given
            if self.middle_scale != 1:
                h = whole(h) / self.middle_scale
        skips.append(skip)

        for name in reversed(self.upsamples.keys()):
            for layer in self.upsamples[name]:
                if isinstance(layer, nn.ModuleDict):
                    h = layer["1"](whole(h))
                else:
                    _, h = _apply(layer, with_channels(h, skips.pop()), embedding)

        h, _ = self.out_conv["0"](h, silu=True)
        h = self.out_conv["2"](h)
        return h[:, : x.shape[1]] if h.shape[1] > x.shape[1] else h


def _apply(layer, h, embedding):
    """Run a residual block, or a list of a residual block and its attention; returns as the block does."""
    given, h = (layer[0] if isinstance(layer, nn.ModuleList) else layer)(h, embedding)
    if isinstance(layer, nn.ModuleList):
        _, h = layer[1](h, embedding)
    return given, h

"""The UNets of EDM (Karras et al. 2022, arXiv 2206.00364, appendix C).

`SongUNet` is the DDPM++ or NCSN++ of Song et al. 2021 (arXiv 2011.13456), `DhariwalUNet` the ADM of Dhariwal & Nichol
2021 (arXiv 2105.05233). Their tensors have the names of EDM's checkpoints, without the `model.` in front.

These are the raw networks F(c_in x; c_noise) of EDM's denoiser. `method/parametrisation.py` makes noise of them.
There is no dropout, and no augmentation either: the checkpoints' `map_augment` counts nothing without its labels.
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import JoiningNorm, UNet, check_class_labels, check_halvings, timestep_frequencies, whole, with_channels
from .edm_blocks import Block, FourierFrequencies, ResamplingConv, norm

HEAD_CHANNELS = 64  # of one attention head of `DhariwalUNet`


class EDMUNet(UNet):
    """What both networks share: the way down `enc`, the way up `dec`, and class labels.

    `predict(x [B, C, H, W] float, t = c_noise [B] float, class_labels [B] int or None)` -> [B, C, H, W].
    Class labels are 0 .. classes - 1; a negative one is no class, as None is for all.
    `attention` lists resolutions in pixels, as EDM's attn_resolutions.
    Raises ValueError for sizes that do not fit each other, and for class labels where it has none.
    """

    takes_sigma = True

    def __init__(self, image_channels, image_size, multipliers, attention, classes):
        super().__init__()
        levels = len(multipliers)
        check_halvings(image_size, levels - 1)
        sizes = [image_size >> level for level in range(levels)]
        for size in attention:
            if size not in sizes:
                raise ValueError(f"network.attention: {size} is none of the resolutions {', '.join(map(str, sizes))}")
        self.event_shape = (image_channels, image_size, image_size)
        self.classes = classes
        self.sizes = sizes

    def _build(self, block, heads, widths, res_blocks, attention, attend_all_up, first=None, residual_taps=None):
        """Make `enc` and `dec` with `widths` [levels] of blocks; returns the last width.

        `block(in, out, change=, heads=)` makes a block, `heads(width)` says how many heads attention has there.
        `first` is the width of the first convolution, that of the first level without it. On the way up all blocks of
        a resolution attend, or the last one. With `residual_taps` the filtered image is added on the way down.
        """
        channels = self.event_shape[0]
        width = widths[0] if first is None else first
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{_place(self.sizes[0])}_conv"] = nn.Conv2d(channels, width, 3, padding=1)
        skips = [width]  # the widths that the way up takes back, last in first out
        side = channels  # the width of what the residual connection filters
        for level, size in enumerate(self.sizes):
            if level:
                self.enc[f"{_place(size)}_down"] = block(width, width, change="down")
                skips.append(width)
                if residual_taps:
                    layer = ResamplingConv(side, width, 3, "down", residual_taps, filter_last=True)
                    self.enc[f"{_place(size)}_aux_residual"] = layer
                    side = width
            for index in range(res_blocks):
                attending = heads(widths[level]) if size in attention else 0
                self.enc[f"{_place(size)}_block{index}"] = block(width, widths[level], heads=attending)
                width = widths[level]
                skips.append(width)
        self.dec[f"{_place(self.sizes[-1])}_in0"] = block(width, width, heads=heads(width))
        self.dec[f"{_place(self.sizes[-1])}_in1"] = block(width, width)
        for level, size in reversed(list(enumerate(self.sizes))):
            if size != self.sizes[-1]:
                self.dec[f"{_place(size)}_up"] = block(width, width, change="up")
            for index in range(res_blocks + 1):
                attends = size in attention and (attend_all_up or index == res_blocks)
                attending = heads(widths[level]) if attends else 0
                self.dec[f"{_place(size)}_block{index}"] = block(width + skips.pop(), widths[level], heads=attending)
                width = widths[level]
        return width

    def _down_and_up(self, x, embedding):
        """The blocks of `enc` and `dec`: x [B, C, H, W], embedding [B, D] -> [B, width, H, W], or `Parts` of it."""
        h, side, skips = x, x, []  # skips: what each block on the way down is given, and what the last one gives
        for layer in self.enc.values():
            if isinstance(layer, ResamplingConv):  # the residual connection
                h = side = (whole(h) + layer(side)) * math.sqrt(0.5)
            elif isinstance(layer, Block):
                skip, h = layer(h, embedding)
                skips.append(skip)
            else:
                h = layer(h)
        for name, layer in self.dec.items():
            if isinstance(layer, Block):
                skip, h = layer(with_channels(h, skips.pop()) if "_block" in name else h, embedding)
                if name.endswith("_in0"):
                    skips.append(skip)
        return h

    def _labels(self, t, class_labels, dtype):
        """One-hot labels [B, classes] as they are embedded, or None for a network without classes."""
        if class_labels is None:
            return t.new_zeros(len(t), self.classes, dtype=dtype) if self.classes else None
        check_class_labels(self.classes, class_labels, len(t))
        return (class_labels[:, None] == torch.arange(self.classes, device=t.device)).to(dtype)


class SongUNet(EDMUNet):
    """The DDPM++ (positional embedding, standard encoder) and NCSN++ (Fourier, residual) as EDM has them.

    See `EDMUNet` for the call. `embedding` is "positional" or "fourier", with channels * noise_multiplier entries;
    `encoder` is "standard" or "residual"; `resample_filter` are the taps of the filter of changes of resolution,
    (1, 1) or (1, 3, 3, 1). Attention has one head.
    """

    def __init__(
        self,
        image_channels,
        image_size,
        channels,
        multipliers,
        res_blocks,
        attention,
        embedding="positional",
        encoder="standard",
        noise_multiplier=1,
        resample_filter=(1, 1),
        classes=None,
        norm_eps=1e-6,
    ):
        super().__init__(image_channels, image_size, multipliers, attention, classes)
        for key, value, known in (
            ("embedding", embedding, ("positional", "fourier")),
            ("encoder", encoder, ("standard", "residual")),
        ):
            if value not in known:
                raise ValueError(f"network.{key}: {value!r} is unknown; choose {' or '.join(known)}")
        if not resample_filter or len(resample_filter) % 2 or sum(resample_filter) <= 0:
            raise ValueError(f"network.resample_filter: {list(resample_filter)} needs an even number of taps, as 1, 1")
        self.noise_channels, embed_channels = channels * noise_multiplier, 4 * channels
        self.map_noise = FourierFrequencies(self.noise_channels // 2) if embedding == "fourier" else None
        if classes:
            self.map_label = nn.Linear(classes, self.noise_channels)
        self.map_layer0 = nn.Linear(self.noise_channels, embed_channels)
        self.map_layer1 = nn.Linear(embed_channels, embed_channels)
        block = functools.partial(
            Block,
            embed_channels=embed_channels,
            norm_eps=norm_eps,
            adaptive=False,
            skip_scale=math.sqrt(0.5),
            project_skip=True,
            taps=resample_filter,
        )
        width = self._build(
            block,
            lambda width: 1,
            [channels * multiplier for multiplier in multipliers],
            res_blocks,
            attention,
            attend_all_up=False,
            first=channels,
            residual_taps=resample_filter if encoder == "residual" else None,
        )
        self.dec[f"{_place(image_size)}_aux_norm"] = norm(width, norm_eps, JoiningNorm)
        self.dec[f"{_place(image_size)}_aux_conv"] = nn.Conv2d(width, image_channels, 3, padding=1)

    def embedded(self, t, class_labels, dtype):
        labels = self._labels(t, class_labels, dtype)
        half = self.noise_channels // 2
        t = _as_precise(t, dtype)
        if self.map_noise is not None:
            angles = self.map_noise(t)  # [B, half]
        else:
            angles = t[:, None] * timestep_frequencies(half, half - 1, t.device)  # [B, half]
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)  # [B, noise_channels]
        if labels is not None:
            embedding = embedding + self.map_label(labels * math.sqrt(self.classes))  # of unit mean square
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))  # [B, 4 channels]

    def through(self, x, embedding):
        h = self._down_and_up(x, embedding)
        place = _place(self.sizes[0])
        h, _ = self.dec[f"{place}_aux_norm"](h, silu=True)
        return self.dec[f"{place}_aux_conv"](h)


class DhariwalUNet(EDMUNet):
    """The ADM UNet as EDM has it; see `EDMUNet` for the call.

    Attention has a head for every 64 channels, so a narrower level has none.
    """

    def __init__(
        self,
        image_channels,
        image_size,
        channels,
        multipliers,
        res_blocks,
        attention,
        classes=None,
        norm_eps=1e-5,
    ):
        super().__init__(image_channels, image_size, multipliers, attention, classes)
        self.channels, embed_channels = channels, 4 * channels
        self.map_layer0 = nn.Linear(channels, embed_channels)
        self.map_layer1 = nn.Linear(embed_channels, embed_channels)
        if classes:
            self.map_label = nn.Linear(classes, embed_channels, bias=False)
        block = functools.partial(
            Block, embed_channels=embed_channels, norm_eps=norm_eps, adaptive=True, skip_scale=1.0
        )
        widths = [channels * multiplier for multiplier in multipliers]
        width = self._build(block, _heads, widths, res_blocks, attention, attend_all_up=True)
        self.out_norm = norm(width, norm_eps, JoiningNorm)
        self.out_conv = nn.Conv2d(width, image_channels, 3, padding=1)

    def embedded(self, t, class_labels, dtype):
        labels = self._labels(t, class_labels, dtype)
        half = self.channels // 2
        angles = _as_precise(t, dtype)[:, None] * timestep_frequencies(half, half, t.device)  # [B, channels / 2]
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))  # [B, 4 channels]
        if labels is not None:
            embedding = embedding + self.map_label(labels)
        return F.silu(embedding)

    def through(self, x, embedding):
        h = self._down_and_up(x, embedding)
        h, _ = self.out_norm(h, silu=True)
        return self.out_conv(h)


def _place(size):
    """The beginning of the names of the blocks at a resolution."""
    return f"{size}x{size}"


def _as_precise(t, dtype):
    """t [B] as floats of that precision, which is float32 at least."""
    return t.to(torch.promote_types(dtype, torch.float32))


def _heads(width):
    """Heads of attention of `DhariwalUNet` at a width."""
    heads = width // HEAD_CHANNELS
    if heads and width % heads:
        raise ValueError(f"network.channels: a width of {width} cannot be cut into {heads} heads; use a multiple of 64")
    return heads

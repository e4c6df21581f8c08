"""Building blocks that the networks share.

They are the networks' precision and memory layout, group normalisation and the convolution before it, attention,
timestep embeddings and upsampling.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops

# So many pixels at most attend by plain products on a CPU in bfloat16. Torch's flash kernel takes twice as long there:
# 11 % of the score network's update in `bench.breakdown` became 5 %. The scores of more do not fit into a cache.
PLAIN_PIXELS = 256


class NoisePredictor(nn.Module):
    """A noise prediction eps_hat(x, t); a subclass writes its arithmetic as `predict(x, t)`.

    Weights, input and result are float32. A network computes in its `precision` wherever it is called:
    "fp32" is float32. "tf32" is float32 here too, since the device has the switch for it, and build.py turns it.
    "bf16" takes matrix products, convolutions and what lies between them in bfloat16 by autocast;
    the statistics of normalisations stay in float32.

    A network that predicts something else than the noise has `coefficients` (`convert_by`): what stands around it is
    float32 in every precision.
    With `channels_last` the tensors inside an image network have that memory layout; input and result stay row-major.
    The network computes with t * `timestep_scale`, which is 1/4 where it was trained with 4000 steps on 0 .. 999.75.
    """

    precision = "fp32"
    channels_last = False
    timestep_scale = 1.0
    classes = None  # how many a network has whose `predict` takes class labels
    takes_sigma = False  # whether `predict` is shown ln(sigma) / 4 in the place of a timestep, as EDM's networks are

    def __init__(self):
        super().__init__()
        self.register_buffer("coefficients", None, persistent=False)  # made again wherever the network is
        self.time_table = None  # of a frozen call, see `prepared.TimeTable`

    def convert_by(self, coefficients):
        """Make noise of what the network predicts; returns the network.

        coefficients: [4, steps] of each timestep, see `method.parametrisation.noise_coefficients`.
        """
        self.coefficients = torch.as_tensor(coefficients, dtype=torch.float32)
        return self

    def in_channels_last(self):
        """Convert the convolutions' weights and everything inside to channels_last; returns the network."""
        self.channels_last = len(self.event_shape) == 3
        return self.to(memory_format=torch.channels_last) if self.channels_last else self

    def forward(self, x, t, class_labels=None):
        """x [B, *event_shape] float, t [B] integers in 0 .. steps-1 of the teacher -> [B, *event_shape].

        class_labels: [B] integers for a network with `classes`, None for others.
        """
        labels = () if class_labels is None else (class_labels,)
        ready = None if self.time_table is None else self.time_table(t)  # [B, S]
        if self.coefficients is not None:
            inner, time, skip, out = self.coefficients[:, t].to(x.dtype)  # each [B]
            inner, skip, out = (factor.reshape(-1, *[1] * (x.ndim - 1)) for factor in (inner, skip, out))
            return skip * x + out * self._predicted(inner * x, time if ready is None else ready, *labels)
        return self._predicted(x, self.shown(t, x.dtype) if ready is None else ready, *labels)

    def shown(self, t, dtype):
        """What `predict` is shown of timesteps t [B] int: [B], in `dtype` where it is made of `coefficients`."""
        if self.coefficients is not None:
            return self.coefficients[1, t].to(dtype)
        return t if self.timestep_scale == 1 else t * self.timestep_scale

    def _predicted(self, x, t, *labels):
        """`predict` in the network's precision and memory layout: float32 in, float32 out."""
        inside = x.to(memory_format=torch.channels_last) if self.channels_last else x
        if self.precision == "bf16":
            with torch.autocast(x.device.type, torch.bfloat16):
                predicted = self.predict(inside, t, *labels).to(x.dtype)
        else:
            predicted = self.predict(inside, t, *labels)
        return predicted.contiguous() if self.channels_last else predicted


class UNet(NoisePredictor):
    """A noise prediction by `TimeBlock`s. A subclass writes two parts of its arithmetic:

    embedded(t, class_labels, dtype)    the embedding [B, E] of time and class that its blocks are given; dtype: of x
    through(x, embedding)               the rest
    """

    def predict(self, x, t, class_labels=None):
        """x [B, C, H, W], t [B], labels [B] or None -> [B, C, H, W]; with a `time_table` t is its rows, [B, S]."""
        return self.through(x, t if self.time_table is not None else self.embedded(t, class_labels, x.dtype))


class GroupNorm(nn.GroupNorm):
    """Group normalisation and what stands around it in a UNet, as one call of `ops`.

    Around it are an addition before, a scale and a shift per sample after, and SiLU.
    Its parameters are those of `torch.nn.GroupNorm`, `weight` [C] and `bias` [C], so checkpoints keep their layout.
    """

    def forward(self, x, silu=False, scale=None, shift=None, add=None):
        """y = norm(x + add) (1 + scale) + shift, then SiLU where `silu` is set.

        x [B, C, H, W]; scale, shift and add are [B, C] or None; y has the shape of x.
        """
        return ops.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, silu=silu, scale=scale, shift=shift, add=add
        )


class Parts(NamedTuple):
    """A feature map that is not put together yet: [(x + add + residual) factor, beside], see `ops.joined`.

    The normalisation after it does that on its way (`JoiningNorm`), and `whole` does where none follows. It is a tuple
    because ZeRO-3 looks for the tensors that modules are given and return, and sees into tuples.

    x, residual: [B, C1, H, W]; add: [B, C1]; beside: [B, C2, H, W]. All but x may be None.
    """

    x: torch.Tensor
    add: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    factor: float = 1.0
    beside: torch.Tensor | None = None


def whole(x):
    """A feature map [B, C, H, W] of a tensor, which is one, or of `Parts`."""
    return ops.joined(*x) if isinstance(x, Parts) else x


def with_channels(x, beside):
    """`Parts` of a feature map x, a tensor or `Parts` without such channels, and the channels of a tensor after it."""
    return (x if isinstance(x, Parts) else Parts(x))._replace(beside=beside)


class JoiningNorm(GroupNorm):
    """`GroupNorm` of a feature map that may be in parts."""

    def forward(self, x, silu=False):
        """(y, x as a whole), both [B, C, H, W]; x: a tensor or `Parts`."""
        parts = x if isinstance(x, Parts) else Parts(x)
        return ops.joined_group_norm_silu(
            parts.x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            silu=silu,
            add=parts.add,
            residual=parts.residual,
            factor=parts.factor,
            beside=parts.beside,
        )


class NoNorm(nn.Module):
    """What stands where a network has no normalisation; it is called as `JoiningNorm`."""

    def forward(self, x):
        """(x as a whole) twice."""
        x = whole(x)
        return x, x


class ConvBeforeSum(nn.Conv2d):
    """`nn.Conv2d` before a sum that a normalisation's kernel makes, which adds the bias too.

    Most libraries of a GPU add it in a pass over the tensor of its own. Torch's sum would have another pass instead,
    so there the convolution keeps its bias.
    """

    def forward(self, x):
        """(the convolution of x [B, D, H, W], its bias [B, D] or None where it is added)."""
        if self.bias is None or ops.running_backend(x.device) == "torch":
            return super().forward(x), None
        h = self._conv_forward(x, self.weight, None)
        return h, self.bias.to(h.dtype).expand(len(h), -1)


class BeforeNorm:
    """What makes a convolution leave its bias to the normalisation after it, which adds [B, D] anyway.

    Most libraries of a GPU add a bias in a pass over the tensor of its own. A mixin for a module with `bias` and
    `convolved(x, bias)`. The sum is made here, in a call of the module itself: ZeRO-3 has its parameters there alone.
    """

    def forward(self, x, add=None):
        """(the convolution of x without its bias [B, D, H, W], add + bias [B, D]); add [B, D] or None for zeros."""
        h = self.convolved(x, None)
        if self.bias is None:  # a frozen call has it in `add`, see prepared.py
            return h, add
        bias = self.bias.to(h.dtype)
        return h, bias.expand(len(h), -1) if add is None else add + bias


class ConvBeforeNorm(BeforeNorm, nn.Conv2d):
    """`nn.Conv2d` that leaves its bias to the normalisation after it."""

    def convolved(self, x, bias):
        return self._conv_forward(x, self.weight, bias)


class TimeBlock(nn.Module):
    """A block that is given the embedding of time and class [B, E], of which one linear layer makes what it needs.

    A subclass says what `prepared.py` has to know of it.
    """

    @property
    def of_embedding(self):
        """The linear layer."""
        raise NotImplementedError

    @property
    def sums(self):
        """Pairs of layers whose results it adds, so that one bias is enough; the first may have none to give."""
        raise NotImplementedError


def pixel_attention(qkv):
    """Scaled dot-product attention over N pixels: q, k and v as [3, B, heads, d, N] -> [B, heads, d, N].

    The flash kernels want the d numbers of a pixel beside each other. In channels_last memory those of most networks
    are; others are copied, once. A CPU's plain products in bfloat16 take them as they lie, and give them so.
    """
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[4] <= PLAIN_PIXELS:
        return _attention_by_products(*qkv)
    qkv = qkv.permute(0, 1, 4, 2, 3)  # [3, B, N, heads, d]
    if qkv.stride(4) != 1:
        qkv = qkv.contiguous()
    q, k, v = qkv.transpose(2, 3)  # each [B, heads, N, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3)


def _attention_by_products(q, k, v):
    """The same with all scores in memory."""
    weights = torch.softmax((q * q.shape[2] ** -0.5).transpose(2, 3) @ k, -1)  # [B, heads, N, N]
    if v.stride(2) < v.stride(3):
        return (weights @ v.transpose(2, 3)).transpose(2, 3)
    return v @ weights.transpose(2, 3)


def class_embedding(table, labels, batch):
    """The rows [B, D] of a table of classes for `labels`, int64 or int32 [B]; None without labels.

    table: nn.Embedding [classes, D], or None for a network without classes. Raises ValueError as `check_class_labels`.
    """
    if labels is None:
        return None
    check_class_labels(None if table is None else table.num_embeddings, labels, batch)
    return table(labels)


def check_class_labels(classes, labels, batch):
    """ValueError for labels of a network without classes, and for others than one whole number an image.

    classes: how many the network has, or None. That labels lie in 0 .. classes - 1 is for the caller to see to: looking
    would wait for the device.
    """
    if classes is None:
        raise ValueError("class_labels: the network has no classes; leave them out")
    if labels.shape != (batch,) or labels.dtype not in (torch.int64, torch.int32):
        found = f"{labels.dtype} of shape {list(labels.shape)}"
        raise ValueError(f"class_labels: {found}, expected whole numbers (int64 or int32) of shape {[batch]}")


def check_halvings(image_size, halvings):
    """ValueError for an image size that cannot be halved so often."""
    if image_size % 2**halvings:
        raise ValueError(
            f"network.image_size: {image_size} cannot be halved {halvings} times; use a multiple of {2**halvings}"
        )


def timestep_frequencies(half, spread, device):
    """Geometric frequencies that fall from 1 by the factor 10000 over `spread` entries: float32 [half]."""
    return torch.exp(torch.arange(half, dtype=torch.float32, device=device) * (-math.log(10000.0) / spread))


def upsample(x):
    """Double the resolution of x [B, C, H, W] by repeating pixels."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class UpsamplingConv(nn.Conv2d):
    """Repeated pixels and a 3x3 convolution: [B, channels, H, W] -> [B, channels, 2 H, 2 W].

    A frozen call has both as one convolution, see `prepared.py`.
    """

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return super().forward(upsample(x))

"""Networks made ready for calls that want no parameter gradients: the teacher, a rollout, a sampler, the pull-back.

Such a call computes with weights that do not change from one call to the next, so whatever is made of the weights alone
is made once here:

* Where a network computes in bfloat16, its convolutions and linear layers have their weights and biases in it, in the
  network's memory layout. Autocast would cast them anew in every call. The values are the same, bit for bit.
* Repeated pixels and a 3x3 convolution are one transposed convolution with 4/9 of the multiplications. It rounds
  otherwise.
* Where a block adds the results of two layers, one bias is the sum of both: a convolution's goes into that of the
  linear layer of the time embedding, and that of the skip connection into the last convolution's. A block whose
  embedding scales and shifts a normalisation has its first convolution's bias before that, and keeps it.

All other parameters share the memory of the network.

A call that is known to be at some timesteps alone, as those of a sampler's K layers are, has no time embedding either:
what the blocks make of it is a table (`Prepared.at`).
"""

import copy
import itertools
import math
from collections import defaultdict

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import BeforeNorm, NoisePredictor, TimeBlock, UNet, UpsamplingConv
from .edm_blocks import ResamplingConv

CAST_BY_AUTOCAST = (nn.Conv1d, nn.Conv2d, nn.Linear, ResamplingConv)


class Prepared(nn.Module):
    """A network, called as it is called, for frozen calls: its parameters want no gradient.

    In-place updates of the network are seen at once where memory is shared, and all of them after `refresh`. That
    writes in place too, so compiled code and CUDA graphs stay valid.
    whole: false where the weights do not lie here as a whole (ZeRO-3). Then the network itself is called, as is one in
    which there is nothing to prepare.
    """

    def __init__(self, network, whole=True):
        super().__init__()
        self.event_shape, self.classes = network.event_shape, getattr(network, "classes", None)
        self._own = []  # (tensor of this copy, parameters of the network, what makes the one of the others)
        predictors = [module for module in network.modules() if isinstance(module, NoisePredictor)]
        self._copied_all = whole and bool(predictors)
        self.network = self._copied(network, predictors) if self._copied_all else network

    def forward(self, *inputs):
        return self.network(*inputs)

    @torch.no_grad()
    def refresh(self):
        """Take over the weights that the network has now."""
        alike = defaultdict(list)  # torch copies a list with one kernel where all of it is of one form
        for own, sources, make in self._own:
            made = make(*sources)
            alike[own.dtype, made.dtype, own.stride() == made.stride()].append((own, made))
        for pairs in alike.values():
            torch._foreach_copy_(*map(list, zip(*pairs)))

    def at(self, times):
        """The same weights for calls at some timesteps alone, int [n]; its `refresh` is that of both.

        Calls share what the blocks make of a timestep, so it does not depend on the batch. Another timestep gives NaN,
        one above all of them an IndexError. This copy itself is returned where there is no such table: for a network
        without blocks, with classes, or with weights that do not lie here.
        """
        if not self._copied_all or not isinstance(self.network, UNet) or self.classes is not None:
            return self
        return PreparedAt(self, times)

    @property
    def own_bytes(self):
        """Bytes of the weights that are not shared with the network."""
        return sum(own.numel() * own.element_size() for own, _, _ in self._own)

    def _copied(self, network, predictors):
        """A copy of the network's modules around the same memory, but for what is made of its weights."""
        # What stands in the place of a tensor or module of the network, as `copy.deepcopy` takes it.
        ready = {id(tensor): tensor for tensor in network.buffers()}
        ready |= {id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in network.parameters()}
        for predictor in predictors:
            modules, folded = list(predictor.modules()), set()
            for gives, takes in itertools.chain.from_iterable(map(biases_in_one, modules)):
                ready[id(takes.bias)] = self._made(predictor, torch.add, takes.bias, gives.bias)
                ready[id(gives.bias)] = None
                folded |= {id(takes.bias), id(gives.bias)}
            for module in modules:
                upsamples = upsamples_by_3x3(module)
                if upsamples:
                    folded.add(id(module.weight))
                if predictor.precision == "bf16" and isinstance(module, CAST_BY_AUTOCAST):
                    for parameter in module.parameters(recurse=False):
                        if id(parameter) not in folded:
                            ready[id(parameter)] = self._made(predictor, _itself, parameter)
                if upsamples:
                    instead = FoldedBeforeNorm if isinstance(module, BeforeNorm) else FoldedUpsampling
                    weight = self._made(predictor, folded_weight, module.weight)
                    ready[id(module)] = instead(weight, ready[id(module.bias)])
        return copy.deepcopy(network, ready)

    def _made(self, predictor, make, *parameters):
        """make(*parameters) as a parameter of this copy's own, as the network computes with it."""
        sources = [parameter.detach() for parameter in parameters]
        made = make(*sources)
        is_image = predictor.channels_last and made.ndim == 4
        own = made.to(
            torch.bfloat16 if predictor.precision == "bf16" else made.dtype,
            memory_format=torch.channels_last if is_image else torch.preserve_format,
        )
        self._own.append((own, sources, make))
        return nn.Parameter(own, requires_grad=False)


class PreparedAt(Prepared):
    """A `Prepared` network for calls at some timesteps; see there.

    Its modules are copies of those of the other, around the same memory.
    """

    def __init__(self, prepared, times):
        nn.Module.__init__(self)
        self.event_shape, self.classes, self.prepared = prepared.event_shape, prepared.classes, prepared
        table = TimeTable(prepared.network, times)
        ready = {id(tensor): tensor for tensor in (*prepared.network.parameters(), *prepared.network.buffers())}
        ready |= {id(layer): columns for layer, columns in table.columns()}
        self.network = copy.deepcopy(prepared.network, ready)
        self.network.time_table = table
        self.refresh_table()

    def refresh(self):
        """Take over the weights that the network has now."""
        self.prepared.refresh()
        self.refresh_table()

    def refresh_table(self):
        """Make the table of the weights of the other copy."""
        self.network.time_table.fill(self.prepared.network)

    def at(self, times):
        """As of `Prepared`."""
        return self.prepared.at(times)

    @property
    def own_bytes(self):
        """As of `Prepared`, without the table."""
        return self.prepared.own_bytes


class TimeTable(nn.Module):
    """What all blocks of a network make of the embedding of n timesteps: t [B], each one of them, -> [B, S].

    network: a `UNet` without classes; times: int [n]. Only `fill` writes numbers into it.
    """

    def __init__(self, network, times):
        super().__init__()
        self._layers = [block.of_embedding for block in network.modules() if isinstance(block, TimeBlock)]
        times, weight = times.unique(), self._layers[0].weight
        rows = torch.full((int(times.max()) + 1,), len(times), device=times.device)  # of a timestep; the last is NaN
        rows[times] = torch.arange(len(times), device=times.device)
        dtype = torch.bfloat16 if network.precision == "bf16" else weight.dtype
        shape = len(times) + 1, sum(layer.out_features for layer in self._layers)
        self.register_buffer("times", times.to(weight.device), persistent=False)
        self.register_buffer("rows", rows.to(weight.device), persistent=False)
        self.register_buffer("values", weight.new_full(shape, math.nan, dtype=dtype), persistent=False)

    def columns(self):
        """(layer of the network, what stands in its place) of each block."""
        last = 0
        for layer in self._layers:
            first, last = last, last + layer.out_features
            yield layer, Columns(first, last)

    def forward(self, t):
        return self.values[self.rows[t]]

    @torch.no_grad()
    def fill(self, network):
        """Take over the weights of the network."""
        in_bf16 = network.precision == "bf16"
        dtype = torch.float32 if in_bf16 else self.values.dtype  # of a call's x
        with torch.autocast("cuda" if self.times.is_cuda else "cpu", torch.bfloat16, enabled=in_bf16):
            embedding = network.embedded(network.shown(self.times, dtype), None, dtype)
            self.values[:-1] = torch.cat([layer(embedding) for layer in self._layers], dim=1)


class Columns(nn.Module):
    """Columns first .. last - 1 of the rows of a `TimeTable`, in the place of a block's layer."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = first, last

    def forward(self, rows):
        return rows[:, self.first : self.last]


class FoldedUpsampling(nn.Module):
    """Repeated pixels and a 3x3 convolution as one: [B, C, H, W] -> [B, D, 2 H, 2 W].

    weight: [C, D, 4, 4], see `folded_weight`; bias: [D].
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        return self.convolved(x, self.bias)

    def convolved(self, x, bias):
        return F.conv_transpose2d(x, self.weight, bias, stride=2, padding=1)


class FoldedBeforeNorm(BeforeNorm, FoldedUpsampling):
    """`FoldedUpsampling` that leaves its bias to the normalisation after it."""


def as_prepared(network):
    """`Prepared(network)`, or the network itself where it is one already."""
    return network if isinstance(network, Prepared) else Prepared(network)


def folded_weight(weight):
    """A 3x3 convolution of repeated pixels, [D, C, 3, 3], as a transposed one: [C, D, 4, 4].

    Of the three taps of a pixel's row two fall on the same source pixel, and the third on its neighbour. Zeros around
    the repeated image are zeros around the source.
    """
    for dim in (2, 3):
        first, second, third = weight.unbind(dim)
        weight = torch.stack([third, second + third, first + second, first], dim)
    return weight.transpose(0, 1).contiguous()


def upsamples_by_3x3(module):
    """Whether a module repeats pixels and then has a 3x3 convolution."""
    if isinstance(module, ResamplingConv):
        return module.repeats and module.kernel == 3
    return isinstance(module, UpsamplingConv)


def biases_in_one(module):
    """Pairs (layer that gives its bias up, layer that has both then) of a block; none of another module."""
    sums = module.sums if isinstance(module, TimeBlock) else []
    return [(gives, takes) for gives, takes in sums if getattr(gives, "bias", None) is not None]


def _itself(parameter):
    return parameter

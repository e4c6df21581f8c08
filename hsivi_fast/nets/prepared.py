"""Networks made ready for calls that want no parameter gradients: the teacher, a rollout, a sampler, the pull-back.

Such a call computes with weights that do not change from one call to the next, so whatever is made of the weights alone
is made once here:

* where a network computes in bfloat16, its convolutions and linear layers have their weights and biases in it, in the
  network's memory layout. Autocast would cast them anew in every call. The values are the same, bit for bit.

All other parameters share the memory of the network: in float32 a prepared network has no weights of its own.
"""

import copy

import torch
from torch import nn

from .blocks import NoisePredictor
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
        self._own, self._sources = [], []  # tensors of this copy, and the network's that they are made of
        predictors = [module for module in network.modules() if isinstance(module, NoisePredictor)]
        self.network = self._copied(network, predictors) if whole and predictors else network

    def forward(self, *inputs):
        return self.network(*inputs)

    @torch.no_grad()
    def refresh(self):
        """Take over the weights that the network has now."""
        if self._own:
            torch._foreach_copy_(self._own, self._sources)

    @property
    def own_bytes(self):
        """Bytes of the weights that are not shared with the network."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._own)

    def _copied(self, network, predictors):
        """A copy of the network's modules around the same memory, but for the weights that are cast."""
        ready = {id(tensor): tensor for tensor in network.buffers()}
        for predictor in predictors:
            if predictor.precision == "bf16":
                ready |= {id(parameter): self._cast(parameter, predictor) for parameter in _cast_by_autocast(predictor)}
        for parameter in network.parameters():
            tensor = ready.get(id(parameter), parameter.detach())
            ready[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
        return copy.deepcopy(network, ready)

    def _cast(self, parameter, predictor):
        is_image = predictor.channels_last and parameter.ndim == 4
        layout = torch.channels_last if is_image else torch.preserve_format
        tensor = parameter.detach().to(torch.bfloat16, memory_format=layout)
        self._own.append(tensor)
        self._sources.append(parameter.detach())
        return tensor


def as_prepared(network):
    """`Prepared(network)`, or the network itself where it is one already."""
    return network if isinstance(network, Prepared) else Prepared(network)


def _cast_by_autocast(network):
    """The parameters that autocast would cast."""
    for module in network.modules():
        if isinstance(module, CAST_BY_AUTOCAST):
            yield from module.parameters(recurse=False)

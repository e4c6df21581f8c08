"""The noise of a batch as one value, from the rollout down to the operators."""

from dataclasses import dataclass

import torch
from torch.utils._pytree import register_pytree_node


@dataclass(frozen=True)
class Noise:
    """Standard normal noise of B samples: counter-based, so it is an address and not a tensor.

    Element i of a sample is a function of (seed, stream, draw, i) alone, see `philox.py`.

    seeds: [B] int64, one a sample; None where the noise is given.
    stream: [B] int, the layer of each sample, 1 .. K.
    draw: [B] int64 or one int, which numbers independent draws at one address; None for 0.
    given: [B, *event], the noise itself in the place of what the address says; or None.
    """

    seeds: torch.Tensor | None
    stream: torch.Tensor
    draw: torch.Tensor | int | None = None
    given: torch.Tensor | None = None

    def __len__(self):
        return len(self.stream)

    def __getitem__(self, samples):
        """The noise of some of the samples: a slice or an index tensor."""
        return Noise(*(value[samples] if isinstance(value, torch.Tensor) else value for value in _fields(self)))


def _fields(noise):
    return noise.seeds, noise.stream, noise.draw, noise.given


# A recorded call (`execution.GraphedCall`) takes what it is given apart into tensors.
register_pytree_node(Noise, lambda noise: (list(_fields(noise)), None), lambda fields, _: Noise(*fields))

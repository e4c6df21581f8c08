"""What the tests of the benchmarks share: a network that is timed in a moment, and the committed rows."""

import functools
from pathlib import Path

import torch

from bench.measure import counted_flops, read_records
from hsivi_fast.nets import build_unet
from hsivi_fast.nets.prepared import Prepared

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = {
    "family": "ddpm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 8,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [False, True],
    "norm_groups": 4,
}


def committed(name):
    """The rows of a results file in bench/results."""
    return read_records(ROOT / "bench" / "results" / f"{name}.jsonl")


@functools.cache
def share_of_a_frozen_call(linear=0.0):
    """The work of a frozen call of `TINY` at known timesteps, by that of another: its upsampling takes 4/9.

    linear: the share of its linear layers' work that is done. A table of it is made for all calls at once.
    """
    network = build_unet(TINY).requires_grad_(False)
    x, t = torch.zeros(2, *network.event_shape), torch.tensor([0, 1])
    ready = Prepared(network)
    plain, prepared, of_table = (counted_flops(functools.partial(call, x, t)) for call in (network, ready, ready.at(t)))
    layers = 2 * 2 * sum(module.weight.numel() for module in network.modules() if isinstance(module, torch.nn.Linear))
    upsampling = 2 * 2 * 16 * 16 * 9 * 8**2  # 16 channels to 8x8 pixels, for both images
    assert plain - prepared == upsampling * 5 // 9 and prepared - of_table == layers
    return (of_table + linear * layers) / plain

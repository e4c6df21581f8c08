"""Where the time of a training cycle and of sampling goes, by torch's profiler: shares of convolutions, normalisation, copies, the method, the optimizer.

    python -m bench.breakdown                     CIFAR-10's network at half width, in float32 and bfloat16: three minutes on 2 cores
    python -m bench.breakdown --width 128         at full width, for a GPU

Eager calls: what is compiled is one kernel to the profiler.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hsivi_fast.build import prepare_device
from hsivi_fast.sampling.sampler import Sampler

from .measure import describe, table, write_rows
from .train_step import OurTraining, small_teacher

KINDS = {  # kind -> parts of operators' names, the first that fits
    "the method's own": (
        "hsivi_fast::affine",
        "hsivi_fast::denoising",
        "hsivi_fast::fisher",
        "hsivi_fast::draw",
        "philox",
    ),
    "convolution": ("convolution",),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "matrix product": ("::mm", "::addmm", "::bmm", "::linear"),
    "normalisation, SiLU": ("group_norm", "silu"),
    "optimizer, average, clipping": ("_fused_adam", "_foreach", "linalg_vector_norm"),
    "casts, copies, padding": ("copy_", "::cat", "pad", "clone", "contiguous", "upsample", "fill_", "zero_"),
}


def kind_of(name):
    """The kind of an operator."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "all else")


def shares(function, device):
    """({kind: share of the time}, seconds) of one call; operators inside an operator of ours are its own."""
    gpu = device.type == "cuda"
    function()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        function()
        if gpu:
            torch.cuda.synchronize(device)
    spent = {}
    for event in profiler.events():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        ancestor = event
        while ancestor.cpu_parent is not None and not ancestor.name.startswith("hsivi_fast::"):
            ancestor = ancestor.cpu_parent
        name = ancestor.name if ancestor.name.startswith("hsivi_fast::") else event.name
        spent[kind_of(name)] = spent.get(kind_of(name), 0.0) + own / 1e6
    total = sum(spent.values())
    return {kind: spent.get(kind, 0.0) / total for kind in (*KINDS, "all else")}, total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64, help="base channels of CIFAR-10's network; 128 is full width")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, rows = {"name": "cifar10", "channels": arguments.width}, []
    for precision in ("fp32", "bf16"):
        ours = OurTraining(
            precision, {"precision": precision}, small_teacher(network, device), network, arguments.batch, 10, 20
        )
        sampler = Sampler(
            ours.updates.teacher, ours.layer, torch.zeros(ours.student.network.event_shape, device=device)
        )
        parts = {**ours.parts(), "sampling": lambda: (prepare_device(ours.config), sampler(range(64), batch_size=64))}
        for part, function in parts.items():
            kinds, seconds = shares(function, device)
            rows.append(
                {
                    "case": f"{part}, {precision}",
                    "seconds": seconds,
                    "shares": kinds,
                    "network": network,
                    "batch": arguments.batch,
                    **describe(device),
                }
            )
    if arguments.json:
        write_rows(arguments.json, rows)
    print(
        table(
            rows,
            {
                "part": lambda r: r["case"],
                "s": lambda r: f"{r['seconds']:.2f}",
                **{kind: lambda r, kind=kind: f"{r['shares'][kind]:.1%}" for kind in (*KINDS, "all else")},
            },
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

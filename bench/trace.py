"""Which kernels a GPU runs in the fastest way, and where they take longer than the model on paper: torch's profiler.

    python -m bench.trace                       sampling and a training cycle, with batches of 16 and of 128
    python -m bench.trace --json bench/results/trace_h100.jsonl

Everything is replayed from CUDA graphs: bfloat16, channels_last, compiled, with the kernels of this package. Times by
kind of kernel stand beside those of `bench.roofline`. What is left of the measured time is a gap between kernels. Of
whom that is, two figures of a row say: how long the host needs to launch it all, and how long the device was at work.
"""

import functools
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.breakdown import REST
from bench.cluster import F_LEARNING_TIMES, NFE
from bench.measure import Row, describe, print_rows, row_of, synchronized_seconds, wait_for_turn, write_rows
from bench.options import command_line
from bench.roofline import (
    CASTS,
    H100,
    OPTIMIZER,
    call_operations,
    counted,
    optimizer_operations,
    terms,
    whole,
)
from bench.sampling import CASES, OurSampling
from bench.tables import Column
from bench.train_step import GRAPHS, OurTraining, small_teacher
from hsivi_fast.build import choose_device
from hsivi_fast.execution import WARM_UP
from hsivi_fast.training.telemetry import gpu_clocks

BATCHES = (16, 128)
ELEMENTWISE, PRODUCTS = "elementwise, copies", "convolution, product"
KERNELS = {  # kind -> parts of kernels' names, the first that fits
    "the method's own": ("_affine_", "_denoising_", "_fisher_", "_draw_kernel", "_integers", "_sum_groups"),
    "normalisation, SiLU": ("_group_norm_",),
    OPTIMIZER: ("_adam_", "_write_addresses", "multi_tensor", "lpnorm"),
    "attention": ("flash", "fmha", "attention"),
    ELEMENTWISE: ("triton_", "memcpy", "memset", "elementwise", "copy", "catarray", "nchwtonhwc", "nhwctonchw"),
    PRODUCTS: ("fprop", "dgrad", "wgrad", "conv", "cudnn", "gemm", "nvjet", "cublas", "splitk", "gemv", "cutlass"),
}
# Kinds of the model that one kernel may hold; a convolution of single pixels is a product to the libraries.
OF_MODEL = {REST: ELEMENTWISE, CASTS: ELEMENTWISE, "convolution": PRODUCTS, "matrix product": PRODUCTS}
GAPS = "between kernels"
MOST_NAMED = 12  # kernels of a part that a row names


def kind_of_kernel(name):
    """The kind of a kernel, by its name in the driver's records."""
    name = name.lower()
    return next((kind for kind, parts in KERNELS.items() if any(part in name for part in parts)), REST)


def kernels_of(function, device):
    """What the driver recorded of one call.

    Returns ([(name, microseconds)] of every kernel and copy, microseconds from the first's start to the last's end).
    """
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize(device)
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.device_type() == DeviceType.CUDA]
    assert events, "the profiler saw no kernel"
    ends = [event.start_ns() + event.duration_ns() for event in events]
    span = max(ends) - min(event.start_ns() for event in events)
    return [(event.name(), event.duration_ns() / 1e3) for event in events], span / 1e3


def host_seconds(function, device):
    """Seconds until a call returns, with the device's work done before: what the host needs to launch it all."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summed(entries):
    """{kind: {launches, ms}} of (kind, launches, milliseconds)."""
    table = defaultdict(lambda: {"launches": 0, "ms": 0.0})
    for kind, launches, milliseconds in entries:
        table[kind]["launches"] += launches
        table[kind]["ms"] += milliseconds
    return dict(table)


def by_kind(kernels):
    """{kind: {launches, ms}} of [(name, microseconds)]."""
    return summed((kind_of_kernel(name), 1, microseconds / 1e3) for name, microseconds in kernels)


def longest(kernels):
    """[[name, launches, ms]] of the kernels that take most."""
    count, spent = Counter(name for name, _ in kernels), Counter()
    for name, microseconds in kernels:
        spent[name] += microseconds / 1e3
    return [[name[:120], count[name], milliseconds] for name, milliseconds in spent.most_common(MOST_NAMED)]


def model_by_kind(operations):
    """The same of the model's operations, in a graph."""
    found = terms(operations)
    del found["all"]
    return summed((OF_MODEL.get(kind, kind), each["launches"], 1e3 * each["seconds"]) for kind, each in found.items())


def compared(kernels, seconds, operations):
    """Rows of a table: of each kind what was measured and what the model says, the largest difference first.

    seconds: of the whole part, measured without the profiler.
    """
    measured, model = by_kind(kernels), model_by_kind(operations)
    nothing = {"launches": 0, "ms": 0.0}
    in_kernels = sum(row["ms"] for row in measured.values())
    measured[GAPS] = {"launches": 0, "ms": max(0.0, 1e3 * seconds - in_kernels)}
    own = sum(row["ms"] for row in model.values())
    model[GAPS] = {"launches": 0, "ms": max(0.0, 1e3 * whole(operations, H100.graph) - own)}
    rows = []
    for kind in {**measured, **model}:
        ours, theirs = measured.get(kind, nothing), model.get(kind, nothing)
        rows.append(
            {
                "kind": kind,
                "launches": ours["launches"],
                "ms": ours["ms"],
                "model_launches": theirs["launches"],
                "model_ms": theirs["ms"],
                "gap": ours["ms"] - theirs["ms"],
            }
        )
    return sorted(rows, key=lambda row: -row["gap"])


def parts_of(network, batch, device):
    """{part: (function of nothing, the model's operations)}; `WARM_UP` + 1 calls of each compile and record it."""
    sizes = counted(network["name"], batch)
    call, step = call_operations(sizes, batch), optimizer_operations(sizes)
    rolled = F_LEARNING_TIMES * batch // NFE  # trajectories of a rollout, each of which gives K samples
    sampling = OurSampling(network, NFE, device, **CASES["sampling_bf16_graphs"])
    training = OurTraining("trace", GRAPHS, small_teacher(network, device), network, batch, NFE, F_LEARNING_TIMES)
    parts = {"sampling": lambda: sampling.draw(batch, batch), **training.parts()}
    operations = {
        "sampling": call * NFE,
        "rollout": call_operations(counted(network["name"], rolled), rolled) * NFE,
        "student": sizes.with_backward + 2 * sizes.with_input_backward + step,
        "score_net": sizes.with_backward + step,
    }
    return {name: (function, operations[name]) for name, function in parts.items()}


def measure(case, function, operations, device, facts, extras):
    """The row of one part."""
    seconds = statistics.median(synchronized_seconds(function, device) for _ in range(7))
    host = statistics.median(host_seconds(function, device) for _ in range(7))
    kernels, span = kernels_of(function, device)
    kinds = compared(kernels, seconds, operations)
    extras = {**extras, "seconds": seconds, "host_seconds": host, "profiled_span_seconds": span / 1e6}
    extras.update(model_seconds=whole(operations, H100.graph), kinds=kinds)
    return Row(case, extras={**extras, "longest": longest(kernels), "clocks": gpu_clocks(device)}, **facts)


def main(given=None):
    parser = command_line(__doc__, json=None)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="samples of an update")
    arguments = parser.parse_args(given)
    device = choose_device("auto")
    if device.type != "cuda":
        parser.error("it needs a GPU: bench.breakdown does the same for a CPU")
    network, facts, rows = {"name": "cifar10"}, describe(device), []
    parts = {batch: parts_of(network, batch, device) for batch in arguments.batches}
    wait_for_turn([function for of_batch in parts.values() for function, _ in of_batch.values()], device)
    for batch, of_batch in parts.items():
        for _ in range(WARM_UP + 1):
            for function, _ in of_batch.values():
                function()
        extras = {"network": network, "batch": batch}
        for name, (function, operations) in of_batch.items():
            case = f"{name}, {batch}"
            work = functools.partial(measure, case, function, operations, device, facts, extras)
            rows.append(row_of(case, work, facts, f"--batches {batch}; use fewer"))
            write_rows(arguments.json, rows)
    return print_rows(rows, [Column("part", "{case}"), Column("ms", _milliseconds), Column("kinds", _kinds)])


def _milliseconds(row):
    return f"{1e3 * row['seconds']:.2f} (model {1e3 * row['model_seconds']:.2f})"


def _kinds(row):
    return "; ".join(f"{kind['kind']} {kind['ms']:.2f} ({kind['model_ms']:.2f})" for kind in row["kinds"])


if __name__ == "__main__":
    sys.exit(main())

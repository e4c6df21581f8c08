"""What the benchmarks share: interleaved medians, counted memory traffic, tables and the rows that they write."""

import contextlib
import json
import platform
import statistics
import sys
import time
from importlib import metadata

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hsivi_fast.nets.blocks import NoisePredictor
from hsivi_fast.training.telemetry import EnergyMeter, commit

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FLUSH_BYTES = 256 * 2**20  # more than the second-level cache of any GPU


def interleaved(sides, device, rounds=30):
    """Median seconds of every side: {name: function of nothing} -> {name: seconds}. One call of each in turn, `rounds` times, after a few to warm up;
    every round begins with the next side, since a call feels what ran before it.

    On a GPU a call is timed by events on the device, behind a write that empties the cache and hides the host's launch.
    """
    gpu = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if gpu else None
    for function in sides.values():
        for _ in range(3):
            function()
    taken = {name: [] for name in sides}
    order = list(sides.items())
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name, function in order:
            if gpu:
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                taken[name].append((start, end))
            else:
                taken[name].append(synchronized_seconds(function, device))
    if gpu:
        torch.cuda.synchronize(device)
        taken = {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in taken.items()}
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def synchronized_seconds(function, device):
    """Seconds of one call, with the device's work done before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def use_torch_defaults():
    """PyTorch's own float32 mode, which the published code keeps: full products, and TF32 in cuDNN's convolutions."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def has_fast_bfloat16():
    """Whether this machine computes in bfloat16: a GPU, or a CPU with avx512_bf16 or amx_bf16."""
    if torch.cuda.is_available():
        return True
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        flags = file.read()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def copy_bandwidth(device, size=512 * 2**20):
    """Bytes per second, read and written, of a plain copy of half a gigabyte."""
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / interleaved({"copy": lambda: target.copy_(source)}, device, rounds=20)["copy"]


def product_rate(device, dtype):
    """Floating-point operations per second of a square matrix product in `dtype`, the limit that a network's rate is set against: the fastest of ten, of two sizes."""
    rates = []
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * n**3 / min(timed_rounds({"product": (lambda: a @ b, 1)}, device, 11)["product"][1:]))
    return max(rates)


def timed_rounds(sides, device, rounds):
    """Interleaved calls of {name: (function, calls a round)} -> {name: seconds of every call}."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (function, calls) in sides.items():
            for _ in range(calls):
                seconds[name].append(synchronized_seconds(function, device))
    return seconds


def counted_calls(function):
    """Calls of networks (`NoisePredictor`) in one call."""
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: calls.append(module) if isinstance(module, NoisePredictor) else None
    )
    try:
        function()
    finally:
        hook.remove()
    return len(calls)


def peak_bytes(function, device):
    """The most memory that one call holds beyond what was held before it: by the allocator's counter on a GPU, by the profiler's records of it on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = most = 0
    for event in sorted(
        (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        held += event.nbytes()
        most = max(most, held)
    return most


def joules_per_image(function, device, images):
    """Energy of a GPU for each of the `images` that one call makes; None where no driver counts it."""
    meter, start, calls = EnergyMeter(device), time.perf_counter(), 0
    if meter.handle is None:
        return None
    while not calls or time.perf_counter() - start < 1.0:  # the driver renews its counter every 20 to 100 ms
        function()
        torch.cuda.synchronize(device)
        calls += 1
    return meter.joules() / (calls * images)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that every operator reads and writes; views move nothing."""

    VIEWS = (
        "view",
        "expand",
        "reshape",
        "permute",
        "transpose",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "detach",
        "alias",
        "as_strided",
        "t",
        "split",
        "unbind",
    )

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function._schema.name.partition("::")[2]
        if (
            name.rstrip("_") not in self.VIEWS
            and not name.startswith("_unsafe_view")
            and name not in ("empty", "empty_like", "new_empty")
        ):
            tensors = [leaf for leaf in tree_leaves((arguments, keywords, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def counted_bytes(function):
    """Bytes that the operators of one call read and write, each counted as if nothing stayed in a cache."""
    with _Traffic() as traffic:
        function()
    return traffic.bytes


class _Flops(TorchDispatchMode):
    """Adds up the operations of products and convolutions by torch's own formulas; `FlopCounterMode` does not take torch.autograd.grad of a leaf."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*arguments, **(keywords or {}), out_val=result)
        elif function is ATTENTION:  # of a CPU; torch has formulas for those of GPUs
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in arguments[:3]))
        elif function is ATTENTION_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(tensor.shape for tensor in arguments[:4]))
        return result


def counted_flops(function):
    """Floating-point operations of the matrix products and convolutions of one call, forward and backward."""
    with _Flops() as counter:
        function()
    return counter.flops


def describe(device):
    """Commit, device and versions, as every row of a results file has them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions = {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "triton", "hsivi_fast")},
    }
    return {"commit": commit(), "device": name, "versions": versions}


def _cpu_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def table(rows, columns):
    """Rows (dicts) as aligned text; columns: {title: function of a row}."""
    cells = [list(columns), *[[str(cell(row)) for cell in columns.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        )
        for line in cells
    )


def run_cases(cases, measure_case, file):
    """The rows of named cases, measured one after the other by `measure_case(name)`; the file, if any, is written after each."""
    rows = []
    for case in cases:
        if "bf16" in case and not has_fast_bfloat16():
            print(f"{case}: this CPU has no avx512_bf16; expect it to be slow", file=sys.stderr)
        rows.append(measure_case(case))
        print(
            f"{case}: {rows[-1]['failed']}" if "failed" in rows[-1] else f"{case}: x{rows[-1]['ratio']:.2f}",
            file=sys.stderr,
            flush=True,
        )
        if file:
            write_rows(file, rows)
    return rows


def print_rows(rows, columns):
    """Print the table of the rows whose check held, and name the others; 0 where all held, else 1: a script's exit code."""
    good = [row for row in rows if "failed" not in row]
    print(table(good, columns))
    for row in rows:
        if "failed" in row:
            print(f"{row['case']}: NOT TIMED, its check failed: {row['failed']}")
    return 1 if len(good) < len(rows) else 0


def span(values):
    """Two seconds as text."""
    return f"{values[0]:.2f} to {values[1]:.2f}"


def write_rows(file, rows):
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

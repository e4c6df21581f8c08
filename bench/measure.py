"""What the benchmarks share: interleaved medians, counted work and memory traffic, and the rows that they write."""

import contextlib
import functools
import json
import os
import platform
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bench.tables import text_table
from hsivi_fast import ops
from hsivi_fast.execution import WARM_UP, CudaRecording
from hsivi_fast.nets.blocks import NoisePredictor
from hsivi_fast.parallel.out_of_memory import memory_advice
from hsivi_fast.training.telemetry import EnergyMeter, commit, gpu_clocks, package_versions

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# The path that `bench/all.py` gives a process which is to wait for its turn: "PATH.ready" and "PATH.go" are files.
TURN = "HSIVI_BENCH_TURN"
FLUSH_BYTES = 256 * 2**20  # more than the second-level cache of any GPU


def interleaved(sides, device, rounds=30):
    """Median seconds of every side: {name: function of nothing} -> {name: seconds}.

    One call of each in turn, `rounds` times, after a few to warm up. Every round begins with the next side, since a
    call feels what ran before it. On a GPU a call is timed by events on the device, behind a write that empties the
    cache and hides the host's launch.
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
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                function()
                end.record()
                taken[name].append((start, end))
            else:
                taken[name].append(synchronized_seconds(function, device))
    if gpu:
        torch.cuda.synchronize(device)
        for name, pairs in taken.items():
            taken[name] = [start.elapsed_time(end) / 1e3 for start, end in pairs]
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
    """The published code's modes: PyTorch's operators, full products, and TF32 in cuDNN's convolutions."""
    _use_tf32(products=False, convolutions=True)
    ops.choose_backend("torch")


def use_full_float32():
    """The same without TF32: the modes of what our results are checked against."""
    _use_tf32(products=False, convolutions=False)
    ops.choose_backend("torch")


def use_modes_of(context):
    """The modes of a context, after those of another side: what `build_context` has set for it."""
    tf32 = context.config.precision == "tf32"
    _use_tf32(products=tf32, convolutions=tf32)
    context.execution.choose_convolutions()
    if not _alone:  # the times of cuDNN's algorithms mean nothing beside other work
        torch.backends.cudnn.benchmark = False
    ops.choose_backend(context.config.backend, context.device)


def _use_tf32(products, convolutions):
    torch.set_float32_matmul_precision("high" if products else "highest")
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cudnn.benchmark = False  # torch's default


_alone = TURN not in os.environ  # whether nothing else uses the device, as far as this is known


def wait_for_turn(functions, device):
    """Call functions of nothing, which compiles them, and wait until this process has the device to itself.

    So `bench/all.py` has several processes compile beside each other. In a process that was started otherwise, and at
    a second call, nothing is done: then the first call of what is timed compiles it.
    """
    global _alone
    if _alone:
        return
    for function in functions:
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    place = os.environ[TURN]
    Path(f"{place}.ready").touch()
    while not Path(f"{place}.go").exists():
        time.sleep(0.02)
    _alone = True


def has_fast_bfloat16():
    """Whether this machine computes in bfloat16: a GPU, or a CPU with avx512_bf16 or amx_bf16."""
    return torch.cuda.is_available() or bool(cpu_bfloat16_flags())


def cpu_bfloat16_flags():
    """Those of the flags avx512_bf16 and amx_bf16 that this CPU has."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        flags = set(file.read().split())
        return [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return []


@functools.cache
def copy_bandwidth(device):
    """Bytes per second, read and written, of a plain copy of half a gigabyte (64 MB on a CPU); measured once."""
    size = (512 if device.type == "cuda" else 64) * 2**20
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / interleaved({"copy": lambda: target.copy_(source)}, device, rounds=20)["copy"]


@functools.cache
def product_rate(device, precision):
    """Floating-point operations per second of a square matrix product, the fastest of ten, of two sizes.

    precision: "fp32", "tf32" or "bf16". It is the limit that a network's rate is set against; measured once.
    """
    _use_tf32(products=precision == "tf32", convolutions=False)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    return max(_product_rate_of_size(n, device, dtype) for n in sizes)


def _product_rate_of_size(n, device, dtype):
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = timed_rounds({"product": (lambda: a @ b, 1)}, device, 11)["product"]
    return 2 * n**3 / min(seconds[1:])


def rates(flops, moved, seconds, context):
    """What a row says of the rates of a side that has just been timed, as extras of the row.

    flops, moved: operations and bytes of the operators of its eager twin, in so many seconds. Fusion and caches spare
    bytes, so a share of a copy's rate may be above 1; context: of the side.
    clocks: of the GPU at this moment, None elsewhere.
    """
    clocks = gpu_clocks(context.device)
    product, copy = product_rate(context.device, context.config.precision), copy_bandwidth(context.device)
    return {
        "clocks": clocks,
        "product_flops_per_second": product,
        "utilisation": flops / seconds / product,
        "ours_bytes": moved,
        "copy_bytes_per_second": copy,
        "share_of_copy": moved / seconds / copy,
    }


def timed_rounds(sides, device, rounds):
    """Interleaved calls of {name: (function, calls a round)} -> {name: seconds of every call}.

    On a GPU every side begins with a call that is not timed: the one before it may have emptied the allocator's cache,
    as the published update does, and taking memory from the driver again is no work of this side.
    """
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (function, calls) in sides.items():
            if device.type == "cuda":
                function()
            for _ in range(calls):
                seconds[name].append(synchronized_seconds(function, device))
    return seconds


def counted_calls(function):
    """Calls of networks (`NoisePredictor`) in one call."""
    calls = []

    def note(module, inputs, output):
        if isinstance(module, NoisePredictor):
            calls.append(module)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        function()
    finally:
        hook.remove()
    return len(calls)


def warmed_up(functions, calls, device):
    """Call functions in turn, so many times; returns the most memory that they took beyond what was held before.

    On a GPU it is the memory that the allocator took from the driver meanwhile: a recorded graph keeps its own, and no
    count of tensors sees it. On a CPU it is what one more call of the hungriest holds, by the profiler's records.
    """
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
    for _ in range(calls):
        for function in functions:
            function()
    if gpu:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before
    return max(map(_held_bytes, functions))


def _held_bytes(function):
    """The most memory of a CPU that one call holds beyond what was held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def replayed(function, device, recording=CudaRecording):
    """The work of a function of nothing as a recorded graph: a function that replays it; its results stay where they
    are.
    """
    graph = recording(device)
    for _ in range(WARM_UP):
        graph.warm_up(function)
    graph.record(function)
    return graph.replay


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
ALLOCATIONS = ("empty", "empty_like", "new_empty")


def moves_memory(operator):
    """Whether an operator of torch reads or writes tensors: views and allocations do not."""
    name = operator._schema.name.partition("::")[2]
    is_view = name.rstrip("_") in VIEWS or name.startswith("_unsafe_view")
    return not is_view and name not in ALLOCATIONS


def tensor_bytes(*values):
    """Bytes of all tensors in some values, nested as torch's pytrees are."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that every operator reads and writes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if moves_memory(function):
            self.bytes += tensor_bytes(arguments, keywords, result)
        return result


def counted_bytes(function):
    """Bytes that the operators of one call read and write, each counted as if nothing stayed in a cache."""
    with _Traffic() as traffic:
        function()
    return traffic.bytes


class _Flops(TorchDispatchMode):
    """Adds up the operations of products and convolutions by torch's own formulas.

    `FlopCounterMode` does not take torch.autograd.grad of a leaf.
    """

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


def describe(device, threads=None):
    """Commit, device and versions, as every row of a results file has them: see `Row`.

    A CPU is named with its threads (this process's by default) and its flags for bfloat16.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        count = threads or torch.get_num_threads()
        name = ", ".join([_cpu_name(), f"{count} thread{'s' * (count > 1)}", *cpu_bfloat16_flags()])
    versions = package_versions(("torch", "triton", "hsivi_fast"))
    return {"commit": commit(), "device": name, "versions": {"python": platform.python_version(), **versions}}


def _cpu_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@dataclass(frozen=True)
class Row:
    """One line of a results file.

    ours, published: what both sides took, in `unit`; a row that compares nothing has no unit.
    ratio: published by ours, so above 1 ours is faster; counted_ratio: the same of counted work.
    extras: {key: value} that the script says besides.
    failed: why a case was not timed, as its check says it.
    commit, device, versions: see `describe`.
    """

    case: str
    ours: float | None = None
    published: float | None = None
    ratio: float | None = None
    unit: str | None = None
    counted_ratio: float | None = None
    extras: dict = field(default_factory=dict)
    failed: str | None = None
    commit: str | None = None
    device: str | None = None
    versions: dict | None = None

    def record(self):
        """The row as one flat dict: what a results file holds."""
        facts = {"commit": self.commit, "device": self.device, "versions": self.versions}
        if self.failed is not None:
            return {"case": self.case, "failed": self.failed, **facts}
        compared = {
            "ours": self.ours,
            "published": self.published,
            "ratio": self.ratio,
            "unit": self.unit,
            "counted_ratio": self.counted_ratio,
        }
        return {"case": self.case, **(compared if self.unit is not None else {}), **self.extras, **facts}


def write_records(file, records):
    """One JSON object a line."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_records(file):
    """What `write_records` wrote."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(file, rows):
    """The rows as a results file; nothing where `file` is None."""
    if file is not None:
        write_records(file, [row.record() for row in rows])


def row_of(case, function, facts, advice):
    """The row that a function of nothing gives; where it fails, a row that says how, and the traceback on stderr.

    facts: as of `describe`, for that row; advice: what to lower where memory is not enough, as of `memory_advice`.
    A ValueError, which says that something was asked for that cannot be, is raised.
    """
    try:
        with memory_advice(advice):
            return function()
    except ValueError:
        raise
    except (AssertionError, MemoryError) as error:  # a check, or memory: the line says it all
        return Row(case, failed=str(error), **facts)
    except Exception as error:  # of a compiler, a library or the device: the other cases may do
        traceback.print_exc()
        return Row(case, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", **facts)


def run_cases(cases, measure_case, file, facts, advice):
    """The rows of named cases, measured one after the other by `measure_case(name)`; facts, advice: as of `row_of`.

    The file, if any, is written after each, so that a run that is cut off leaves what it has.
    """
    rows = []
    for case in cases:
        if "bf16" in case and not has_fast_bfloat16():
            print(f"{case}: this CPU has no avx512_bf16; expect it to be slow", file=sys.stderr)
        row = row_of(case, functools.partial(measure_case, case), facts, advice)
        rows.append(row)
        print(f"{case}: {row.failed or f'x{row.ratio:.2f}'}", file=sys.stderr, flush=True)
        write_rows(file, rows)
    return rows


def print_rows(rows, columns):
    """Print the table of the rows whose check held, and name the others; 0 where all held, else 1, the exit code."""
    good = [row.record() for row in rows if row.failed is None]
    print(text_table(good, columns))
    for row in rows:
        if row.failed is not None:
            print(f"{row.case}: NOT TIMED, its check failed: {row.failed}")
    return 1 if len(good) < len(rows) else 0


def print_headline(rows, device):
    """Name the row that compares like with like: float32 in the published code's own mode, which has TF32 on a GPU."""
    mode = "tf32" if device.type == "cuda" else "fp32"
    for row in rows:
        if mode in row.case.split("_") and row.failed is None:
            print(f"like with like, {mode} on both sides: {row.case}, x{row.ratio:.2f}")
            return

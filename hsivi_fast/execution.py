"""How calls of networks are executed: eagerly, compiled by Inductor, or replayed from a CUDA graph.

Each way has the same signature and the same result. Imports nothing of ours.

What a function given to `Execution.graphed` keeps to, so that it may be captured:

* It works on the device alone. There is no `.item()`, no `nonzero`, no index or condition that the host has to know,
  and no copy from the host.
* It reads its arguments, and tensors that stay where they are in memory: parameters, tables, buffers that are filled
  by `copy_`.
* What the host counts (a step, a rate) is written into such a tensor before the call, since the function's Python
  runs once.

The networks of a run are held to that: optimizer, average and loading update their weights in place.
"""

import contextlib
import os
import shutil
import time

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

# Calls that run eagerly before one is recorded: libraries and compilers set themselves up, optimizers make their state.
WARM_UP = 3
# Shapes and gradient modes of one network's code; torch's own limit of 8 is below what a run with its table needs.
RECOMPILE_LIMIT = 64

_kernel_seconds = 0.0  # that Triton has compiled kernels of this package for, in this process


class CudaRecording:
    """One CUDA graph, recorded and replayed.

    The tests put another class with these methods in its place, to run all of this without a GPU.
    """

    def __init__(self, device):
        self.device, self.stream, self.graph = device, torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def warm_up(self, function):
        """Run a function on the stream that will record it.

        Backward passes remember the stream that their parameters were first used on.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def record(self, function):
        """Record a function's work without doing it, and return its result: tensors that `replay` fills.

        Other threads may use the device meanwhile, as NCCL's own does: what they do is no part of the graph, and no
        error.
        """
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return function()

    def replay(self):
        """Do the recorded work."""
        self.graph.replay()


class GraphedCall:
    """A function of tensors, recorded at its call number `WARM_UP` + 1 and replayed from then on.

    An argument may be a tensor, None, or a value that torch's pytrees take apart into these (as `Batch`). The shapes of
    the first call are the only ones that it takes afterwards (ValueError), and what was None stays None. Results are
    copies: a later call does not change them. `on_record(seconds)` is called once, with what recording took.

    Every call, the first one too, works on the same tensors, which the arguments are copied into. What compiles itself
    by how a tensor lies in memory (Triton does) has so done it before the recording, where it could not.
    """

    def __init__(self, function, recording, on_record=lambda seconds: None):
        self.function, self.recording, self.on_record = function, recording, on_record
        self.calls, self.inputs, self.arguments, self.outputs = 0, None, None, None

    def __call__(self, *inputs):
        tensors, structure = tree_flatten(inputs)
        if self.inputs is None:
            self.inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
            self.arguments = tree_unflatten(self.inputs, structure)
        for kept, given in zip(self.inputs, tensors, strict=True):
            if _described(kept) != _described(given):
                advice = "fill a smaller batch up, or switch cuda_graphs off"
                made_for = f"recorded for {_described(kept)}, called with {_described(given)}"
                raise ValueError(f"cuda_graphs: {made_for}; {advice}")
            if kept is not None:
                kept.copy_(given)
        self.calls += 1
        if self.calls <= WARM_UP:
            return _copies(self.recording.warm_up(self._run))
        if self.calls == WARM_UP + 1:
            start = time.perf_counter()
            self.outputs = self.recording.record(self._run)
            self.on_record(time.perf_counter() - start)
        self.recording.replay()
        return _copies(self.outputs)

    def _run(self):
        return self.function(*self.arguments)


def _copies(outputs):
    """Copies of a tensor or of a tuple of them; None for None."""
    if isinstance(outputs, tuple):
        return tuple(value.clone() for value in outputs)
    return None if outputs is None else outputs.clone()


def _described(tensor):
    return None if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"


class Execution:
    """The ways to execute that a configuration asks for, on one device.

    `recorded` counts the calls that have been recorded; `warm_up_calls` are those of one function that are slower than
    all after them: libraries set themselves up, and graphs are recorded. Raises ValueError where the device cannot do
    what is asked.
    """

    def __init__(self, device, compile=False, cuda_graphs=False, recording=CudaRecording):
        self.device = torch.device(device)
        if cuda_graphs and recording is CudaRecording and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs: true needs a CUDA device, the device is {self.device}; leave it false")
        if compile and self.device.type == "cpu" and not has_compiler():
            missing = "neither g++ nor clang++ nor $CXX is there"
            raise ValueError(
                f"compile: true needs a C++ compiler on a CPU, and {missing}; install one or leave it false"
            )
        self.compile, self.cuda_graphs, self.recording = compile, cuda_graphs, recording
        self.recorded, self._record_seconds = 0, 0.0
        self.warm_up_calls = WARM_UP + 1 if cuda_graphs else int(self.device.type == "cuda")
        if self.device.type == "cuda":
            _count_kernels()
        self._kernels_before = _kernel_seconds
        if compile:
            from torch._dynamo import config as dynamo  # here: the compiler takes a second to import

            dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
            self._compiled_before = _compile_seconds()

    @property
    def fixed_shapes(self):
        """Whether another batch size would be compiled or recorded anew: a smaller batch is better filled up then."""
        return self.compile or self.cuda_graphs

    def choose_convolutions(self):
        """Have cuDNN time its algorithms at the first call of each convolution, where shapes are fixed.

        It is a mode of the process. Calls of the warm-up do it, before anything is recorded. Another process may find
        another algorithm the fastest, which rounds otherwise.
        """
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = self.fixed_shapes

    def compiled(self, network):
        """`network` as a function (x, t) -> noise, compiled if the configuration says so.

        It is compiled for every shape and gradient mode that it meets. Values and gradients are those of the network
        itself, up to rounding. Inductor keeps what it made on the disk, so a second process is faster.
        """
        return torch.compile(network, dynamic=False, fullgraph=True) if self.compile else network

    def graphed(self, function):
        """`function` of tensors, replayed from a graph if the configuration says so; see the rules on top."""
        return GraphedCall(function, self.recording(self.device), self._note) if self.cuda_graphs else function

    def _note(self, seconds):
        self.recorded, self._record_seconds = self.recorded + 1, self._record_seconds + seconds

    @property
    def seconds(self):
        """Seconds that recording has taken since this was made, and compiling in the whole process since then.

        The kernels of this package are compiled by Triton at their first calls, whatever `compile` says.
        """
        compiling = _compile_seconds() - self._compiled_before if self.compile else 0.0
        return self._record_seconds + compiling + _kernel_seconds - self._kernels_before


def has_compiler():
    """Whether a C++ compiler is there, which Inductor needs on a CPU: $CXX, g++ or clang++."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def _compile_seconds():
    """Seconds that torch.compile has spent in this process.

    Backward graphs are compiled at their first use, so no call of ours can be timed for it.
    """
    from torch._dynamo.utils import calculate_time_spent  # here: the compiler takes a second to import

    return calculate_time_spent().get("total_wall_time", 0.0)


def _count_kernels():
    """Ask Triton to tell how long it compiles, from now on in this process, unless somebody else has asked."""
    with contextlib.suppress(ImportError):  # where it is missing, nothing is compiled by it
        from triton import knobs  # here: it is of use with a GPU alone

        knobs.compilation.listener = knobs.compilation.listener or _note_kernel


def _note_kernel(*, src, times, **others):
    """Count a kernel that Triton has compiled, times.total in microseconds; Inductor counts its own by itself."""
    global _kernel_seconds
    if src.fn.fn.__module__.startswith(f"{__package__}."):
        _kernel_seconds += times.total / 1e6


EAGER = Execution("cpu")  # eager calls are the same on every device

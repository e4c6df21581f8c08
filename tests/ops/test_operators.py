"""The switch between the backends, and the operators as torch sees them: opcheck, torch.compile, what is refused."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from devices import KERNEL_DEVICE
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from hsivi_fast import ops
from hsivi_fast.ops import library

B, K, EVENT = 4, 3, (2, 4, 4)
SIZE = 32
SHAPES = [(1, 1), (K, 1), (1, SIZE), (K, SIZE)]
BACKENDS = [("torch", "cpu"), ("triton", KERNEL_DEVICE)]


def _inputs(shape, device, channels_last=False):
    generator = torch.Generator().manual_seed(3)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(device)

    e = randn(B, *EVENT)
    return {
        "x": randn(B, *EVENT),
        "e": e.to(memory_format=torch.channels_last) if channels_last else e,
        "a": randn(K + 1),
        "b": randn(K + 1),
        "s": randn(K + 1).abs(),
        "log_gamma": 0.3 * randn(*shape),
        "seeds": torch.arange(B, device=device),
        "k": torch.tensor([1, 3, 2, 3], device=device),
        "draw": torch.tensor([0, 1, 0, 2], device=device),
        "weight": randn(K + 1).abs(),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck_of_the_method_operators(backend, device, shape):
    i = _inputs(shape, device, channels_last=True)

    def leaf(name):
        return i[name].clone(memory_format=torch.preserve_format).requires_grad_()

    address = (i["seeds"], i["k"], i["draw"], None, backend)
    torch.library.opcheck(
        library.affine_noise_step, (leaf("x"), leaf("e"), i["a"], i["b"], i["s"], leaf("log_gamma"), *address)
    )
    torch.library.opcheck(
        library.affine_noise_step_backward, (i["x"], i["e"], i["b"], i["s"], i["log_gamma"], *address)
    )
    torch.library.opcheck(library.denoising_loss_and_grads, (i["e"], i["weight"], i["s"], i["log_gamma"], *address))
    fisher = (i["x"], i["e"], i["weight"], i["s"], i["log_gamma"], *address)
    torch.library.opcheck(library.fisher_loss_and_grads, fisher)
    if shape == SHAPES[-1]:  # alpha changes no shape
        torch.library.opcheck(library.fisher_loss_and_grads, (*fisher, 1.2))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck_without_noise_and_of_the_draw(backend, device):
    i = _inputs((1, 1), device)
    x = i["x"].clone().requires_grad_()
    torch.library.opcheck(
        library.affine_noise_step, (x, None, i["a"], None, None, None, None, i["k"], None, None, backend)
    )
    torch.library.opcheck(
        library.affine_noise_step,
        (x, i["e"], i["a"], i["b"], i["s"], i["log_gamma"], None, i["k"], None, i["e"], backend),
    )
    torch.library.opcheck(library.draw_noise, (i["seeds"], i["k"], i["draw"], [3, 5], backend))


def test_integers_are_the_same_from_each_backend(monkeypatch):
    """On the CPU they are torch's, whatever the process's choice: the host draws beside a run on a GPU."""
    seeds = torch.tensor([3, -1, 2**62], device=KERNEL_DEVICE)
    torch.library.opcheck(library.integers_of_seeds, (seeds, 10))
    draws = [
        (
            ops.integers(7, 1, 3, 9, KERNEL_DEVICE, backend=backend),
            ops.integers_below(10, 7, 1, 3, 9, KERNEL_DEVICE, backend=backend),
            ops.integers_of_seeds(seeds, 10, backend=backend),
        )
        for backend in ("torch", "triton")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*draws))
    ops.choose_backend("triton", KERNEL_DEVICE)
    monkeypatch.setattr(library, "integers", None)
    assert torch.equal(ops.integers(7, 1, 3, 9), draws[0][0].cpu())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("modulated", [False, True])
def test_opcheck_of_group_normalisation(modulated, layout):

    def randn(*size):
        return torch.randn(*size, device=KERNEL_DEVICE).requires_grad_()

    x = torch.randn(2, 8, 4, 4, device=KERNEL_DEVICE).to(memory_format=layout).requires_grad_()
    rows = (randn(2, 8), randn(2, 8), None) if modulated else (None, None, randn(2, 8))
    torch.library.opcheck(library.norm_operator, (x, 2, randn(8), randn(8), 1e-5, True, *rows))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("beside, added", [(0, True), (6, True), (6, False)])
def test_opcheck_of_group_normalisation_of_parts(beside, added, layout):

    def randn(*size):
        return torch.randn(*size, device=KERNEL_DEVICE).contiguous(memory_format=layout).requires_grad_()

    x, residual = randn(2, 10, 4, 4), randn(2, 10, 4, 4)
    weight, bias, add = (
        torch.randn(*size, device=KERNEL_DEVICE).requires_grad_() for size in ((10 + beside,),) * 2 + ((2, 10),)
    )
    parts = (add if added else None, residual, 0.5, randn(2, beside, 4, 4) if beside else None)
    torch.library.opcheck(library.joined_norm_operator, (x, 2, weight, bias, 1e-5, True, *parts))


@pytest.mark.parametrize("watched", [False, True])
def test_only_a_call_that_is_watched_is_an_operator_s(watched):
    """Counters, compilers and gradients see the operator. Without them it is the same, for less work of the host."""
    x, weight, bias = torch.randn(2, 8, 4, 4, device=KERNEL_DEVICE), *torch.randn(2, 8, device=KERNEL_DEVICE)
    mode = FlopCounterMode(display=False) if watched else contextlib.nullcontext()
    with profile() as profiler, torch.no_grad(), mode:
        alone = ops.group_norm_silu(x, 2, weight, bias, 1e-5, backend="triton")
        parts = ops.joined_group_norm_silu(x, 2, weight, bias, 1e-5, residual=x, backend="triton")
    operators = {event.key for event in profiler.key_averages() if event.key.startswith("hsivi_fast::")}
    names = {"hsivi_fast::group_norm_silu", "hsivi_fast::joined_group_norm_silu"}
    assert operators == (names if watched else set())
    assert torch.equal(alone, library.norm_operator(x, 2, weight, bias, 1e-5, True, None, None, None)[0])
    given = (x, 2, weight, bias, 1e-5, True, None, x, 1.0, None)
    assert all(torch.equal(a, b) for a, b in zip(parts, library.joined_norm_operator(*given)[:2], strict=True))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_compiler_is_given_the_operators(with_gradients):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def normalised(x):
        alone = ops.group_norm_silu(x, 2, None, None, 1e-5, backend="triton")
        return alone + ops.joined_group_norm_silu(x, 2, None, None, 1e-5, residual=x, backend="triton")[0]

    x = torch.randn(2, 8, 4, 4, device=KERNEL_DEVICE)
    with torch.set_grad_enabled(with_gradients):
        compiled = torch.compile(normalised, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), normalised(x))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert called >= {f"hsivi_fast.{name}.default" for name in ("group_norm_silu", "joined_group_norm_silu")}


@pytest.mark.parametrize("uses", ["y", "whole", "both"])
def test_parts_have_the_gradients_of_what_they_are_joined_to(uses):
    """With both backends, where one of the results or both are used."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 3, 4), (2, 5), (2, 5, 3, 4), (2, 7, 3, 4), (12,), (12,)]
    given = [torch.randn(*shape, generator=generator).to(KERNEL_DEVICE) for shape in shapes]
    cotangents = [torch.randn(2, 12, 3, 4, generator=generator).to(KERNEL_DEVICE) for _ in range(2)]
    results = []
    for backend in ("torch", "triton"):
        x, add, residual, beside, weight, bias = leaves = [tensor.clone().requires_grad_() for tensor in given]
        parts = {"add": add, "residual": residual, "factor": 0.7, "beside": beside}
        found = ops.joined_group_norm_silu(x, 3, weight, bias, 1e-5, **parts, backend=backend)
        names = ("y", "whole")
        used = [(y * c).sum() for name, y, c in zip(names, found, cotangents) if uses in (name, "both")]
        results.append((*found, *torch.autograd.grad(sum(used), leaves, materialize_grads=True)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_parts_of_several_types_or_memory_formats_are_joined_before_the_kernel():
    """As they always were: by torch, whose rules say what comes out."""
    x, y, beside = (torch.randn(2, 4, 3, 5, device=KERNEL_DEVICE) for _ in range(3))
    weight, bias = torch.ones(2, 8, device=KERNEL_DEVICE)
    for residual in (y.bfloat16(), y.contiguous(memory_format=torch.channels_last)):
        parts = {"residual": residual, "beside": beside, "backend": "triton"}
        found, whole = ops.joined_group_norm_silu(x, 2, weight, bias, 1e-5, **parts)
        expected = torch.cat([x + residual, beside], 1)
        assert torch.equal(whole, expected)
        assert torch.equal(found, ops.group_norm_silu(expected, 2, weight, bias, 1e-5, backend="triton"))


def test_the_gradient_of_what_is_added_is_made_where_it_is_wanted(monkeypatch):
    made, backward = [], library.kernels("group_norm_silu")._backward

    def noted(*arguments):
        result = backward(*arguments)
        made.append(result[1] is not None)
        return result

    monkeypatch.setattr(library.kernels("group_norm_silu"), "_backward", noted)
    x, add = torch.randn(2, 4, 3, 5, device=KERNEL_DEVICE), torch.randn(2, 4, device=KERNEL_DEVICE)
    weight, bias = torch.ones(2, 4, device=KERNEL_DEVICE)
    for wanted in (False, True):
        leaves = [x.requires_grad_(), add.requires_grad_(wanted)][: 1 + wanted]
        y = ops.group_norm_silu(x, 2, weight, bias, 1e-5, add=add, backend="triton")
        whole, _ = ops.joined_group_norm_silu(x, 2, weight, bias, 1e-5, add=add, backend="triton")
        torch.autograd.grad(y.sum() + whole.sum(), leaves)
    assert made == [False, False, True, True]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_compiled_is_eager(backend, device):
    """One graph, no breaks, forward and backward; the noise is in it, which Inductor would get wrong if it saw it."""
    i = _inputs((1, SIZE), device)
    noise = ops.Noise(i["seeds"], i["k"])
    ops.choose_backend(backend, device)

    def step(x, e, log_gamma):
        y = ops.affine_noise_step(torch.tanh(x), e, i["a"], i["b"], i["s"], log_gamma, noise)
        y = ops.group_norm_silu(y, 2, i["a"][:2], i["b"][:2], 1e-5)
        parts = {"residual": torch.tanh(e), "beside": e, "factor": 0.5}
        normed, whole = ops.joined_group_norm_silu(y, 2, i["a"][:4], i["b"][:4], 1e-5, **parts)
        y = y + normed[:, :2] * whole[:, 2:]
        tables = (i["weight"], i["s"], log_gamma.detach(), noise)
        losses, grad = ops.denoising_loss_and_grads(y.detach(), *tables)
        fisher = [ops.fisher_loss_and_grads(y.detach(), e.detach(), *tables, alpha) for alpha in (0.5, 1.2)]
        return y * 2, losses, grad, *fisher[0], *fisher[1]

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        e, log_gamma = i["e"].clone().requires_grad_(), i["log_gamma"].clone().requires_grad_()
        y, *values = function(i["x"], e, log_gamma)
        (y * i["x"]).sum().backward()
        results.append((y.detach(), *values, e.grad, log_gamma.grad))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_the_losses_say_that_they_are_not_differentiable_again():
    i = _inputs((1, 1), "cpu")
    noise = ops.Noise(i["seeds"], i["k"])
    losses, _ = ops.denoising_loss_and_grads(i["e"].requires_grad_(), i["weight"], i["s"], i["log_gamma"], noise)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        losses.sum().backward()


def test_gradients_of_a_sum_are_those_of_ones():
    """Autograd hands a repeated number to the backward of a sum; no kernel reads such strides."""

    def plainly(y):
        return y.sum()

    def times_ones(y):
        return (y * torch.ones_like(y)).sum()

    i = _inputs((1, SIZE), KERNEL_DEVICE)
    grads = []
    for total in (plainly, times_ones):
        e, log_gamma = i["e"].clone().requires_grad_(), i["log_gamma"].clone().requires_grad_()
        noise = ops.Noise(i["seeds"], i["k"])
        y = ops.affine_noise_step(i["x"], e, i["a"], i["b"], i["s"], log_gamma, noise, backend="triton")
        grads.append(torch.autograd.grad(total(y), (e, log_gamma)))
        y = ops.group_norm_silu(e, 2, i["a"][:2], i["b"][:2], 1e-5, backend="triton")
        grads[-1] += torch.autograd.grad(total(y), e)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- the switch ------------------------------------------------------------------------------------------------------


def _without_interpreter(code, **variables):
    """Run code in a process without TRITON_INTERPRET and without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", ops.VARIABLE)}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", **variables},
    )


def test_auto_is_torch_on_a_cpu_and_does_not_import_the_kernels():
    code = (
        "import sys, torch; from hsivi_fast import ops; s = torch.arange(2); ops.draw_noise(s, 0, (3,));"
        "print(ops.choose_backend(), sorted(n for n in sys.modules if n.startswith('hsivi_fast.kernels.')))"
    )
    done = _without_interpreter(code)
    assert done.stdout.startswith("torch") and "affine_noise_step" not in done.stdout, done.stderr


@pytest.mark.parametrize(
    "variables, call, message",
    [
        (
            {},
            "ops.choose_backend('triton')",
            "backend: 'triton' cannot run, the device is cpu and Triton needs a CUDA device, or TRITON_INTERPRET=1",
        ),
        ({ops.VARIABLE: "triton"}, "ops.choose_backend()", "HSIVI_BACKEND: 'triton' cannot run, the device is cpu"),
        (
            {ops.VARIABLE: "cuda"},
            "ops.choose_backend()",
            "HSIVI_BACKEND: 'cuda' is unknown; choose one of auto, torch, triton",
        ),
        ({}, "ops.draw_noise(s, 0, (3,), backend='triton')", "backend: 'triton' cannot run, the device is cpu"),
    ],
)
def test_a_backend_that_cannot_run_says_why(variables, call, message):
    code = f"import torch; from hsivi_fast import ops; s = torch.arange(2)\ntry: {call}"
    done = _without_interpreter(f"{code}\nexcept ValueError as error: print(error)", **variables)
    assert done.stdout.startswith(message), done.stdout + done.stderr


def test_argument_before_configuration_before_environment(monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, "triton")
    assert ops.choose_backend("auto", KERNEL_DEVICE) == "triton"
    assert ops.choose_backend("torch", KERNEL_DEVICE) == "torch"
    assert (
        ops._resolve("triton", torch.device(KERNEL_DEVICE)) == "triton"
        and ops._resolve(None, torch.device(KERNEL_DEVICE)) == "torch"
    )
    with pytest.raises(ValueError, match="backend: 'cuda' is unknown"):
        ops.choose_backend("cuda")


def test_missing_triton_and_an_old_gpu_are_reasons(monkeypatch):
    monkeypatch.setattr(ops, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    ops._obstacle.cache_clear()
    try:
        assert ops._resolve("auto", torch.device("cuda:0")) == "torch"
        with pytest.raises(ValueError, match="compute capability 7.0 and the kernels are made for 8.0"):
            ops.choose_backend("triton", "cuda:0")
        ops._obstacle.cache_clear()
        monkeypatch.setattr(ops, "_triton_is_installed", lambda: False)
        with pytest.raises(ValueError, match="the package triton is not installed"):
            ops.choose_backend("triton", "cuda:0")
        ops._obstacle.cache_clear()
        monkeypatch.undo()
        monkeypatch.setattr(ops, "triton_is_interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert (
            ops._resolve("auto", torch.device("cuda:0")) == "triton"
            and ops._resolve("auto", torch.device("cpu")) == "torch"
        )
    finally:
        ops._obstacle.cache_clear()

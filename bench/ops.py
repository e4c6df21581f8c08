"""Every operation against plain torch, eager and compiled, on the same work.

    python -m bench.ops [--json bench/results/ops_h100.jsonl]      a table
    python -m bench.ops --selection --replay                       about 20 cases, as recorded graphs: a GPU's own time
    pytest -n 0 bench/test_ops.py --benchmark-only                 six of the cases in pytest-benchmark

On a GPU "ours" is the Triton backend, with its rate against the bytes that it must move and the share that this is of a
plain copy's rate, measured in the same run. On a CPU "ours" is the torch backend. The plain formula draws its noise
with torch.randn and keeps it, as the published implementation does. An operation whose check fails prints no speed, and
the exit code is 1.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.nn import functional as F

from bench.measure import (
    Row,
    copy_bandwidth,
    counted_bytes,
    describe,
    interleaved,
    print_rows,
    replayed,
    row_of,
    wait_for_turn,
    write_rows,
)
from bench.options import command_line
from bench.tables import Column
from hsivi_fast import ops
from hsivi_fast.build import choose_device
from hsivi_fast.execution import CudaRecording
from hsivi_fast.nets import build_unet
from hsivi_fast.ops import library, philox, reference
from hsivi_fast.training.optim import FusedStep, PlainStep

LAYERS = 10
GRAPHS = CudaRecording  # what --replay records; the tests put another class in its place


@dataclass
class Case:
    """One operation at one shape: two functions of nothing that do the same work.

    bytes: what the fused one moves; elements, element_size: of its tensor.
    check: raises AssertionError where ours is wrong.
    plain_bytes: what the plain one moves, where its operators do not tell.
    """

    name: str
    ours: Callable
    plain: Callable
    bytes: int
    elements: int
    element_size: int
    check: Callable
    plain_bytes: int | None = None


class MethodInputs:
    """Random inputs of the affine step and of the two losses at one shape, and the plain formulas on them."""

    def __init__(self, device, event, batch, dtype, per_pixel, layout):
        generator = torch.Generator().manual_seed(0)

        def randn(*size):
            return torch.randn(*size, generator=generator).to(device)

        size = torch.Size(event).numel()
        self.batch, self.per_pixel = batch, per_pixel
        self.x, self.e, self.dy = (randn(batch, *event).to(dtype, memory_format=layout) for _ in range(3))
        self.a, self.b = randn(LAYERS + 1), randn(LAYERS + 1)
        self.s, self.weight = randn(LAYERS + 1).abs() + 0.1, randn(LAYERS + 1).abs()
        self.log_gamma = 0.1 * randn(1, size if per_pixel else 1)
        self.log_gamma_view = self.log_gamma.reshape(1, *(event if per_pixel else [1] * len(event)))
        seeds, self.k = torch.arange(batch, device=device), torch.arange(batch, device=device) % LAYERS + 1
        self.noise = ops.Noise(seeds, self.k)
        self.drawn = ops.draw_noise(seeds, self.k, event)

    def plain_step(self):
        """The affine step, with noise from torch.randn."""
        z = torch.randn_like(self.x)
        mean = self._column(self.a) * self.x + self._column(self.b) * self.e
        return mean + self._column(self.s) * torch.exp(self.log_gamma_view) * z

    def plain_backward(self):
        """Its gradients at e and log_gamma."""
        terms = self._column(self.s) * torch.exp(self.log_gamma_view) * self.drawn * self.dy
        return self._column(self.b) * self.dy, self._summed(terms)

    def plain_denoising(self):
        """The denoising loss of e, with its gradient."""
        residual = self.e - self.drawn * self._column(self.s) * torch.exp(-self.log_gamma_view)
        losses = (self._column(self.weight) * residual.square()).flatten(1).sum(1)
        return losses, 2 * self._column(self.weight) * residual / self.batch

    def plain_fisher(self):
        """The Fisher loss of x and e, with its three gradients."""
        target = self.drawn * self._column(self.s) * torch.exp(-self.log_gamma_view)
        g = self.x - self.e
        losses = (self._column(self.weight) * (2 * g * (target - self.e) - g.square())).flatten(1).sum(1)
        slope = -2 * self._column(self.weight) * g * target / self.batch
        grad_f = 2 * self._column(self.weight) * (target - self.x) / self.batch
        grad_e = -2 * self._column(self.weight) * (target - self.e) / self.batch
        return losses, grad_f, grad_e, self._summed(slope)

    def exact(self, function, *names):
        """A function of `reference` in float64, on the inputs of these names and the noise that the address says."""
        tensors = [_exact(getattr(self, name)) for name in names]
        return function(*tensors, None, self.k, noise=self.drawn.double())

    def _column(self, table):
        return table[self.k].reshape(-1, 1, 1, 1)

    def _summed(self, terms):
        """Summed to log_gamma's shape, [1, 1 or size of an event]."""
        return terms.sum(0).reshape(1, -1) if self.per_pixel else terms.sum().reshape(1, 1)


def method_cases(device, event, batch, dtype, per_pixel, layout=torch.contiguous_format):
    """The affine step, its backward and the two losses."""
    given = MethodInputs(device, event, batch, dtype, per_pixel, layout)
    backend = ops.choose_backend("auto", device)
    x, e, log_gamma, noise = given.x, given.e, given.log_gamma, given.noise
    step = functools.partial(ops.affine_noise_step, x, e, given.a, given.b, given.s, log_gamma, noise)
    backward = functools.partial(
        library.affine_noise_step_backward,
        *(given.dy, e, given.b, given.s, log_gamma),
        *(noise.seeds, noise.stream, None, None, backend),
    )
    denoising = functools.partial(ops.denoising_loss_and_grads, e, given.weight, given.s, log_gamma, noise)
    fisher = functools.partial(ops.fisher_loss_and_grads, x, e, given.weight, given.s, log_gamma, noise)
    exact_step = functools.partial(given.exact, reference.affine_noise_step, "x", "e", "a", "b", "s", "log_gamma")
    exact_backward = functools.partial(
        given.exact, reference.affine_noise_step_backward, "dy", "e", "b", "s", "log_gamma"
    )
    exact_denoising = functools.partial(
        given.exact, reference.denoising_loss_and_grads, "e", "weight", "s", "log_gamma"
    )
    exact_fisher = functools.partial(given.exact, reference.fisher_loss_and_grads, "x", "e", "weight", "s", "log_gamma")
    shape = f"{'x'.join(map(str, (batch, *event)))} {_name(dtype)}{' per pixel' if per_pixel else ''}"
    shape += " channels_last" if layout == torch.channels_last else ""
    for name, ours, plain, passes, exact in (
        ("affine_noise_step", step, given.plain_step, 3, exact_step),
        ("affine_noise_step backward", backward, given.plain_backward, 2, exact_backward),
        ("denoising_loss_and_grads", denoising, given.plain_denoising, 2, exact_denoising),
        ("fisher_loss_and_grads", fisher, given.plain_fisher, 4, exact_fisher),
    ):
        moved = passes * x.numel() * x.element_size()
        yield Case(f"{name} {shape}", ours, plain, moved, x.numel(), x.element_size(), _check(ours, exact))


def norm_cases(device, size, channels, groups, batch, dtype, modulated, added, channels_last):
    """Group normalisation with SiLU and what is fused with it, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (randn(batch, channels, size, size).to(memory_format=layout) for _ in range(2))
    weight, bias = 1 + 0.5 * randn(channels), randn(channels)
    scale, shift = randn(batch, 2 * channels).chunk(2, dim=1) if modulated else (None, None)
    add = randn(batch, channels) if added else None
    inputs = (x, weight, bias, scale, shift, add)

    def plain(x, weight, bias, scale, shift, add):
        h = x if add is None else x + add[:, :, None, None]
        h = F.group_norm(h, groups, weight, bias, 1e-5)
        return F.silu(h if scale is None else h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    def fused(x, weight, bias, scale, shift, add):
        return ops.group_norm_silu(x, groups, weight, bias, 1e-5, True, scale, shift, add)

    def with_gradients(function, leaves, dy):
        wanted = [leaf for leaf in leaves if leaf is not None]
        return torch.autograd.grad(function(*leaves), wanted, dy)

    def exact():
        return plain(*map(_exact, inputs))

    def exact_gradients():
        return with_gradients(plain, [_leaf(_exact(tensor)) for tensor in inputs], dy.double())

    shape, order = "x".join(map(str, (batch, channels, size, size))), "channels_last" if channels_last else "row-major"
    name = f"{shape} {_name(dtype)} {order}{' modulated' * modulated}{' added' * added}"
    elements, width = x.numel(), x.element_size()
    ours = functools.partial(fused, *inputs)
    yield Case(
        f"group_norm_silu {name}",
        ours,
        functools.partial(plain, *inputs),
        2 * elements * width,
        elements,
        width,
        _check(ours, exact),
    )
    leaves = [_leaf(tensor) for tensor in inputs]
    ours = functools.partial(with_gradients, fused, leaves, dy)
    yield Case(
        f"group_norm_silu forward+backward {name}",
        ours,
        functools.partial(with_gradients, plain, leaves, dy),
        5 * elements * width,
        elements,
        width,
        _check(ours, exact_gradients),
    )


def joined_cases(device, size, channels, beside, groups, batch, dtype, channels_last):
    """What stands at the end of a residual block and before the next one: a bias and a sum, further channels, the norm.

    Both results are used, as by a convolution and by the skip connection. Passes are of a tensor of all channels.
    """
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def images(count):
        return randn(batch, count, size, size).to(memory_format=layout)

    every = channels + beside
    inputs = (images(channels), randn(batch, channels), images(channels), images(beside), randn(every), randn(every))
    cotangents = images(every), images(every)

    def plain(x, add, residual, beside, weight, bias, read=lambda whole: whole):
        whole = torch.cat([x + add[:, :, None, None] + residual, beside], 1)
        return F.silu(F.group_norm(read(whole), groups, weight, bias, 1e-5)), whole

    def fused(x, add, residual, beside, weight, bias):
        parts = {"add": add, "residual": residual, "beside": beside}
        return ops.joined_group_norm_silu(x, groups, weight, bias, 1e-5, **parts)

    def with_gradients(function, leaves, *cotangents):
        return torch.autograd.grad(function(*leaves), leaves, cotangents)

    def as_stored(whole):
        """What the norm reads of a sum in float64; its gradient is the sum's."""
        return whole + (whole.to(dtype).double() - whole).detach()

    rounded = functools.partial(plain, read=as_stored)

    def exact():
        return rounded(*map(_exact, inputs))

    def exact_gradients():
        return with_gradients(rounded, [_leaf(_exact(tensor)) for tensor in inputs], *map(_exact, cotangents))

    order = "channels_last" if channels_last else "row-major"
    name = f"{batch}x{channels}+{beside}x{size}x{size} {_name(dtype)} {order}"
    elements, width = batch * every * size * size, inputs[0].element_size()
    forward = (2 * channels + beside) / every + 2
    leaves = [_leaf(tensor) for tensor in inputs]
    for what, ours, theirs, passes, truth in (
        ("", functools.partial(fused, *inputs), functools.partial(plain, *inputs), forward, exact),
        (
            " forward+backward",
            functools.partial(with_gradients, fused, leaves, *cotangents),
            functools.partial(with_gradients, plain, leaves, *cotangents),
            forward + 4,
            exact_gradients,
        ),
    ):
        moved = int(passes * elements * width)
        check = _check(ours, truth)
        yield Case(f"joined_group_norm_silu{what} {name}", ours, theirs, moved, elements, width, check)


def noise_cases(device, event, batch):
    """Noise by address against torch.randn."""
    seeds, k = torch.arange(batch, device=device), torch.arange(batch, device=device) % LAYERS + 1
    shape = (batch, *event)
    elements = torch.Size(shape).numel()

    def philox_normal():
        return philox.normal(seeds, k, event)

    def case(name, ours):
        plain = functools.partial(torch.randn, shape, device=device)
        check = _check(ours, lambda: philox_normal().double())
        return Case(f"{name} {'x'.join(map(str, shape))}", ours, plain, 4 * elements, elements, 4, check)

    yield case("draw_noise", functools.partial(ops.draw_noise, seeds, k, event))
    if device.type == "cpu":
        yield case("draw_noise, plain Philox compiled", torch.compile(philox_normal, dynamic=False))


def step_case(device, name, shapes, recorded):
    """The optimizer step of parameters of these shapes in one kernel, against torch's clipping, fused Adam and average.

    recorded: torch's as it is where steps are recorded, with the weight of the average in a tensor.
    Of torch's operators on lists the counter sees what they read, not that they write it. So their passes are counted
    by hand: clipping 3 with the norm, Adam 9, and the average 3 or, of three operators, 8. They are not compiled.
    """
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    elements = sum(tensor.numel() for tensor in start)

    def step_of(kind, dtype, *options):
        parameters = {str(index): torch.nn.Parameter(_exact(value).to(dtype)) for index, value in enumerate(start)}
        optimizer = kind(parameters.items(), 1.0, 0.999, 0.9, None, *options)
        own = [gradient.to(dtype, copy=True) for gradient in gradients]  # torch's clipping writes into its gradients

        @torch.compiler.disable
        def step():
            for parameter, gradient in zip(parameters.values(), own):
                parameter.grad = gradient
            optimizer.prepare(1e-4)
            optimizer.apply()
            return [value.detach() for value in (*parameters.values(), *optimizer.ema.parameters.values())]

        return step

    f32, on = torch.float32, device if recorded else None
    fresh = functools.partial(step_of, FusedStep, f32)
    return Case(
        f"optimizer step {name} {len(shapes)} tensors, {elements} elements{' recorded' * recorded}",
        fresh(),
        step_of(PlainStep, f32, on),
        12 * elements * 4,
        elements,
        4,
        _check(lambda: fresh()(), lambda: step_of(PlainStep, torch.float64)()),
        (20 if recorded else 15) * elements * 4,
    )


def all_cases(device):
    """The real shapes: on a GPU from a small batch to beyond 64 MB, on a CPU a few that it does in a minute."""
    return cpu_cases(device) if device.type == "cpu" else gpu_cases(device)


def cpu_cases(device):
    """What a CPU does in a minute."""
    f32 = torch.float32
    yield from noise_cases(device, (3, 32, 32), 64)
    yield from method_cases(device, (3, 32, 32), 64, f32, True)
    yield from method_cases(device, (1, 8, 8), 160, f32, True)
    yield from norm_cases(device, 32, 128, 32, 4, f32, False, True, False)
    yield from norm_cases(device, 8, 64, 8, 160, f32, False, True, False)


def gpu_cases(device):
    """From a small batch to beyond 64 MB."""
    f32, bf16 = torch.float32, torch.bfloat16
    for batch in (128, 8192):
        yield from noise_cases(device, (3, 32, 32), batch)
    for event, batches in (((3, 32, 32), (16, 128, 8192, 16384)), ((3, 64, 64), (16, 128, 4096))):
        for batch in batches:
            for dtype in (f32, bf16):
                yield from method_cases(device, event, batch, dtype, True)
        yield from method_cases(device, event, batches[-1], f32, False)
        yield from method_cases(device, event, batches[-1], bf16, False)
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in build_unet("cifar10").parameters()]
    yield from (step_case(device, "cifar10", shapes, recorded) for recorded in (False, True))
    for index, (size, channels, modulated, added) in enumerate(NORMS):
        for batch in (16, 64):
            yield from norm_cases(device, size, channels, 32, batch, bf16, modulated, added, True)
        if index % 4 == 0:
            yield from norm_cases(device, size, channels, 32, 64, f32, modulated, added, True)
            yield from norm_cases(device, size, channels, 32, 64, bf16, modulated, added, False)
    for size, channels, beside in ((32, 128, 128), (16, 256, 128), (8, 256, 256)):
        for batch in (16, 64):
            yield from joined_cases(device, size, channels, beside, 32, batch, bf16, True)


def selected_cases(device):
    """About 20 that stand for the others; on a CPU as many, of sizes that it does in a moment."""
    f32, bf16, gpu = torch.float32, torch.bfloat16, device.type == "cuda"
    large, small, batch, wide = (8192, 128, 64, 1) if gpu else (16, 4, 2, 16)
    event = (3, 32, 32) if gpu else (3, 8, 8)
    yield next(noise_cases(device, event, large))
    yield from method_cases(device, event, small, bf16, True)
    for dtype in (bf16, f32):
        yield from method_cases(device, event, large, dtype, True)
    for index in SELECTED_NORMS:
        size, channels, modulated, added = NORMS[index]
        dtype = bf16 if gpu else f32  # plain torch rounds each of its steps to bfloat16
        yield from norm_cases(device, size, channels // wide, 32 // wide, batch, dtype, modulated, added, True)
    yield from joined_cases(device, 16, 256 // wide, 128 // wide, 32 // wide, batch, bf16 if gpu else f32, True)


# (height = width, channels, modulated, added): what the published networks spend most of their normalisation on, and
# the extremes.
NORMS = [
    (32, 128, False, True),
    (32, 256, False, True),
    (32, 384, False, False),
    (32, 640, False, False),
    (16, 256, False, True),
    (16, 512, False, False),
    (16, 896, False, False),
    (8, 256, False, True),
    (8, 512, True, False),
    (8, 1024, False, False),
    (4, 256, False, True),
    (64, 128, True, False),
    (64, 256, False, False),
    (64, 384, False, False),
]
SELECTED_NORMS = (0, 4, 8, 10)


def _exact(tensor):
    return None if tensor is None else tensor.to(torch.float64)


def _leaf(tensor):
    return None if tensor is None else tensor.detach().requires_grad_()


def _name(dtype):
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _check(ours, exact):
    """Ours against float64: 16-bit results to two units, float32 ones to a relative error that long sums allow."""

    def run():
        values, truths = ours(), exact()
        if isinstance(values, torch.Tensor):
            values, truths = [values], [truths]
        for value, truth in zip(values, truths):
            allowed = _allowed_error(value, truth)
            worst = float(((value.double() - truth).abs() - allowed).max())
            assert worst <= 0, f"off by {worst:.2e} more than allowed"

    return run


def _allowed_error(value, truth):
    unit = torch.finfo(value.dtype).eps
    of_largest = 1e-4 if value.dtype == torch.float32 else unit
    factor = 0.1 if value.numel() > 1 else 10
    return 2 * unit * truth.abs() + of_largest * truth.abs().max() * factor


# ---- the script ------------------------------------------------------------------------------------------------------


def compile_for(case, compiled, replay=None):
    """Have on the disk what the measurement of a case compiles; what is wrong with it is said there."""
    with contextlib.suppress(Exception):
        case.ours()
        if compiled:
            torch._dynamo.reset()
            torch.compile(case.plain, dynamic=False)()


def measure(case, device, bandwidth, facts, compiled=True, replay=None):
    """The row of a case; AssertionError where its check fails.

    compiled: whether the plain formula is timed compiled too; replay: the class that records graphs, `CudaRecording`,
    where all sides are to be recorded.
    """
    case.check()
    sides = {"ours": case.ours, "eager": case.plain}
    if compiled:
        torch._dynamo.reset()
        sides["compiled"] = torch.compile(case.plain, dynamic=False)
    if replay:
        sides = {name: replayed(function, device, replay) for name, function in sides.items()}
    seconds = interleaved(sides, device)
    plain_bytes = case.plain_bytes or counted_bytes(case.plain)
    rate = case.bytes / seconds["ours"]
    extras = {
        "compiled": seconds["compiled"] * 1e6 if compiled else None,
        "ratio_compiled": seconds["compiled"] / seconds["ours"] if compiled else None,
        "bytes": case.bytes,
        "plain_bytes": plain_bytes,
        "transfers_per_element": case.bytes / case.elements / case.element_size,
        "plain_transfers_per_element": plain_bytes / case.elements / case.element_size,
        "gigabytes_per_second": rate / 1e9,
        "share_of_copy": rate / bandwidth if bandwidth else None,
    }
    return Row(
        case.name,
        ours=seconds["ours"] * 1e6,
        published=seconds["eager"] * 1e6,
        ratio=seconds["eager"] / seconds["ours"],
        unit="us",
        counted_ratio=plain_bytes / case.bytes,
        extras=extras,
        **facts,
    )


def fused_megabytes(row):
    """What the fused operation moves."""
    return f"{row['bytes'] / 1e6:.1f}"


def eager_megabytes(row):
    """What the operators of the plain formula move."""
    return f"{row['plain_bytes'] / 1e6:.1f}"


TIMES = [
    Column("operation", "{case}"),
    Column("ours us", "{ours:.1f}"),
    Column("eager us", "{published:.1f}"),
    Column("compiled us", "{compiled:.1f}", needs="compiled"),
    Column("x eager", "{ratio:.2f}"),
    Column("x compiled", "{ratio_compiled:.2f}", needs="ratio_compiled"),
]
RATES = [
    Column("GB/s", "{gigabytes_per_second:.0f}"),
    Column("of a copy", "{share_of_copy:.0%}"),
]
TRAFFIC = [
    Column("fused MB", fused_megabytes),
    Column("eager MB", eager_megabytes),
    Column("fused transfers/element", "{transfers_per_element:.1f}"),
    Column("eager transfers/element", "{plain_transfers_per_element:.1f}"),
]


def main(given=None):
    parser = command_line(__doc__, json=None)
    parser.add_argument("--device", default=str(choose_device("auto")))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--selection", action="store_true", help="about 20 cases that stand for the others")
    parser.add_argument("--replay", action="store_true", help="every side as a recorded graph, without the host's part")
    parser.add_argument("--without-compiled", action="store_true", help="leave out torch.compile: seconds a case")
    text = "begin no case after this long, and say which were left out"
    parser.add_argument("--minutes", type=float, default=float("inf"), help=text)
    arguments = parser.parse_args(given)
    device = torch.device(arguments.device)
    if arguments.replay and device.type != "cuda" and GRAPHS is CudaRecording:
        parser.error(f"--replay needs a CUDA device, the device is {device}; leave it out")
    backend = ops.choose_backend("auto", device)
    facts, cases = describe(device), (selected_cases if arguments.selection else all_cases)(device)
    cases = [case for case in cases if arguments.only in case.name]
    options = {"compiled": not arguments.without_compiled, "replay": GRAPHS if arguments.replay else None}
    wait_for_turn([functools.partial(compile_for, case, **options) for case in cases], device)
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
    copies = f", whose copy moves {bandwidth / 1e9:.0f} GB/s" if bandwidth else ""
    print(f"ours: backend {backend}, on {facts['device']}{copies}", flush=True)
    rows, left_out, start = [], [], time.monotonic()
    for case in cases:
        if time.monotonic() - start > 60 * arguments.minutes:
            left_out.append(case.name)
            continue
        timed = functools.partial(measure, case, device, bandwidth, facts, **options)
        rows.append(row_of(case.name, timed, facts, "the case needs a larger GPU"))
        write_rows(arguments.json, rows)  # after every case, so that a run that is cut off leaves what it has
        print(f"{case.name}: {_said(rows[-1])}", file=sys.stderr, flush=True)
    code = print_rows(rows, [*TIMES, *(RATES if bandwidth else []), *TRAFFIC])
    if left_out:
        print(f"NOT TIMED for want of time: {', '.join(left_out)}")
    return code


def _said(row):
    """What is said of a row as soon as it is there."""
    if row.failed is not None:
        return row.failed
    compiled = row.extras["ratio_compiled"]
    return f"{row.ours:.1f} us, x{row.ratio:.2f} eager{f', x{compiled:.2f} compiled' if compiled else ''}"


if __name__ == "__main__":
    sys.exit(main())

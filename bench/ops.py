"""Every operation against plain torch, eager and compiled, on the same work.

    python -m bench.ops [--json bench/results/ops_h100.jsonl]      a table; on a GPU in under ten minutes
    pytest bench/ops.py --benchmark-only                           the same cases in pytest-benchmark

On a GPU "ours" is the Triton backend, with its rate against the bytes that it must move and the share that this is of a plain copy's rate, measured in
the same run. On a CPU "ours" is the torch backend. The plain formula draws its noise with torch.randn and keeps it, as the published
implementation does. An operation whose check fails prints no speed, and the exit code is 1.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hsivi_fast import ops
from hsivi_fast.ops import library, philox, reference

from .measure import copy_bandwidth, counted_bytes, describe, interleaved, print_rows, write_rows

LAYERS = 10


@dataclass
class Case:
    """One operation at one shape: two functions of nothing that do the same work, the bytes that the fused one moves, and its check."""

    name: str
    ours: Callable
    plain: Callable
    bytes: int
    elements: int
    element_size: int
    check: Callable  # raises AssertionError


def method_cases(device, event, batch, dtype, per_pixel):
    """The affine step, its backward and the two losses."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(*size, generator=generator).to(device)
    size = torch.Size(event).numel()
    x, e, dy = (randn(batch, *event).to(dtype) for _ in range(3))
    a, b, s, weight = randn(LAYERS + 1), randn(LAYERS + 1), randn(LAYERS + 1).abs() + 0.1, randn(LAYERS + 1).abs()
    log_gamma = 0.1 * randn(1, size if per_pixel else 1)
    gamma_view = log_gamma.reshape(1, *(event if per_pixel else [1] * len(event)))
    seeds, k = torch.arange(batch, device=device), torch.arange(batch, device=device) % LAYERS + 1
    noise = ops.draw_noise(seeds, k, event)
    column = lambda table: table[k].reshape(-1, 1, 1, 1)
    backend = ops.choose_backend("auto", device)

    def plain_step():
        z = torch.randn_like(x)
        return column(a) * x + column(b) * e + column(s) * torch.exp(gamma_view) * z

    def plain_backward():
        terms = column(s) * torch.exp(gamma_view) * noise * dy
        return column(b) * dy, terms.sum(0).reshape(1, -1) if per_pixel else terms.sum().reshape(1, 1)

    def plain_denoising():
        residual = e - noise * column(s) * torch.exp(-gamma_view)
        return (column(weight) * residual.square()).flatten(1).sum(1), 2 * column(weight) * residual / batch

    def plain_fisher():
        target = noise * column(s) * torch.exp(-gamma_view)
        g = x - e
        losses = (column(weight) * (2 * g * (target - e) - g.square())).flatten(1).sum(1)
        slope = -2 * column(weight) * g * target / batch
        return (
            losses,
            2 * column(weight) * (target - x) / batch,
            -2 * column(weight) * (target - e) / batch,
            slope.sum(0).reshape(1, -1) if per_pixel else slope.sum().reshape(1, 1),
        )

    tables = (a, b, s, log_gamma, seeds, k)
    calls = {
        "affine_noise_step": (
            lambda: ops.affine_noise_step(x, e, *tables),
            plain_step,
            3,
            lambda: reference.affine_noise_step(
                *map(_exact, (x, e, a, b, s, log_gamma)), None, k, noise=noise.double()
            ),
        ),
        "affine_noise_step backward": (
            lambda: library.affine_noise_step_backward(dy, e, b, s, log_gamma, seeds, k, None, None, backend),
            plain_backward,
            2,
            lambda: reference.affine_noise_step_backward(
                *map(_exact, (dy, e, b, s, log_gamma)), None, k, noise=noise.double()
            ),
        ),
        "denoising_loss_and_grads": (
            lambda: ops.denoising_loss_and_grads(e, weight, s, log_gamma, seeds, k),
            plain_denoising,
            2,
            lambda: reference.denoising_loss_and_grads(
                *map(_exact, (e, weight, s, log_gamma)), None, k, noise=noise.double()
            ),
        ),
        "fisher_loss_and_grads": (
            lambda: ops.fisher_loss_and_grads(x, e, weight, s, log_gamma, seeds, k),
            plain_fisher,
            4,
            lambda: reference.fisher_loss_and_grads(
                *map(_exact, (x, e, weight, s, log_gamma)), None, k, noise=noise.double()
            ),
        ),
    }
    shape = f"{'x'.join(map(str, (batch, *event)))} {_name(dtype)}{' per pixel' if per_pixel else ''}"
    for name, (ours, plain, passes, exact) in calls.items():
        yield Case(
            f"{name} {shape}",
            ours,
            plain,
            passes * x.numel() * x.element_size(),
            x.numel(),
            x.element_size(),
            _check(ours, exact),
        )


def norm_cases(device, size, channels, groups, batch, dtype, modulated, added, channels_last):
    """Group normalisation with SiLU and what is fused with it, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (randn(batch, channels, size, size).to(memory_format=layout) for _ in range(2))
    weight, bias = 1 + 0.5 * randn(channels), randn(channels)
    scale, shift = randn(batch, 2 * channels).chunk(2, dim=1) if modulated else (None, None)
    add = randn(batch, channels) if added else None

    def forward(x, weight, bias, scale, shift, add):
        h = x if add is None else x + add[:, :, None, None]
        h = F.group_norm(h, groups, weight, bias, 1e-5)
        return F.silu(h if scale is None else h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    inputs = (x, weight, bias, scale, shift, add)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    wanted = [t for t in leaves if t is not None]
    ours = lambda: ops.group_norm_silu(x, groups, weight, bias, 1e-5, True, scale, shift, add)
    plain = lambda: forward(*inputs)
    exact = lambda: forward(*map(_exact, inputs))
    name = f"{'x'.join(map(str, (batch, channels, size, size)))} {_name(dtype)} {'channels_last' if channels_last else 'row-major'}{' modulated' * modulated}{' added' * added}"
    moved = x.numel() * x.element_size()
    yield Case(f"group_norm_silu {name}", ours, plain, 2 * moved, x.numel(), x.element_size(), _check(ours, exact))

    def both(function):
        def run():
            y = function(*leaves)
            return torch.autograd.grad(y, wanted, dy)

        return run

    def exact_grads():
        doubles = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
        return torch.autograd.grad(forward(*doubles), [t for t in doubles if t is not None], dy.double())

    ours = both(
        lambda x, weight, bias, scale, shift, add: ops.group_norm_silu(
            x, groups, weight, bias, 1e-5, True, scale, shift, add
        )
    )
    yield Case(
        f"group_norm_silu forward+backward {name}",
        ours,
        both(forward),
        5 * moved,
        x.numel(),
        x.element_size(),
        _check(ours, exact_grads),
    )


def noise_cases(device, event, batch):
    """Noise by address against torch.randn."""
    seeds, k = torch.arange(batch, device=device), torch.arange(batch, device=device) % LAYERS + 1
    shape = (batch, *event)
    elements = torch.Size(shape).numel()
    ours = lambda: ops.draw_noise(seeds, k, event)
    check = _check(ours, lambda: philox.normal(seeds, k, event).double())
    yield Case(
        f"draw_noise {'x'.join(map(str, shape))}",
        ours,
        lambda: torch.randn(shape, device=device),
        4 * elements,
        elements,
        4,
        check,
    )
    if device.type == "cpu":
        compiled = torch.compile(lambda: philox.normal(seeds, k, event), dynamic=False)
        yield Case(
            f"draw_noise, plain Philox compiled {'x'.join(map(str, shape))}",
            compiled,
            lambda: torch.randn(shape, device=device),
            4 * elements,
            elements,
            4,
            _check(compiled, lambda: philox.normal(seeds, k, event).double()),
        )


def all_cases(device):
    """The real shapes: on a GPU from a small batch to beyond 64 MB, on a CPU a few that it does in a minute."""
    f32, bf16 = torch.float32, torch.bfloat16
    if device.type == "cpu":
        yield from noise_cases(device, (3, 32, 32), 64)
        yield from method_cases(device, (3, 32, 32), 64, f32, True)
        yield from method_cases(device, (1, 8, 8), 160, f32, True)
        yield from norm_cases(device, 32, 128, 32, 4, f32, False, True, False)
        yield from norm_cases(device, 8, 64, 8, 160, f32, False, True, False)
        return
    for batch in (128, 8192):
        yield from noise_cases(device, (3, 32, 32), batch)
    for event, batches in (((3, 32, 32), (16, 128, 8192, 16384)), ((3, 64, 64), (16, 128, 4096))):
        for batch in batches:
            for dtype in (f32, bf16):
                yield from method_cases(device, event, batch, dtype, True)
        yield from method_cases(device, event, batches[-1], f32, False)
        yield from method_cases(device, event, batches[-1], bf16, False)
    for index, (size, channels, modulated, added) in enumerate(NORMS):
        for batch in (16, 64):
            yield from norm_cases(device, size, channels, 32, batch, bf16, modulated, added, True)
        if index % 4 == 0:
            yield from norm_cases(device, size, channels, 32, 64, f32, modulated, added, True)
            yield from norm_cases(device, size, channels, 32, 64, bf16, modulated, added, False)


# (height = width, channels, modulated, added): what the published networks spend most of their normalisation on, and the extremes.
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


def _exact(tensor):
    return None if tensor is None else tensor.to(torch.float64)


def _name(dtype):
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _check(ours, exact):
    """Ours against float64: 16-bit results to two units, float32 ones to a relative error that long sums allow."""

    def run():
        values, truths = ours(), exact()
        for value, truth in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (values, truths))):
            unit = torch.finfo(value.dtype).eps
            allowed = 2 * unit * truth.abs() + (1e-4 if value.dtype == torch.float32 else unit) * truth.abs().max() * (
                0.1 if value.numel() > 1 else 10
            )
            worst = float(((value.double() - truth).abs() - allowed).max())
            assert worst <= 0, f"off by {worst:.2e} more than allowed"

    return run


# ---- the script -------------------------------------------------------------------------------------------------------


def measure(case, device, bandwidth, facts):
    """The row of a case, or a row that says how its check failed."""
    try:
        case.check()
    except AssertionError as error:
        return {"case": case.name, "failed": str(error), **facts}
    torch._dynamo.reset()
    compiled = torch.compile(case.plain, dynamic=False)
    seconds = interleaved({"ours": case.ours, "eager": case.plain, "compiled": compiled}, device)
    plain_bytes = counted_bytes(case.plain)
    rate = case.bytes / seconds["ours"]
    return {
        "case": case.name,
        "ours": seconds["ours"] * 1e6,
        "published": seconds["eager"] * 1e6,
        "compiled": seconds["compiled"] * 1e6,
        "unit": "us",
        "ratio": seconds["eager"] / seconds["ours"],
        "ratio_compiled": seconds["compiled"] / seconds["ours"],
        "counted_ratio": plain_bytes / case.bytes,
        "bytes": case.bytes,
        "plain_bytes": plain_bytes,
        "transfers_per_element": case.bytes / case.elements / case.element_size,
        "plain_transfers_per_element": plain_bytes / case.elements / case.element_size,
        "gigabytes_per_second": rate / 1e9,
        "share_of_copy": rate / bandwidth if bandwidth else None,
        **facts,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no case after this long, and say which were left out"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    backend = ops.choose_backend("auto", device)
    facts = describe(device)
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
    print(
        f"ours: backend {backend}, on {facts['device']}"
        + (f", whose copy moves {bandwidth / 1e9:.0f} GB/s" if bandwidth else ""),
        flush=True,
    )
    rows, left_out, start = [], [], time.monotonic()
    for case in all_cases(device):
        if arguments.only not in case.name:
            continue
        if time.monotonic() - start > 60 * arguments.minutes:
            left_out.append(case.name)
            continue
        row = measure(case, device, bandwidth, facts)
        rows.append(row)
        if arguments.json:
            write_rows(arguments.json, rows)  # after every case, so that a run that is cut off leaves what it has
        said = (
            row["failed"]
            if "failed" in row
            else f"{row['ours']:.1f} us, x{row['ratio']:.2f} eager, x{row['ratio_compiled']:.2f} compiled"
        )
        print(f"{case.name}: {said}", file=sys.stderr, flush=True)
    columns = {
        "operation": lambda r: r["case"],
        "ours us": lambda r: f"{r['ours']:.1f}",
        "eager us": lambda r: f"{r['published']:.1f}",
        "compiled us": lambda r: f"{r['compiled']:.1f}",
        "x eager": lambda r: f"{r['ratio']:.2f}",
        "x compiled": lambda r: f"{r['ratio_compiled']:.2f}",
    }
    if bandwidth:
        columns |= {
            "GB/s": lambda r: f"{r['gigabytes_per_second']:.0f}",
            "of a copy": lambda r: f"{r['share_of_copy']:.0%}",
        }
    columns |= {
        "fused MB": lambda r: f"{r['bytes'] / 1e6:.1f}",
        "eager MB": lambda r: f"{r['plain_bytes'] / 1e6:.1f}",
        "fused transfers/element": lambda r: f"{r['transfers_per_element']:.1f}",
        "eager transfers/element": lambda r: f"{r['plain_transfers_per_element']:.1f}",
    }
    code = print_rows(rows, columns)
    if left_out:
        print(f"NOT TIMED for want of time: {', '.join(left_out)}")
    return code


# ---- pytest-benchmark -------------------------------------------------------------------------------------------------

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("side", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("index", range(6))
def test_operation(benchmark, index, side):
    """The first six cases of the device: the draw, the step, its backward and the losses."""
    case = next(case for number, case in enumerate(all_cases(_DEVICE)) if number == index)
    case.check()
    function = {"ours": case.ours, "eager": case.plain, "compiled": torch.compile(case.plain, dynamic=False)}[side]
    wait = torch.cuda.synchronize if _DEVICE.type == "cuda" else lambda: None
    benchmark.group = case.name
    function()

    def run():
        function()
        wait()

    benchmark(run)


if __name__ == "__main__":
    sys.exit(main())

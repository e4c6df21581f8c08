"""The benchmark of operations compares what does the same work, and times nothing that is wrong."""

import dataclasses

import pytest
import torch
from bench_cases import committed
from devices import KERNEL_DEVICE

from bench import ops as bench_ops
from bench.measure import counted_bytes
from hsivi_fast import ops


@pytest.mark.parametrize("backend, device", [("torch", "cpu"), ("triton", KERNEL_DEVICE)])
@pytest.mark.parametrize("per_pixel", [True, False])
def test_plain_formulas_give_the_operations_results(backend, device, per_pixel, monkeypatch):
    """What the checks and the timings compare, up to rounding."""
    monkeypatch.setenv(ops.VARIABLE, backend)
    device = torch.device(device)
    methods = []
    for layout in (torch.contiguous_format, torch.channels_last):
        methods += bench_ops.method_cases(device, (2, 4, 4), 3, torch.float32, per_pixel, layout)
    for case in methods:
        case.check()
        if not case.name.startswith("affine_noise_step 3x"):  # that one draws torch.randn in the plain formula
            torch.testing.assert_close(case.ours(), case.plain(), rtol=1e-4, atol=1e-4)
    norms = [
        *bench_ops.norm_cases(device, 4, 8, 2, 3, torch.float32, True, False, True),
        *bench_ops.norm_cases(device, 4, 8, 2, 3, torch.float32, False, True, True),
        *bench_ops.joined_cases(device, 4, 5, 7, 2, 3, torch.float32, True),
    ]
    if not per_pixel:
        for case in norms:
            case.check()
            torch.testing.assert_close(case.ours(), case.plain(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recorded", [False, True])
def test_the_optimizer_steps_do_the_same(recorded, monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, "triton")
    case = bench_ops.step_case(torch.device(KERNEL_DEVICE), "small", [(3, 5), (70,)], recorded)
    case.check()
    for _ in range(2):  # as one is timed, again and again
        torch.testing.assert_close(case.ours(), case.plain(), rtol=1e-5, atol=1e-5)
    assert (case.bytes, case.plain_bytes) == (12 * 85 * 4, (20 if recorded else 15) * 85 * 4)


def test_an_operation_whose_check_fails_is_not_timed():
    case = next(bench_ops.method_cases(torch.device("cpu"), (2, 4, 4), 3, torch.float32, True))
    wrong = case.ours
    bad = dataclasses.replace(case, check=bench_ops._check(lambda: wrong() + 1e-2, lambda: wrong().double()))
    with pytest.raises(AssertionError, match="off by"):
        bench_ops.measure(bad, torch.device("cpu"), None, {})


def test_the_selection_has_all_kinds_and_is_short():
    names = [case.name for case in bench_ops.selected_cases(torch.device("cpu"))]
    kinds = ["draw_noise", "affine_noise_step", "denoising", "fisher", "joined_group_norm_silu"]
    kinds += ["group_norm_silu forward+backward", "joined_group_norm_silu forward+backward"]
    assert len(names) == len(set(names)) == 23 and all(sum(kind in name for name in names) for kind in kinds)


def test_the_cases_and_the_traffic_are_those_of_the_committed_rows():
    rows = committed("ops_cpu")
    found = list(bench_ops.all_cases(torch.device("cpu")))
    assert [case.name for case in found] == [row["case"] for row in rows]
    for case, row in zip(found, rows):
        assert case.bytes == row["bytes"] and counted_bytes(case.plain) == row["plain_bytes"]

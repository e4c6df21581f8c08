"""The benchmarks count and check what they say; and the README shows the committed figures."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import KERNEL_DEVICE

from bench import measure, ops as bench_ops, sampling, train_step
from bench.published import cycle_work
from hsivi_fast import ops

ROOT = Path(__file__).resolve().parent.parent


def test_counted_bytes():
    x = torch.zeros(10, 100)
    assert measure.counted_bytes(lambda: x + x) == 3 * 4000
    assert measure.counted_bytes(lambda: x.reshape(100, 10).transpose(0, 1)[3:]) == 0
    assert measure.counted_bytes(lambda: x.sum(1)) == 4000 + 40


def test_sides_are_timed_in_turn_and_each_goes_first():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    medians = measure.interleaved(sides, torch.device("cpu"), rounds=3)
    assert medians.keys() == sides.keys() and "".join(calls[9:]) == "bcacababc"


@pytest.mark.parametrize("backend, device", [("torch", "cpu"), ("triton", KERNEL_DEVICE)])
@pytest.mark.parametrize("per_pixel", [True, False])
def test_both_sides_do_the_same_work(backend, device, per_pixel, monkeypatch):
    """What the checks and the timings compare: the plain formulas give the operations' results, up to rounding."""
    monkeypatch.setenv(ops.VARIABLE, backend)
    for case in bench_ops.method_cases(torch.device(device), (2, 4, 4), 3, torch.float32, per_pixel):
        case.check()
        if not case.name.startswith("affine_noise_step 3x"):  # that one draws torch.randn in the plain formula
            torch.testing.assert_close(case.ours(), case.plain(), rtol=1e-4, atol=1e-4)
    for modulated, added in ((True, False), (False, True)):
        for case in bench_ops.norm_cases(torch.device(device), 4, 8, 2, 3, torch.float32, modulated, added, True):
            case.check()
            torch.testing.assert_close(case.ours(), case.plain(), rtol=1e-4, atol=1e-4)


def test_an_operation_whose_check_fails_is_not_timed():
    case = next(bench_ops.method_cases(torch.device("cpu"), (2, 4, 4), 3, torch.float32, True))
    wrong = case.ours
    bad = dataclasses.replace(case, check=bench_ops._check(lambda: wrong() + 1e-2, lambda: wrong().double()))
    row = bench_ops.measure(bad, torch.device("cpu"), None, {})
    assert "off by" in row["failed"] and "ours" not in row


TINY = dict(family="ddpm", image_channels=3, image_size=8, channels=8, multipliers=[1, 2], res_blocks=1, attention=[False, True], norm_groups=4)


@pytest.mark.parametrize("case", train_step.CASES)
def test_a_training_cycle_is_checked_counted_and_timed(case, monkeypatch):
    """Work by hand, K = 3 and 4 score-network updates a cycle: ours rolls ceil(16 / (3 redraw)) trajectories through 3 layers, then 4 x 3 and 7 forwards."""
    row = train_step.measure(case, TINY, batch=4, nfe=3, f_updates=4, rounds=2, facts={})
    redraw = 4 if "redraw4" in case else 1
    trajectories = -(-16 // (3 * redraw))
    ours = 3 * trajectories / 4 + 4 * 3 + 7
    assert row["counted_ratio"] == pytest.approx(cycle_work(3, 4, 4) / ours, rel=0.02)
    assert row["ratio"] == pytest.approx(row["published"] / row["ours"]) and row["ours_quartiles"][0] <= row["ours_quartiles"][1] and row["unit"] == "s a cycle"
    assert row["parts"].keys() == {"published student", "published score_net", "ours rollout", "ours student", "ours score_net"}
    monkeypatch.setitem(train_step.EQUAL, "bf16" if "bf16" in case else "fp32", -1.0)
    failed = train_step.measure(case, TINY, batch=4, nfe=3, f_updates=4, rounds=2, facts={})
    assert "losses differ" in failed["failed"] and "ratio" not in failed


@pytest.mark.parametrize("case", sampling.CASES)
def test_sampling_is_checked_counted_and_timed(case, monkeypatch):
    row = sampling.measure(case, TINY, images=16, nfe=3, rounds=2, facts={})
    assert row["counted_ratio"] == pytest.approx(1, abs=1e-9) and row["ratio"] == pytest.approx(row["published"] / row["ours"])
    assert row["difference"] < (1e-5 if case == "sampling_fp32" else 0.1)
    monkeypatch.setitem(sampling.EQUAL, "bf16" if "bf16" in case else "fp32", -1.0)
    assert "images differ" in sampling.measure(case, TINY, images=16, nfe=3, rounds=2, facts={})["failed"]


def test_the_readme_shows_the_committed_figures():
    table = (ROOT / "bench" / "results" / "aot.md").read_text()
    assert table in (ROOT / "README.md").read_text()
    rows = [json.loads(line) for line in (ROOT / "bench" / "results" / "aot.jsonl").read_text().splitlines()]
    assert {row["sm"] for row in rows} == {80, 90, 100} and all(row["stack"] == 0 and row["local"] == 0 and row["problems"] == [] for row in rows)
    assert {row["dtype"] for row in rows} == {"fp32", "bf16", "fp16"}

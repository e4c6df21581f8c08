"""The benchmarks count and check what they say; and the README shows the committed figures."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import KERNEL_DEVICE

from bench import ablation, fid, measure, quality, report, sampling, train_step
from bench import ops as bench_ops
from bench.published import cycle_work
from hsivi_fast import ops
from hsivi_fast.training import telemetry

ROOT = Path(__file__).resolve().parent.parent.parent


def test_counted_bytes():
    x = torch.zeros(10, 100)
    assert measure.counted_bytes(lambda: x + x) == 3 * 4000
    assert measure.counted_bytes(lambda: x.reshape(100, 10).transpose(0, 1)[3:]) == 0
    assert measure.counted_bytes(lambda: x.sum(1)) == 4000 + 40


def test_calls_and_memory_are_counted():
    network = train_step.small_teacher(TINY, torch.device("cpu"))
    x, t = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    assert (
        measure.counted_calls(lambda: [network(x, t) for _ in range(3)]) == 3
        and measure.counted_calls(lambda: x + x) == 0
    )

    def function():
        first = torch.empty(1_000_000)  # 4 MB, and another 4 beside it, and 2 after them
        second = first + 1
        del first, second
        return torch.empty(500_000)

    assert measure.peak_bytes(function, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_attention_is_counted_whichever_kernel_runs_it():
    q, k, v = (
        torch.randn(2, 1, 16, 8, requires_grad=True) for _ in range(3)
    )  # [B, heads, N, d], contiguous: one kernel; transposed: products
    laid_out = [tensor.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for tensor in (q, k, v)]
    attention = torch.nn.functional.scaled_dot_product_attention
    forward = 2 * 2 * 2 * 16 * 16 * 8
    for tensors in ((q, k, v), laid_out):
        assert measure.counted_flops(lambda: attention(*tensors)) == forward
        assert measure.counted_flops(lambda: torch.autograd.grad(attention(*tensors).sum(), tensors)) >= 3 * forward


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


TINY = {
    "family": "ddpm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 8,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [False, True],
    "norm_groups": 4,
}


EAGER_CASES = [
    name for name, changes in train_step.CASES.items() if not changes.get("compile")
]  # compiled calls have their tests in test_frozen.py


@pytest.mark.parametrize("case", EAGER_CASES)
def test_a_training_cycle_is_checked_counted_and_timed(case, monkeypatch):
    """Work by hand, K = 3 and 4 score-network updates a cycle: ours rolls ceil(16 / (3 redraw)) trajectories through 3 layers, then 4 x 3 and 7 forwards."""
    row = train_step.measure(case, TINY, batch=4, nfe=3, f_updates=4, rounds=2, facts={})
    redraw = 4 if "redraw4" in case else 1
    trajectories = -(-16 // (3 * redraw))
    ours = 3 * trajectories / 4 + 4 * 3 + 7
    assert row["counted_ratio"] == pytest.approx(cycle_work(3, 4, 4) / ours, rel=0.02)
    assert (
        row["ratio"] == pytest.approx(row["published"] / row["ours"])
        and row["ours_quartiles"][0] <= row["ours_quartiles"][1]
        and row["unit"] == "s a cycle"
    )
    assert row["parts"].keys() == {
        "published student",
        "published score_net",
        "ours rollout",
        "ours student",
        "ours score_net",
    }
    monkeypatch.setitem(train_step.EQUAL, "bf16" if "bf16" in case else "fp32", -1.0)
    failed = train_step.measure(case, TINY, batch=4, nfe=3, f_updates=4, rounds=2, facts={})
    assert "losses differ" in failed["failed"] and "ratio" not in failed
    assert row["ours_network_calls"] == 3 + 4 + 3 and row["published_network_calls"] == pytest.approx(
        cycle_work(3, 4, 4) - 4 * 2 - 4
    )
    assert row["ours_peak_bytes"] > 1e5 and row["published_peak_bytes"] > 1e5 and row["joules_per_image"] is None
    assert (
        row["utilisation"] == pytest.approx(row["ours_flops"] / row["ours"] / row["product_flops_per_second"])
        and row["baseline"] == "bench/published.py"
    )


def test_cases_are_those_that_the_device_can_run():
    cpu, cuda = torch.device("cpu"), SimpleNamespace(type="cuda")
    assert train_step.default_cases(
        cpu, full=False
    ) == EAGER_CASES and "train_cycle_bf16_compiled" in train_step.default_cases(cpu, full=True)
    assert train_step.default_cases(cuda, full=False) == list(train_step.CASES) and sampling.default_cases(
        cuda
    ) == list(sampling.CASES)
    assert sampling.default_cases(cpu) == [
        "sampling_fp32",
        "sampling_fp32_channels_last",
        "sampling_bf16_eager",
        "sampling_bf16",
    ]
    assert (
        not {"graphs", "fused kernels"} & ablation.runnable(ablation.TRAINING, cpu).keys()
        and ablation.runnable(ablation.TRAINING, cuda) == ablation.TRAINING
    )


@pytest.mark.parametrize("case", ["sampling_fp32", "sampling_fp32_channels_last", "sampling_bf16_eager"])
def test_sampling_is_checked_counted_and_timed(case, monkeypatch):
    row = sampling.measure(case, TINY, images=16, nfe=3, rounds=2, facts={})
    assert row["counted_ratio"] == pytest.approx(1, abs=1e-9) and row["ratio"] == pytest.approx(
        row["published"] / row["ours"]
    )
    assert row["difference"] < (1e-5 if "fp32" in case else 0.1)
    monkeypatch.setitem(sampling.EQUAL, "bf16" if "bf16" in case else "fp32", -1.0)
    assert "images differ" in sampling.measure(case, TINY, images=16, nfe=3, rounds=2, facts={})["failed"]


def test_every_technique_is_set_against_what_it_is_added_to(monkeypatch):
    for name, techniques in (("TRAINING", ablation.TRAINING), ("SAMPLING", ablation.SAMPLING)):
        assert all(
            against in ("published", *list(techniques)[:index])
            for index, (against, _) in enumerate(techniques.values())
        )
        monkeypatch.setattr(ablation, name, {key: row for key, row in techniques.items() if not row[1].get("compile")})
    rows = ablation.training_rows(TINY, 4, 3, 4, 2, torch.device("cpu"))
    by_name = {row["technique"]: row for row in rows}
    assert {
        "published",
        "two-stage gradient, fresh rollout",
        "pooled",
        "redraw 4",
        "bf16",
        "channels_last",
        "channels_last in bf16",
    } <= by_name.keys()
    assert by_name["redraw 4"]["ratio_against"] == pytest.approx(
        by_name["pooled"]["ours"] / by_name["redraw 4"]["ours"]
    )
    assert (
        by_name["bf16"]["counted_ratio"]
        == by_name["pooled"]["counted_ratio"]
        == pytest.approx(cycle_work(3, 4, 4) / (3 * 6 / 4 + 4 * 3 + 7), rel=0.02)
    )
    assert by_name["two-stage gradient, fresh rollout"]["counted_ratio"] == 1
    rows = ablation.sampling_rows(TINY, 16, 3, 2, torch.device("cpu"))
    assert [row["technique"] for row in rows][:2] == ["published", "eager fp32"] and all(
        row["counted_ratio"] == 1 for row in rows
    )


def test_the_distance_is_checked_and_timed_without_its_features(monkeypatch):
    row = fid.measure("fid_64", images=150, rounds=2, facts={})
    assert row["distance"] == pytest.approx(row["published_distance"], rel=1e-6) and row["distance"] > 1
    assert row["ratio"] == pytest.approx(row["published"] / row["ours"]) and row["feature_seconds"]["ours"] > 0
    monkeypatch.setattr(fid, "EQUAL", -1.0)
    assert "distances differ" in fid.measure("fid_64", images=150, rounds=1, facts={})["failed"]


def test_a_summary_of_seeds_is_paired():
    rows = [
        {
            "study": "ring",
            "variant": variant,
            "seed": seed,
            "metric": "js_divergence",
            "steps": 10,
            "start": 0.2,
            "value": value,
        }
        for variant, values in (("fresh", (0.1, 0.2)), ("pooled", (0.11, 0.24)))
        for seed, value in enumerate(values)
    ]
    fresh, pooled = quality.summary(rows)
    assert fresh["difference"] is None and fresh["value"] == pytest.approx((0.15, 0.05))
    assert pooled["reference"] == "fresh" and pooled["difference"] == pytest.approx((15.0, 5.0))
    assert {(study, variant) for study, variant, _ in quality.all_runs()} >= {
        ("digits", "pooled, bf16"),
        ("swiss_roll", "pooled, redraw 4"),
    }
    assert len(quality.all_runs()) == 3 * 3 * 5 + 4 * 3


def test_energy_is_the_driver_s_counter(monkeypatch):
    counter = iter((5_000_000, 5_000_500, 5_012_345))
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        NVMLError=RuntimeError,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    meter = telemetry.EnergyMeter(torch.device("cuda", 0))
    assert (
        meter.handle == "GPU-abc" and meter.joules() == pytest.approx(0.5) and meter.joules() == pytest.approx(12.345)
    )
    assert telemetry.EnergyMeter(torch.device("cpu")).joules() is None

    def broken():
        raise RuntimeError("no driver")

    fake.nvmlInit = broken
    assert telemetry.EnergyMeter(torch.device("cuda", 0)).joules() is None


def test_without_time_nothing_is_started_and_all_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "bench/all.py", "--minutes", "0", "--outdir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0 and "NOT RUN for want of time: sampling_" in done.stdout and not list(tmp_path.iterdir())
    )


def test_the_readme_has_the_tables_of_the_results():
    readme = (ROOT / "README.md").read_text()
    assert set(report.PLACE.findall(readme)) >= {
        "train_step_cpu",
        "sampling_cpu",
        "fid_cpu",
        "ablation_cpu",
        "quality",
        "start_cpu",
    }
    assert report.filled(readme) == readme


def test_the_committed_figures_reach_what_is_claimed():
    """Measured ratios are facts of one machine and day; what a test can hold is that the files and the words of the README are of one mind, and whose gates held."""
    rows = [
        row
        for name in ("train_step_cpu", "sampling_cpu", "fid_cpu")
        for row in report.read_rows(ROOT / "bench" / "results" / f"{name}.jsonl")
    ]
    assert rows and all(
        "failed" not in row and row["ratio"] == pytest.approx(row["published"] / row["ours"]) for row in rows
    )
    assert {
        "case",
        "ours",
        "published",
        "ratio",
        "unit",
        "counted_ratio",
        "commit",
        "device",
        "versions",
    } <= set.intersection(*(set(row) for row in rows))


def test_the_readme_of_the_kernels_shows_the_committed_figures():
    table = (ROOT / "bench" / "results" / "aot.md").read_text()
    assert table in (ROOT / "kernels" / "README.md").read_text()
    rows = [json.loads(line) for line in (ROOT / "bench" / "results" / "aot.jsonl").read_text().splitlines()]
    assert {row["sm"] for row in rows} == {80, 90, 100} and all(
        row["stack"] == 0 and row["local"] == 0 and row["problems"] == [] for row in rows
    )
    assert {row["dtype"] for row in rows} == {"fp32", "bf16", "fp16"}

"""The benchmark of a training cycle checks, counts and times what it says."""

from types import SimpleNamespace

import pytest
import torch
from bench_cases import TINY, committed, share_of_a_frozen_call

from bench import train_step
from bench.published import cycle_work
from hsivi_fast.build import choose_device
from hsivi_fast.training.telemetry import EnergyMeter

# Compiled calls have their tests in test_execution.py.
EAGER_CASES = train_step.default_cases(torch.device("cpu"), full=False)


def _measured(case):
    return train_step.measure(case, TINY, batch=4, nfe=3, f_learning_times=4, rounds=2, facts={}).record()


@pytest.mark.parametrize("case", EAGER_CASES)
def test_a_training_cycle_is_checked_counted_and_timed(case, monkeypatch):
    """Work by hand, K = 3 and 4 score-network updates a cycle.

    Ours rolls ceil(16 / (3 redraw)) trajectories through 3 layers, then 4 x 3 and 7 forwards. The rollout and 4 of the
    last are frozen calls.
    """
    row = _measured(case)
    redraw = 4 if "redraw4" in case else 1
    trajectories = -(-16 // (3 * redraw))
    ours = (3 * trajectories / 4 + 4) * share_of_a_frozen_call() + 4 * 3 + 3
    assert row["counted_ratio"] == pytest.approx(cycle_work(3, 4, 4) / ours, rel=0.02)
    assert row["ratio"] == pytest.approx(row["published"] / row["ours"]) and row["unit"] == "s a cycle"
    assert row["ours_quartiles"][0] <= row["ours_quartiles"][1]
    parts = {"published student", "published score_net", "ours rollout", "ours student", "ours score_net"}
    assert row["parts"].keys() == parts
    assert row["ours_network_calls"] == 3 + 4 + 3
    assert row["published_network_calls"] == pytest.approx(cycle_work(3, 4, 4) - 4 * 2 - 4)
    assert row["ours_peak_bytes"] > 1e5 and row["published_peak_bytes"] > 1e5
    assert (row["joules_per_image"] is None) == (EnergyMeter(choose_device("auto")).joules() is None)
    rate = row["ours_flops"] / row["ours"]
    assert row["utilisation"] == pytest.approx(rate / row["product_flops_per_second"])
    assert row["baseline"] == "bench/published.py"
    assert row.keys() >= committed("train_step_cpu")[0].keys() and row["share_of_copy"] > 0
    monkeypatch.setitem(train_step.EQUAL, "bf16" if "bf16" in case else "fp32", -1.0)
    failed = _measured(case)
    assert "losses differ" in failed["failed"] and "ratio" not in failed


def test_quartiles_of_one_value_are_that_value():
    assert train_step.lower_quartile([3.0]) == train_step.upper_quartile([3.0]) == 3.0
    assert (train_step.lower_quartile([1, 2, 3]), train_step.upper_quartile([1, 2, 3])) == (1.0, 3.0)


def test_cases_are_those_that_the_device_can_run():
    cpu, cuda = torch.device("cpu"), SimpleNamespace(type="cuda")
    assert EAGER_CASES == [f"train_cycle_{name}" for name in ("fp32", "fp32_redraw4", "bf16", "bf16_redraw4")]
    assert "train_cycle_bf16_compiled" in train_step.default_cases(cpu, full=True)
    assert train_step.default_cases(cuda, full=False) == list(train_step.CASES)

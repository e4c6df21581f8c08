"""Single techniques are timed against what they are added to."""

from types import SimpleNamespace

import pytest
import torch
from bench_cases import TINY, committed, share_of_a_frozen_call

from bench import ablation
from bench.published import cycle_work


def test_techniques_are_those_that_the_device_can_run():
    cpu, cuda = torch.device("cpu"), SimpleNamespace(type="cuda")
    assert not {"graphs", "fused kernels"} & ablation.runnable(ablation.TRAINING, cpu).keys()
    assert ablation.runnable(ablation.TRAINING, cuda) == ablation.TRAINING


def _without_compiling(techniques):
    return {name: technique for name, technique in techniques.items() if not technique[1].get("compile")}


@pytest.mark.parametrize(
    "techniques", [ablation.TRAINING, ablation.SAMPLING, ablation.CALL], ids=["training", "sampling", "call"]
)
def test_every_technique_is_set_against_what_it_is_added_to(techniques):
    names = ["published", *techniques]
    for index, (against, *_) in enumerate(techniques.values()):
        assert against in names[: index + 1]


def test_techniques_of_training_are_timed_and_counted(monkeypatch):
    monkeypatch.setattr(ablation, "TRAINING", _without_compiling(ablation.TRAINING))
    rows = [row.record() for row in ablation.training_rows(TINY, 4, 3, 4, 2, torch.device("cpu"))]
    by_name = {row["technique"]: row for row in rows}
    fresh, pooled, redraw = (by_name[name] for name in ("two-stage gradient, fresh rollout", "pooled", "redraw 4"))
    assert {"published", "bf16", "channels_last", "channels_last in bf16"} <= by_name.keys()
    assert redraw["ratio_against"] == pytest.approx(pooled["ours"] / redraw["ours"])
    assert by_name["bf16"]["counted_ratio"] == pooled["counted_ratio"]
    share = share_of_a_frozen_call()
    for row, rolled in ((pooled, 3 * 6 / 4), (redraw, 3 * 2 / 4)):
        ours = share * rolled + 4 * 3 + 3 + share * 4
        assert row["counted_ratio"] == pytest.approx(cycle_work(3, 4, 4) / ours, rel=0.02)
    assert fresh["counted_ratio"] == 1


def test_techniques_of_sampling_are_timed(monkeypatch):
    monkeypatch.setattr(ablation, "SAMPLING", _without_compiling(ablation.SAMPLING))
    rows = [row.record() for row in ablation.sampling_rows(TINY, 16, 3, 2, torch.device("cpu"))]
    assert [row["technique"] for row in rows][:2] == ["published", "eager fp32"]
    assert all(row["counted_ratio"] == pytest.approx(1 / share_of_a_frozen_call()) for row in rows[1:])
    settings = {"network", "batch", "images", "nfe", "f_learning_times"}  # which the script adds
    assert rows[0].keys() | settings == committed("ablation_cpu")[0].keys()


def test_techniques_of_a_call_are_checked_counted_and_timed():
    rows = {row.extras["technique"]: row for row in ablation.call_rows(TINY, 4, 2, torch.device("cpu"))}
    assert rows.keys() == {"published", *ablation.CALL}
    for name, row in rows.items():
        share = share_of_a_frozen_call() if "folded" in name else 1
        assert row.counted_ratio == pytest.approx(1 / share)

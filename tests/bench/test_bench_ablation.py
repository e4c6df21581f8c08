"""Single techniques are timed against what they are added to."""

from types import SimpleNamespace

import pytest
import torch
from bench_cases import TINY, committed, share_of_a_frozen_call

from bench import ablation, measure
from bench.published import cycle_work


def test_techniques_are_those_that_the_device_can_run():
    cpu, cuda = torch.device("cpu"), SimpleNamespace(type="cuda")
    assert not {"graphs", "fused kernels"} & ablation.runnable(ablation.TRAINING, cpu).keys()
    assert "sums left to the norm" in ablation.CALL.keys() - ablation.runnable(ablation.CALL, cpu).keys()
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


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Of this machine, which a test need not measure."""
    monkeypatch.setattr(measure, "product_rate", lambda device, precision: 1e9)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)


def _rows(study, rounds):
    return list(ablation.rows_of(study, rounds, torch.device("cpu"), {}, "use fewer"))


def test_techniques_of_training_are_timed_and_counted(monkeypatch):
    monkeypatch.setattr(ablation.TrainingStudy, "techniques", _without_compiling(ablation.TRAINING))
    study = ablation.TrainingStudy(TINY, 4, 3, 4, torch.device("cpu"))
    by_name = {row.extras["technique"]: row.record() for row in _rows(study, 2)}
    fresh, pooled, redraw = (by_name[name] for name in ("two-stage gradient, fresh rollout", "pooled", "redraw 4"))
    assert {"published", "bf16", "channels_last", "channels_last in bf16"} <= by_name.keys()
    assert redraw["against"] == "pooled" and redraw["ratio_against"] > 0 and redraw["share_of_copy"] > 0
    # The backward of attention by plain products does not compute the scores again, as that of torch's kernel does.
    assert 1 < by_name["bf16"]["counted_ratio"] / pooled["counted_ratio"] < 1.01
    share = share_of_a_frozen_call()
    for row, rolled in ((pooled, 3 * 6 / 4), (redraw, 3 * 2 / 4)):
        ours = share * rolled + 4 * 3 + 3 + share * 4
        assert row["counted_ratio"] == pytest.approx(cycle_work(3, 4, 4) / ours, rel=0.02)
    assert fresh["counted_ratio"] == 1


def test_techniques_of_sampling_are_timed_and_one_that_fails_ends_no_other(monkeypatch):
    """What would be added to it is set against the published side alone."""
    monkeypatch.setattr(ablation.SamplingStudy, "techniques", _without_compiling(ablation.SAMPLING))
    study = ablation.SamplingStudy(TINY, 16, 3, torch.device("cpu"))
    checked = ablation.OurSampling.check

    def check(ours, images, batch, expected):
        wrong = ours.config.precision == "bf16" and not ours.config.channels_last
        return (0.5, False) if wrong else checked(ours, images, batch, expected)

    monkeypatch.setattr(ablation.OurSampling, "check", check)
    rows = _rows(study, 2)
    good = {row.extras["technique"]: row.record() for row in rows if row.failed is None}
    assert list(good) == ["published", "eager fp32", "channels_last", "channels_last in bf16"]
    assert [row.failed for row in rows if row.failed] == ["images differ by 5.00e-01 of the largest value"]
    share = share_of_a_frozen_call(linear=1 / 16)  # once for 16 images
    ours = [row for name, row in good.items() if name != "published"]
    assert all(row["counted_ratio"] == pytest.approx(1 / share) for row in ours)
    assert good["channels_last"]["against"] == "eager fp32" and good["channels_last in bf16"]["against"] is None
    settings = {"network", "batch", "images", "nfe", "f_learning_times"}  # which the script adds
    assert good["published"].keys() | settings == committed("ablation_cpu")[0].keys()


def test_techniques_of_a_call_are_checked_counted_and_timed():
    rows = {row.extras["technique"]: row for row in _rows(ablation.CallStudy(TINY, 4, torch.device("cpu")), 2)}
    assert rows.keys() == {"published", *ablation.runnable(ablation.CALL, torch.device("cpu"))}
    for name, row in rows.items():
        share = 1
        if any(part in name for part in ("folded", "biases", "table")):
            share = share_of_a_frozen_call(linear=0.0 if "table" in name else 1.0)
        assert row.failed is None and row.counted_ratio == pytest.approx(1 / share)

"""The benchmark of sampling checks, counts and times what it says."""

from types import SimpleNamespace

import pytest
import torch
from bench_cases import TINY, committed, share_of_a_frozen_call

from bench import sampling


@pytest.mark.parametrize("case", ["sampling_fp32", "sampling_fp32_channels_last", "sampling_bf16_eager"])
def test_sampling_is_checked_counted_and_timed(case, monkeypatch):
    row = sampling.measure(case, TINY, images=16, nfe=3, rounds=2, facts={}).record()
    assert row["counted_ratio"] == pytest.approx(1 / share_of_a_frozen_call(linear=1 / 16), abs=1e-9)
    assert row["ratio"] == pytest.approx(row["published"] / row["ours"])
    assert row["difference"] < (1e-5 if "fp32" in case else 0.1)
    assert row.keys() >= committed("sampling_cpu")[0].keys() and row["share_of_copy"] > 0
    monkeypatch.setitem(sampling.EQUAL, "bf16" if "bf16" in case else "fp32", -1.0)
    failed = sampling.measure(case, TINY, images=16, nfe=3, rounds=2, facts={}).record()
    assert "images differ" in failed["failed"]


def test_cases_are_those_that_the_device_can_run():
    assert sampling.default_cases(SimpleNamespace(type="cuda")) == list(sampling.CASES)
    assert sampling.default_cases(torch.device("cpu")) == [
        "sampling_fp32",
        "sampling_fp32_channels_last",
        "sampling_bf16_eager",
        "sampling_bf16",
    ]

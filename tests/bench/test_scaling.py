"""What bench/scaling.py counts and makes of it."""

import pytest
import torch
import torch.distributed as dist
from bench_cases import committed
from ranks import run_ranks

from bench import scaling
from hsivi_fast.config import load_config
from hsivi_fast.parallel.world import connect


def collectives_of_known_size():
    """([(bytes, calls) that the recorder has counted of one collective of each kind on 1,000 floats], the sum).

    The last collective is left out.
    """
    recorder, counted = scaling.Recorder(), []
    connect(load_config("smoke", ["device=cpu"]))
    value, whole = torch.ones(1000), torch.empty(2000)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    for collective in (
        lambda: dist.all_reduce(value),
        lambda: gather(whole, value),
        lambda: dist.broadcast(value, src=0),
    ):
        recorder.clear()
        collective()
        counted.append((recorder.sent, len(recorder.calls)))
    recorder.mode = "leave out"
    dist.all_reduce(value)
    return counted, float(value.sum())


def test_bytes_are_counted_for_rings():
    """W = 2: an all-reduce sends the tensor once, a gather half of what comes out, a broadcast half.

    What is left out changes nothing.
    """
    for counted, total in run_ranks(collectives_of_known_size, 2):
        assert counted == [(4000.0, 1), (4000.0, 1), (2000.0, 1)]
        assert total == 2000.0  # summed once


def _result(seconds, computing):
    """What one round gave of a case."""
    return {
        "seconds": [seconds],
        "computing": computing,
        "communicating": [0.5],
        "in_collectives": [0.6],
        "sent": [3e6],
        "parameters": [1000, 1000],
    }


def test_rows_of_measured_cases():
    found = scaling.cases([1, 2], 8, 32, 1)
    times = {
        "plain, batch 8": 1.0,
        "plain, batch 16": 2.0,
        "weak, 2 ranks, ZeRO 1": 1.25,
        "strong, 2 ranks, ZeRO 3": 1.6,
    }
    results = {}
    for name, case in found.items():
        results[name] = [_result(times.get(name, 1.1), [1.0] if case["zero"] < 3 else [])]
    rows = {row.case: row.record() for row in scaling.rows_of(found, results)}
    assert set(rows) == {
        "plain, batch 8",
        "plain, batch 16",
        "deepspeed, batch 8",
        *(f"{kind}, 2 ranks, ZeRO {zero}" for kind in ("weak", "strong") for zero in range(4)),
    }
    assert list(rows) == [row["case"] for row in committed("scaling_cpu")]
    weak, strong = rows["weak, 2 ranks, ZeRO 1"], rows["strong, 2 ranks, ZeRO 3"]
    assert weak.keys() == committed("scaling_cpu")[0].keys()
    # 16 samples in 1.25 s against 8 in 1 s.
    assert weak["batch"] == 16
    assert "1 thread" in weak["device"] and weak["threads"] == 1 and weak["counted_ratio"] is None
    assert (weak["ratio"], weak["efficiency"]) == (pytest.approx(1.6), pytest.approx(0.8))
    assert weak["overlapped"] == pytest.approx(0.5)  # 0.25 s more than computing, of 0.5 s of collectives
    assert strong["batch"] == 16 and strong["overlapped"] is None
    assert (strong["ratio"], strong["efficiency"]) == (pytest.approx(1.25), pytest.approx(0.625))
    # All-reduce of whole buckets, 2 (W-1)/W of 4 bytes, and a gather of parameters, for 5 updates; the pool of
    # ceil(4 16 / 5) trajectories of 6 states.
    assert weak["modelled_bytes"] == 5 * (4000 + 2000) + 6 * 13 * 3072 * 4 / 2

"""What bench/scaling.py counts and makes of it."""

import pytest
from ranks import run_ranks

from bench import scaling


def collectives_of_known_size():
    """[bytes that the recorder has counted, calls, the sum] of one collective of each kind on 1,000 floats; the last is left out."""
    import torch
    import torch.distributed as dist

    from hsivi_fast.config import load_config
    from hsivi_fast.parallel.world import connect

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
    """W = 2: an all-reduce sends the tensor once, a gather half of what comes out, a broadcast half; what is left out changes nothing."""
    for counted, total in run_ranks(collectives_of_known_size, 2):
        assert counted == [(4000.0, 1), (4000.0, 1), (2000.0, 1)]
        assert total == 2000.0  # summed once


def test_rows_of_measured_cases():
    found = scaling.cases([1, 2], 8, 32, 1)
    result = lambda seconds, computing: [
        {
            "seconds": [seconds],
            "computing": computing,
            "communicating": [0.5],
            "in_collectives": [0.6],
            "sent": [3e6],
            "parameters": [1000, 1000],
        }
    ]
    times = {
        "plain, batch 8": 1.0,
        "plain, batch 16": 2.0,
        "weak, 2 ranks, ZeRO 1": 1.25,
        "strong, 2 ranks, ZeRO 3": 1.6,
    }
    rows = {
        row["case"]: row
        for row in scaling.rows_of(
            found,
            {name: result(times.get(name, 1.1), [1.0] if case["zero"] < 3 else []) for name, case in found.items()},
        )
    }
    assert set(rows) == {
        "plain, batch 8",
        "plain, batch 16",
        "deepspeed, batch 8",
        *(f"{kind}, 2 ranks, ZeRO {zero}" for kind in ("weak", "strong") for zero in range(4)),
    }
    weak, strong = rows["weak, 2 ranks, ZeRO 1"], rows["strong, 2 ranks, ZeRO 3"]
    assert (weak["batch"], weak["ratio"], weak["efficiency"]) == (
        16,
        pytest.approx(1.6),
        pytest.approx(0.8),
    )  # 16 samples in 1.25 s against 8 in 1 s
    assert weak["overlapped"] == pytest.approx(0.5)  # 0.25 s more than computing, of 0.5 s of collectives
    assert (strong["batch"], strong["ratio"], strong["efficiency"], strong["overlapped"]) == (
        16,
        pytest.approx(1.25),
        pytest.approx(0.625),
        None,
    )
    # All-reduce of whole buckets, 2 (W-1)/W of 4 bytes, and a gather of parameters, for 5 updates; the pool of ceil(4 16 / 5) trajectories of 6 states.
    assert weak["modelled_bytes"] == 5 * (4000 + 2000) + 6 * 13 * 3072 * 4 / 2

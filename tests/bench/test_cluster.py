"""The model of many GPUs: its formulas at numbers that can be worked out by hand, what it counts, and the committed report."""

from dataclasses import replace

import pytest
import torch

from bench import cluster
from bench.cluster import Case, Cluster, Network, advice, collectives, cycle, memory, needed_samples, sent_per_cycle
from hsivi_fast.build import build_layers
from hsivi_fast.config import load_config
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.nets import build_unet
from hsivi_fast.training.rollout import build_rollout

# Round numbers: 1e12 operations a second, 1000 bytes a second through a NIC, 10,000 within a node of 2; a latency of 1 s, and steps that cost nothing.
ROUND = Cluster(
    node=2,
    bf16=2e12,
    utilisation=0.5,
    memory=1e9,
    memory_bandwidth=1e4,
    nvlink=1e4,
    nic=1e3,
    start=1.0,
    ring_step_nvlink=0.0,
    tree_step_nvlink=0.0,
    step_network=0.0,
)
SMALL = Network(
    "small", forward_flops=10**10, parameters=90, event=10, with_backward=3.0, with_input_backward=2.0
)  # the student has 100 parameters


@pytest.fixture(scope="module")
def networks():
    return [cluster.counted(name) for name in cluster.PUBLISHED]


@pytest.mark.parametrize(
    "zero, accumulation, reduction, gradients, parameters",
    [
        (
            0,
            1,
            "reduce_scatter",
            2 * 3 * 1100,
            0,
        ),  # 3 = 4 bytes (W - 1) / W; 1100 = 100 + 20 x 50 parameters of a cycle's 21 updates; an all-reduce is twice that
        (0, 2, "reduce_scatter", 2 * 3 * 1100, 0),
        (1, 2, "reduce_scatter", 3 * 1100, 3 * 1100),
        (1, 2, "reduces", 3 * 1100, 3 * 1100),
        (1, 2, "all_reduce", 2 * 3 * 1100, 3 * 1100),
        (2, 2, "reduce_scatter", 2 * 3 * 1100, 3 * 1100),  # each of the 2 micro-batches
        (2, 2, "all_reduce", 2 * 2 * 3 * 1100, 3 * 1100),
        # Each update's forward and backward, the score network's in the student's update, the rollout's 10 calls.
        (3, 1, "reduce_scatter", 3 * 1100, 3 * (2 * 1100 + 2 * 50 + 10 * 100)),
        (3, 2, "reduce_scatter", 2 * 3 * 1100, 3 * (2 * 2 * 1100 + 2 * 2 * 50 + 10 * 100)),
    ],
)
def test_bytes_that_a_rank_sends(zero, accumulation, reduction, gradients, parameters):
    sent = sent_per_cycle(
        100,
        50,
        30,
        world_size=4,
        zero=zero,
        f_learning_times=20,
        accumulation=accumulation,
        rollout_calls=10,
        reduction=reduction,
    )
    assert sent == {"gradients": gradients, "parameters": parameters, "pool": 3 * 30}


def test_one_rank_sends_nothing():
    for zero in range(4):
        assert set(sent_per_cycle(100, 50, 30, world_size=1, zero=zero, f_learning_times=20).values()) == {0}
    alone = cycle(Case(SMALL, 1, 4), 0, cluster=ROUND)
    assert alone["no_overlap"] == alone["full_overlap"] == alone["compute"] + alone["update"] and alone["share"] == 0


def test_calls_of_a_collective():
    large = {
        "parameters_student": 120_000_000,
        "parameters_score_net": 1_200_000_000,
        "pool_floats": 1,
        "world_size": 8,
        "f_learning_times": 20,
    }
    calls = lambda **how: {(each.kind, each.behind): each.calls for each in collectives(**large, **how)}
    assert calls(zero=0) == {
        ("gradients", "student backward"): 1,
        ("gradients", "score_net backward"): 3,
        ("pool", None): 1,
    }
    assert calls(zero=1, reduction="reduces")["gradients", "score_net backward"] == 8 * 3
    assert calls(zero=3)["parameters", "rollout"] == 3 and calls(zero=3)["parameters", "frozen forward"] == 24


def test_links_and_latencies():
    h100 = cluster.H100
    assert [h100.bandwidth(gpus) for gpus in (1, 8, 9, 512)] == [450e9, 450e9, 50e9, 50e9]
    assert replace(h100, rails=8).bandwidth(512) == 400e9
    assert h100.latency("all_gather", 8) == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    assert h100.latency("all_reduce", 8) == pytest.approx(
        8.4e-6 + 14 * 3.4e-6
    )  # a ring; a tree has 2 x 7 steps of 4 us
    assert h100.latency("all_gather", 64) == pytest.approx(8.4e-6 + 56 * 3.4e-6 + 7 * 14e-6)
    assert h100.latency("all_reduce", 64) == pytest.approx(8.4e-6 + 2 * (7 * 4e-6 + 3 * 14e-6))  # a tree
    assert h100.rate() == pytest.approx(296.7e12) and replace(h100, precision="tf32").rate() == pytest.approx(148.5e12)


def test_a_cycle_by_hand():
    case = Case(SMALL, 4, 5)
    assert (case.batch, case.trajectories, case.pool_floats) == (20, 10, 11 * 40 * 10)
    assert case.passes() == {
        "rollout": 100,
        "student forward": 5,
        "frozen forward": 10,
        "frozen backward": 10,
        "student backward": 10,
        "score_net forward": 100,
        "score_net backward": 200,
    }
    times = cycle(case, 0, cluster=ROUND)
    assert times["compute"] == pytest.approx(435 * 0.01)
    assert times["update"] == pytest.approx(4 * 15 * (100 + 20 * 90) / 1e4)
    assert times["gradients"] == pytest.approx(21 * 1.0 + 6 * (100 + 20 * 90) / 1e3)
    assert times["parameters"] == 0 and times["pool"] == pytest.approx(1.0 + 3 * 4400 / 1e3)
    assert times["no_overlap"] == pytest.approx(4.35 + 11.4 + 32.4 + 14.2) and times["share"] == pytest.approx(
        46.6 / 62.35
    )
    assert times["full_overlap"] == pytest.approx(
        times["no_overlap"] - 2.0 - 0.1
    )  # all of both backwards, which are shorter than what they hide
    spread = cycle(case, 0, cluster=ROUND, spread=True)
    assert (
        spread["pool"] == pytest.approx(1.0 + 3 * 21 * 5 * 10 / 1e3)
        and cluster.all_to_all(case, ROUND)["sent"] == 3 * 1050
    )
    # Each stage's parameters and Adam: 12 of 15 floats are shared by the 4 ranks, in ZeRO 3 all.
    assert cycle(case, 1, cluster=ROUND)["update"] == pytest.approx(11.4 * (12 / 4 + 3) / 15)
    assert cycle(case, 3, cluster=ROUND)["update"] == pytest.approx(11.4 / 4)


def test_memory_by_hand():
    case, small = Case(SMALL, 4, 5), replace(ROUND, bucket=1000)
    states = [memory(case, zero, small)["states"] - 4 * 90 for zero in range(4)]  # without the teacher
    assert states == [190 * 24, 190 * (12 + 16 / 4), 190 * (8 + 20 / 4), 190 * 28 / 4]
    assert [memory(case, zero, small)["buckets"] for zero in range(4)] == [0, 4000, 4000, 8000]
    assert memory(case, 0, small)["pool"] == 4 * (4400 + 1100)


def test_the_pool_is_the_one_of_a_rollout():
    config = load_config("toy2d", ["nfe=10", "train.batch_size=16", "train.f_learning_times=20"])
    layer = build_layers(config, "cpu")
    student = attach_log_gamma(build_unet("toy2d"), layer)
    case = Case(replace(SMALL, event=2), 1, 16)
    rollout = build_rollout(config, layer, student)
    assert rollout.states.numel() == case.pool_floats and rollout.trajectories == case.trajectories


def test_where_communication_is_a_given_share():
    for gpus in cluster.GPUS:
        for share in (0.2, 0.5):
            samples = needed_samples(replace(SMALL, forward_flops=10**13, parameters=10**7), gpus, share, cluster.H100)
            shares = [
                cycle(Case(replace(SMALL, forward_flops=10**13, parameters=10**7), gpus, each), 0)["share"]
                for each in (samples - 1, samples)
                if each
            ]
            assert shares[-1] <= share and (samples == 1 or shares[0] > share)
    assert (
        needed_samples(replace(SMALL, event=10**9), 512, 0.5) is None
    )  # the pool takes longer than the work, at any batch


def test_limits_of_the_pool(networks):
    for network in networks:
        batch, gpus = cluster.pool_limit_batch(network), cluster.pool_limit_gpus(network)
        bytes_of = lambda batch: 4 * 11 * (20 * batch // 10) * network.event
        assert bytes_of(batch) <= 10e9 < bytes_of(batch + 1)
        seconds = lambda gpus: 4 * Case(network, gpus, 1).pool_floats * (gpus - 1) / gpus / 50e9
        assert seconds(gpus - 1) < 87 * network.forward_flops / 296.7e12 <= seconds(gpus)


def test_advice_takes_the_smallest_stage_that_fits_and_is_fast():
    network = replace(SMALL, forward_flops=10**10, parameters=10**8)
    far, node = Case(network, 64, 16), Case(network, 8, 16)
    assert (
        advice(far)["way"] == (0, "all_reduce") and advice(node)["way"][0] == 1
    )  # Adam's work is shared, and costs more than the gathering within a node
    tight = replace(cluster.H100, bucket=10**7)
    assert [advice(far, replace(tight, memory=limit))["way"][0] for limit in (10e9, 4e9, 2.2e9, 1.1e9)] == [0, 1, 2, 3]
    assert advice(far, replace(tight, memory=1e6)) is None
    chosen = advice(far)
    assert chosen["others"][chosen["way"]] == 0 and chosen["seconds"] == cycle(far, 0)["no_overlap"]


def test_counted_networks(networks):
    assert [network.parameters for network in networks] == [35_746_307, 78_700_803, 121_063_942]
    assert [network.event for network in networks] == [3072, 12288, 12288]
    assert networks[0].forward_flops == 12_443_713_536
    for network in networks:  # the units in which a cycle is counted
        assert network.with_backward == pytest.approx(3, rel=0.01) and network.with_input_backward == pytest.approx(
            2, rel=0.02
        )


def test_the_report_is_what_the_script_makes(networks):
    assert cluster.REPORT.read_text() == cluster.report(networks), "run python -m bench.cluster"


def test_operations_without_memory_are_those_of_real_tensors():
    network = build_unet("digits")
    x, t = torch.zeros(1, *network.event_shape), torch.zeros(1, dtype=torch.int64)
    assert cluster.counted("digits").forward_flops == cluster.counted_flops(lambda: network(x, t))

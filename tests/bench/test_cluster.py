"""The model of many GPUs: its formulas at numbers worked out by hand, what it counts, and the committed report."""

from dataclasses import replace

import pytest
import torch
from contexts import context_of

from bench import cluster
from bench.cluster import (
    Case,
    Cluster,
    Network,
    Study,
    advice,
    collectives,
    cycle,
    memory,
    needed_samples,
    sent_per_cycle,
)
from bench.tables import table_names
from hsivi_fast.config import load_config
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.nets import build_unet
from hsivi_fast.training.rollout import build_rollout

# Round numbers: 1e12 operations a second, 1000 bytes a second through a NIC, 10,000 within a node of 2; a latency of
# 1 s, and steps that cost nothing.
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
# The student has 100 parameters.
SMALL = Network("small", forward_flops=10**10, parameters=90, event=10, with_backward=3.0, with_input_backward=2.0)


@pytest.fixture(scope="module")
def networks():
    return [cluster.counted(name) for name in cluster.PUBLISHED]


# 3 = 4 bytes (W - 1) / W; 1100 = 100 + 20 x 50 parameters of a cycle's 21 updates; an all-reduce is twice that.
@pytest.mark.parametrize(
    "zero, accumulation, reduction, gradients, parameters",
    [
        (0, 1, "reduce_scatter", 2 * 3 * 1100, 0),
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

    def calls(**how):
        return {(each.kind, each.behind): each.calls for each in collectives(**large, **how)}

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
    # A ring; a tree has 2 x 7 steps of 4 us.
    assert h100.latency("all_reduce", 8) == pytest.approx(8.4e-6 + 14 * 3.4e-6)
    assert h100.latency("all_gather", 64) == pytest.approx(8.4e-6 + 56 * 3.4e-6 + 7 * 14e-6)
    assert h100.latency("all_reduce", 64) == pytest.approx(8.4e-6 + 2 * (7 * 4e-6 + 3 * 14e-6))  # a tree
    assert h100.rate() == pytest.approx(296.7e12)
    assert replace(h100, precision="tf32").rate() == pytest.approx(148.5e12)


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
    assert times["no_overlap"] == pytest.approx(4.35 + 11.4 + 32.4 + 14.2)
    assert times["share"] == pytest.approx(46.6 / 62.35)
    # All of both backwards, which are shorter than what they hide.
    assert times["full_overlap"] == pytest.approx(times["no_overlap"] - 2.0 - 0.1)
    spread = cycle(case, 0, cluster=ROUND, spread=True)
    assert spread["pool"] == pytest.approx(1.0 + 3 * 21 * 5 * 10 / 1e3)
    assert cluster.all_to_all(case, ROUND)["sent"] == 3 * 1050
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
    config = load_config(
        "toy2d", ["objective.match=knots", "nfe=10", "train.batch_size=16", "train.f_learning_times=20"]
    )
    context = context_of(config)
    student = attach_log_gamma(build_unet("toy2d"), context.layers)
    case = Case(replace(SMALL, event=2), 1, 16)
    rollout = build_rollout(context, student)
    assert rollout.states.numel() == case.pool_floats and rollout.trajectories == case.trajectories


def test_where_communication_is_a_given_share():
    network = replace(SMALL, forward_flops=10**13, parameters=10**7)
    for gpus in cluster.GPUS:
        for share in (0.2, 0.5):
            samples = needed_samples(network, gpus, share, cluster.H100)
            around = (samples - 1, samples) if samples > 1 else (samples,)
            shares = [cycle(Case(network, gpus, each), 0)["share"] for each in around]
            assert shares[-1] <= share and (samples == 1 or shares[0] > share)
    # The pool takes longer than the work, at any batch.
    assert needed_samples(replace(SMALL, event=10**9), 512, 0.5) is None


def test_limits_of_the_pool(networks):
    for network in networks:
        batch, gpus = cluster.pool_limit_batch(network), cluster.pool_limit_gpus(network)
        assert _pool_bytes(network, batch) <= 10e9 < _pool_bytes(network, batch + 1)
        work = 87 * network.forward_flops / 296.7e12
        assert _pool_seconds(network, gpus - 1) < work <= _pool_seconds(network, gpus)


def _pool_bytes(network, batch):
    return 4 * 11 * (20 * batch // 10) * network.event


def _pool_seconds(network, gpus):
    return 4 * Case(network, gpus, 1).pool_floats * (gpus - 1) / gpus / 50e9


def test_advice_takes_the_smallest_stage_that_fits_and_is_fast():
    network = replace(SMALL, forward_flops=10**10, parameters=10**8)
    far, node = Case(network, 64, 16), Case(network, 8, 16)
    assert advice(far)["way"] == (0, "all_reduce")
    assert advice(node)["way"][0] == 1  # Adam's work is shared, and costs more than the gathering within a node
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
        assert network.with_backward == pytest.approx(3, rel=0.01)
        assert network.with_input_backward == pytest.approx(2, rel=0.02)


def test_the_report_has_all_tables_as_the_script_makes_them(networks):
    document = cluster.REPORT.read_text()
    assert sorted(table_names(document)) == sorted(cluster.TABLES)
    assert cluster.with_tables(document, Study(tuple(networks))) == document, "run python -m bench.cluster"


def test_figures_in_the_report_s_text_are_those_of_the_model(networks):
    """The text around the tables is written by hand; what it says in numbers is computed here."""
    study, text = Study(tuple(networks)), " ".join(cluster.REPORT.read_text().split())
    largest = max(network.parameters for network in networks)
    assert f"500 million numbers. The largest network here has {largest / 1e6:.0f} million" in text
    assert cluster.H100.bucket == 500_000_000

    case = next(case for case in study.cases if case.gpus == 64)
    updates = [case.sent(zero, "all_reduce") for zero in (0, 1)]
    plain, default = (sent["gradients"] + sent["parameters"] for sent in updates)
    assert f"{default / plain:.1f} times what ZeRO 0 sends for an update" in text

    kept = [[memory(case, zero) for zero in range(4)] for case in study.cases]
    assert max(sum(each.values()) for stages in kept for each in stages) <= 80e9
    assert "Everything fits into 80 GB in every stage" in text
    saved = max(stages[0]["states"] - stages[3]["states"] for stages in kept)
    assert f"Sharding saves at most {saved / 1e9:.2f} GB" in text
    buckets = [memory(study.cases[0], zero)["buckets"] / 1e9 for zero in range(4)]
    taken = f"take {buckets[1]:.2f} GB of that back in ZeRO 1 and 2, and {buckets[3]:.2f} GB in ZeRO 3"
    assert buckets[1] == buckets[2] and taken in text

    slower = [advice(case)["others"][1, "reduces"] + 1 for case in study.far_cases]
    assert f"its reduces make a cycle {min(slower):.1f} to {max(slower):.0f} times as long" in text


def test_the_advice_in_the_report_s_text_is_the_model_s(networks):
    text = " ".join(cluster.REPORT.read_text().split())
    assert "**ZeRO 0** over several nodes, and for imagenet64 within one." in text
    assert "**ZeRO 1** for cifar10 and celeba64 within a node." in text
    study = Study(tuple(networks))
    assert {advice(case)["way"][0] for case in study.far_cases} == {0}
    within = {case.network.name: advice(case)["way"][0] for case in study.cases if case.gpus == 8}
    assert within == {"cifar10": 1, "celeba64": 1, "imagenet64": 0}


def test_operations_without_memory_are_those_of_real_tensors():
    network = build_unet("digits")
    x, t = torch.zeros(1, *network.event_shape), torch.zeros(1, dtype=torch.int64)
    assert cluster.counted("digits").forward_flops == cluster.counted_flops(lambda: network(x, t))

"""What a run needs is counted before it starts: parameters, evaluations, operations, memory."""

import subprocess
import sys

import pytest
import torch

from hsivi_fast.config import load_config
from hsivi_fast.nets import build_unet
from hsivi_fast.training.estimate import _forward_of_one, estimate_run, evaluations_until


def test_the_estimate_counts_what_the_design_counts():
    """A pooled cycle of 20 updates is 87 forward calls with the batch at any K, and 72 with redraw 4 at K = 10."""

    def calls_per_cycle(*overrides):
        return estimate_run(load_config("cifar10", overrides))["evaluations_per_update"] * 20

    assert calls_per_cycle() == 87
    assert calls_per_cycle("rollout.redraw=4") == pytest.approx(72, abs=0.1)
    assert calls_per_cycle("rollout.mode=fresh") == 60 + 7 + 21 * 9 + 20
    cifar = estimate_run(load_config("cifar10"), 8)
    assert cifar["parameters"] == 35_746_307 and cifar["samples_per_rank"] == 16
    # Ho et al.'s network takes 6.2 G multiplications and as many additions.
    assert cifar["forward_flops"] == pytest.approx(12.4e9, rel=0.01)
    assert cifar["weights_bytes"] == 3 * 4 * cifar["parameters"]
    assert cifar["optimizer_bytes"] == round(2 * 4 * 4 * cifar["parameters"] / 8)
    # Each of its three upsampling convolutions has a 4x4 weight besides, and each of its 22 blocks a bias of 128 or 256
    # numbers: 5 and 17 of them. 3 and 10 have another, with that of their skip connection. In bfloat16 all but some
    # 50,000 numbers are.
    folded = 3 * 16 * 256**2
    own = 4 * (folded + 8 * 128 + 27 * 256)
    assert cifar["prepared_bytes"] == 3 * own
    low = estimate_run(load_config("cifar10", ["precision=bf16"]), 8)
    assert low["prepared_bytes"] == pytest.approx(3 * 2 * (cifar["parameters"] + folded * 7 / 16), rel=0.002)
    assert estimate_run(load_config("cifar10", ["distributed.zero=3"]), 8)["prepared_bytes"] == own
    assert cifar["training_flops"] == pytest.approx(87 * 128 * 10000 * cifar["forward_flops"])


def test_the_work_so_far_grows_to_that_of_the_whole_run():
    """Paths before the first update, three calls an update of the start, and cycles after the head start."""
    start = ["start.kind=trajectory", "start.updates=6", "start.trajectories=24", "start.substeps=2", "nfe=3"]
    rest = ["start.score_net_updates=2", "train.steps=8", "train.f_learning_times=2", "train.batch_size=4"]
    config = load_config("smoke", [*start, *rest])
    so_far = [evaluations_until(config, step) for step in range(17)]
    assert so_far[:3] == [0, 24 * 3 * 2 + 12, 24 * 3 * 2 + 24]
    estimate = estimate_run(config)
    assert so_far[16] == estimate["training_flops"] // estimate["forward_flops"]
    assert so_far[6] < so_far[7] and so_far[16] - so_far[8] == pytest.approx(2 * (so_far[12] - so_far[8]), abs=1)


def test_estimated_activations_are_what_a_forward_call_keeps():
    network, kept = build_unet("digits"), {}
    weights = {parameter.data_ptr() for parameter in network.parameters()}

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(16, 1, 8, 8, requires_grad=True), torch.arange(16))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 16
    with torch.device("meta"):
        meta = build_unet("digits")
    assert _forward_of_one(meta)[1] == pytest.approx(real, rel=0.1)


def _hsivi(*arguments):
    return subprocess.run([sys.executable, "-m", "hsivi_fast.cli", *arguments], capture_output=True, text=True)


def test_a_dry_run_prints_config_and_estimate_and_writes_nothing(tmp_path):
    done = _hsivi("train", "cifar10", "--dry-run", "--processes", "8", "--outdir", str(tmp_path / "run"))
    assert done.returncode == 0 and not (tmp_path / "run").exists()
    assert "student_lr: 1.6e-05" in done.stdout and "35.7 M parameters" in done.stdout and "in all" in done.stdout
    wrong = _hsivi("train", "cifar10", "--dry-run", "--processes", "7")
    assert wrong.returncode == 2 and "train.batch_size: 128" in wrong.stderr and len(wrong.stderr.splitlines()) == 1

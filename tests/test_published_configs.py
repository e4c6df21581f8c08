"""The four published data sets: every setting as the published scripts give it, and what a run of them needs, counted."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hsivi_fast.config import load_config
from hsivi_fast.training.estimate import estimate_run
from hsivi_fast.training.trainer import train

SHARED = {"steps": 200000, "f_learning_times": 20, "warmup": 2500, "clip": 1.0, "ema": 0.999}
# batch, betas, spacing, rule, rates of student and score network at 10 and 15 layers, and at 5
PUBLISHED = {
    "cifar10": (128, "linear", "quad", "decay", (1.6e-5, 8e-5), (1.6e-6, 8e-7)),
    "celeba64": (128, "linear", "quad", "cosine", (1e-5, 5e-5), (1e-6, 5e-6)),
    "imagenet64": (2048, "cosine", "uniform", "cosine", (1e-5, 5e-5), (1e-6, 5e-6)),
}


@pytest.mark.parametrize("nfe", [5, 10, 15])
@pytest.mark.parametrize("data", PUBLISHED)
def test_a_config_has_the_published_settings(data, nfe):
    batch, betas, spacing, rule, rates, rates_of_5 = PUBLISHED[data]
    config = load_config(data if nfe == 10 else f"{data}_nfe{nfe}")
    assert (
        config.nfe,
        config.network.name,
        config.eta,
        config.spacing,
        config.teacher.betas,
        config.teacher.steps,
    ) == (nfe, data, 0.2, spacing, betas, 1000)
    assert (config.gamma.per_step, config.gamma.per_pixel) == (False, True)
    assert {key: getattr(config.train, key) for key in SHARED} == SHARED
    assert (config.train.batch_size, config.train.lr_rule) == (batch, rule)
    assert (config.train.student_lr, config.train.score_net_lr) == (rates_of_5 if nfe == 5 else rates)
    assert config.init == (f"runs/{data}" if nfe == 5 else None)
    assert config.network.norm_eps == (None if data == "imagenet64" else 1e-6)


def test_mnist_is_there_at_5_10_and_15():
    assert [load_config(name).nfe for name in ("mnist_nfe5", "mnist", "mnist_nfe15")] == [5, 10, 15]


def test_a_base_is_found_beside_the_file_and_among_the_names(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: cifar10\nnfe: 7\ntrain: {steps: 3}\n")
    (tmp_path / "yours.yaml").write_text("base: mine\neta: 0.5\nnetwork: digits\n")
    mine, yours = load_config(tmp_path / "mine.yaml"), load_config(tmp_path / "yours.yaml", ["nfe=8"])
    assert (mine.nfe, mine.train.steps, mine.train.batch_size, mine.name) == (7, 3, 128, "mine")
    assert (yours.nfe, yours.eta, yours.train.steps, yours.network.name) == (8, 0.5, 3, "digits")
    (tmp_path / "cifar10.yaml").write_text("base: cifar10\nnfe: 3\n")  # its own name: the shipped one is meant
    assert (load_config(tmp_path / "cifar10.yaml").nfe, load_config(tmp_path / "cifar10.yaml").train.batch_size) == (
        3,
        128,
    )
    (tmp_path / "one.yaml").write_text("base: two\n")
    (tmp_path / "two.yaml").write_text("base: one\n")
    with pytest.raises(ValueError, match="base leads back"):
        load_config(tmp_path / "one.yaml")


def test_a_path_in_a_base_is_looked_for_beside_the_base(tmp_path, monkeypatch):
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "t.safetensors").touch()
    (tmp_path / "teachers" / "network.yaml").write_text("network: digits\nteacher: {checkpoint: t.safetensors}\n")
    (tmp_path / "run.yaml").write_text("base: teachers/network\nnfe: 5\n")
    assert load_config(tmp_path / "run.yaml").teacher.checkpoint == str(tmp_path / "teachers" / "t.safetensors")
    (tmp_path / "cifar10").mkdir()  # a folder of that name does not hide the published teacher
    monkeypatch.chdir(tmp_path)
    assert load_config("cifar10").teacher.checkpoint == "cifar10"


def test_the_estimate_counts_what_the_design_counts():
    """Section "Training" of the method: a pooled cycle of 20 is 87 forward calls with the batch at any K (72 with redraw 4 at K = 10)."""
    assert estimate_run(load_config("cifar10"))["evaluations_per_update"] * 20 == 87
    assert estimate_run(load_config("cifar10", ["rollout.redraw=4"]))["evaluations_per_update"] * 20 == pytest.approx(
        72, abs=0.1
    )
    assert (
        estimate_run(load_config("cifar10", ["rollout.mode=fresh"]))["evaluations_per_update"] * 20
        == 60 + 7 + 21 * 9 + 20
    )
    cifar = estimate_run(load_config("cifar10"), 8)
    assert cifar["parameters"] == 35_746_307 and cifar["samples_per_rank"] == 16
    assert cifar["forward_flops"] == pytest.approx(
        12.4e9, rel=0.01
    )  # Ho et al.'s network: 6.2 G multiplications and additions
    assert cifar["weights_bytes"] == 3 * 4 * cifar["parameters"] and cifar["optimizer_bytes"] == round(
        2 * 4 * 4 * cifar["parameters"] / 8
    )
    assert cifar["training_flops"] == pytest.approx(87 * 128 * 10000 * cifar["forward_flops"])


def test_estimated_activations_are_what_a_forward_call_keeps():
    from hsivi_fast.nets import build_unet
    from hsivi_fast.training.estimate import _forward_of_one

    network, kept = build_unet("digits"), {}
    own = {parameter.data_ptr() for parameter in network.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
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


def test_a_run_starts_from_a_trained_one(tmp_path):
    first = train(load_config("smoke", ["train.steps=2"]), tmp_path / "first")
    weights = {stem: load_file(first.checkpoint_path(2) / f"{stem}.safetensors") for stem in ("student", "score_net")}
    # So small a rate that two updates leave the weights where they started.
    tiny = [
        "train.steps=2",
        "train.student_lr=1e-30",
        "train.score_net_lr=1e-30",
        f"init={tmp_path / 'first'}",
        "nfe=2",
    ]
    second = train(load_config("smoke", tiny), tmp_path / "second")
    for stem, expected in weights.items():
        for name, value in load_file(second.checkpoint_path(2) / f"{stem}.safetensors").items():
            assert torch.equal(value, expected[name]), name
    assert weights["student"]["log_scaled_gamma"].abs().max() > 0
    train(load_config("smoke", [*tiny[:3], f"init={first.checkpoint_path(2)}"]), tmp_path / "from_folder")
    with pytest.raises(ValueError, match="init: .*is neither a trained run nor a folder with"):
        train(load_config("smoke", ["init=runs/nowhere"]), tmp_path / "third")
    with pytest.raises(ValueError, match="log_scaled_gamma"):
        train(load_config("smoke", [*tiny, "gamma.per_step=true"]), tmp_path / "fourth")

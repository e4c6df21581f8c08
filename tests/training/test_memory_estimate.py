"""What a run needs is compared with the machine before anything is allocated, quickly, and never too strictly."""

import time

import pytest
import torch

from hsivi_fast.config import CONFIGS, load_config
from hsivi_fast.parallel import machine
from hsivi_fast.training import estimate
from hsivi_fast.training.estimate import check_disk, check_memory, check_teacher_memory, estimate_run
from hsivi_fast.training.trainer import train

CPU, GIB = torch.device("cpu"), 2**30


@pytest.fixture
def memory(monkeypatch):
    """A machine with as much memory as the test says."""

    def has(size):
        for module in (machine, estimate):
            monkeypatch.setattr(module, "memory_of", lambda device: size)

    has(24 * GIB)
    return has


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        (
            "smoke",
            ["train.batch_size=100000", "train.f_learning_times=1000000"],
            "train.f_learning_times: 1000000 with",
        ),
        ("smoke", ["network.channels=65536"], "network: 227635822593 parameters needs about"),
        ("smoke", ["network.image_size=4096", "train.batch_size=64"], "train.batch_size: 64 needs about"),
        (
            "digits",
            ["nfe=10", "spacing=quad", "network.image_size=4096", "train.batch_size=1", "train.f_learning_times=1"],
            "needs about",
        ),
        ("celeba64", [], "train.batch_size: 128 needs about"),
        ("imagenet64", [], "train.batch_size: 2048 needs about"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_estimate_and_what_to_lower(memory, tmp_path, name, overrides, message):
    config = load_config(name, overrides)
    with pytest.raises(ValueError) as caught:
        check_memory(config, 1, CPU)
    said = str(caught.value)
    assert message in said and "this machine's memory has 24.0 GiB; " in said and "\n" not in said
    with pytest.raises(ValueError, match="needs about"):
        train(config, tmp_path / "missing" / "run")
    assert not (tmp_path / "missing").exists()


def test_what_runs_is_not_refused(memory):
    for name in ("smoke", "digits", "digits_long", "mnist", "toy2d", "cifar10", "cifar10_nfe5"):
        check_memory(load_config(name), 1, CPU)
    check_memory(load_config("celeba64"), 8, CPU)
    check_memory(load_config("celeba64", ["distributed.accumulation=8"]), 1, CPU)
    check_memory(load_config("celeba64", ["precision=bf16", "compile=true"]), 1, CPU)
    memory(80 * GIB)
    check_memory(load_config("imagenet64"), 64, CPU)
    check_memory(load_config("celeba64"), 1, CPU)


def test_a_teacher_s_training_is_estimated_too(memory):
    check_teacher_memory(load_config("mnist"), CPU)
    with pytest.raises(ValueError, match="teacher_train.batch_size: 100000 needs about"):
        check_teacher_memory(load_config("mnist", ["teacher_train.batch_size=100000"]), CPU)


def test_a_small_run_is_passed_without_a_forward_call(memory, monkeypatch):
    monkeypatch.setattr(estimate, "_forward_of_one", None)
    check_memory(load_config("smoke"), 1, CPU)


def test_the_largest_accepted_configuration_is_estimated_in_seconds():
    """Every size at its bound, in an estimate that ends."""
    levels = "[" + ",".join(["1"] * 9 + ["64"]) + "]"
    sizes = [
        "network.res_blocks=4",
        "network.image_size=4096",
        "network.channels=65536",
        f"network.multipliers={levels}",
    ]
    sizes += ["network.attention=[" + ",".join(["true"] * 10) + "]", "gamma.per_step=true", "nfe=10000"]
    numbers = ["train.batch_size=100000", "train.f_learning_times=1000000", "teacher.steps=1000000"]
    began = time.perf_counter()
    e = estimate_run(load_config("smoke", sizes + numbers))
    assert time.perf_counter() - began < 60 and 2**60 < e["memory_bytes"] < 2**80


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_has_an_estimate_in_every_precision(path):
    for precision in ("fp32", "bf16"):
        e = estimate_run(load_config(path.stem, [f"precision={precision}", "channels_last=true"]))
        assert e["memory_bytes"] == sum(e[key] for key in e if key.endswith("_bytes") and key != "memory_bytes")


def test_a_checkpoint_that_has_no_room_is_told_before_the_start(monkeypatch, tmp_path):
    config = load_config("cifar10")
    usage = type("usage", (), {"free": 10**9})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"outdir '.*run': one checkpoint needs about 1.3 GiB and the disk of '.*' has"
    ):
        check_disk(config, tmp_path / "missing" / "run")
    usage.free = 2 * 10**9
    check_disk(config, tmp_path / "missing" / "run")


def test_an_image_size_that_is_not_the_data_s_is_refused(tmp_path):
    with pytest.raises(ValueError, match="network.image_size: 7 is not that of data=digits.*set network.image_size=8"):
        train(load_config("smoke", ["network.image_size=7"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()

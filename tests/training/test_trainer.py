"""Training: it goes on bit for bit where it stopped, stops on a NaN with the place named, and improves what it should."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from hsivi_fast import load_config, sample, train
from hsivi_fast.training.trainer import FiniteGuard

QUICK = [
    "train.batch_size=8",
    "train.f_learning_times=4",
    "eval.num_samples=0",
    "log_every=3",
    "save_every=1000",
    "train.lr_rule=decay",
    "train.warmup=3",
]


def _weights(folder):
    step = folder.checkpoints()[-1]
    files = sorted(path.name for path in folder.checkpoint_path(step).glob("*.safetensors"))
    assert files == sorted(
        f"{name}{kind}.safetensors" for name in ("student", "score_net") for kind in ("", "_ema", "_optimizer")
    )
    return {
        (file, key): value
        for file in files
        for key, value in folder.load_tensors(step, file.removesuffix(".safetensors")).items()
    }


def _assert_same(first, second):
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, different[:3]


@pytest.mark.parametrize("overrides", [[], ["rollout.redraw=2", "gamma.per_step=true"], ["rollout.mode=fresh"]])
@pytest.mark.parametrize("stop", [5, 8])  # within a cycle, and right after a student update
def test_a_longer_run_goes_on_bit_for_bit(tmp_path, overrides, stop):
    settings = [*QUICK, *overrides]
    straight = train(load_config("digits", [*settings, "train.steps=13"]), tmp_path / "straight")
    train(load_config("digits", [*settings, f"train.steps={stop}"]), tmp_path / "stopped")
    resumed = train(load_config("digits", [*settings, "train.steps=13"]), tmp_path / "stopped")
    assert resumed.checkpoints()[-1] == straight.checkpoints()[-1] == 13
    _assert_same(_weights(straight), _weights(resumed))
    assert [record["step"] for record in resumed.metrics()][-1] == 13


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path):
    runs = [
        _weights(train(load_config("digits", [*QUICK, "train.steps=5", f"seed={seed}"]), tmp_path / name))
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    _assert_same(runs[0], runs[1])
    assert not torch.equal(
        runs[0]["score_net.safetensors", "in_conv.weight"], runs[2]["score_net.safetensors", "in_conv.weight"]
    )


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_ends_bit_identical(tmp_path, number, code):
    settings = [*QUICK, "train.steps=60"]
    command = [
        sys.executable,
        "-m",
        "hsivi_fast.cli",
        "train",
        "digits",
        *settings,
        "--outdir",
        str(tmp_path / "killed"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == code and last.startswith("hsivi: stopped at step ") and "Traceback" not in errors
    stopped = int(last.split()[4])
    assert 0 < stopped < 60 and (tmp_path / "killed" / "checkpoints" / f"step_{stopped}").is_dir()
    for name in ("killed", "straight"):
        done = subprocess.run([*command[:-1], str(tmp_path / name)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    from hsivi_fast.checkpoints.run_folder import RunFolder

    _assert_same(_weights(RunFolder(tmp_path / "killed")), _weights(RunFolder(tmp_path / "straight")))


def test_a_loss_that_is_not_finite_names_step_layer_and_checkpoint(tmp_path):
    settings = [
        "train.batch_size=8",
        "train.f_learning_times=4",
        "eval.num_samples=0",
        "log_every=2",
        "save_every=2",
        "train.warmup=0",
    ]
    healthy = train(load_config("digits", [*settings, "train.steps=4"]), tmp_path / "run")
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is not finite at step \d+, layer [1-5]; the last good checkpoint is .*step_4; try smaller learning rates",
    ):
        train(dataclasses.replace(load_config("digits", [*settings, "train.steps=30"])), _poisoned(healthy))
    assert healthy.checkpoints()[-1] == 4


def _poisoned(folder):
    """Put an infinity into the score network of the newest checkpoint."""
    from safetensors.torch import load_file, save_file

    file = folder.checkpoint_path(folder.checkpoints()[-1]) / "score_net.safetensors"
    weights = load_file(file)
    weights["in_conv.weight"][0] = float("inf")
    save_file(weights, file)
    return folder.path


def test_the_guard_keeps_the_first_bad_step_and_its_highest_layer(tmp_path):
    class Folder:
        def checkpoints(self):
            return []

    guard, k = FiniteGuard("cpu"), torch.tensor([1, 4, 2, 3])
    guard.watch(torch.tensor([1.0, 2.0, 3.0, 4.0]), k, 7)
    guard.check(Folder())
    guard.watch(torch.tensor([1.0, float("inf"), float("nan"), 4.0]), k, 8)
    guard.watch(torch.tensor([float("nan")] * 4), k, 9)
    with pytest.raises(FloatingPointError, match="step 8, layer 4; no checkpoint was saved before"):
        guard.check(Folder())


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    folder = train(load_config("digits", [*QUICK, "train.steps=2"]), tmp_path / "run")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, folder.checkpoint_path(2) / "student.safetensors")
    with pytest.raises(ValueError, match="student is of another network, first at log_scaled_gamma"):
        train(load_config("digits", [*QUICK, "train.steps=3"]), tmp_path / "run")


def test_a_short_run_in_the_plane_improves_on_its_start(tmp_path):
    folder = train(
        load_config(
            "toy2d",
            [
                "train.steps=1500",
                "train.lr_rule=constant",
                "eval.num_samples=5000",
                "eval.every=0",
                "eval.ddim_nfe=[5]",
            ],
        ),
        tmp_path / "run",
    )
    rows = {row["sampler"]: row for row in folder.read_json("results.json")}
    assert set(rows) == {"ddim", "ddim_eta", "hsivi_ema", "hsivi_raw"}
    assert rows["hsivi_ema"]["js_divergence"] < 0.75 * rows["ddim_eta"]["js_divergence"]
    assert rows["hsivi_ema"]["nfe"] == rows["ddim_eta"]["nfe"] == 5
    points = sample(folder, range(10))
    assert points.shape == (10, 2) and torch.allclose(points[3], sample(str(folder.path), [3])[0], atol=1e-5)
    assert (folder.path / "report.html").stat().st_size > 20000 and (folder.path / "samples" / "density.png").is_file()

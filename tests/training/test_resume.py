"""A run goes on bit for bit where it stopped, however it stopped; its seed says all of it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoint_files import rewrite

from hsivi_fast import cli, load_config, train
from hsivi_fast.checkpoints.run_folder import RunFolder

QUICK = [
    "nfe=5",
    "train.batch_size=8",
    "train.f_learning_times=4",
    "log_every=3",
    "save_every=1000",
    "train.lr_rule=decay",
    "train.warmup=3",
]
ROLLOUTS = [[], ["rollout.redraw=2", "gamma.per_step=true"], ["rollout.mode=fresh"]]
LONG = ["train.steps=200", "log_every=1"]  # long enough for a signal to come in its midst


def _train(folder, *overrides):
    return train(load_config("smoke", [*QUICK, *overrides]), folder)


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


@pytest.fixture(scope="module", params=ROLLOUTS, ids=["pooled", "redraw", "fresh"])
def straight(request, no_report, tmp_path_factory):
    """(overrides, the run of 13 steps without a stop)."""
    return request.param, _train(tmp_path_factory.mktemp("straight"), *request.param, "train.steps=13")


@pytest.mark.parametrize("stop", [5, 8])  # within a cycle, and right after a student update
def test_a_longer_run_goes_on_bit_for_bit(tmp_path, straight, stop):
    overrides, undisturbed = straight
    _train(tmp_path, *overrides, f"train.steps={stop}")
    resumed = _train(tmp_path, *overrides, "train.steps=13")
    assert resumed.checkpoints()[-1] == undisturbed.checkpoints()[-1] == 13
    _assert_same(_weights(undisturbed), _weights(resumed))
    assert [record["step"] for record in resumed.metrics()][-1] == 13


def test_the_same_seed_is_the_same_run_and_another_is_not(no_report, tmp_path):
    runs = [
        _weights(_train(tmp_path / name, "train.steps=5", f"seed={seed}"))
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    _assert_same(runs[0], runs[1])
    key = "score_net.safetensors", "in_conv.weight"
    assert not torch.equal(runs[0][key], runs[2][key])


def _command(folder):
    return ["train", "smoke", *QUICK, *LONG, "--outdir", str(folder)]


@pytest.fixture(scope="module")
def long_run(no_report, tmp_path_factory):
    """The weights at the end of the run that is sent no signal."""
    folder = tmp_path_factory.mktemp("long")
    cli.main(_command(folder))
    return _weights(RunFolder(folder))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_run_ends_bit_identical(tmp_path, long_run, number, code):
    process = subprocess.Popen(
        [sys.executable, "-m", "hsivi_fast.cli", *_command(tmp_path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == code and last.startswith("hsivi: stopped at step ") and "Traceback" not in errors
    stopped = int(last.split()[4])
    assert 0 < stopped < 200 and (tmp_path / "checkpoints" / f"step_{stopped}").is_dir()
    cli.main(_command(tmp_path))  # with an error it would exit
    _assert_same(_weights(RunFolder(tmp_path)), long_run)


def test_a_checkpoint_of_another_network_is_named(no_report, tmp_path):
    folder = _train(tmp_path, "train.steps=2")
    rewrite(folder.checkpoint_path(2), "student", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="student is of another network, first at log_scaled_gamma"):
        _train(tmp_path, "train.steps=3")

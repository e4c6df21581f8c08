"""The command line as a user meets it: results and files of every command. test_cli_errors.py has bad input."""

import functools
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import hsivi_here, hsivi_process
from PIL import Image

from hsivi_fast.cli import parse_seeds

QUICK = [
    "start.kind=ddim",
    "start.score_net_updates=0",
    "train.steps=8",
    "train.batch_size=8",
    "train.f_learning_times=4",
    "eval.num_samples=20",
    "eval.seeds=2",
    "eval.every=4",
    "eval.ddim_nfe=[5,10]",
    "log_every=2",
    "save_every=4",
]


@pytest.fixture
def hsivi(capsys):
    return functools.partial(hsivi_here, capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits, through the command."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = hsivi_process("train", "digits", *QUICK, "--outdir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_train_prints_the_table_and_fills_the_folder(run):
    folder, done = run
    rows = json.loads((folder / "results.json").read_text())
    assert [(row["sampler"], row["nfe"]) for row in rows] == [
        ("ddim", 5),
        ("ddim", 10),
        *[(solver, nfe) for solver in ("dpmpp_2m", "unipc_3") for nfe in (5, 10)],
        ("ddim_eta", 5),
        ("hsivi_ema", 5),
        ("hsivi_raw", 5),
    ]
    keys = {"sampler", "nfe", "frechet_distance", "frechet_std", "images_per_second", "num_samples"}
    for row in rows:
        assert set(row) - {"spacing"} == keys
        assert row.get("spacing") == ("run" if row["sampler"] in ("dpmpp_2m", "unipc_3") else None)
    assert rows[0]["num_samples"] == 20
    for line in ("DDIM ", "start (DDIM, run's eta)", "HSIVI (EMA)", "HSIVI (raw)"):
        assert line in done.stdout
    assert "it/s" in done.stderr or "step/s" in done.stderr
    assert f"backend torch, device cpu, run folder {folder}" in done.stderr
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "results.json",
        "metrics.jsonl",
        "samples",
        "checkpoints",
        "tensorboard",
        "report.html",
    }
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert all(
        set(record)
        >= {"step", "loss_student", "loss_score_net", "student_lr", "score_net_lr", "images_per_second", "seconds"}
        for record in records
    )
    assert records[0]["loss_student"] is None and records[1]["loss_student"] is not None and records[1]["metric"] > 0
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["backend"] == "torch" and environment["world_size"] == 1 and environment["samples_per_rank"] == 8
    assert {path.name for path in (folder / "samples").iterdir()} >= {
        "teacher.png",
        "ddim.png",
        "hsivi.png",
        "comparison.png",
        "distance_vs_nfe.png",
        "losses.png",
    }
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "HSIVI (EMA)" in page and 'src="http' not in page


def test_a_finished_run_prints_its_table_again_and_another_eta_is_refused(run, hsivi):
    folder, done = run
    again = hsivi("train", "digits", *QUICK, "--outdir", folder)
    results = [output.partition("took: ")[0] for output in (done.stdout, again.stdout)]  # not the time
    assert again.returncode == 0 and results[0] == results[1] and "next: hsivi sample" in again.stdout
    other = hsivi("train", "digits", *QUICK, "eta=0.9", "--outdir", folder)
    assert other.returncode == 2
    assert other.stderr.strip().splitlines()[-1].startswith("hsivi: outdir") and "eta" in other.stderr


def test_sample_writes_the_same_image_for_a_seed(run, hsivi, tmp_path):
    folder, _ = run
    assert hsivi("sample", folder, "--seeds", "3-9", "--outdir", tmp_path / "a").returncode == 0
    assert hsivi("sample", folder, "--seeds", "5,8", "--batch", 1, "--outdir", tmp_path / "b").returncode == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [*(f"{n:06d}.png" for n in range(3, 10)), "grid.png"]
    for name in ("000005.png", "000008.png"):
        first, second = (_pixels(tmp_path / part / name) for part in "ab")
        assert first.shape == (8, 8) and np.abs(first - second).max() <= 1
    raw = hsivi("sample", folder, "--seeds", "5", "--weights", "raw", "--outdir", tmp_path / "c")
    assert raw.returncode == 0
    assert (_pixels(tmp_path / "c" / "000005.png") != _pixels(tmp_path / "a" / "000005.png")).any()


def _pixels(file):
    return np.array(Image.open(file)).astype(int)


def test_eval_measures_against_the_data_and_against_a_file(run, hsivi, tmp_path):
    folder, _ = run
    first = hsivi("eval", folder, "--num-samples", 50)
    assert first.returncode == 0 and "HSIVI (EMA)" in first.stdout
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=np.eye(64))
    other = hsivi("eval", folder, "--num-samples", 50, "--ref", tmp_path / "ref.npz", "--weights", "raw")
    assert other.returncode == 0 and "HSIVI (raw)" in other.stdout


def test_report_draws_the_page_again(run, hsivi):
    folder, _ = run
    (folder / "report.html").unlink()
    assert hsivi("report", folder).returncode == 0 and (folder / "report.html").is_file()


def test_a_teacher_goes_on_to_the_same_bytes_and_can_be_distilled(hsivi, tmp_path):
    settings = [
        "network.channels=16",
        "teacher_train.steps=12",
        "teacher_train.batch_size=8",
        "save_every=5",
        "log_every=4",
    ]
    assert hsivi("teacher", "digits", *settings, "--outdir", tmp_path / "a").returncode == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_12")
    (tmp_path / "b" / "teacher.safetensors").unlink()
    assert hsivi("teacher", "digits", *settings, "--outdir", tmp_path / "b").returncode == 0
    first, second = (tmp_path / name / "teacher.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    changes = ["network.channels=16", f"teacher.checkpoint={first}", "eval.num_samples=0"]
    done = hsivi("train", "digits", *QUICK, *changes, "--outdir", tmp_path / "c")
    assert done.returncode == 0, done.stderr


def test_a_backend_from_the_environment(run, hsivi, tmp_path, monkeypatch):
    done = hsivi_process("sample", run[0], "--seeds", "0-1", "--outdir", tmp_path / "a", HSIVI_BACKEND="torch")
    assert done.returncode == 0 and (tmp_path / "a" / "000001.png").is_file()
    monkeypatch.setenv("HSIVI_BACKEND", "cuda")
    done = hsivi("sample", run[0], "--seeds", "0-1", "--outdir", tmp_path / "a")
    assert done.returncode == 2 and "HSIVI_BACKEND: 'cuda' is unknown" in done.stderr


def test_help_has_an_example_and_starts_at_once(hsivi):
    start = time.perf_counter()
    assert hsivi_process("--help").returncode == 0
    assert time.perf_counter() - start < 3
    for command in ("train", "sample", "eval", "prepare", "teacher", "convert", "export", "report"):
        done = hsivi(command, "--help")
        assert done.returncode == 0 and f"Example:\n  hsivi {command} " in done.stdout


def test_import_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import hsivi_fast; "
        "print(time.perf_counter() - start, *(name in sys.modules for name in ('torch', 'triton', 'deepspeed')))"
    )
    seconds, *heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert float(seconds) < 3 and heavy == ["False", "False", "False"]


@pytest.mark.parametrize("text, expected", [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5,9-11", [1, 5, 9, 10, 11])])
def test_seeds(text, expected):
    assert parse_seeds(text) == expected

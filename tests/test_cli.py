"""The command line as a user meets it: results and files of every command, and one line with exit code 2 for bad input."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from hsivi_fast.cli import parse_seeds

QUICK = [
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


def hsivi(*arguments, cwd=None, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **variables}
    return subprocess.run(
        [sys.executable, "-m", "hsivi_fast.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits, through the command."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = hsivi("train", "digits", *QUICK, "--outdir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_train_prints_the_table_and_fills_the_folder(run):
    folder, done = run
    rows = json.loads((folder / "results.json").read_text())
    assert [(row["sampler"], row["nfe"]) for row in rows] == [
        ("ddim", 5),
        ("ddim", 10),
        ("ddim_eta", 5),
        ("hsivi_ema", 5),
        ("hsivi_raw", 5),
    ]
    assert all(
        set(row) == {"sampler", "nfe", "frechet_distance", "frechet_std", "images_per_second", "num_samples"}
        for row in rows
    )
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


def test_a_finished_run_prints_its_table_again_and_a_grown_one_measures_again(run, tmp_path):
    folder, done = run
    again = hsivi("train", "digits", *QUICK, "--outdir", folder)
    assert again.returncode == 0 and done.stdout == again.stdout
    other = hsivi("train", "digits", *QUICK, "eta=0.9", "--outdir", folder)
    assert (
        other.returncode == 2
        and other.stderr.strip().splitlines()[-1].startswith("hsivi: outdir")
        and "eta" in other.stderr
    )


def test_what_the_machine_cannot_do_is_one_line(run, tmp_path):
    folder, _ = run
    for done in (
        hsivi("train", "smoke", "cuda_graphs=true", "device=cpu", "--outdir", tmp_path / "a"),
        hsivi("sample", folder, "--seeds", "1", "--cuda-graphs"),
        hsivi("eval", folder, "--num-samples", "20", "--cuda-graphs"),
    ):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert (
            done.stderr.strip().splitlines()[-1]
            == "hsivi: cuda_graphs: true needs a CUDA device, the device is cpu; leave it false"
        )
    done = hsivi("train", "smoke", "compile=true", "--outdir", tmp_path / "a", PATH="/nowhere")
    assert done.returncode == 2 and done.stderr.strip().startswith("hsivi: compile: true needs a C++ compiler on a CPU")
    assert not (tmp_path / "a").exists()


def test_sample_writes_the_same_image_for_a_seed(run, tmp_path):
    folder, _ = run
    assert hsivi("sample", folder, "--seeds", "3-9", "--outdir", tmp_path / "a").returncode == 0
    assert hsivi("sample", folder, "--seeds", "5,8", "--batch", 1, "--outdir", tmp_path / "b").returncode == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        *(f"{n:06d}.png" for n in range(3, 10)),
        "grid.png",
    ]
    for name in ("000005.png", "000008.png"):
        first, second = (np.array(Image.open(tmp_path / part / name)).astype(int) for part in "ab")
        assert first.shape == (8, 8) and np.abs(first - second).max() <= 1
    raw = hsivi("sample", folder, "--seeds", "5", "--weights", "raw", "--outdir", tmp_path / "c")
    assert raw.returncode == 0
    assert (
        np.array(Image.open(tmp_path / "c" / "000005.png")) != np.array(Image.open(tmp_path / "a" / "000005.png"))
    ).any()


def test_eval_and_report(run, tmp_path):
    folder, _ = run
    first = hsivi("eval", folder, "--num-samples", 50)
    assert first.returncode == 0 and "HSIVI (EMA)" in first.stdout
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=np.eye(64))
    other = hsivi("eval", folder, "--num-samples", 50, "--ref", tmp_path / "ref.npz", "--weights", "raw")
    assert other.returncode == 0 and "HSIVI (raw)" in other.stdout
    (folder / "report.html").unlink()
    assert hsivi("report", folder).returncode == 0 and (folder / "report.html").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "digts"], "config 'digts': neither a file nor one of celeba64"),
        (["train", "digits", "train.stepz=3"], "train.stepz: unknown key; did you mean train.steps?"),
        (["train", "digits", "nfe=0"], "nfe: input should be greater than or equal to 1, got 0"),
        (["train", "digits", "nfe=60"], "nfe: 60 layers with quad spacing repeat a timestep"),
        (
            ["train", "digits", "backend=triton", "device=cpu"],
            "backend: 'triton' cannot run, the device is cpu and Triton needs a CUDA device, or TRITON_INTERPRET=1",
        ),
        (["sample", "RUN", "--seeds", "0-3", "--backend", "triton"], "backend: 'triton' cannot run"),
        (["sample", "RUN", "--seeds", "0-3", "--backend", "cuda"], "'cuda' is not one of 'auto', 'torch', 'triton'"),
        (["train", "digits", "device=cuda:7"], "device: 'cuda:7' is not there"),
        (
            ["train", "digits", "teacher.checkpoint=nowhere.safetensors"],
            "checkpoint 'nowhere.safetensors': no such file",
        ),
        (
            ["train", "digits", "network.channels=64"],
            "is of another network, it has another shape for embed.0.weight ([128, 32], expected [256, 64])",
        ),
        (["train", "digits", "data=null"], "data: missing; without reference images"),
        (["train", "digits", "--outdir", "FILE"], "is a file; give a folder"),
        (["train", "digits", "--outdirr", "x"], "No such option"),
        (["train"], "Missing argument 'CONFIG'"),
        (["trian", "digits"], "No such command 'trian'"),
        (["sample", "RUN", "--seeds", "5-2"], "seeds: '5-2' runs backwards; write 2-5"),
        (["sample", "RUN", "--seeds", "a"], "seeds: 'a' is not understood"),
        (["sample", "RUN", "--seeds", "0-3", "--weights", "best"], "weights: 'best' is unknown"),
        (["sample", "RUN", "--seeds", "0-3", "--batch", "0"], "batch: 0 must be at least 1"),
        (["sample", "RUN", "--seeds", "0-3", "--outdir", "FILE"], "is a file; give a folder"),
        (["sample", "nowhere", "--seeds", "0-3"], "run 'nowhere': no config.yaml there"),
        (["eval", "RUN", "--num-samples", "0"], "num-samples: 0 is too few"),
        (
            ["eval", "RUN", "--num-samples", "50", "--ref", "SMALL"],
            "ref: has 32 features, the feature network digits gives 64",
        ),
        (["eval", "RUN", "--num-samples", "50", "--ref", "nowhere.npz"], "reference 'nowhere.npz': no such file"),
        (["report", "nowhere"], "run 'nowhere': no config.yaml there"),
        (["teacher", "toy2d", "--outdir", "NEW"], "data: missing; a teacher needs images"),
        (["teacher", "mnist", "--outdir", "NEW"], "data_path: missing; data=mnist is read from a folder of idx files"),
        (
            ["train", "cifar10_nfe5", "teacher.checkpoint=nowhere.pt", "eval.num_samples=0"],
            "checkpoint 'nowhere.pt': no such file",
        ),
        (["train", "digits", "--processes", "2"], "processes: goes with --dry-run"),
        (["convert", "nowhere.pt", "--to", "NEW"], "'nowhere.pt'"),
        (["export", "nowhere", "--format", "aoti", "--outdir", "NEW"], "run 'nowhere': no config.yaml there"),
        (["export", "RUN", "--format", "onnx", "--outdir", "NEW"], "'onnx' is not one of"),
        (["eval", "RUN", "--num-samples", "50", "--metric", "mnist"], "eval.metric: 'mnist' sees images [1, 32, 32]"),
        (
            ["eval", "RUN", "--num-samples", "50", "--metric", "inception", "--inception", "nowhere.pth"],
            "eval.inception: 'nowhere.pth' is not there",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    np.savez(tmp_path / "small.npz", mu=np.zeros(32), sigma=np.eye(32))
    places = {"RUN": run[0], "FILE": tmp_path / "file", "SMALL": tmp_path / "small.npz", "NEW": tmp_path / "new"}
    done = hsivi(*(places.get(argument, argument) for argument in arguments), cwd=tmp_path)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("hsivi: ") and message in lines[0]


def test_a_teacher_is_trained_stopped_and_continued(tmp_path):
    settings = [
        "network.channels=16",
        "teacher_train.steps=12",
        "teacher_train.batch_size=8",
        "save_every=5",
        "log_every=4",
    ]
    assert hsivi("teacher", "digits", *settings, "--outdir", tmp_path / "a").returncode == 0
    import shutil

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_12")
    (tmp_path / "b" / "teacher.safetensors").unlink()
    assert hsivi("teacher", "digits", *settings, "--outdir", tmp_path / "b").returncode == 0
    assert (tmp_path / "a" / "teacher.safetensors").read_bytes() == (
        tmp_path / "b" / "teacher.safetensors"
    ).read_bytes()
    done = hsivi(
        "train",
        "digits",
        *QUICK,
        "network.channels=16",
        f"teacher.checkpoint={tmp_path / 'a' / 'teacher.safetensors'}",
        "eval.num_samples=0",
        "--outdir",
        tmp_path / "c",
    )
    assert done.returncode == 0, done.stderr


def test_a_backend_from_the_environment_and_from_the_command(run, tmp_path):
    done = hsivi("sample", run[0], "--seeds", "0-1", "--outdir", tmp_path / "a", HSIVI_BACKEND="cuda")
    assert done.returncode == 2 and "HSIVI_BACKEND: 'cuda' is unknown" in done.stderr
    done = hsivi("sample", run[0], "--seeds", "0-1", "--outdir", tmp_path / "a", HSIVI_BACKEND="torch")
    assert done.returncode == 0 and (tmp_path / "a" / "000001.png").is_file()


def test_help_has_an_example_and_starts_at_once():
    start = time.perf_counter()
    assert hsivi("--help").returncode == 0
    assert time.perf_counter() - start < 3
    for command in ("train", "sample", "eval", "teacher", "convert", "export", "report"):
        done = hsivi(command, "--help")
        assert done.returncode == 0 and f"Example:\n  hsivi {command} " in done.stdout


def test_import_is_light():
    code = "import sys, time; s = time.perf_counter(); import hsivi_fast; print(time.perf_counter() - s, 'torch' in sys.modules, 'triton' in sys.modules, 'deepspeed' in sys.modules)"
    seconds, *heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert float(seconds) < 3 and heavy == ["False", "False", "False"]


@pytest.mark.parametrize("text, expected", [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5,9-11", [1, 5, 9, 10, 11])])
def test_seeds(text, expected):
    assert parse_seeds(text) == expected

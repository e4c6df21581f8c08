"""The plan of a GPU, run on a CPU: the same jobs with a tiny network, and graphs that record operators."""

import functools
import importlib
import itertools
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_cases import ROOT
from operator_recording import OperatorRecording

from bench import all as run_all
from bench import measure, ops, train_step
from bench.measure import read_records
from hsivi_fast import build
from hsivi_fast.execution import Execution
from hsivi_fast.training import telemetry

TINY = run_all.Size(
    network=("--network", "smoke", "--width", "8", "--nfe", "2"),
    images=(16, 32),
    batches=(4, 2),
    cycle=("--f-learning-times", "2"),
    measured=("--images", "130", "--case", "fid_64"),
    kernels=("--without-compiled",),
)


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Compiled calls are eager, graphs record operators, TF32 is float32; rates of the machine are not measured."""

    def execution(device, compile=False, cuda_graphs=False):
        return Execution(device, cuda_graphs=cuda_graphs, recording=OperatorRecording)

    monkeypatch.setattr(build, "Execution", execution)
    monkeypatch.setattr(train_step, "Execution", execution)
    monkeypatch.setattr(build, "_set_float32_mode", lambda precision, device: None)
    monkeypatch.setattr(ops, "GRAPHS", OperatorRecording)
    monkeypatch.setattr(measure, "product_rate", lambda device, precision: 1e9)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)


def _in_this_process(job, outdir, seconds):
    """What `run` does of a job, without a process."""
    if job.tests or job.module == "trace":  # it reads what a driver records of a GPU
        return 0
    command, _ = job.command(outdir)
    return importlib.import_module(command[2]).main(command[3:])


def test_the_plan_of_a_gpu_runs(like_a_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "run", _in_this_process)
    # Each kind of technique once: without, and on top of another one.
    ablation = importlib.import_module("bench.ablation")
    in_call = ("bf16 by autocast", "upsampling folded, bf16")
    kinds = {"CallStudy": in_call, "TrainingStudy": ("pooled", "graphs"), "SamplingStudy": ("eager fp32", "graphs")}
    for study, names in kinds.items():
        techniques = getattr(ablation, study).techniques
        monkeypatch.setattr(getattr(ablation, study), "techniques", {name: techniques[name] for name in names})
    monkeypatch.setattr(ablation, "runnable", lambda techniques, device: techniques)
    plan = run_all.gpu_jobs("gpu", TINY)
    assert run_all.run_all(plan, tmp_path, 600) == 0, capsys.readouterr()
    cases = {file.stem: [row["case"] for row in read_records(file)] for file in tmp_path.iterdir()}
    assert cases.keys() == {job.name for job in plan} - {"gpu_tests_gpu", "trace_gpu"}
    assert cases["sampling_gpu_16"] == cases["sampling_gpu_32"] == ["sampling_bf16_graphs"]
    assert cases["sampling_gpu_16_tf32"] == ["sampling_tf32"]
    assert cases["train_step_gpu_4"] == cases["train_step_gpu_2"] == ["train_cycle_bf16_graphs"]
    assert cases["train_step_gpu_4_tf32"] == cases["train_step_gpu_2_tf32"] == ["train_cycle_tf32"]
    assert len(cases["ops_gpu"]) == 23 and cases["fid_gpu"] == ["fid_64"]
    assert cases["ablation_gpu"] == [
        *(f"call: {name}" for name in ("published", *in_call)),
        *(f"sampling: {name}" for name in ("published", "eager fp32", "graphs")),
        *(f"training: {name}" for name in ("published", "pooled", "graphs")),
    ]
    for file in tmp_path.iterdir():
        for row in read_records(file):
            assert "failed" not in row and row["ours"] > 0 and row["device"] and row["versions"]["torch"]
            if file.stem.startswith(("sampling", "train_step")):
                assert row["utilisation"] > 0 and row["share_of_copy"] > 0 and "clocks" in row
    assert "NOT RUN" not in capsys.readouterr().out


def test_the_plan_is_in_order_and_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(run_all, "find_spec", lambda package: None if package == "torch_fidelity" else package)
    monkeypatch.setattr(run_all, "jobs", lambda device: run_all.gpu_jobs("h100"))
    assert run_all.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [
        *("gpu_tests_h100", "sampling_h100_128", "train_step_h100_128", "train_step_h100_16", "sampling_h100_512"),
        *("trace_h100", "ops_h100", "sampling_h100_128_tf32", "train_step_h100_128_tf32", "train_step_h100_16_tf32"),
        *("fid_h100", "ablation_h100"),
    ]
    assert "torch_fidelity (missing), scipy, PIL" in lines[10] and lines[10].split()[1] == "1"
    assert [job.name for job in run_all.gpu_jobs("h100") if "torch_fidelity" in job.needs] == ["fid_h100"]


def test_every_gpu_test_is_in_the_plan_without_what_pytest_ini_needs():
    (job,) = [job for job in run_all.gpu_jobs("h100") if job.module == "pytest"]
    command, output = job.command(ROOT)
    assert command[:3] == [sys.executable, "-m", "pytest"] and output == ROOT / "gpu_tests_h100.txt"
    assert ["-o", "addopts="] == job.options[:2]  # pytest-xdist may be missing
    assert {"tests/test_execution.py", "tests/test_gpu.py", "tests/nets/test_nets.py"} <= set(job.options)
    assert "tests/test_data.py" not in job.options


def test_what_a_package_lacks_or_time_does_not_allow_is_named(tmp_path, monkeypatch, capsys):
    seconds = []

    def run(job, outdir, limit):
        seconds.append(limit)
        return {"a": 0, "b": None, "c": 1}[job.name]

    monkeypatch.setattr(run_all, "run", run)
    monkeypatch.setattr(time, "monotonic", functools.partial(next, itertools.count(0, 100)))
    plan = [run_all.Job(name, "sampling", [], 1, share=0.5) for name in "abc"]
    plan.insert(1, run_all.Job("d", "fid", [], 1, needs=("no_such_package",)))
    assert run_all.run_all([*plan, run_all.Job("late", "ops", [], 1)], tmp_path, 501) == 1
    assert seconds == [200.5, 100.5, 50.5]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "NOT RUN for want of time or packages: d (needs no_such_package), the rest of b, late"


TURN_TAKER = """
import os, sys, time
from pathlib import Path
from bench.measure import wait_for_turn
import torch
wait_for_turn([lambda: time.sleep(float(sys.argv[1]))], torch.device("cpu"))
start = time.time()
time.sleep(0.3)
print(start, time.time())
"""


class TakingTurns(run_all.Job):
    """A job that compiles for as many seconds as its options begin with, and says when it was timed."""

    def command(self, outdir):
        code = "import time; time.sleep(60)" if self.tests else TURN_TAKER
        return [sys.executable, "-c", code, *self.options], outdir / f"{self.name}.txt"


def test_jobs_compile_beside_each_other_and_are_timed_one_by_one(tmp_path, monkeypatch, capsys):
    """One that is not ready in time is halted, and goes on when its turn comes; the tests are not taken up again."""
    monkeypatch.setattr(run_all, "PREPARING", 0.04)
    jobs = [TakingTurns(name, "ops", [seconds], 1, prepares=True) for name, seconds in (("a", "0.1"), ("b", "6"))]
    jobs += [TakingTurns("c", "ops", ["0"], 1), TakingTurns("tests", "pytest", [], 1)]
    assert run_all.run_all(jobs, tmp_path, 120, beside=True) == 0
    spans = [tuple(map(float, (tmp_path / f"{name}.txt").read_text().split())) for name in "abc"]
    assert all(first[1] < second[0] for first, second in zip(spans, spans[1:]))
    assert capsys.readouterr().out.splitlines()[-1].endswith("the rest of tests")


def test_a_job_that_is_cut_short_is_ended_with_what_it_has_started(tmp_path):
    code = (
        "import subprocess, sys, time; print('one case', flush=True);"
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); time.sleep(60)"
    )
    job = SimpleNamespace(command=lambda outdir: ([sys.executable, "-c", code], outdir / "said.txt"))
    assert run_all.run(job, tmp_path, 1.5) is None
    first, child = (tmp_path / "said.txt").read_text().split("\n")[:2]
    assert first == "one case"
    deadline = time.monotonic() + 10
    while _lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(process):
    """Whether a process does anything still: its parent may not have asked for its end."""
    status = Path("/proc", process, "status")
    return status.exists() and not re.search(r"^State:\s+Z", status.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "name, word",
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090")],
)
def test_a_card_in_the_name_of_a_file(name, word, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert run_all.card_name(torch.device("cuda")) == word


@pytest.mark.parametrize(
    "capability, driver, options, message",
    [
        (
            (7, 5),
            "fine",
            [],
            "GPU: compute capability 7.5, and kernels and bfloat16 need 8.0 or newer; ",
        ),
        ((9, 0), "missing", [], "NVML: the package nvidia-ml-py is not installed; rows would have no clocks"),
        ((9, 0), "silent", [], "NVML: the driver does not answer (Driver Not Loaded); rows would have no clocks"),
        ((9, 0), "silent", ["--without-clocks"], None),
        ((9, 0), "fine", [], None),
    ],
)
def test_a_gpu_that_cannot_run_the_plan_is_told(capability, driver, options, message, tmp_path, monkeypatch, capsys):
    class NVMLError(Exception):
        pass

    def init():
        if driver == "silent":
            raise NVMLError("Driver Not Loaded")

    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=init, nvmlDeviceGetHandleByUUID=lambda uuid: uuid)
    monkeypatch.setattr(telemetry, "_pynvml", lambda: None if driver == "missing" else nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(run_all, "run_all", lambda plan, outdir, seconds, beside: 0)
    code, said = run_all.main(["--outdir", str(tmp_path), *options]), capsys.readouterr().err.splitlines()
    assert code == (2 if message else 0) and len(said) == bool(message)
    assert not message or said[0].startswith(f"all.py: {message}")

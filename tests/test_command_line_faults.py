"""The command line where something around it is wrong: one line and exit code 2, nothing written, no traceback.

In the process, but for the streams: these belong to a process of its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_files import rewrite
from PIL import Image
from safetensors.torch import load_file

from hsivi_fast import cli, load_config, ops, sample
from hsivi_fast.metrics.table import format_table
from hsivi_fast.parallel import machine
from hsivi_fast.parallel.interrupt import StopRequest
from hsivi_fast.parallel.out_of_memory import is_out_of_memory, memory_advice
from hsivi_fast.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two measured checkpoints, of which the older one is the better."""
    folder = train(load_config("smoke", ["save_every=2"]), tmp_path_factory.mktemp("runs") / "run")
    for step, distance in ((2, 1.5), (4, 2.5)):
        file = folder.checkpoint_path(step) / "state.json"
        file.write_text(file.read_text().replace('"metric": null', f'"metric": {distance}'))
    return folder


def hsivi(capfd, *arguments):
    """(exit code, lines on stderr without bars) of the command, in this process."""
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        cli.main([str(argument) for argument in arguments])
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    return ended.value.code, [line for line in lines if line.strip() and "it/s" not in line and "image/s" not in line]


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        (
            ["sample", "RUN", "--seeds", "0-9999999999"],
            {},
            "seeds: '0-9999999999' are too many; ask for at most 10000000",
        ),
        (["sample", "RUN", "--seeds", "0-199999999"], {}, "seeds: 200000000 needs about 762.9 GiB and the disk of"),
        (["sample", "RUN", "--seeds", f"0-{2**63}"], {}, f"seeds: {2**63} is too large; use numbers below 2^63"),
        (["sample", "RUN", "--seeds", "9" * 5000], {}, "is not understood; write 0-63 or 1,5,9-12"),
        (["sample", "RUN", "--seeds", "0-3", "--batch", 10**12], {}, "batch: 1000000000000 must be at most 65536"),
        (["eval", "RUN", "--num-samples", 10**30], {}, "num-samples: 1000000000000000000000000000000 is too many"),
        (["train", "smoke", "train.batch_size=1000000000000"], {}, "train.batch_size: input should be less than or"),
        (["train", "smoke", "--dry-run", "network.res_blocks=1000000"], {}, "network.res_blocks: input should be less"),
        (["train", "smoke", "device=cuda:999"], {}, "device: 'cuda:999' is not there"),
        (["train", "smoke"], {"WORLD_SIZE": "0"}, "WORLD_SIZE: 0 in the environment is not between 1 and 1000000"),
        (["train", "smoke"], {"WORLD_SIZE": "-2"}, "WORLD_SIZE: -2 in the environment is not between 1"),
        (["train", "smoke"], {"WORLD_SIZE": "1" * 30}, "in the environment is not between 1 and 1000000"),
        (["train", "smoke"], {"WORLD_SIZE": "2"}, "RANK: not set, and WORLD_SIZE is; start the run with a launcher"),
        (["train", "smoke"], {"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: not set, and WORLD_SIZE is"),
        (
            ["train", "smoke"],
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "999999"},
            "MASTER_PORT: 999999 in the environment is not between 1 and 65535",
        ),
    ],
)
def test_a_number_too_large_is_one_line(run, tmp_path, monkeypatch, capfd, arguments, variables, message):
    disk = type("disk", (), {"free": 100 * 2**30})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: disk)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    places = [run.path if argument == "RUN" else argument for argument in arguments]
    places += ["--outdir", tmp_path / "new"] if arguments[0] != "eval" else []
    code, lines = hsivi(capfd, *places)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("hsivi: ") and message in lines[0], lines
    assert len(lines[0]) < 400 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "smoke", "seed=3", "--outdir", "missing/../RUN"],
        ["train", "smoke", "--outdir", "missing/../stranger"],
        ["sample", "RUN", "--seeds", "0", "--outdir", "missing/../file"],
        ["export", "RUN", "--format", "safetensors", "--outdir", "missing/../stranger"],
        ["eval", "RUN", "--num-samples", "20", "--save-images", "missing/../pictures"],
    ],
)
def test_a_guard_sees_through_dots_behind_a_missing_folder(run, tmp_path, monkeypatch, capfd, arguments):
    (tmp_path / "RUN").symlink_to(run.path)
    for folder, file in (("stranger", "config.txt"), ("pictures", "1.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    before = (run.path / "config.yaml").read_bytes()
    code, lines = hsivi(capfd, *arguments)
    assert code == 2 and len(lines) == 1, lines
    assert not (tmp_path / "missing").exists() and (run.path / "config.yaml").read_bytes() == before
    assert [path.name for path in (tmp_path / "stranger").iterdir()] == ["config.txt"]


def test_samples_are_written_as_they_come(run, tmp_path, monkeypatch):
    """Images, their grid and the seeds' order are those of one call, and no more than a batch is held."""
    held = []
    from hsivi_fast.metrics import image_files

    write = image_files.write_pictures
    monkeypatch.setattr(image_files, "write_pictures", lambda *given: (held.append(len(given[2])), write(*given)))
    cli.main(
        [
            "sample",
            str(run.path),
            "--seeds",
            "40-45,3,1000000-1000020",
            "--batch",
            "16",
            "--outdir",
            str(tmp_path / "a"),
        ]
    )
    seeds = [*range(40, 46), 3, *range(1000000, 1000021)]
    images = sample(run, seeds).numpy()
    for seed, image in zip(seeds, images):
        assert (np.array(Image.open(tmp_path / "a" / f"{seed:06d}.png")) == image[0]).all()
    assert held == [16, 12] and (tmp_path / "a" / "grid.png").is_file()


def test_weights_that_are_not_finite_are_neither_drawn_nor_measured_nor_exported(run, tmp_path, capfd):
    shutil.copytree(run.path, tmp_path / "nan")
    checkpoint = tmp_path / "nan" / "checkpoints" / "step_4"
    weights = load_file(checkpoint / "student_ema.safetensors")
    weights["in_conv.bias"][0] = float("nan")
    rewrite(checkpoint, "student_ema", weights)
    nan, out = tmp_path / "nan", tmp_path / "out"
    for arguments in (
        ["sample", nan, "--seeds", "0", "--outdir", out],
        ["eval", nan, "--num-samples", "20"],
        ["export", nan, "--format", "safetensors", "--outdir", out],
    ):
        code, lines = hsivi(capfd, *arguments)
        assert code == 2 and len(lines) == 1 and "in_conv.bias is not finite" in lines[0], lines
    assert not out.exists()


@pytest.mark.parametrize(
    "init_step, said",
    [
        ("newest", "starting from step 4 of RUN (the newest)"),
        ("best", "starting from step 2 of RUN (its best, distance 1.5)"),
        (2, "starting from step 2 of RUN (by init_step)"),
        (3, "init_step: 'RUN' has no checkpoint of step 3; it has 2, 4"),
    ],
)
def test_a_run_starts_from_the_checkpoint_that_it_names(run, tmp_path, capfd, init_step, said):
    arguments = ["train", "smoke", f"init={run.path}", f"init_step={init_step}", "--outdir", str(tmp_path / "new")]
    if init_step == 3:
        _, lines = hsivi(capfd, *arguments)
        assert said.replace("RUN", str(run.path)) in lines[0] and not (tmp_path / "new").exists()
        return
    cli.main(arguments)
    assert said.replace("RUN", str(run.path)) in capfd.readouterr().err


def test_best_needs_a_measured_run_and_a_step_needs_a_run(run, tmp_path, capfd):
    unmeasured = train(load_config("smoke", ["train.steps=2"]), tmp_path / "unmeasured")
    for init, message in (
        (unmeasured.path, "init_step: 'best', and no checkpoint of"),
        (run.checkpoint_path(4), "init_step: 'best' is a checkpoint of a run, and init="),
    ):
        outdir = tmp_path / "new"
        code, lines = hsivi(capfd, "train", "smoke", f"init={init}", "init_step=best", "--outdir", outdir)
        assert code == 2 and message in lines[0] and not outdir.exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"wall_clock_breakdown": True}, "sets wall_clock_breakdown"),
        ({"sparse_gradients": True}, "sets sparse_gradients"),
        ({"steps_per_print": None}, "steps_per_print is null"),
        ({"zero_optimization": {"reduce_bucket_size": None}}, "zero_optimization.reduce_bucket_size is null"),
        ({"zero_optimization": None}, "expected an object with settings"),
        (
            {"zero_optimization": {"stage3_param_persistence_threshold": "many"}},
            "zero_optimization.stage3_param_persistence_threshold: 'many' is not a number",
        ),
    ],
)
def test_settings_of_deepspeed_that_cannot_be(tmp_path, settings, message):
    import json

    from hsivi_fast.training.zero import deepspeed_config

    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as caught:
        deepspeed_config(load_config("smoke", [f"distributed.deepspeed={tmp_path / 'deepspeed.json'}"]), 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def _allocates_too_much():
    torch.empty(2**50)


def _allocates_too_much_of_a_gpu():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"
    )


def _has_no_memory_in_a_recording():
    """What ends the recording of a graph hides why."""
    try:
        _allocates_too_much_of_a_gpu()
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def _has_no_memory_in_a_library():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def _has_no_memory():
    raise MemoryError


def _has_no_thread():
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    "fault, said",
    [
        (_allocates_too_much, "out of memory (for 4503599627370496 bytes more); batch: 3; use a smaller one"),
        (_allocates_too_much_of_a_gpu, "out of memory (for 20.00 GiB more); batch: 3; use a smaller one"),
        (_has_no_memory_in_a_recording, "out of memory (for 20.00 GiB more); batch: 3; use a smaller one"),
        (_has_no_memory_in_a_library, "out of memory; batch: 3; use a smaller one"),
        (_has_no_memory, "out of memory; batch: 3; use a smaller one"),
        (_has_no_thread, "out of memory; batch: 3; use a smaller one"),
    ],
)
def test_too_little_memory_names_the_batch(fault, said, monkeypatch, capfd):
    with pytest.raises(MemoryError) as caught, memory_advice("batch: 3; use a smaller one"):
        with memory_advice("batch: 3; use a smaller one"):  # the inner one's advice is kept
            fault()
    assert str(caught.value) == said and is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(OSError("no space left"))
    monkeypatch.setattr(cli.hsivi, "main", lambda *given, **more: fault())
    code, lines = hsivi(capfd, "train", "smoke")
    assert code == 2 and len(lines) == 1 and lines[0].startswith("hsivi: out of memory")


@pytest.mark.parametrize(
    "settings, message",
    [
        (["precision=bf16"], "precision: 'bf16' needs a GPU of compute capability 8.0 or newer, this one has 7.5"),
        (["precision=tf32"], "precision: 'tf32' needs a GPU of compute capability 8.0 or newer, this one has 7.5"),
        (["backend=triton"], "backend: 'triton' cannot run, the GPU has compute capability 7.5 and the kernels are"),
    ],
)
def test_a_gpu_that_is_too_old_is_told(settings, message, tmp_path, monkeypatch, capfd):
    """Before anything lies on it. By then it is the current one: libraries ask for that, not where tensors lie."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**40))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(ops, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(ops, "_obstacle", ops._obstacle.__wrapped__)  # nothing of this machine is remembered
    code, lines = hsivi(capfd, "train", "smoke", "device=cuda:1", "--outdir", tmp_path / "run", *settings)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"hsivi: {message}")
    assert "; choose " in lines[0] and not (tmp_path / "run").exists()
    assert chosen == [torch.device("cuda", 1)]


def test_a_hangup_is_a_wish_to_stop_unless_it_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what started pytest may ignore it
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:  # under nohup
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_warnings_of_ours_are_a_line_and_those_of_libraries_are_not_shown(run, capfd, monkeypatch):
    """Whose a warning is says the call of warnings.warn, whatever line it is said to be about."""
    import hsivi_fast.checkpoints.run_folder as ours

    source = "def warn(message, level):\n import warnings\n warnings.warn(message, UserWarning, stacklevel=level)\n"
    mine, theirs = {}, {}
    exec(compile(source, ours.__file__, "exec"), mine)
    exec(compile(source, torch.__file__, "exec"), theirs)

    def command(*given, **more):
        mine["warn"]("of ours\nin two lines", 1)
        mine["warn"]("of ours, about the caller", 2)
        mine["warn"]("of C++ (Triggered internally at x.cpp)", 1)
        theirs["warn"]("of torch", 1)
        theirs["warn"]("of torch, about the caller", 2)

    monkeypatch.setattr(cli.hsivi, "main", command)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main(["report", str(run.path)])
    shown = capfd.readouterr().err.splitlines()
    assert shown == ["hsivi: warning: of ours in two lines", "hsivi: warning: of ours, about the caller"]


class Full:
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")


def test_what_cannot_be_shown_does_not_end_a_command(monkeypatch, capfd):
    stream = cli._Stream(Full(), forgiving=True)
    assert stream.write("a bar") == 5 and stream.flush() is None and stream.failed.errno == 28
    monkeypatch.setattr(sys, "stdout", Full())
    code, lines = hsivi(capfd, "--help")
    assert code == 2 and lines == ["hsivi: cannot write the output: [Errno 28] No space left on device"]


COMMAND = f"{sys.executable} -m hsivi_fast.cli"


@pytest.mark.parametrize(
    "line, code, stderr",
    [
        (f"{COMMAND} train smoke nfe=0 2>&-", 2, ""),  # closed: nothing can be said, and the code says it
        (f"{COMMAND} --help >&-", 0, ""),
        (f"{COMMAND} train smoke --dry-run --outdir a | true; exit ${{PIPESTATUS[0]}}", 1, ""),
        (f"({COMMAND} train smoke --outdir b 2>&1 >/dev/null; echo $? >&3) 3>&2 | true", 0, "0\n"),  # goes on
        (f"ulimit -v 1000000; {COMMAND} train smoke --outdir c", 2, "hsivi: out of memory"),
    ],
)
def test_streams_and_limits_of_a_process(tmp_path, line, code, stderr):
    environment = {**os.environ, "PYTHONPATH": str(cli.Path(cli.__file__).parents[1])}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == code and done.stderr.startswith(stderr), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1
    if line.endswith("| true"):
        assert (tmp_path / "b" / "report.html").is_file()


def test_the_table_says_on_how_many_images():
    row = {
        "sampler": "ddim",
        "nfe": 5,
        "frechet_distance": 1.0,
        "frechet_std": None,
        "images_per_second": 1.0,
        "num_samples": 50000,
    }
    assert format_table([row]).splitlines()[0].startswith("sampler, on 50,000 images  NFE  Frechet distance")
    heading = format_table([row, {**row, "num_samples": 1000}]).splitlines()[0]
    assert heading.startswith("sampler, on 1,000 and 50,000 images")
    plane = {**row, "js_divergence": 1.0, "js_std": None}
    del plane["frechet_distance"]
    assert format_table([plane]).startswith("sampler, on 50,000 points")


def test_a_run_that_is_not_measured_draws_its_own_samples_alone(run):
    pictures = {path.name for path in (run.path / "samples").iterdir()}
    assert "hsivi.png" in pictures and not pictures & {"teacher.png", "ddim.png", "comparison.png"}

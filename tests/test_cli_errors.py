"""Bad input to the command line: one line that says what was wrong, exit code 2 and no traceback."""

import functools

import numpy as np
import pytest
from commands import hsivi_here, hsivi_process

from hsivi_fast import load_config, train


@pytest.fixture
def hsivi(capsys):
    return functools.partial(hsivi_here, capsys)


@pytest.fixture(scope="module")
def run(no_report, tmp_path_factory):
    """The folder of a short run on digits."""
    settings = ["start.kind=ddim", "start.score_net_updates=0", "train.steps=1", "train.batch_size=8"]
    settings += ["eval.num_samples=0"]
    return train(load_config("digits", settings), tmp_path_factory.mktemp("cli") / "run").path


def _only_line(done):
    """What is written besides bars."""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "digts"], "config 'digts': neither a file nor one of celeba64"),
        (["train", "digits", "train.stepz=3"], "train.stepz: unknown key; did you mean train.steps?"),
        (["train", "digits", "nfe=0"], "nfe: input should be greater than or equal to 1, got 0"),
        (["train", "digits", "nfe=60", "spacing=quad"], "nfe: 60 layers with quad spacing repeat a timestep"),
        (
            ["train", "digits", "nfe=10"],
            "are 6 timesteps, and nfe: 10 layers stand between 11; give as many, or spacing=",
        ),
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
        (["sample", "RUN", "--seeds", "0-3", "--weights", "best"], "'best' is not one of 'ema', 'raw'"),
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
def test_bad_input_is_one_line_and_exit_code_2(run, hsivi, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    np.savez(tmp_path / "small.npz", mu=np.zeros(32), sigma=np.eye(32))
    places = {"RUN": run, "FILE": tmp_path / "file", "SMALL": tmp_path / "small.npz", "NEW": tmp_path / "new"}
    line = _only_line(hsivi(*(places.get(argument, argument) for argument in arguments)))
    assert line.startswith("hsivi: ") and message in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "digits", "train.stepz=3"], "train.stepz: unknown key; did you mean train.steps?"),
        (
            ["train", "digits", "backend=triton", "device=cpu"],
            "backend: 'triton' cannot run, the device is cpu and Triton needs a CUDA device, or TRITON_INTERPRET=1",
        ),
        (["sample", "RUN", "--seeds", "0-3", "--backend", "triton"], "backend: 'triton' cannot run"),
    ],
)
def test_a_process_ends_with_the_same_line_and_code(run, tmp_path, arguments, message):
    """In a process of its own: there Triton is not interpreted, and what libraries say would be seen."""
    line = _only_line(hsivi_process(*(run if argument == "RUN" else argument for argument in arguments), cwd=tmp_path))
    assert line.startswith("hsivi: ") and message in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "RUN", "--num-samples", "4", "--ref", "x" * 5000],
        ["sample", "x" * 5000, "--seeds", "0"],
        ["train", "x" * 5000],
        ["train", "digits", f"data_path={'x' * 5000}", "data=images"],
        ["train", "digits", f"teacher.checkpoint={'x' * 5000}"],
        ["train", "digits", "--outdir", "x" * 5000],
    ],
)
def test_no_line_is_longer_than_a_screen(run, hsivi, arguments):
    line = _only_line(hsivi(*[{"RUN": str(run)}.get(word, word) for word in arguments]))
    assert line.startswith("hsivi: ") and len(line) < 1000


def test_what_the_machine_cannot_do_is_one_line(run, hsivi, tmp_path, monkeypatch):
    for done in (
        hsivi("train", "smoke", "cuda_graphs=true", "device=cpu", "--outdir", tmp_path / "a"),
        hsivi("sample", run, "--seeds", "1", "--cuda-graphs"),
        hsivi("eval", run, "--num-samples", "20", "--cuda-graphs"),
    ):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last == "hsivi: cuda_graphs: true needs a CUDA device, the device is cpu; leave it false"
    monkeypatch.setenv("PATH", "/nowhere")
    done = hsivi("train", "smoke", "compile=true", "--outdir", tmp_path / "a")
    assert done.returncode == 2 and done.stderr.strip().startswith("hsivi: compile: true needs a C++ compiler on a CPU")
    assert not (tmp_path / "a").exists()

"""Runs with a target from the command line: draws as files, the page, and each bad input as one line."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from commands import hsivi_here
from density_runs import SHORT, write_target
from safetensors.torch import load_file, save_file

from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.export import load_exported
from hsivi_fast.sampling import sampler

SOURCE = """
import torch
from torch.distributions import LogNormal, Normal


def log_density(parameters):
    return LogNormal(0.5, 0.3).log_prob(parameters[:, 0]) + Normal(-1.0, 2.0).log_prob(parameters[:, 1])
"""
USE = ["target.dim=2", "target.constraints=[positive,real]", "target.parameters=[rate,place]"]


@pytest.fixture
def hsivi(capsys):
    return functools.partial(hsivi_here, capsys)


def _only_line(done):
    """What is written besides bars; that of a bridge has no end to be a share of."""
    lines = done.stderr.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and "%|" not in line and "evaluation [" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the run's folder, the user's file): by the command, with the page at its end. The file raises ever after."""
    folder = tmp_path_factory.mktemp("density")
    file = write_target(folder, SOURCE)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        from hsivi_fast import cli

        more = ["eval.num_samples=50", "eval.seeds=1", "eval.baselines=[base]"]
        cli.main(
            ["train", "density", "target.log_density=gaussian.py:log_density", *USE, *SHORT, *more, "--outdir", "run"]
        )
    shutil.copytree(folder / "run", folder / "kept")
    file.write_text("raise RuntimeError('the file of the target was run')\n")
    return folder / "run", file


def test_a_run_keeps_where_the_file_is(trained):
    config = RunFolder(trained[0]).config()
    assert config.target.log_density == f"{trained[1].resolve()}:log_density"
    assert config.target.constraints == ("positive", "real") and config.target.parameters == ("rate", "place")


def test_draws_as_files(trained, hsivi, tmp_path):
    done = hsivi("sample", trained[0], "--seeds", "0-99", "--outdir", tmp_path / "draws", "--batch", "100")
    assert done.returncode == 0 and "100 draws: " in done.stdout
    with np.load(tmp_path / "draws" / "draws.npz") as file:
        draws = file["draws"]
        assert file["parameters"].tolist() == ["rate", "place"] and file["seeds"].tolist() == list(range(100))
    assert draws.shape == (100, 2) and draws.dtype == np.float32
    assert (draws[:, 0] > 0).all() and (draws[:, 1] < 0).any()
    # A draw is a function of its seed, whatever the batch and the other seeds.
    hsivi("sample", trained[0], "--seeds", "7,3,98", "--outdir", tmp_path / "few", "--batch", "2")
    with np.load(tmp_path / "few" / "draws.npz") as file:
        np.testing.assert_allclose(file["draws"], draws[[7, 3, 98]], rtol=1e-5, atol=1e-6)
        assert file["seeds"].tolist() == [7, 3, 98]
    hsivi("sample", trained[0], "--seeds", "0-99", "--outdir", tmp_path / "raw", "--weights", "raw")
    with np.load(tmp_path / "raw" / "draws.npz") as file:
        assert not np.allclose(file["draws"], draws)


def test_an_export_draws_the_same_parameters_without_the_target(trained, hsivi, tmp_path):
    """The target's file raises when it is run."""
    done = hsivi("export", trained[0], "--format", "safetensors", "--outdir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    exported = load_exported(tmp_path / "out", "cpu")
    draws = exported(range(40))
    torch.testing.assert_close(draws, sampler.sample(trained[0], range(40)), rtol=1e-5, atol=1e-6)
    assert bool((draws[:, 0] > 0).all()) and exported.nfe == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "gaussian.py:log_density, 2 unconstrained coordinates" in card and "none of the density" in card
    line = _only_line(hsivi("export", trained[0], "--format", "diffusers", "--outdir", tmp_path / "pipeline"))
    assert "format: 'diffusers' is for image runs only, and this run has a target" in line


def test_draws_for_arviz(trained, hsivi, tmp_path):
    arviz = pytest.importorskip("arviz")
    hsivi("sample", trained[0], "--seeds", "0-9", "--outdir", tmp_path)
    posterior = arviz.from_netcdf(tmp_path / "draws.nc").posterior
    with np.load(tmp_path / "draws.npz") as file:
        for column, name in enumerate(("rate", "place")):
            assert posterior[name].shape == (1, 10) and np.array_equal(posterior[name][0], file["draws"][:, column])


def test_draws_are_what_the_layers_make_through_the_base_and_the_transform(trained):
    """By hand from x_K: u through the student's layers, x = mean + factor u, and exp of the first coordinate."""
    folder = RunFolder(trained[0])
    bridge = folder.bridge()
    from hsivi_fast.parallel.world import ALONE

    own, context, _ = sampler.load_sampler(folder, ALONE)
    states = own.states(torch.arange(5))
    x = bridge.mean + states[0] @ bridge.factor.T
    draws = sampler.sample(folder, range(5))
    torch.testing.assert_close(draws, torch.stack([x[:, 0].exp(), x[:, 1]], 1), rtol=1e-5, atol=1e-6)
    for k in (2, 1):  # x_{k-1} = x_k - eps + exp(log_gamma_k) z
        with torch.no_grad():
            eps = own.network(states[k], torch.full((5,), k))
        z = (states[k - 1] - states[k] + eps) / own.log_gamma[k - 1].exp()
        assert 0.1 < float(z.std()) < 3 and float(z.abs().max()) < 4


def test_the_page_has_its_sections_and_pictures(trained, hsivi):
    for name in ("report.html", "samples/marginals.png"):
        (trained[0] / name).unlink()
    done = hsivi("report", trained[0])
    assert done.returncode == 0 and not done.stderr.strip()
    text = (trained[0] / "report.html").read_text()
    at = -1
    for section in ("Marginals", "Pairs", "The bridge", "Table", "Training", "Fisher divergence", "Noise scale"):
        assert (at := text.index(f">{section}</h2>", at + 1)) > 0, section
    assert "2 network evaluations a draw, none of the target; step 18." in text and "rate" in text
    for stem in ("marginals", "pairs", "bridge", "losses", "log_gamma"):
        assert (trained[0] / "samples" / f"{stem}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", stem
    assert text.count("data:image/png;base64,") >= 5 and "http" not in text.split("<body")[1].replace("http-equiv", "")


def test_the_table_is_what_the_command_printed(trained):
    rows = RunFolder(trained[0]).read_json("results.json")
    assert [row["sampler"] for row in rows] == ["base", "start", "hsivi_ema", "hsivi_raw"]
    assert all(np.isfinite(row["stein_discrepancy"]) for row in rows)
    assert len(RunFolder(trained[0]).read_json("fisher.json")) == 2


def test_measuring_and_going_on_run_the_file_and_say_what_it_raises(trained, hsivi):
    line = _only_line(hsivi("eval", trained[0], "--num-samples", "20"))
    assert line.startswith("hsivi: target.log_density: ") and "the file of the target was run" in line


@pytest.fixture
def again(trained, tmp_path, monkeypatch):
    """A copy of the run, with its file as it was."""
    folder, file = trained
    source = file.read_text()
    file.write_text(SOURCE)
    monkeypatch.chdir(file.parent)
    yield shutil.copytree(folder.parent / "kept", tmp_path / "again")
    file.write_text(source)


def test_eval_measures_a_run(again, hsivi, tmp_path):
    done = hsivi("eval", again, "--num-samples", "200")
    assert done.returncode == 0 and "Stein discrepancy" in done.stdout
    random = torch.Generator().manual_seed(0)
    exact = torch.randn(500, 2, generator=random, dtype=torch.float64) * torch.tensor([0.3, 2.0]) + torch.tensor(
        [0.5, -1]
    )
    exact[:, 0] = exact[:, 0].exp()
    np.savez(tmp_path / "exact.npz", draws=exact.numpy())
    done = hsivi("eval", again, "--num-samples", "200", "--ref", tmp_path / "exact.npz")
    assert done.returncode == 0 and "sliced" in done.stdout.lower(), done.stderr
    np.savez(tmp_path / "wrong.npz", draws=np.zeros((5, 3)))
    line = _only_line(hsivi("eval", again, "--num-samples", "200", "--ref", tmp_path / "wrong.npz"))
    assert "eval.reference" in line and "expected floats [N, 2]" in line
    np.savez(tmp_path / "other.npz", points=np.zeros((5, 2)))
    assert "draws" in _only_line(hsivi("eval", again, "--num-samples", "200", "--ref", tmp_path / "other.npz"))
    assert "a run with a target draws parameters" in _only_line(
        hsivi("eval", again, "--num-samples", "200", "--metric", "digits")
    )


def _damaged(file, name, change):
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)


@pytest.mark.parametrize("command", [["sample", "RUN", "--seeds", "0-3"], ["report", "RUN"], ["train"]])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file.unlink(), "has no bridge.safetensors"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "bridge.safetensors: damaged"),
        (lambda file: file.write_bytes(b""), "bridge.safetensors: damaged"),
        (lambda file: _damaged(file, "above", lambda value: value * torch.nan), "above is of shape"),
        (lambda file: _damaged(file, "levels", lambda value: value.flip(0)), "levels do not fall"),
        (lambda file: _of_another(file), "it is of another target or of other layers"),
    ],
    ids=["missing", "cut", "empty", "nan", "rising", "another"],
)
def test_a_damaged_bridge_is_one_line(again, hsivi, command, damage, message):
    damage(again / "bridge.safetensors")
    if command == ["train"]:
        command = ["train", again / "config.yaml", "train.steps=12", "--outdir", "RUN"]
    done = hsivi(*(again if word == "RUN" else word for word in command))
    line = _only_line(done)
    assert message in line and "bridge.safetensors" in line


def _of_another(file):
    bridge = RunFolder(file.parent).bridge()
    fields = {
        "mean": torch.zeros(3),
        "factor": torch.eye(3),
        "above": torch.zeros(2, 4, 3),
        "below": torch.zeros(2, 4, 3),
    }
    save_file(dataclasses.replace(bridge, **fields).tensors(), file)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ["target.dim=3", "network.dim=null", "target.constraints=positive", "target.parameters=[a,b,c]"],
            "network.dim",
        ),
        (["target.constraints=positive"], "its run has target.constraints"),
        (["target.log_density=banana", "target.constraints=null", "target.parameters=null"], "its run has target."),
        (["bridge.noise=0.3"], "its run has bridge.noise = "),
    ],
)
def test_a_run_does_not_go_on_with_another_target(again, hsivi, change, message):
    line = _only_line(hsivi("train", again / "config.yaml", *change, "--outdir", again))
    assert message in line and "when a run goes on, only train.steps may grow" in line


def test_a_run_does_not_go_on_with_a_file_of_other_content(again, trained, hsivi):
    trained[1].write_text(SOURCE.replace("2.0)", "2.5)"))
    line = _only_line(hsivi("train", again / "config.yaml", "train.steps=12", "--outdir", again))
    assert line.startswith("hsivi: target.log_density: ") and "is not what it was when the run began" in line
    trained[1].write_text(SOURCE)
    assert hsivi("train", again / "config.yaml", "train.steps=12", "--outdir", again).returncode == 0


BAD = {
    "returns_a_number": ("return 1.0", "it returns 'float'; expected a float tensor [48]"),
    "returns_columns": ("return -x ** 2", "it returns [48, 2]"),
    "returns_a_sum": ("return -(x ** 2).sum()", "it returns []"),
    "nan": ("return (x[:, 0] - 2).log()", "nan at ["),
    "infinite": ("return -(x ** 2).sum(1) + torch.where(x[:, 0] > 1, -torch.inf, 0.)", "-inf at ["),
    "raises": ("return x @ torch.ones(3)", "it raises RuntimeError"),
    "detached": ("return -(x.detach() ** 2).sum(1)", "autograd cannot differentiate it"),
    "numpy": ("import numpy; return torch.tensor(-(x.numpy() ** 2).sum(1))", "target.log_density"),
    "random": ("return -(x ** 2).sum(1) + torch.rand(len(x))", "then"),
    "rows": ("return -(x ** 2).sum(1) - x.mean()", "each row must be worked out by itself"),
    "constant": ("return 0 * x.sum(1)", "its chains do not settle: it has no finite integral"),
    "growing": ("return (x ** 2).sum(1)", "its chains do not settle: it has no finite integral"),
}


def _train(file, *overrides):
    return ["train", "density", f"target.log_density={file}:log_density", "target.dim=2", *SHORT, *overrides]


@pytest.mark.parametrize("given", [False, True], ids=["fitted", "given base"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_log_density_is_one_line(name, given, hsivi, tmp_path):
    body, message = BAD[name]
    file = write_target(tmp_path, f"import torch\ndef log_density(x):\n    {body}\n")
    base = [] if given else ["bridge.mean=null", "bridge.scale=null"]
    line = _only_line(hsivi(*_train(file, *base), "--outdir", tmp_path / "run"))
    assert line.startswith("hsivi: target.log_density: ") and message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["target.log_density=nowhere.py:f"], "target.log_density: there is no file"),
        (["target.log_density=FILE:nothing"], "has no 'nothing'"),
        (["target.log_density=bananas"], "target.log_density: 'bananas'; expected one of banana"),
        (["target.log_density=FILE:MEAN"], "is not callable"),
        (["target.log_density=BROKEN:f"], "raises when it is run: SyntaxError"),
        (["target.log_density=null"], "target.log_density: "),
        (["target.score=FILE:log_density"], "target.score: it returns [48]"),
        (["target.score=FILE:wrong"], "target.score: "),
        (["target.score=FILE:nothing"], "has no 'nothing'"),
        (["target.dim=3"], "target.log_density: it raises RuntimeError"),
        (["target.dim=0"], "target.dim: input should be greater than or equal to 1, got 0"),
        (["target.dim=null"], "target.dim: "),
        (["target.log_density=banana", "target.dim=3"], "target.dim: 3, but banana has 2 dimensions"),
        (["target.constraints=positiv"], "target.constraints: 'positiv' is no constraint of torch.distributions"),
        (["target.constraints=boolean"], "target.constraints: 'boolean' has no transform"),
        (["target.constraints=[positive]"], "target.constraints: 1 of them for 2 dimensions"),
        (["target.constraints=[real,simplex]"], "target.constraints: 'simplex' is of several coordinates"),
        (["target.parameters=[a]"], "target.parameters: 1 names for 2 parameters"),
        (["target.parameters=[a,a]"], "target.parameters: 'a' is there twice"),
        (["bridge.mean=[0,0,0]"], "bridge.mean: 3 numbers for 2 dimensions"),
        (["bridge.scale=[1,1,1]"], "bridge.scale: 3 numbers for 2 dimensions"),
        (["bridge.scale=null"], "bridge.mean: give bridge.mean and bridge.scale together"),
        (["bridge.scale=[0]"], "bridge.scale"),
        (["bridge.noise=3"], "bridge.noise: input should be less than or equal to 2, got 3"),
        (["bridge.schedule=quad"], "bridge.schedule: "),
        (["objective.match=windows"], "objective.match: windows are times of a diffusion"),
        (["start.top=900"], "start.top: 900 is a time of a diffusion"),
        (["teacher.checkpoint=digits_teacher.safetensors"], "teacher.checkpoint: "),
        (["teacher.target=ring"], "teacher.target: 'ring', and the run has a target"),
        (["teacher.steps=50"], "teacher: a run with a target has none"),
        (["data=digits"], "data: 'digits' is of runs with a teacher"),
        (["init=somewhere"], "init: "),
        (["network.name=digits"], "network: "),
        (["network.family=adm"], "network: "),
        (["network.dim=5"], "network.dim: 5 for a target of 2 dimensions"),
        (["eval.baselines=[ddim]"], "eval.baselines: ddim samples a teacher, and there is a target; choose of base"),
        (["eval.num_samples=9", "eval.reference=WRONG"], "has draws [5, 3]; expected floats [N, 2]"),
        (["eval.num_samples=9", "eval.reference=nowhere.npz"], "eval.reference: 'nowhere.npz'"),
        (["eval.num_samples=9", "eval.metric=digits"], "eval.metric: "),
        (["start.trajectories=10000000"], "start.trajectories: "),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(overrides, message, hsivi, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from density_runs import SOURCE as GAUSSIAN

    file = write_target(tmp_path, GAUSSIAN + "\n\ndef wrong(x):\n    return 2 * score(x)\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    np.savez(tmp_path / "wrong.npz", draws=np.zeros((5, 3)))
    places = {"FILE": str(file), "BROKEN": "broken.py", "WRONG": "wrong.npz"}
    for name, place in places.items():
        overrides = [text.replace(name, place) for text in overrides]
    line = _only_line(hsivi(*_train(file, *overrides), "--outdir", tmp_path / "run"))
    assert line.startswith("hsivi: ") and message in line
    assert not (tmp_path / "run").exists()


def test_a_baseline_of_a_target_is_none_of_a_teacher(hsivi):
    assert "eval.baselines: langevin is for a run with a target" in _only_line(
        hsivi("train", "toy2d", "eval.baselines=[langevin]", "--dry-run")
    )


def test_a_dry_run_says_what_is_needed_and_runs_nothing(hsivi, tmp_path):
    file = write_target(tmp_path, "raise RuntimeError('the file of the target was run')\n")
    done = hsivi(*_train(file), "--dry-run", "--processes", "2")
    assert done.returncode == 0 and not done.stderr.strip()
    assert f"log_density: {file}:log_density" in done.stdout and "name: density" in done.stdout
    assert "2, 8 images each of every batch of 16" in done.stdout


def test_two_runs_on_one_page(trained, hsivi, tmp_path):
    """Their draws in one picture a parameter, and their distances together."""
    folder = trained[0]
    other = shutil.copytree(folder, tmp_path / "other")
    done = hsivi("report", folder, other, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.html").read_text()
    assert "its bridge has to be found" not in text and "no data" not in text
    assert "densities of single parameters" in text and "Stein discrepancy" in text
    done = hsivi("report", folder, "--out", tmp_path / "one.html")
    assert done.returncode == 0 and "densities of pairs of parameters" in (tmp_path / "one.html").read_text()

"""Runs with a target in the place of a teacher: what they recover, resuming, ranks and ways of execution."""

import json
import shutil

import numpy as np
import pytest
import torch
from density_runs import COVARIANCE, MEAN, density_config, exact_draws, write_target
from ranks import run_ranks
from run_files import checkpoint, distance, files_without_times, killed_at, losses_of

from hsivi_fast import sample, train
from hsivi_fast.checkpoints import run_folder
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.metrics.posterior import moment_errors
from hsivi_fast.metrics.table import spread_key
from hsivi_fast.training import start, trainer

STEPS = 18  # of all phases of a short run


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module", autouse=True)
def all_checkpoints(no_report):
    """Without a page, and with all checkpoints."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_folder, "CHECKPOINTS_KEPT", 100)
        yield


@pytest.fixture(scope="module")
def straight(file, tmp_path_factory):
    return train(density_config(file, "save_every=2"), tmp_path_factory.mktemp("straight") / "run")


def test_what_a_run_records_of_its_phases(straight):
    records = straight.metrics()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(np.isfinite(record["loss_start"]) for record in records[:6])
    assert all(record["loss_score_net"] > 0 for record in records[6:])
    assert [record["step"] for record in records if record["loss_student"] is not None] == [12, 15, 18]
    assert straight.start_checkpoint() == 6
    divergences = straight.read_json("fisher.json")
    assert len(divergences) == 2 and all(value > 0 for value in divergences)
    bridge = straight.bridge()
    assert bridge.mean.tolist() == [0, 0] and bridge.above.shape == (2, 32, 2)
    student = checkpoint(straight.path, "student", STEPS)
    assert not any("teacher" in name for name in student) and student["log_scaled_gamma"].shape == (2,)
    moved = [checkpoint(straight.path, "student", step)["log_scaled_gamma"] for step in (2, 6, STEPS)]
    assert bool((moved[0] != moved[1]).all()) and bool((moved[1] != moved[2]).all())  # the start learns it too


def test_a_gaussian_is_recovered(file, tmp_path):
    """From a base that is twice as wide and lies elsewhere: means and deviations within 0.1, correlation within 0.1.

    5 deviations of 0.02, the error of 2000 draws, are a part of it; the rest is a network of 16 channels.
    """
    np.savez(tmp_path / "exact.npz", draws=exact_draws(2000, seed=1).numpy())
    settings = [
        *("nfe=3", "start.updates=700", "start.trajectories=500", "start.batch_size=128", "start.substeps=5"),
        *("start.score_net_updates=50", "train.steps=100", "train.batch_size=64", "train.f_learning_times=10"),
        *("train.student_lr=1.0e-5", "train.log_gamma_lr=1.0e-4", "log_every=50", "start.lr=0.003"),
        *("eval.num_samples=1000", "eval.seeds=2", f"eval.reference={tmp_path / 'exact.npz'}"),
        *("eval.baselines=[base,particles,langevin]", "bridge.noise=0.1"),
    ]
    folder = train(density_config(file, *settings), tmp_path / "run")
    draws = sample(folder, range(2000), batch_size=2000)
    assert draws.dtype == torch.float32 and draws.shape == (2000, 2)
    errors = moment_errors(draws.double(), (torch.tensor(MEAN).double(), torch.tensor(COVARIANCE).double()))
    assert errors["mean_error_max"] < 0.1 and errors["std_error_max"] < 0.1
    assert errors["correlation_error_max"] < 0.1
    rows = {row["sampler"]: row for row in folder.read_json("results.json")}
    assert list(rows) == ["base", "particles", "langevin", "start", "hsivi_ema", "hsivi_raw"]
    columns = ["sliced_wasserstein", "mean_error", "std_error", "correlation_error", "energy_distance"]
    for name, row in rows.items():
        for column in [*columns, "stein_discrepancy"]:
            assert np.isfinite(row[column]) and np.isfinite(row[spread_key(column)]), (name, column)
        assert row["num_samples"] == 1000 and row["nfe"] == (3 if name in ("start", *list(rows)[-2:]) else 0)
    assert rows["hsivi_ema"]["sliced_wasserstein"] < 0.2 * rows["base"]["sliced_wasserstein"]
    assert rows["hsivi_ema"]["mean_error"] < 0.1 and rows["hsivi_ema"]["std_error"] < 0.1
    # The same budget of gradient evaluations for the rival: the bridge's, and the run's two networks.
    of_run = rows["hsivi_ema"]["gradient_evaluations"]
    bridge = folder.bridge().evaluations
    assert of_run == bridge + 64 * (2 * 50 + 100 + 4 * 10)
    assert rows["langevin"]["gradient_evaluations"] == of_run and rows["base"]["gradient_evaluations"] is None
    assert rows["particles"]["gradient_evaluations"] == rows["start"]["gradient_evaluations"] == bridge


def test_without_a_reference_draws_are_measured_by_the_score_alone(file, tmp_path):
    settings = ["eval.num_samples=60", "eval.seeds=1", "eval.baselines=[base]"]
    (base, *students) = train(density_config(file, *settings), tmp_path / "run").read_json("results.json")
    assert [row["sampler"] for row in students] == ["start", "hsivi_ema", "hsivi_raw"]
    measured = {"sampler", "nfe", "stein_discrepancy", "images_per_second", "num_samples", "gradient_evaluations"}
    assert measured <= base.keys() and not {"sliced_wasserstein", "mean_error"} & base.keys()


# ---- going on --------------------------------------------------------------------------------------------------------


def _assert_same_run(folder, other):
    for stem in ("student", "student_ema", "student_optimizer", "score_net", "score_net_ema", "score_net_optimizer"):
        own, expected = checkpoint(folder, stem, STEPS), checkpoint(other, stem, STEPS)
        assert own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own), stem
    assert losses_of(folder) == losses_of(other)
    assert (folder / "fisher.json").read_bytes() == (other / "fisher.json").read_bytes()


@pytest.mark.parametrize("stop", [4, 6, 8, 14])  # in the start, at its end, in the head start, in the distillation
def test_a_run_goes_on_bit_for_bit_on_the_bridge_that_it_has(straight, file, tmp_path, monkeypatch, stop):
    folder = shutil.copytree(straight.path, tmp_path / "run")
    for step in straight.checkpoints():
        if step > stop:
            shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    monkeypatch.setattr(trainer, "find_bridge", None)  # another one would not be found in the same way elsewhere
    train(density_config(file, "save_every=2"), folder)
    _assert_same_run(folder, straight.path)


KILLS = [
    (RunFolder, "save_bridge", 1, "before"),
    (RunFolder, "save_bridge", 1, "after"),
    (start.BridgePaths, "batch", 3, "before"),
    (RunFolder, "save_checkpoint", 2, "before"),
    (trainer.Training, "_advance_distillation", 8, "before"),
    (trainer.Training, "finish", 1, "before"),
    (RunFolder, "write_json", 2, "before"),  # the Fisher divergences
]


@pytest.mark.parametrize("owner, name, call, when", KILLS)
def test_a_run_that_was_killed_ends_with_the_same_files(straight, file, tmp_path, owner, name, call, when):
    with killed_at(owner, name, call, when):
        train(density_config(file, "save_every=2"), tmp_path / "run")
    train(density_config(file, "save_every=2"), tmp_path / "run")
    found, expected = files_without_times(tmp_path / "run"), files_without_times(straight.path)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


# ---- the same losses -------------------------------------------------------------------------------------------------


def _train(folder, file, *overrides):
    train(density_config(file, *overrides), folder)


@pytest.mark.parametrize("ranks, zero", [(2, 0), (2, 1), (2, 3)])
def test_ranks_and_stages_give_the_same_run(straight, file, tmp_path, ranks, zero):
    pieces = tmp_path / "pieces.json"
    pieces.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    settings = [f"distributed.zero={zero}", f"distributed.deepspeed={pieces}", "save_every=2"]
    run_ranks(_train, ranks, tmp_path / "run", file, *settings)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(straight.path), rel=1e-4, abs=1e-5)
    for step, close in ((6, 1e-6), (STEPS, 1e-5)):
        for stem in ("student", "score_net", "student_ema"):
            own, other = checkpoint(tmp_path / "run", stem, step), checkpoint(straight.path, stem, step)
            assert distance(own, other) < close, (stem, step)
    first, second = (json.loads((folder / "fisher.json").read_text()) for folder in (tmp_path / "run", straight.path))
    assert first == pytest.approx(second, rel=1e-3)


def test_the_kernels_give_the_losses_of_torch(file, tmp_path, monkeypatch):
    """log_gamma with a number for each coordinate, of which no other test here has a run."""
    monkeypatch.setattr(trainer, "FISHER_DRAWS", 10)  # interpreted, 2000 draws take a minute
    few = ["nfe=1", "start.updates=2", "start.score_net_updates=1", "train.steps=3", "gamma.per_pixel=true"]
    expected, got = (
        train(density_config(file, *few, f"backend={backend}"), tmp_path / backend) for backend in ("torch", "triton")
    )
    assert len(losses_of(got.path)) == 4 + 1 and all(np.isfinite(losses_of(got.path)))
    assert losses_of(got.path) == pytest.approx(losses_of(expected.path), rel=1e-4, abs=1e-5)
    own, other = (checkpoint(run.path, "student", 6) for run in (got, expected))
    assert distance(own, other) < 1e-5


@pytest.mark.parametrize("settings", [["rollout.mode=fresh"], ["rollout.redraw=2"], ["start.kind=ddim"]], ids=str)
def test_other_ways_to_the_states_run(straight, file, tmp_path, settings):
    """From other states the losses are others, but of the same size."""

    def losses_of_score_net(folder):
        return [record["loss_score_net"] for record in folder.metrics() if record["loss_score_net"] is not None]

    more = ["objective.anchor=0"] if settings == ["start.kind=ddim"] else []
    folder = train(density_config(file, *settings, *more), tmp_path / "run")
    losses, expected = losses_of_score_net(folder), losses_of_score_net(straight)
    assert len(losses) == len(expected) == 12 and losses[3:] != expected[3:]
    assert np.mean(losses) == pytest.approx(np.mean(expected), rel=0.5)


@pytest.mark.parametrize("own_score", [False, True], ids=["autograd", "own score"])
def test_compiled_networks_give_the_eager_losses(straight, file, tmp_path, traced_only, own_score):
    """The whole auxiliary score is in their graphs, also its derivative."""
    settings = [f"target.score={file}:score"] if own_score else []
    folder = train(density_config(file, "save_every=2", "compile=true", *settings), tmp_path / "run")
    assert len(traced_only) > 3
    assert losses_of(folder.path) == pytest.approx(losses_of(straight.path), rel=1e-4, abs=1e-5)

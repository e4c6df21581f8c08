"""The start on the teacher's paths, the head start of the score network, windows and anchor, as a run has them."""

import json
import shutil

import numpy as np
import pytest
import torch
from contexts import context_with_teacher
from ranks import run_ranks
from run_files import checkpoint, distance, without_times

from hsivi_fast import load_config, train
from hsivi_fast.build import build_ddim_layers
from hsivi_fast.checkpoints import run_folder
from hsivi_fast.config import phases_of
from hsivi_fast.ops import draw_noise
from hsivi_fast.training import start as start_module
from hsivi_fast.training.estimate import estimate_run
from hsivi_fast.training.start import Paths, start_learning_rate

START = ["start.kind=trajectory", "start.updates=6", "start.trajectories=24", "start.substeps=2", "start.lr=0.001"]
ALL = [
    *(*START, "start.score_net_updates=3", "objective.match=windows", "objective.gamma_min=0.2", "objective.alpha=1.0"),
    *("objective.anchor=0.5", "objective.anchor_batch=4", "train.steps=8", "train.f_learning_times=2", "log_every=2"),
    *("train.batch_size=8", "device=cpu", "save_every=2", "train.lr_rule=linear", "train.beta1=0.5"),
    "train.log_gamma_lr=0.02",
]


def _config(*overrides):
    return load_config("smoke", [*START, "device=cpu", *overrides])


def test_phases_and_rates():
    config = _config("start.score_net_updates=3", "train.steps=8")
    phases = phases_of(config)
    assert (phases.start, phases.head, phases.train, phases.total) == (6, 3, 8, 17)
    plain = phases_of(load_config("smoke"))
    assert plain.total == plain.train
    rates = [start_learning_rate(_config("start.updates=100"), update) for update in (1, 10, 20, 60, 100)]
    assert rates == pytest.approx([0.001 * share for share in (0.05, 0.5 * 0.91, 0.81, 0.41, 0.01)])


@pytest.mark.parametrize("top", [None, 950])
def test_the_target_takes_the_path_s_state_to_the_next_by_one_ddim_step(top):
    """Of the student's own layers, also where the path comes from above their top knot."""
    context = context_with_teacher(_config(*([f"start.top={top}"] if top else [])))
    paths = Paths(context)
    paths.prepare(1)
    assert paths.steps[0].t == (top or context.layers.tau[3])
    assert [step.reaches for step in paths.steps if step.reaches is not None] == [2, 1, 0]
    assert paths.states.shape == (1, 4, 24, 1, 8, 8)
    batch = paths.batch(1)
    layers = build_ddim_layers(context.config, 3, 0.0, "cpu", own_knots=True)
    reached = layers.mean(batch.x, batch.target, batch.k)
    states = paths.states[0]
    for n, k in enumerate(batch.k.tolist()):
        rows = [row for row in range(24) if torch.equal(states[k, row], batch.x[n])]
        assert len(rows) == 1
        torch.testing.assert_close(reached[n], states[k - 1, rows[0]], rtol=1e-4, atol=1e-5)
    other = paths.anchor_batch(1)
    assert not torch.equal(other.x, batch.x)


def test_paths_are_rolled_in_parts_that_memory_holds(monkeypatch):
    """And every part has trajectories of its own, whatever the size of a call."""
    context = context_with_teacher(_config())
    whole = Paths(context)
    whole.prepare(1)
    with monkeypatch.context() as patched:
        patched.setattr(start_module, "PATH_BYTES", 10 * 4 * 4 * 64)  # 10 trajectories of 4 states
        parts = Paths(context_with_teacher(_config("rollout.chunk=3")))
    assert (parts.parts, parts.count) == (3, 8)
    held = []
    for update in range(1, 7):
        parts.prepare(update)
        held.append(parts.states[0, 3].clone())
    assert torch.equal(held[0], held[1]) and torch.equal(held[2], held[3]) and torch.equal(held[4], held[5])
    assert not set(held[0][:, 0, 0, 0].tolist()) & set(held[2][:, 0, 0, 0].tolist())
    torch.testing.assert_close(held[0], whole.states[0, 3, :8])
    parts.prepare(9)  # an anchor's
    assert torch.equal(parts.states[0, 3], held[5])


def test_a_start_learns_the_paths(no_report, tmp_path):
    """On the digits' teacher it soon draws better digits than DDIM; the table has a row of it."""
    overrides = [*START, "start.updates=40", "start.trajectories=64", "train.steps=1", "train.batch_size=32"]
    settings = [
        "log_every=10",
        "eval.num_samples=300",
        "eval.seeds=1",
        "eval.baselines=[ddim]",
        "eval.ddim_nfe=[5]",
        "device=cpu",
    ]
    folder = train(load_config("digits", [*overrides, *settings]), tmp_path / "run")
    losses = [record["loss_start"] for record in folder.metrics() if "loss_start" in record]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    assert folder.start_checkpoint() == 40
    rows = {row["sampler"]: row["frechet_distance"] for row in folder.read_json("results.json")}
    assert list(rows) == ["ddim", "ddim_eta", "start", "hsivi_ema", "hsivi_raw"]
    assert rows["start"] < rows["ddim"]


@pytest.fixture(scope="module")
def straight(no_report, tmp_path_factory):
    """A run with everything, whose checkpoints all stay."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_folder, "CHECKPOINTS_KEPT", 100)
        return train(load_config("smoke", ALL), tmp_path_factory.mktemp("straight") / "run")


def test_what_a_run_records_of_its_phases(straight):
    records = {record["step"]: record for record in straight.metrics()}
    assert straight.checkpoints() == [2, 4, 6, 8, 10, 12, 14, 16, 17] and straight.start_checkpoint() == 6
    for step in (2, 4, 6):
        assert records[step]["loss_start"] > 0 and records[step]["loss_score_net"] is None
    assert records[6]["student_lr"] > 0 == records[6]["score_net_lr"]
    # The head start begins at the teacher: its first loss is the teacher's own. The student does not move in it.
    assert records[8]["loss_teacher"] > 0 and records[8]["loss_student"] is None and records[8]["student_lr"] == 0
    assert records[12]["loss_student"] is not None and "loss_teacher" not in records[14]
    at_start, after_head = (checkpoint(straight.path, "student", step) for step in (6, 8))
    assert distance(after_head, at_start) == 0
    assert distance(checkpoint(straight.path, "score_net", 8), checkpoint(straight.path, "score_net", 6)) > 0
    assert distance(checkpoint(straight.path, "student", 17), at_start) > 0
    state = json.loads((straight.checkpoint_path(6) / "state.json").read_text())
    assert state["start"] is True and state["student_updates"] == 0


@pytest.mark.parametrize("stop", [4, 6, 8, 12, 16])  # in the start, at its end, in the head start, after it
def test_a_run_goes_on_bit_for_bit_in_every_phase(straight, tmp_path, stop):
    folder = shutil.copytree(straight.path, tmp_path / "run")
    for step in straight.checkpoints():
        if step > stop:
            shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    train(load_config("smoke", ALL), folder)
    for stem in ("student", "student_ema", "student_optimizer", "score_net", "score_net_ema", "score_net_optimizer"):
        own, other = checkpoint(folder, stem, 17), checkpoint(straight.path, stem, 17)
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own), stem
    first, second = (run.metrics() for run in (straight, run_folder.RunFolder(folder)))
    assert list(map(without_times, first)) == list(map(without_times, second))


def test_the_start_s_checkpoint_stays(no_report, tmp_path):
    run = train(load_config("smoke", ALL), tmp_path / "run")
    assert run.checkpoints()[0] == 6 and len(run.checkpoints()) < 6


def _train_on_ranks(folder, zero, kept):
    """One run on these ranks."""
    pieces = folder.parent / "pieces.json"
    pieces.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": kept}}))
    settings = [f"distributed.zero={zero}", f"distributed.deepspeed={pieces}", "eval.num_samples=0"]
    train(load_config("smoke", [*ALL, *settings]), folder)


@pytest.mark.parametrize("ranks, zero", [(2, 0), (2, 1), (4, 2), (2, 3)])
def test_ranks_and_stages_give_the_same_run(straight, tmp_path, ranks, zero):
    run_ranks(_train_on_ranks, ranks, tmp_path / "run", zero, 0)
    for step, close in ((6, 1e-6), (17, 1e-5)):
        for stem in ("student", "score_net", "student_ema"):
            own, other = checkpoint(tmp_path / "run", stem, step), checkpoint(straight.path, stem, step)
            assert distance(own, other) < close, (stem, step)


def test_the_anchor_holds_the_student_to_the_paths(no_report, tmp_path):
    """With a heavy anchor the regression's loss ends lower than without one."""
    ends = {}
    for weight in (0.0, 20.0):
        overrides = [
            *ALL,
            f"objective.anchor={weight}",
            "train.steps=60",
            "train.student_lr=0.01",
            "eval.num_samples=0",
        ]
        config = load_config("smoke", [*overrides, "start.updates=40", "save_every=1000", "train.lr_rule=constant"])
        folder = train(config, tmp_path / f"run_{weight}")
        context = context_with_teacher(config)
        paths = Paths(context)
        paths.prepare(1)
        from hsivi_fast.parallel.world import ALONE
        from hsivi_fast.sampling.sampler import load_sampler

        network = load_sampler(folder, ALONE, "raw")[0].network
        batch = paths.anchor_batch(10_000)
        with torch.no_grad():
            eps_hat = network(batch.x, context.layers.tau[batch.k])
        ends[weight] = float((eps_hat - batch.target).square().mean())
    assert ends[20.0] < 0.8 * ends[0.0]


@pytest.mark.parametrize("top", [200, 1000])
def test_paths_come_from_a_timestep_above_the_others(top):
    config = _config("nfe=2", "spacing=[0,200,700]", f"start.top={top}")
    message = f"start.top: {top} is no timestep between the run's knot 200 and 1000"
    with pytest.raises(ValueError, match=message):
        Paths(context_with_teacher(config))
    with pytest.raises(ValueError, match=message):
        estimate_run(config)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["spacing=[0,5,3,9]"], r"spacing: \[0, 5, 3, 9\] does not rise, first at 5, 3"),
        (["spacing=[0,5,900,1000]"], "spacing: 1000 is no timestep of the teacher, whose last is 999"),
        (["spacing=[0,5]"], r"spacing: \[0, 5\] are 2 timesteps, and nfe: 3 layers stand between 4"),
        (["objective.alpha=3"], "objective.alpha: input should be less than or equal to 2, got 3"),
        (["objective.anchor=-1"], "objective.anchor: input should be greater than or equal to 0, got -1"),
        (["start.kind=ddim", "objective.anchor=1"], "objective.anchor: 1.0 keeps the regression of a start"),
        (["start.solver=heun"], "start.solver: input should be 'dpmpp' or 'ddim'"),
        (["start.kind=ddim", "start.top=900"], "start.top: 900 is where trajectories come from"),
        (["start.top=0"], "start.top: input should be greater than or equal to 1, got 0"),
        (["start.updates=0"], "start.updates: input should be greater than or equal to 1, got 0"),
    ],
)
def test_what_cannot_be_is_one_line(overrides, message):
    with pytest.raises(ValueError, match=message):
        _config("nfe=3", *overrides)


def test_a_gamma_min_that_leaves_a_layer_nothing_is_named_before_anything_is_written(tmp_path):
    config = _config("objective.match=windows", "objective.gamma_min=1.0", "eta=0.1")
    with pytest.raises(ValueError, match="objective.gamma_min: 1.0 leaves layer"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_that_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hsivi_fast.training.start.PATH_BYTES", 2**60)
    config = _config("start.trajectories=100000000", "nfe=900", "spacing=uniform")
    with pytest.raises(ValueError, match="start.trajectories: 100000000 over nfe 900"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_knots_by_hand_are_those_of_the_layers():
    context = context_with_teacher(_config("nfe=2", "spacing=[0,250,800]"))
    assert context.layers.tau.tolist() == [0, 250, 800]
    assert build_ddim_layers(context.config, 2, 0.0, "cpu", own_knots=True).tau.tolist() == [0, 250, 800]
    # A baseline is not held to knots that suit a student.
    assert build_ddim_layers(context.config, 2, 0.0, "cpu").tau.tolist() == [0, 200, 800]
    assert build_ddim_layers(context.config, 4, 0.0, "cpu").tau.tolist() == [0, 50, 200, 450, 800]
    x = draw_noise(torch.arange(4), 0, (1, 8, 8))
    assert np.isfinite(context.teacher(x, torch.full((4,), 800)).numpy()).all()

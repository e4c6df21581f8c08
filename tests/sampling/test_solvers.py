"""Other samplers of the teacher: how often they call it, where they start and end, their order, and their rows.

With every solver and spacing: what it converges to, and that the best of them is chosen on other seeds than the row's.
"""

import dataclasses

import numpy as np
import pytest
import torch
from contexts import context_with_teacher
from operator_recording import RunAgain

from hsivi_fast import load_config, ops, train
from hsivi_fast.build import load_teacher
from hsivi_fast.execution import Execution
from hsivi_fast.method.schedule import signal_levels
from hsivi_fast.metrics.evaluation import best_row, build_metric, final_table, measure_row
from hsivi_fast.metrics.table import format_table, sampler_title
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.sampling import solvers
from hsivi_fast.sampling.sampler import ddim_sampler
from hsivi_fast.sampling.solvers import (
    COMBINATIONS,
    NAMES,
    SOLVERS,
    SPACINGS,
    AtTimesteps,
    SchedulerSampler,
    baseline_sampler,
    build_scheduler,
    check_baselines,
    solver_sampler,
    timesteps_of,
)

CPU = torch.device("cpu")
NEW = ("dpmpp", "unipc")


class Counted(torch.nn.Module):
    """A teacher that writes down the timesteps of its calls, and the first x."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.event_shape, self.timesteps, self.start = teacher, teacher.event_shape, [], None

    def forward(self, x, t):
        assert len(set(t.tolist())) == 1 and t.shape == (len(x),)
        self.start = x.clone() if self.start is None else self.start
        self.timesteps.append(int(t[0]))
        return self.teacher(x, t)


@pytest.fixture(scope="module")
def context():
    return context_with_teacher(load_config("toy2d", ["teacher.target=ring"]))


def _counting(context):
    """The same context with a teacher that counts its calls."""
    return dataclasses.replace(context, teacher=Counted(context.teacher))


@pytest.mark.parametrize("name", ["ddim", "ddpm", *NEW])
@pytest.mark.parametrize("nfe", [1, 5, 20])
def test_exactly_nfe_evaluations_from_the_noise_of_ddim(context, name, nfe):
    other, reference = _counting(context), _counting(context)
    sampler = baseline_sampler(other, name, nfe)
    samples = sampler(range(20))
    ddim_sampler(reference, nfe, 0.0)(range(20))
    counted, ddim = other.teacher, reference.teacher
    assert len(counted.timesteps) == nfe == sampler.nfe
    assert torch.equal(counted.start, ddim.start) and counted.timesteps[0] == ddim.timesteps[0] == 800
    assert (
        counted.timesteps == sorted(set(counted.timesteps), reverse=True)
        and samples.shape == (20, 2)
        and torch.isfinite(samples).all()
    )


@pytest.mark.parametrize("name", NEW)
def test_a_sample_depends_on_its_seed_alone(context, name):
    sampler, told = baseline_sampler(context, name, 8), []
    whole = sampler(range(50), 20, told.append)
    assert told == [20, 20, 10] and torch.equal(whole, baseline_sampler(context, name, 8)(range(50)))
    torch.testing.assert_close(sampler([7, 33]), whole[[7, 33]], rtol=0, atol=1e-6)
    for arguments, message in ((([],), "seeds: none"), (([1], 0), "batch: 0")):
        with pytest.raises(ValueError, match=message):
            sampler(*arguments)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("name", NEW)
def test_the_scheduler_has_the_teachers_signal_levels(betas, name):
    config = load_config("toy2d", [f"teacher.betas={betas}"])
    scheduler = build_scheduler(config, name, 10)
    np.testing.assert_allclose(scheduler.alphas_cumprod, signal_levels(betas, 1000)[:801], rtol=1e-4)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(800, 0, -80))


def _errors(target, name, evaluations, order=2):
    """{NFE: median distance to a trajectory of 800 steps from the same x_K}.

    The median: between two Gaussians of the target a small error picks the other one.
    """
    config = load_config("toy2d", [f"teacher.target={target}"])
    teacher = load_teacher(config, CPU)

    def draw(name, nfe, order):
        return SchedulerSampler(teacher, build_scheduler(config, name, nfe, order), nfe)(range(400), 400)

    fine = draw("unipc", 800, 2)
    return {nfe: float((draw(name, nfe, order) - fine).square().sum(1).sqrt().median()) for nfe in evaluations}


@pytest.mark.parametrize("name", NEW)
def test_errors_fall_with_nfe_and_are_below_ddims_at_the_same_timesteps(name):
    evaluations = (5, 10, 20, 40, 80)
    own, ddim = _errors("checkerboard", name, evaluations), _errors("checkerboard", "dpmpp", evaluations, order=1)
    assert own[5] > own[10] > own[20] > own[40] > own[80]
    assert all(own[nfe] < ddim[nfe] for nfe in evaluations), (own, ddim)
    assert own[20] < 0.6 * ddim[20] and own[80] < 0.2 * ddim[80]


def test_twice_the_steps_is_half_ddims_error_and_less_than_half_the_others():
    """On the narrower Gaussians of the ring: even timesteps are too far apart for them until there are many."""

    def ratio(name, order=2):
        errors = _errors("ring", name, (80, 160), order)
        return errors[80] / errors[160]

    assert ratio("dpmpp", order=1) == pytest.approx(2, abs=0.15)
    assert ratio("dpmpp") > 2.7 and ratio("unipc") > 2.7


def test_order_one_is_ddim_on_the_same_timesteps(context):
    """Between the knots of the scheduler, DDIM's own formula; the last step goes to noise level 0."""
    teacher = context.teacher
    sampler = SchedulerSampler(teacher, build_scheduler(context.config, "dpmpp", 10, order=1), 10)
    seeds = torch.arange(16)
    x, level = ops.draw_noise(seeds, 0, (2,)).double(), signal_levels("linear", 1000)
    for t in range(800, 0, -80):
        noise = teacher(x.float(), torch.full_like(seeds, t)).double()
        clean, target = (x - (1 - level[t]) ** 0.5 * noise) / level[t] ** 0.5, level[t - 80] if t > 80 else 1.0
        x = target**0.5 * clean + (1 - target) ** 0.5 * noise
    torch.testing.assert_close(sampler(range(16)).double(), x, rtol=0, atol=1e-3)


def test_ddpm_is_ddim_with_eta_one(context):
    assert torch.equal(baseline_sampler(context, "ddpm", 7)(range(9)), ddim_sampler(context, 7, 1.0)(range(9)))
    assert torch.equal(baseline_sampler(context, "ddim", 7)(range(9)), ddim_sampler(context, 7, 0.0)(range(9)))


def test_a_batch_is_filled_up_where_shapes_are_fixed(context):
    """With a recording in the place of a CUDA graph: one shape, and the samples of eager calls."""
    shapes, counting = [], _counting(context)
    counting.teacher.register_forward_pre_hook(lambda module, arguments: shapes.append(len(arguments[0])))
    execution = Execution("cpu", cuda_graphs=True, recording=RunAgain)
    sampler = baseline_sampler(dataclasses.replace(counting, execution=execution), "unipc", 6)
    samples = sampler(range(70), 30)
    assert set(shapes) == {30} and execution.recorded == 1
    torch.testing.assert_close(samples, baseline_sampler(context, "unipc", 6)(range(70), 30), rtol=0, atol=1e-6)


# ---- every solver with every spacing ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fine():
    """The checkerboard's context, and where 800 steps lead from the noise of 200 seeds."""
    context = context_with_teacher(load_config("toy2d", ["teacher.target=checkerboard"]))
    return context, solver_sampler(context, "unipc", 800)(range(200), 200)


def _error(fine, name, nfe, spacing):
    """The median distance, as of `_errors`."""
    context, exact = fine
    return float((solver_sampler(context, name, nfe, spacing)(range(200), 200) - exact).square().sum(1).sqrt().median())


@pytest.mark.parametrize("name, spacing", COMBINATIONS)
def test_a_solver_with_a_spacing_approaches_many_steps_from_the_noise_of_ddim(fine, name, spacing):
    counting = _counting(fine[0])
    sampler = solver_sampler(counting, name, 40, spacing)
    samples = sampler(range(200), 200)
    counted = counting.teacher
    assert counted.timesteps == timesteps_of(counting.config, spacing, 40)[:0:-1].tolist()
    assert len(counted.timesteps) == sampler.nfe and counted.timesteps[0] == 800
    assert torch.equal(counted.start, ops.draw_noise(torch.arange(200), 0, (2,)))
    error = float((samples - fine[1]).square().sum(1).sqrt().median())
    assert error < 0.02 and error < 0.35 * _error(fine, name, 10, spacing)


@pytest.mark.parametrize("name", ["dpmpp", "unipc", "deis"])
def test_the_third_order_is_closer_than_the_second(fine, name):
    assert _error(fine, f"{name}3", 40, "run") < 0.6 * _error(fine, name, 40, "run")


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_where_the_spacings_are(betas):
    config = load_config("toy2d", [f"teacher.betas={betas}"])
    level = signal_levels(betas, 1000)
    sigma = np.sqrt((1 - level) / level)
    for spacing, times in {spacing: timesteps_of(config, spacing, 10) for spacing in SPACINGS}.items():
        assert times[0] == 0 and times[-1] == 800 and len(times) == 11 and (np.diff(times) > 0).all(), spacing
    assert timesteps_of(config, "linspace", 10).tolist() == list(range(0, 801, 80))
    assert timesteps_of(config, "run", 10).tolist() == [0, 8, 32, 72, 128, 200, 288, 392, 512, 648, 800]
    ramp = np.arange(11) / 10
    karras = (sigma[800] ** (1 / 7) + ramp * (sigma[0] ** (1 / 7) - sigma[800] ** (1 / 7))) ** 7
    even = np.exp(np.log(sigma[800]) + ramp * (np.log(sigma[0]) - np.log(sigma[800])))
    for spacing, wanted in (("karras", karras), ("logsnr", even)):
        for time, one in zip(timesteps_of(config, spacing, 10)[::-1], wanted, strict=True):
            assert sigma[max(time - 1, 0)] <= one * (1 + 1e-9) and one <= sigma[time + 1], (spacing, time)


def test_the_runs_spacing_is_also_that_of_uniform_runs():
    config = load_config("toy2d", ["spacing=uniform"])
    assert timesteps_of(config, "run", 4).tolist() == [0, 200, 400, 600, 800]
    assert timesteps_of(config, "karras", 4)[-1] == 800


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "ipndm"])
def test_at_timesteps_of_ours_is_diffusers_own_solver(context, name):
    """At those of diffusers' default; and where a scheduler takes timesteps, at any."""
    own = build_scheduler(context.config, name, 8)
    placed = build_scheduler(context.config, name, 8, spacing="run")
    own.set_timesteps(8)
    moved = AtTimesteps(placed.scheduler, own.timesteps.numpy(), own.sigmas.numpy())
    torch.testing.assert_close(
        SchedulerSampler(context.teacher, moved, 8)(range(16)), baseline_sampler(context, name, 8)(range(16))
    )
    if name in ("dpmpp", "dpmpp3"):
        own.set_timesteps(timesteps=placed.timesteps.tolist())
        torch.testing.assert_close(own.sigmas, placed.sigmas, rtol=1e-4, atol=1e-7)
        assert torch.equal(own.timesteps, placed.timesteps)


def test_ipndm_is_adams_and_bashforth_on_the_noise_with_ddims_step(context):
    teacher, level = context.teacher, signal_levels("linear", 1000)
    seeds = torch.arange(16)
    x, noises = ops.draw_noise(seeds, 0, (2,)).double(), []
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    times = timesteps_of(context.config, "run", 7)[::-1].tolist()
    for t, target in zip(times[:-1], times[1:]):
        noises = [teacher(x.float(), torch.full_like(seeds, t)).double(), *noises][:4]
        noise = sum(weight * value for weight, value in zip(weights[len(noises)], noises, strict=True))
        clean = (x - (1 - level[t]) ** 0.5 * noise) / level[t] ** 0.5
        x = level[target] ** 0.5 * clean + (1 - level[target]) ** 0.5 * noise
    torch.testing.assert_close(solver_sampler(context, "ipndm", 7, "run")(range(16)).double(), x, rtol=0, atol=1e-3)
    one = solver_sampler(context, "ipndm", 1, "run")(range(16))
    torch.testing.assert_close(one, ddim_sampler(context, 1, 0.0)(range(16)), rtol=0, atol=1e-3)


def test_a_batch_does_not_know_of_the_one_before(context):
    for name, spacing in COMBINATIONS:
        sampler = solver_sampler(context, name, 5, spacing)
        parts = sampler(range(40), 20)
        torch.testing.assert_close(parts[20:], sampler(range(20, 40)), rtol=0, atol=1e-6, msg=f"{name} {spacing}")


# ---- rows ------------------------------------------------------------------------------------------------------------


def _searched(overrides=()):
    """A context whose table searches for the best solver, on three sets of 300 points."""
    wanted = ["eval.baselines=[best]", "eval.ddim_nfe=[4]", "eval.num_samples=300", "eval.seeds=3"]
    return context_with_teacher(load_config("toy2d", ["teacher.target=ring", "device=cpu", *wanted, *overrides]))


def test_the_best_is_chosen_on_the_first_set_and_measured_on_the_others():
    context, told = _searched(), []
    metric = build_metric(context)
    row = best_row(context, metric, 4, told.append)

    def measured(name, spacing, sets, first):
        return measure_row("", solver_sampler(context, name, 4, spacing), metric, 300, sets, ALONE, first_set=first)

    first = {choice: measured(*choice, 1, 0)["js_divergence"] for choice in COMBINATIONS}
    name, spacing = min(first, key=first.get)
    assert (row["solver"], row["spacing"], row["sampler"], row["nfe"]) == (NAMES[name], spacing, "best", 4)
    others = measured(name, spacing, 2, 1)
    for column in ("js_divergence", "js_std", "sliced_wasserstein"):
        assert row[column] == others[column]
    assert sum(told) == 300 * (len(COMBINATIONS) + 2)
    assert measured(name, spacing, 3, 0)["js_divergence"] == pytest.approx(
        (first[name, spacing] + 2 * row["js_divergence"]) / 3
    )


def test_a_solver_whose_samples_are_not_finite_is_not_chosen(monkeypatch):
    context = _searched()
    distances = iter([float("nan"), 0.3, 0.2, float("inf"), *[0.4] * 24])

    def measure(name, sampler, metric, num_samples, sets, world, on_batch, nfe, first_set=0):
        return {"js_divergence": 1.0 if first_set else next(distances)}

    monkeypatch.setattr("hsivi_fast.metrics.evaluation.measure_row", measure)
    row = best_row(context, build_metric(context), 4)
    assert (row["solver"], row["spacing"]) == (NAMES[COMBINATIONS[2][0]], COMBINATIONS[2][1])


def test_evaluations_of_the_best_that_fall_together_are_counted_once(monkeypatch):
    monkeypatch.setattr("hsivi_fast.metrics.evaluation.COMBINATIONS", (("dpmpp", "logsnr"),))
    context = _searched(["eval.seeds=2"])
    row = best_row(context, build_metric(context), 50)
    assert row["nfe"] == 50 and row["evaluations"] == len(timesteps_of(context.config, "logsnr", 50)) - 1 < 50
    assert row["js_std"] is None  # of one set
    assert format_table([row]).splitlines()[1].startswith("best solver: DPM-Solver++(2M), log-SNR  50 (")


def test_the_search_compiles_and_records_the_network_once(context):
    first = solver_sampler(context, "dpmpp", 5)
    second = solver_sampler(context, "ipndm", 6, "run", like=first)
    assert second._predict is first._predict and (second.nfe, first.nfe) == (6, 5)
    assert torch.equal(second(range(20)), solver_sampler(context, "ipndm", 6, "run")(range(20)))


def test_what_cannot_be_had_is_said_before_the_training(context, monkeypatch):
    wanted = load_config("toy2d", ["eval.baselines=[ddim,unipc]", "eval.ddim_nfe=[5]"])
    check_baselines(wanted)
    with pytest.raises(ValueError, match="eval.ddim_nfe: 850 evaluations repeat a timestep below 800"):
        check_baselines(load_config("toy2d", ["eval.baselines=[unipc]", "eval.ddim_nfe=[850]"]))
    monkeypatch.setattr(solvers, "find_spec", lambda name: None)
    check_baselines(context.config)
    with pytest.raises(
        ValueError, match="eval.baselines: 'unipc' needs the package diffusers.*pip install diffusers"
    ) as caught:
        check_baselines(wanted)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="eval.baselines: 'best' needs the package diffusers"):
        check_baselines(load_config("toy2d", ["eval.baselines=[best]"]))
    with pytest.raises(ValueError, match="eval.baselines.0: input should be"):
        load_config("toy2d", ["eval.baselines=[euler]"])


def test_the_best_of_one_set_is_refused_before_the_training(tmp_path):
    config = load_config("toy2d", ["eval.baselines=[ddim,best]", "eval.seeds=1", "device=cpu"])
    with pytest.raises(
        ValueError, match="^eval.seeds: 1 set of images is too few for eval.baselines=.best.*2 or more$"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_baselines_stand_in_one_table(tmp_path):
    start = ["start.kind=ddim", "start.score_net_updates=0"]
    config = load_config("toy2d", [*start, "train.steps=2", "eval.num_samples=0", "device=cpu"])
    run = train(config, tmp_path / "run")
    config = load_config(
        "toy2d",
        [
            f"eval.baselines=[{','.join(NAMES)}]",
            "eval.ddim_nfe=[5,10]",
            "eval.num_samples=400",
            "eval.seeds=2",
            "device=cpu",
        ],
    )
    context = context_with_teacher(config)
    rows = final_table(context, run, build_metric(context))
    assert [(row["sampler"], row["nfe"]) for row in rows] == [
        *((name, nfe) for name in NAMES.values() for nfe in (5, 10)),
        ("ddim_eta", 5),
        ("hsivi_ema", 5),
        ("hsivi_raw", 5),
    ]
    table = format_table(rows)
    for title in ("DDIM", "DDPM (ancestral)", "DPM-Solver++(2M)", "UniPC", "iPNDM", "best solver: ", "HSIVI (EMA)"):
        assert title in table
    assert len({sampler_title(row["sampler"]) for row in rows}) == len(NAMES) + 3


def test_a_run_says_where_its_solvers_timesteps_are(no_report, tmp_path):
    overrides = ["eval.baselines=[unipc3]", "eval.ddim_nfe=[4]", "eval.num_samples=40", "eval.seeds=1", "device=cpu"]
    for spacing, named in (("run", "run"), ("linspace", None)):
        config = load_config("smoke", [*overrides, f"eval.solver_spacing={spacing}", "eval.baselines=[unipc3]"])
        row, *_ = train(config, tmp_path / spacing).read_json("results.json")
        context = context_with_teacher(config)
        expected = measure_row("", solver_sampler(context, "unipc3", 4, spacing), build_metric(context), 40, 1, ALONE)
        assert row["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=1e-6)
        assert row.get("spacing") == named

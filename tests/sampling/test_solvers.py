"""Other samplers of the teacher: how often they call it, where they start and end, their order, and their rows."""

import dataclasses

import numpy as np
import pytest
import torch
from contexts import context_with_teacher

from hsivi_fast import load_config, ops, train
from hsivi_fast.build import load_teacher
from hsivi_fast.execution import Execution
from hsivi_fast.method.schedule import signal_levels
from hsivi_fast.metrics.evaluation import build_metric, final_table
from hsivi_fast.metrics.table import format_table, sampler_title
from hsivi_fast.sampling import solvers
from hsivi_fast.sampling.sampler import ddim_sampler
from hsivi_fast.sampling.solvers import SchedulerSampler, baseline_sampler, build_scheduler, check_baselines

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

    class Recording:
        def __init__(self, device):
            self.device = device

        def warm_up(self, function):
            return function()

        def record(self, function):
            self.function, self.result = function, function()
            return self.result

        def replay(self):
            self.result.copy_(self.function())

    shapes, counting = [], _counting(context)
    counting.teacher.register_forward_pre_hook(lambda module, arguments: shapes.append(len(arguments[0])))
    execution = Execution("cpu", cuda_graphs=True, recording=Recording)
    sampler = baseline_sampler(dataclasses.replace(counting, execution=execution), "unipc", 6)
    samples = sampler(range(70), 30)
    assert set(shapes) == {30} and execution.recorded == 1
    torch.testing.assert_close(samples, baseline_sampler(context, "unipc", 6)(range(70), 30), rtol=0, atol=1e-6)


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
    with pytest.raises(ValueError, match="eval.baselines.0: input should be"):
        load_config("toy2d", ["eval.baselines=[euler]"])


def test_all_baselines_stand_in_one_table(tmp_path):
    config = load_config("toy2d", ["train.steps=2", "eval.num_samples=0", "device=cpu"])
    run = train(config, tmp_path / "run")
    config = load_config(
        "toy2d",
        [
            "eval.baselines=[ddim,ddpm,dpmpp,unipc]",
            "eval.ddim_nfe=[5,10]",
            "eval.num_samples=400",
            "eval.seeds=2",
            "device=cpu",
        ],
    )
    context = context_with_teacher(config)
    rows = final_table(context, run, build_metric(context))
    assert [(row["sampler"], row["nfe"]) for row in rows] == [
        *((name, nfe) for name in ("ddim", "ddpm", "dpmpp_2m", "unipc") for nfe in (5, 10)),
        ("ddim_eta", 5),
        ("hsivi_ema", 5),
        ("hsivi_raw", 5),
    ]
    table = format_table(rows)
    for title in ("DDIM", "DDPM (ancestral)", "DPM-Solver++(2M)", "UniPC", "HSIVI (EMA)"):
        assert title in table
    assert len({sampler_title(row["sampler"]) for row in rows}) == 7

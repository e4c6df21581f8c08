"""Other samplers of the same teacher, for the table: what a user would pick instead of training.

DDIM and DDPM are our own layers; DPM-Solver++, UniPC, DEIS and iPNDM are diffusers' schedulers. All start from the
noise x_K of the seeds at the run's top knot tau_K, and a row of NFE evaluations calls the teacher that many times for
each image. Where the timesteps below tau_K are is the spacing: `timesteps_of`.
"""

import copy
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch

from .. import ops
from ..build import device_of, solver_spacing
from ..execution import EAGER
from ..method.class_labels import if_given
from ..method.schedule import knots, signal_levels
from ..nets.prepared import as_prepared
from .sampler import NO_CLASSES, Batches, ddim_sampler


class Solver(NamedTuple):
    """A multistep solver that diffusers has."""

    name: str  # in results.json
    scheduler: str  # diffusers' class
    order: int


# eval.baselines -> solver
SOLVERS = {
    "dpmpp": Solver("dpmpp_2m", "DPMSolverMultistepScheduler", 2),
    "dpmpp3": Solver("dpmpp_3m", "DPMSolverMultistepScheduler", 3),
    "unipc": Solver("unipc", "UniPCMultistepScheduler", 2),
    "unipc3": Solver("unipc_3", "UniPCMultistepScheduler", 3),
    "deis": Solver("deis", "DEISMultistepScheduler", 2),
    "deis3": Solver("deis_3", "DEISMultistepScheduler", 3),
    "ipndm": Solver("ipndm", "IPNDMScheduler", 4),
}
SPACINGS = ("linspace", "karras", "logsnr", "run")
COMBINATIONS = tuple((name, spacing) for name in SOLVERS for spacing in SPACINGS)  # what "best" is chosen from
# eval.baselines -> results.json
NAMES = {"ddim": "ddim", "ddpm": "ddpm", **{key: solver.name for key, solver in SOLVERS.items()}, "best": "best"}

# What each of diffusers' classes is told alone. Those without a final level end at the teacher's lowest.
SETTINGS = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
    },
    "UniPCMultistepScheduler": {"predict_x0": True, "solver_type": "bh2", "final_sigmas_type": "zero"},
    "DEISMultistepScheduler": {"algorithm_type": "deis", "solver_type": "logrho"},
}


class SchedulerSampler:
    """A noise-prediction network that a diffusers scheduler steps through; called like `Sampler`.

    network, class_labels: as of `Sampler`.
    scheduler: a diffusers scheduler whose `step` draws nothing; nfe: evaluations of the network.
    The scheduler computes on the host between them, so with cuda_graphs it is the network's call that is recorded.
    """

    def __init__(self, network, scheduler, nfe, execution=EAGER, class_labels=NO_CLASSES):
        self.network, self.scheduler, self.nfe, self.execution = network, scheduler, nfe, execution
        self._prepared = as_prepared(network)
        self._predict = execution.graphed(execution.compiled(self._prepared))
        self._batches = Batches(execution, class_labels)

    @torch.no_grad()
    def __call__(self, seeds, batch_size=250, on_batch=None, labels=None):
        """Draw one sample a seed: arguments, result and errors as of `Sampler`."""
        self._prepared.refresh()
        return self._batches(self._all_steps, seeds, device_of(self.network), batch_size, on_batch, labels)

    def _all_steps(self, seeds, labels):
        """x_0 of the seeds [B], from x_K; labels: [B] or None."""
        x = ops.draw_noise(seeds, 0, self.network.event_shape)
        self.scheduler.set_timesteps(self.nfe)  # forgets what it knows of the batch before
        for t in self.scheduler.timesteps.tolist():
            eps_hat = self._predict(x, torch.full_like(seeds, t), *if_given(labels))
            x = self.scheduler.step(eps_hat, t, x, return_dict=False)[0]
        return x

    def through(self, scheduler, nfe):
        """A sampler of the same network with another scheduler: what is compiled and recorded serves both."""
        other = copy.copy(self)
        other.scheduler, other.nfe = scheduler, nfe
        return other


class AtTimesteps:
    """A diffusers scheduler at timesteps of ours, called like a scheduler.

    timesteps: int64 [N], the top one first; sigmas: sqrt((1 - alpha_bar) / alpha_bar) at them and at the end, [N + 1].

    They are put in the place of those that `set_timesteps` makes. UniPC and DEIS take no timesteps. The flags for
    Karras's and the log-SNR spacing are not used: with them the network is shown the timestep next to a noise level,
    and not that of the sample, and DEIS spends its last evaluation on a step from the lowest level to itself.
    """

    def __init__(self, scheduler, timesteps, sigmas):
        self.scheduler = scheduler
        self.timesteps = torch.from_numpy(timesteps)
        self.sigmas = torch.from_numpy(sigmas).float()

    def set_timesteps(self, nfe):
        """Forget the batch before; nfe: N."""
        self.scheduler.set_timesteps(nfe)
        self.scheduler.timesteps, self.scheduler.sigmas = self.timesteps, self.sigmas

    def step(self, eps_hat, t, x, return_dict=False):
        """A tuple of x at the next timestep."""
        return self.scheduler.step(eps_hat, t, x, return_dict=return_dict)


class IpndmAtTimesteps(AtTimesteps):
    """diffusers' iPNDM for a network that predicts noise.

    Its class is made for x = alpha x_0 + sigma noise on a trigonometric schedule of its own, and for networks that
    predict v = (noise - sigma x) / alpha. Schedule and timesteps are replaced by ours, and it is given v, from which
    its first line has the noise again, to rounding. What follows is iPNDM (Zhang & Chen 2022, arXiv 2204.13902): Adams
    and Bashforth's weights up to order 4 on the noise, and DDIM's step with it.
    """

    def set_timesteps(self, nfe):
        """Forget the batch before; nfe: N."""
        super().set_timesteps(nfe)
        self.scheduler.alphas = (1 + self.sigmas**2).rsqrt()
        self.scheduler.betas = self.sigmas * self.scheduler.alphas  # its name for sigma

    def step(self, eps_hat, t, x, return_dict=False):
        """A tuple of x at the next timestep."""
        index = self.scheduler.step_index or 0  # None before the first step
        alpha, sigma = self.scheduler.alphas[index], self.scheduler.betas[index]
        return self.scheduler.step((eps_hat - sigma * x) / alpha, t, x, return_dict=return_dict)


def check_baselines(config):
    """ValueError where a run's table wants what cannot be had here: asked before the training, not after it."""
    wanted = [name for name in config.eval.baselines if name in SOLVERS or name == "best"]
    if wanted and find_spec("diffusers") is None:
        missing = f"{wanted[0]!r} needs the package diffusers, which is not installed"
        raise ValueError(f"eval.baselines: {missing}; `pip install diffusers`, or leave it out")
    if "best" in wanted and config.eval.seeds < 2:
        problem = f"{config.eval.seeds} set of images is too few for eval.baselines=[best]"
        raise ValueError(
            f"eval.seeds: {problem}, which is chosen on the first and measured on the others; use 2 or more"
        )
    for nfe in config.eval.ddim_nfe:
        if nfe >= config.teacher.steps:
            raise ValueError(f"eval.ddim_nfe: {nfe} evaluations do not fit a teacher of {config.teacher.steps} steps")
        if wanted:
            _top_knot(config, nfe)


def baseline_sampler(context, name, nfe):
    """The sampler of eval.baselines called `name`, but "best", with `nfe` evaluations of the context's teacher.

    DDIM and DDPM (eta 0 and 1) have the run's spacing, the solvers that of eval.solver_spacing.
    """
    if name in SOLVERS:
        return solver_sampler(context, name, nfe, context.config.eval.solver_spacing)
    return ddim_sampler(context, nfe, eta=0.0 if name == "ddim" else 1.0)


def solver_sampler(context, name, nfe, spacing="linspace", like=None):
    """The solver `name` of `SOLVERS` with up to `nfe` evaluations of the context's teacher, see `timesteps_of`.

    like: another of the same context and batches, whose compiled and recorded network is used.
    """
    scheduler = build_scheduler(context.config, name, nfe, spacing=spacing)
    distinct = len(timesteps_of(context.config, spacing, nfe)) - 1
    if like is not None:
        return like.through(scheduler, distinct)
    return SchedulerSampler(context.prepared_teacher, scheduler, distinct, context.execution, context.class_labels)


def timesteps_of(config, spacing, nfe):
    """0 = tau_0 < ... < tau_K, int64 [K + 1], up to the run's top knot; a solver evaluates the network at all but 0.

    `linspace`: evenly spaced, diffusers' default. `run`: the knots of the run's own spacing, and of `quad` where that
    is `angle` or given by hand: it suits the student then, and no solver. The other two are evenly spaced in a function
    of sigma = sqrt((1 - alpha_bar) / alpha_bar), and rounded to whole timesteps: `karras` in sigma^(1/7) (Karras et al.
    2022, arXiv 2206.00364, eq. 5 with rho = 7), `logsnr` in log sigma, which is minus half the log-SNR (Lu et al. 2022,
    arXiv 2206.00927). diffusers' flags for them evaluate at tau_0 too. On the digits, at
    5 and 10 evaluations, that was worse for six of eight.
    K = nfe, and less where timesteps fall together.
    """
    top = _top_knot(config, nfe)
    if spacing == "run":
        return knots(solver_spacing(config), nfe, config.teacher.steps, drop_doubles=True)
    if spacing == "linspace":
        return np.unique(np.linspace(0, top, nfe + 1).round().astype(np.int64))
    sigmas = _sigmas(config)[: top + 1]
    scale = np.log(sigmas) if spacing == "logsnr" else sigmas ** (1 / 7)
    times = np.interp(np.linspace(scale[0], scale[-1], nfe + 1), scale, np.arange(top + 1))
    return np.unique(times.round().astype(np.int64))


def _sigmas(config):
    """sqrt((1 - alpha_bar) / alpha_bar) at the timesteps of the run's teacher, float64 [steps]."""
    level = signal_levels(config.teacher.betas, config.teacher.steps)
    return np.sqrt((1 - level) / level)


def build_scheduler(config, name, nfe, order=None, spacing="linspace"):
    """diffusers' scheduler of the solver `name` with the betas of the run's teacher up to its top knot tau_K.

    So its first timestep is tau_K. DPM-Solver++ and UniPC are on the prediction of x_0 without thresholding, and end at
    noise 0. The others are on the noise, and end as DDIM does: at the teacher's lowest level.
    order: in the place of the solver's.
    """
    import diffusers  # here: it takes seconds

    if name == "ipndm":
        return IpndmAtTimesteps(diffusers.IPNDMScheduler(), *_points(config, nfe, spacing))
    solver = SOLVERS[name]
    level = signal_levels(config.teacher.betas, config.teacher.steps)
    betas = (1 - level / np.concatenate([[1.0], level[:-1]]))[: _top_knot(config, nfe) + 1]
    settings = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "solver_order": order or solver.order,
        "prediction_type": "epsilon",
        "thresholding": False,
        "timestep_spacing": "linspace",
        "lower_order_final": True,
        **SETTINGS[solver.scheduler],
    }
    scheduler = getattr(diffusers, solver.scheduler)(**settings)
    if spacing == "linspace":
        return scheduler  # as it is
    timesteps, sigmas = _points(config, nfe, spacing)
    if settings.get("final_sigmas_type") == "zero":
        sigmas[-1] = 0
    return AtTimesteps(scheduler, timesteps, sigmas)


def _points(config, nfe, spacing):
    """Timesteps [K], the top one first, and sigmas at them and at the end [K + 1]."""
    times = timesteps_of(config, spacing, nfe)[::-1].copy()
    return times[:-1], _sigmas(config)[times]


def _top_knot(config, nfe):
    """tau_K of DDIM with as many evaluations."""
    top = int(knots(solver_spacing(config), nfe, config.teacher.steps, drop_doubles=True)[-1])
    if nfe > top:
        problem = f"{nfe} evaluations repeat a timestep below {top}"
        raise ValueError(f"eval.ddim_nfe: {problem}; use fewer for diffusers' solvers")
    return top

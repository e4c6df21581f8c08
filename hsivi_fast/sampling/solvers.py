"""Other samplers of the same teacher, for the table: what a user would pick instead of training.

DDIM and DDPM are our own layers; DPM-Solver++(2M) and UniPC are diffusers' schedulers. All start from the noise x_K of
the seeds at the run's top knot tau_K, and a row of NFE evaluations calls the teacher that many times for each image.
"""

from importlib.util import find_spec

import numpy as np
import torch

from .. import ops
from ..build import device_of
from ..execution import EAGER
from ..method.schedule import knots, signal_levels
from .sampler import Batches, ddim_sampler

NAMES = {"ddim": "ddim", "ddpm": "ddpm", "dpmpp": "dpmpp_2m", "unipc": "unipc"}  # eval.baselines -> results.json
FROM_DIFFUSERS = ("dpmpp", "unipc")


class SchedulerSampler:
    """A noise-prediction network that a diffusers scheduler steps through; called like `Sampler`.

    network: (x [B, *event], t [B] int) -> noise, a module with `event_shape`.
    scheduler: a diffusers scheduler whose `step` draws nothing; nfe: evaluations of the network.
    The scheduler computes on the host between them, so with cuda_graphs it is the network's call that is recorded.
    """

    def __init__(self, network, scheduler, nfe, execution=EAGER):
        self.network, self.scheduler, self.nfe, self.execution = network, scheduler, nfe, execution
        self._predict = execution.graphed(execution.compiled(network))
        self._batches = Batches(execution)

    @torch.no_grad()
    def __call__(self, seeds, batch_size=250, on_batch=None):
        """Draw one sample a seed: arguments, result and errors as of `Sampler`."""
        return self._batches(self._all_steps, seeds, device_of(self.network), batch_size, on_batch)

    def _all_steps(self, seeds):
        """x_0 of the seeds [B], from x_K."""
        x = ops.draw_noise(seeds, 0, self.network.event_shape)
        self.scheduler.set_timesteps(self.nfe)  # forgets what it knows of the batch before
        for t in self.scheduler.timesteps.tolist():
            eps_hat = self._predict(x, torch.full_like(seeds, t))
            x = self.scheduler.step(eps_hat, t, x, return_dict=False)[0]
        return x


def check_baselines(config):
    """ValueError where a run's table wants what cannot be had here: asked before the training, not after it."""
    wanted = [name for name in config.eval.baselines if name in FROM_DIFFUSERS]
    if wanted and find_spec("diffusers") is None:
        missing = f"{wanted[0]!r} needs the package diffusers, which is not installed"
        raise ValueError(f"eval.baselines: {missing}; `pip install diffusers`, or leave it out")
    for nfe in config.eval.ddim_nfe:
        if nfe >= config.teacher.steps:
            raise ValueError(f"eval.ddim_nfe: {nfe} evaluations do not fit a teacher of {config.teacher.steps} steps")
        if wanted:
            _top_knot(config, nfe)


def baseline_sampler(context, name, nfe):
    """The sampler "ddim", "ddpm", "dpmpp" or "unipc" with `nfe` evaluations of the context's teacher.

    DDIM and DDPM (eta 0 and 1) have the run's spacing. The other two are of second order, on the prediction of x_0
    without thresholding. They have diffusers' own "linspace" spacing below the run's top knot, and end at noise 0.
    """
    if name not in FROM_DIFFUSERS:
        return ddim_sampler(context, nfe, eta=0.0 if name == "ddim" else 1.0)
    return SchedulerSampler(context.teacher, build_scheduler(context.config, name, nfe), nfe, context.execution)


def build_scheduler(config, name, nfe, order=2):
    """diffusers' scheduler "dpmpp" or "unipc" with the betas of the run's teacher up to its top knot tau_K.

    So its first timestep is tau_K.
    """
    # Here: diffusers is optional, and takes seconds to import.
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    level = signal_levels(config.teacher.betas, config.teacher.steps)
    betas = (1 - level / np.concatenate([[1.0], level[:-1]]))[: _top_knot(config, nfe) + 1]
    common = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "solver_order": order,
        "prediction_type": "epsilon",
        "thresholding": False,
        "timestep_spacing": "linspace",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }
    if name == "dpmpp":
        return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_type="midpoint", **common)
    return UniPCMultistepScheduler(predict_x0=True, solver_type="bh2", **common)


def _top_knot(config, nfe):
    """tau_K of DDIM with as many evaluations."""
    top = int(knots(config.spacing, nfe, config.teacher.steps, drop_doubles=True)[-1])
    if nfe > top:
        problem = f"{nfe} evaluations repeat a timestep below {top}"
        raise ValueError(f"eval.ddim_nfe: {problem}; use fewer for dpmpp and unipc")
    return top

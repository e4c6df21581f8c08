"""The published code itself as the baseline: a clone of github.com/longinYu/HSIVI, driven on this project's networks.

It takes the place of `bench.published`. Theirs, imported and called:

* `SpeedDDPM` around the three networks (layer, log_gamma)
* the loss functions with draws, rollout and gather
* `step_fn_speedup`, a whole iteration
* Adam, its rates and the clipping; the average of the weights
* the sampler

An update of the score network and a cycle are `step_fn_speedup` from its first line to its last. It has no call for the
student alone. So the body of `update_student` is ours: which network learns, backward, and the calls of their clipping,
optimizer and average. They empty the GPU's cache once an iteration, not once an update; here that belongs to the score
network's.

Ours besides: the schedule's tables (theirs have float32's rounding, 2e-4 of the lowest variance), and no
DistributedDataParallel. They put it around the networks even on one GPU: their `train` and `evaluate` need CUDA, NCCL
and a process group. What is called here runs on a CPU, and with torch 2.14 under two FutureWarnings
(`torch.jit.script`, `torch.cuda.amp.autocast`). Their modules import torchvision and matplotlib. Written for their
commit 06e7831.
"""

import contextlib
import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from bench.published import PublishedTraining

USED = {  # module -> names
    "models.ddpm_cifar": ("SpeedDDPM", "UNet"),
    "models.ema": ("ExponentialMovingAverage",),
    "torch_utils.losses": ("get_loss_fn_speedup", "get_step_fn_speedup"),
    "torch_utils.sampling": ("get_sampling_fn",),
    "torch_utils.utils": ("get_optimizer_speedup", "optimization_manager_speedup"),
}


class UpstreamTraining:
    """The two updates of one training iteration, by the code in the clone at `path`; otherwise as `PublishedTraining`.

    rates: (student_lr, score_net_lr) as functions of the step = 1, 2, ...
    Raises ValueError where `path` is no such clone, and for events other than [channels, size, size].
    """

    def __init__(
        self, path, student, score_net, teacher, schedule, eta, per_step, per_pixel, rates, clip=1.0, ema=0.999
    ):
        self.modules = modules = _import_clone(path)
        event = list(student.event_shape)
        if len(event) != 3 or event[1] != event[2]:
            raise ValueError(f"upstream: the published code takes images [channels, size, size], not {event}")
        self.student, self.score_net, self.teacher, self.nfe = student, score_net, teacher, schedule.nfe
        device = next(teacher.parameters()).device
        use = {True: "use", False: "dis"}
        self.config = config = SimpleNamespace(
            n_discrete_steps=schedule.nfe + 1,
            eta=eta,
            independent_log_gamma=use[per_step],
            image_gamma=use[per_pixel],
            image_channels=event[0],
            image_size=event[1],
            device=device,
            f_learning_times=1,
            grad_clip=clip,
            optimizer="Adam",
            weight_decay=0.0,
            phi_learning_rate=0.0,
            f_learning_rate=0.0,
            n_warmup_iters=0,
            cosine_lr_decay="dis",
            autocast_train=False,
        )
        in_their_order = iter((teacher, student, score_net))  # in which it builds its networks
        with mock.patch.object(modules.ddpm_cifar, "UNet", in_their_order.__next__):
            model = modules.ddpm_cifar.SpeedDDPM(config).to(device)
        self.log_gamma = student.log_scaled_gamma
        self.diffusion = SimpleNamespace(
            timesteps=torch.from_numpy(schedule.timesteps),
            one_minus_alpha_bars=torch.from_numpy(1 - schedule.alpha_bar).float(),
        )
        self.tau = self.diffusion.timesteps.to(device)
        self.state = {"whole_model": _Undistributed(module=model, device=device)}
        for name, network in (("phinet", student), ("fnet", score_net)):
            parameters = list(network.requires_grad_(True).parameters())
            self.state[f"optimizer_{name}"] = modules.utils.get_optimizer_speedup(config, parameters)
            self.state[f"ema_{name}"] = modules.ema.ExponentialMovingAverage(parameters, decay=ema)
        manager = modules.utils.optimization_manager_speedup
        self.optimize_student = _at_rate(manager(config, phi_net=True), rates[0])
        optimize_score_net = _at_rate(manager(config, phi_net=False), rates[1])
        self.loss = modules.losses.get_loss_fn_speedup(self.diffusion, config)
        self.iterate = modules.losses.get_step_fn_speedup(
            True, self.optimize_student, optimize_score_net, self.diffusion, config
        )
        self.samplers = {}

    draw = PublishedTraining.draw

    def update_student(self, step, k, x_top, noise, rollout_noise=None):
        """One update of the student; the loss.

        k: [B] in antithetic pairs; x_top: x_K [B, *event]; noise: [B, *event].
        rollout_noise: [rolled layers, B, *event]. Without it nothing in their code is replaced: it draws all four
        itself, as in a run, and only the batch size is taken from k.
        Raises ValueError for a k without pairs, or noise for another number of layers.
        """
        with self._given(k, x_top, noise, rollout_noise):
            self.student.requires_grad_(True)
            self.score_net.requires_grad_(False)
            loss = self.loss(self.state["whole_model"], self._shape(len(k)), train_phiNet=True, train_FNet=False)
            loss.backward()
            self.optimize_student(self.state["optimizer_phinet"], self.student.parameters(), step=step)
            self.state["optimizer_phinet"].zero_grad()
            self.state["ema_phinet"].update(self.student.parameters())
        return loss.item()

    def update_score_net(self, step, k, x_top, noise, rollout_noise=None):
        """One update of the score network: their iteration in a step that is not the student's.

        Arguments, result and errors are those of `update_student`.
        """
        self.config.f_learning_times = math.inf  # no step is a multiple of it
        self.state["step"] = step
        with self._given(k, x_top, noise, rollout_noise):
            return self.iterate(self.state, self._shape(len(k)))[1].item()

    def cycle(self, step, batch, f_learning_times):
        """`f_learning_times` of their iterations, the first of which has number `step`.

        One of them, whose number is a multiple of `f_learning_times`, updates the student first.
        """
        self.config.f_learning_times = f_learning_times
        self.state["step"] = step
        for _ in range(f_learning_times):
            self.iterate(self.state, self._shape(batch))

    def _shape(self, batch):
        return (batch, *self.student.event_shape)

    def _given(self, k, x_top, noise, rollout_noise):
        if rollout_noise is None:
            return contextlib.nullcontext()
        drawn = self.nfe + 1 - k  # they count layers from the top
        pairs = drawn[: len(k) // 2 + 1]
        if not torch.equal(torch.cat([pairs, self.nfe + 1 - pairs])[: len(k)], drawn):
            raise ValueError("k: the published code draws layers in antithetic pairs, k and K + 1 - k; these are none")
        if len(rollout_noise) != (rolled := self.nfe - int(k.min())):
            raise ValueError(f"rollout_noise: {rolled} layers are rolled, not {len(rollout_noise)}")
        return _handed_out(randint=[pairs], randn=[x_top], randn_like=[*rollout_noise, noise])


def upstream_sample(training, batch, x=None, noise=None):
    """Images by the sampler of the clone, [batch, *event], float32; the last layer without noise.

    x = x_K and noise [K - 1, B, *event] replace their draws: both or none.
    """
    if (x is None) != (noise is None) or noise is not None and len(noise) != training.nfe - 1:
        raise ValueError("upstream: x and the noise of K - 1 layers are given together or not at all")
    if batch not in training.samplers:  # made once, as in a run: making it collects garbage
        training.samplers[batch] = training.modules.sampling.get_sampling_fn(
            training.config, training.diffusion, training._shape(batch)
        )
    # Their last layer draws as well, and leaves it unused.
    with contextlib.nullcontext() if x is None else _handed_out(randn=[x], randn_like=[*noise, torch.zeros_like(x)]):
        return training.samplers[batch](training.state["whole_model"])


class _Undistributed(SimpleNamespace):
    """What their functions use of DistributedDataParallel: `module`, `device` and the call."""

    def __call__(self, *arguments, **keywords):
        return self.module(*arguments, **keywords)


def _at_rate(optimize, rate):
    """Their clip-and-step function with the rate of ours: without a warm-up it leaves the rate of step 1 as it is."""
    return lambda optimizer, parameters, step: optimize(optimizer, parameters, step=1, lr=rate(step))


def _handed_out(**tensors):
    """A block in which torch.<name> returns the tensors of that name in turn, whatever it is asked for."""
    return mock.patch.multiple(torch, **{name: mock.Mock(side_effect=values) for name, values in tensors.items()})


def _import_clone(path):
    """The modules in USED of the clone at `path`, by their last names.

    sys.path and sys.modules stay as they were: `models` may mean something else to others.
    """
    for name in USED:
        file = Path(path, *name.split(".")).with_suffix(".py")
        if not file.is_file():
            raise _unusable(path, f"it has no {file.relative_to(path)}")
    others = _take_out_their_names()
    folder = str(Path(path).resolve())
    sys.path.insert(0, folder)
    try:
        modules = {name: importlib.import_module(name) for name in USED}
    except Exception as error:  # whatever is wrong in the clone, one line says where
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
        _take_out_their_names()
        sys.modules.update(others)
    for name, needed in USED.items():
        missing = [each for each in needed if not hasattr(modules[name], each)]
        if missing:
            raise _unusable(path, f"{name} has no {', '.join(missing)}")
    return SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()})


def _unusable(path, what):
    return ValueError(f"upstream: {path} is no clone of github.com/longinYu/HSIVI that can be used: {what}")


def _take_out_their_names():
    """{name: module}: what sys.modules has under the clone's names, which it has no longer."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("models", "torch_utils")]
    return {name: sys.modules.pop(name) for name in names}

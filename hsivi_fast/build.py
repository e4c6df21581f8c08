"""From a configuration to its layer, teacher, student and score network."""

import sys
from pathlib import Path

import torch

from . import ops
from .checkpoints.download import locate_checkpoint
from .checkpoints.formats import NORMS, read_checkpoint
from .checkpoints.run_folder import RunFolder
from .checkpoints.weights import load_weights, read_weights
from .execution import Execution
from .method.layers import Layer, attach_log_gamma
from .method.schedule import make_schedule, signal_levels
from .nets import build_unet, network_arguments
from .nets.mixture import CorrectedTeacher, MixtureTeacher
from .parallel.world import ALONE


def choose_device(name):
    """The torch device of "auto", "cpu" or "cuda:N"; ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device: {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def prepare_device(config, backend=None, world=ALONE):
    """Choose a run's device (of several processes, this one's), its backend (`backend` in the place of the run's, if given) and the device's float32 mode:
    (device, backend that runs).

    Raises ValueError for a device, backend or precision that cannot run here.
    """
    device = choose_device(config.device) if world.size == 1 else world.device
    _set_float32_mode(config.precision, device)
    return device, ops.choose_backend(backend or config.backend, device)


def _set_float32_mode(precision, device):
    """TF32 for "tf32", full float32 otherwise: bfloat16 is the networks' own affair (`NoisePredictor`)."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: 'tf32' is a mode of CUDA devices, the device is {device}; choose fp32 or bf16")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def build_execution(config, device):
    """How a run's networks are called; ValueError where the device cannot do what the configuration asks for."""
    return Execution(device, config.compile, config.cuda_graphs)


def device_of(network):
    """The device of a network's parameters or, where it has none, of its buffers."""
    return next(network.parameters(), next(network.buffers(), None)).device


def build_layer(config, device):
    """The semi-implicit layers of a run."""
    return Layer(_schedule(config, config.nfe), config.eta, config.gamma.per_step, config.gamma.per_pixel).to(device)


def build_ddim_layer(config, nfe, eta, device):
    """The layers of DDIM with the run's betas and spacing; with many steps, knots that fall together are dropped."""
    return Layer(_schedule(config, nfe, drop_doubles=True), eta, per_step=False, per_pixel=False).to(device)


def _schedule(config, nfe, drop_doubles=False):
    return make_schedule(config.teacher.betas, config.teacher.steps, config.spacing, nfe, drop_doubles)


def load_teacher(config, device):
    """The frozen teacher: a module (x [B, *event], t [B] int) -> noise [B, *event] with `event_shape`.

    Its checkpoint is a file or folder of any kind that `read_checkpoint` knows, a known name or an address. Raises ValueError where it cannot be had or
    read, or is of another network or another noise than the configuration says.
    """
    if config.teacher.target is not None:
        teacher = _mixture_teacher(config)
    else:
        teacher = _network(config)
        checkpoint = read_checkpoint(locate_checkpoint(config.teacher.checkpoint, progress=sys.stderr.isatty()))
        load_weights(teacher, checkpoint.weights("teacher"), checkpoint.source)
        _check_what_weights_do_not_show(checkpoint, config)
    return teacher.to(device).eval().requires_grad_(False)


def _check_what_weights_do_not_show(checkpoint, config):
    """ValueError that names the first setting of which a checkpoint says something else than the configuration."""
    groups = (
        (
            "network",
            {**NORMS, **network_arguments(config.network)},
            {key: checkpoint.network[key] for key in checkpoint.stated},
        ),
        (
            "teacher",
            {"betas": config.teacher.betas, "steps": config.teacher.steps},
            checkpoint.settings.get("teacher", {}),
        ),
    )
    for group, ours, said in groups:
        for key in ("norm_eps", "norm_groups", "image_size", "heads", "betas", "steps"):
            if key in said and key in ours and said[key] != ours[key]:
                raise ValueError(
                    f"{group}.{key}: {ours[key]!r} is not what the teacher {checkpoint.source!r} was trained with; set {group}.{key}={said[key]}"
                )


def build_network(config, device):
    """A trainable network of the run's kind, with weights that depend on the run's seed alone.

    For a 2-D target it is the exact teacher plus a correction that starts at zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _network(config)
    if config.teacher.target is not None:
        network = CorrectedTeacher(_mixture_teacher(config), network)
    return network.to(device)


def _network(config):
    """The configuration's network with fresh weights, in its precision and memory layout."""
    return in_form_of(config, build_unet(config.network))


def in_form_of(config, network):
    """Give a network the configuration's precision and memory layout; returns it."""
    network.precision = config.precision
    return network.in_channels_last() if config.channels_last else network


def build_student(config, teacher, layer):
    """The student: a network that starts as the teacher, with `log_scaled_gamma` = 0, or as that of the run `init`."""
    student = attach_log_gamma(_copy_of(config, teacher), layer).to(layer.tau.device)
    return _started(config, student, "student")


def build_score_net(config, teacher):
    """The score network f, which starts as the teacher, or as that of the run `init`."""
    return _started(config, _copy_of(config, teacher), "score_net")


def _copy_of(config, teacher):
    network = build_network(config, device_of(teacher))
    if config.teacher.target is None:
        network.load_state_dict(teacher.state_dict())
    return network


def _started(config, network, stem):
    """Give a network the weights (raw, not averaged: those that its optimizer left, as in the published code) of the run that the configuration starts from."""
    if config.init is None:
        return network
    folder = Path(config.init)
    if (folder / "config.yaml").is_file():
        run = RunFolder(folder)
        if not run.checkpoints():
            raise ValueError(f"init: the run {config.init!r} has no checkpoint yet")
        folder = run.checkpoint_path(run.checkpoints()[-1])
    file = folder / f"{stem}.safetensors"
    if not file.is_file():
        raise ValueError(
            f"init: {config.init!r} is neither a trained run nor a folder with {stem}.safetensors; train the run first, or say where it is with init=FOLDER"
        )
    load_weights(network, read_weights(file), file)
    return network


def _mixture_teacher(config):
    return MixtureTeacher(config.teacher.target, signal_levels(config.teacher.betas, config.teacher.steps))

"""From a configuration to what computes: device, layers, teacher, student and score network.

`Context` is the one object that carries them through sampling, measuring and training. May import the rooms of the
mathematics, the networks, checkpoints/, parallel/, config.py and execution.py.
"""

import functools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from . import ops
from .checkpoints.autoencoder import Decoder, load_decoder
from .checkpoints.run_folder import RunFolder, check_sum
from .checkpoints.weights import load_weights, read_teacher, read_weights
from .config import Config, ObjectiveConfig
from .density.teacher import BridgeTeacher, ToTarget
from .execution import Execution
from .method.bridge import BridgeSchedule
from .method.class_labels import ClassLabels, GuidedTeacher
from .method.layers import Layers, attach_log_gamma
from .method.parametrisation import noise_coefficients
from .method.schedule import make_schedule, signal_levels
from .method.windows import Windows
from .nets import all_arguments, build_unet
from .nets.mixture import CorrectedTeacher, MixtureTeacher
from .nets.prepared import Prepared
from .parallel.world import World

SPAN_OF_KNOTS = (
    100.0  # the last knot of a bridge, as its networks are shown it: embeddings tell few small numbers apart
)


@dataclass(frozen=True)
class Context:
    """What a command computes with; made by `build_context`, and handed on as it is.

    config: the run's; world: the processes of it; device: of this process; backend: the one that runs, "torch" or
    "triton"; execution: how networks are called; layers: the run's K layers; teacher: a module, or None where nobody
    asked for it; class_labels: the class of each seed; decoder: of the latents that a run with `teacher.vae` makes, or
    of the coordinates in which one with a `target` draws, or None.
    """

    config: Config
    world: World
    device: torch.device
    backend: str
    execution: Execution
    layers: Layers
    teacher: nn.Module | None = None
    class_labels: ClassLabels = field(default_factory=ClassLabels)
    decoder: Decoder | ToTarget | None = None

    @property
    def objective(self):
        """The run's objective; the published one without a configuration."""
        return self.config.objective if self.config is not None else ObjectiveConfig()

    @functools.cached_property
    def prepared_teacher(self):
        """The teacher as it is called: one copy for all who call it."""
        return Prepared(self.teacher)

    @functools.cached_property
    def matching(self):
        """Where the student is compared with the teacher: the layers themselves, or `Windows` of them."""
        if self.objective.match == "knots":
            return self.layers
        teacher = self.config.teacher
        levels = signal_levels(teacher.betas, teacher.steps)
        return Windows(self.layers, self.layers.tau.tolist(), levels, self.objective.gamma_min)

    def images(self, samples):
        """Images [B, C, H, W] in -1 .. 1 of a sampler's samples: latents decoded, others (and points) as they are."""
        if self.decoder is None:
            return samples
        return self.decoder(samples, lambda n: self.world.mark_detail(f"{n} images decoded"))

    def image_shape(self, event_shape):
        """(C, H, W) of the images of samples of a shape; that itself where nothing is decoded."""
        return tuple(event_shape) if self.decoder is None else self.decoder.image_shape(event_shape)

    def with_teacher(self, teacher=None):
        """The same with a teacher: the one given, or the one that the configuration names."""
        return replace(self, teacher=teacher or load_teacher(self.config, self.device))

    def with_bridge(self, bridge, target=None):
        """The same for a run with a `target`, whose `Bridge` has been found: its draws are of the target's parameters.

        target: the `Target`, where there will be training or measuring: the teacher is made of it.
        """
        context = self.with_base(bridge.mean, bridge.factor)
        if target is None:
            return context
        self.layers.weigh(bridge.scales**2)
        return replace(context, teacher=BridgeTeacher(target, bridge).to(self.device))

    def with_base(self, mean, factor):
        """The same for a run with a `target` of which only the base is known: enough for draws of its parameters."""
        return replace(self, decoder=ToTarget(mean, factor, self.config.target.constraints).to(self.device))


def build_context(config, world, teacher=False):
    """The `Context` of a configuration; `teacher` says whether it is loaded too.

    Chooses the process's device and backend, and the device's float32 mode and convolutions. Raises ValueError for a
    device, backend, precision or way of execution that cannot run here.
    """
    device = choose_device(config.device) if world.size == 1 else world.device
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what asks for the current GPU, as libraries do, means this one
    _set_float32_mode(config.precision, device)
    backend = ops.choose_backend(config.backend, device)
    execution = Execution(device, config.compile, config.cuda_graphs)
    execution.choose_convolutions()
    labels, decoder = build_class_labels(config, device), build_decoder(config, device)
    layers = build_layers(config, device)
    context = Context(config, world, device, backend, execution, layers, class_labels=labels, decoder=decoder)
    return context.with_teacher() if teacher else context


def choose_device(name):
    """The torch device of "auto", "cpu" or "cuda:N"; ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    # Before torch reads it: a number that does not fit into a byte is another error there.
    if kind == "cuda" and not (torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()):
        raise ValueError(f"device: {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def _set_float32_mode(precision, device):
    """TF32 for "tf32", full float32 otherwise: bfloat16 is the networks' own affair (`NoisePredictor`)."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: 'tf32' is a mode of CUDA devices, the device is {device}; choose fp32 or bf16")
    if precision != "fp32" and (old := ops.old_capability(device)):
        problem = f"{precision!r} needs a GPU of compute capability {old[1]} or newer, this one has {old[0]}"
        raise ValueError(f"precision: {problem}; choose fp32")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def device_of(network):
    """The device of a network's parameters or, where it has none, of its buffers."""
    return next(network.parameters(), next(network.buffers(), None)).device


def build_layers(config, device):
    """The semi-implicit layers of a run."""
    if config.target is not None:
        return Layers(BridgeSchedule(config.nfe), 1.0, config.gamma.per_step, config.gamma.per_pixel).to(device)
    teacher = config.teacher
    schedule = make_schedule(teacher.betas, teacher.steps, config.spacing, config.nfe)
    return Layers(schedule, config.eta, config.gamma.per_step, config.gamma.per_pixel).to(device)


def build_ddim_layers(config, nfe, eta, device, own_knots=False):
    """The layers of DDIM with the run's betas; with many steps, knots that fall together are dropped.

    They are spaced as `solver_spacing` says, or with `own_knots` as the run's layers are.
    """
    spacing = config.spacing if own_knots else solver_spacing(config)
    schedule = make_schedule(config.teacher.betas, config.teacher.steps, spacing, nfe, drop_doubles=True)
    return Layers(schedule, eta, per_step=False, per_pixel=False).to(device)


def solver_spacing(config):
    """The spacing of other samplers of the teacher: the run's own, and "quad" where that is made for a student."""
    return config.spacing if config.spacing in ("quad", "uniform") else "quad"


def load_teacher(config, device):
    """The frozen teacher: a module (x [B, *event], t [B] int, class labels [B] or None) -> noise [B, *event].

    Its checkpoint is a file or folder of any kind that `read_checkpoint` knows, a known name or an address. Raises
    ValueError where it cannot be had or read, or is of another network or another noise than the configuration says.
    """
    if config.target is not None:
        raise ValueError("target: its bridge has to be found before there is a teacher")
    if config.teacher.target is not None:
        teacher = _mixture_teacher(config)
    else:
        teacher = read_teacher(config, _network(config), progress=sys.stderr.isatty())
        if config.teacher.guidance is not None:
            teacher = GuidedTeacher(teacher, config.teacher.guidance, config.teacher.null_class)
    return teacher.to(device).eval().requires_grad_(False)


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
    """The configuration's network with fresh weights, in the configuration's form."""
    return in_form_of(config, build_unet(config.network))


def in_form_of(config, network):
    """Give a network the configuration's precision, memory layout, and the way to the noise in x_t; returns it.

    Every network of a run passes here: teacher, student and score network, wherever they are built. Raises ValueError
    where teacher.prediction is not of such a network.
    """
    teacher = config.teacher
    check_classes(config, network)
    network.precision, network.timestep_scale = config.precision, teacher.timestep_scale
    if config.target is not None:
        network.timestep_scale = SPAN_OF_KNOTS / config.nfe
    if network.takes_sigma != (teacher.prediction == "denoiser"):
        problem = f"{teacher.prediction!r} is not what the network predicts"
        kind, wanted = ("one of EDM's", "denoiser") if network.takes_sigma else ("shown timesteps", "epsilon, x_0 or v")
        raise ValueError(f"teacher.prediction: {problem}, which is {kind}; set teacher.prediction={wanted}")
    if teacher.prediction != "epsilon":
        levels = signal_levels(teacher.betas, teacher.steps)
        network.convert_by(noise_coefficients(teacher.prediction, levels, teacher.timestep_scale))
    return network.in_channels_last() if config.channels_last else network


def check_classes(config, network):
    """ValueError where what a configuration says of classes does not fit its network."""
    count, teacher = network.classes, config.teacher
    for key, value in (("classes", config.classes), ("null_class", teacher.null_class), ("guidance", teacher.guidance)):
        if value is not None and count is None:
            where = key if key == "classes" else f"teacher.{key}"
            shown = list(value) if key == "classes" else value
            raise ValueError(f"{where}: {shown}, and the network has no classes; leave it out")
    for label in config.classes or ():
        if label >= count:
            raise ValueError(f"classes: {label} is none of the network's {count}; use 0 to {count - 1}")
    if len(set(config.classes or ())) < len(config.classes or ()):
        raise ValueError(f"classes: {list(config.classes)} names one twice")
    if teacher.null_class is not None:
        embeds_one_hot = network.takes_sigma
        if embeds_one_hot != (teacher.null_class == -1) or teacher.null_class >= count:
            wanted = "-1 for one of EDM's networks" if embeds_one_hot else f"a row of its table, 0 to {count - 1}"
            raise ValueError(f"teacher.null_class: {teacher.null_class} is no label of the network; use {wanted}")
        if teacher.null_class in (config.classes or ()):
            raise ValueError(f"classes: {teacher.null_class} is teacher.null_class, which is no class")
    if teacher.guidance is not None and teacher.null_class is None:
        problem = f"{teacher.guidance} needs a teacher that has learned what no class is"
        raise ValueError(f"teacher.guidance: {problem}; say its label with teacher.null_class, or leave it out")


def build_class_labels(config, device):
    """The `ClassLabels` of a run: uniform over `classes`, and over all but the null class without them."""
    count = None if config.teacher.target is not None else all_arguments(config.network).get("classes")
    chosen = config.classes
    if count is not None and chosen is None:
        chosen = [label for label in range(count) if label != config.teacher.null_class]
    return ClassLabels(count, chosen).to(device)


def build_decoder(config, device):
    """The `Decoder` that `teacher.vae` names, None without one; errors as of `load_decoder`."""
    if config.teacher.vae is None:
        return None
    return load_decoder(config.teacher.vae, all_arguments(config.network).get("image_channels"), device)


def build_student(context, from_init=True):
    """The student: a network that starts as the teacher, with `log_scaled_gamma` = 0.

    from_init: whether it starts as that of the run that the configuration's `init` names, if there is one.
    """
    student = attach_log_gamma(_copy_of_teacher(context), context.layers).to(context.device)
    return _initialised(student, context.config, "student") if from_init else student


def build_score_net(context, from_init=True):
    """The score network f, which starts as the teacher; `from_init` as of `build_student`.

    With a `target` it is the auxiliary score plus a correction, which vanishes where a student is right. The student
    has no such part: it is called where nobody has the target.
    """
    score_net = _copy_of_teacher(context)
    if context.config.target is not None:
        score_net = CorrectedTeacher(context.teacher, score_net)
    return _initialised(score_net, context.config, "score_net") if from_init else score_net


def build_untrained_student(context):
    """A student without its weights, for a checkpoint to be loaded into: no gradients, and no teacher is needed."""
    network = attach_log_gamma(build_network(context.config, context.device), context.layers)
    return network.to(context.device).eval().requires_grad_(False)


def _copy_of_teacher(context):
    network = build_network(context.config, context.device)
    if context.config.teacher.checkpoint is not None:
        teacher = context.teacher.network if isinstance(context.teacher, GuidedTeacher) else context.teacher
        network.load_state_dict(teacher.state_dict())
    return network


def _initialised(network, config, stem):
    """Give a network the weights of the run that `init` names.

    They are the raw ones and not the averaged: those that the optimizer left, as in the published code.
    """
    if config.init is None:
        return network
    folder, _ = checkpoint_to_start_from(config)
    file = folder / f"{stem}.safetensors"
    if not file.is_file():
        problem = f"init: {config.init!r} is neither a trained run nor a folder with {stem}.safetensors"
        raise ValueError(f"{problem}; train the run first, or say where it is with init=FOLDER")
    try:
        check_sum(file)
    except ValueError as error:
        raise ValueError(f"init: {file}: damaged ({error}); start from another checkpoint") from None
    load_weights(network, read_weights(file), file)
    return network


def checkpoint_to_start_from(config):
    """(folder, words): the weights that `init` and `init_step` name, and what they are called in the log.

    Raises ValueError where the run has no such checkpoint.
    """
    folder, wanted = Path(config.init), config.init_step
    if not (folder / "config.yaml").is_file():
        if wanted != "newest":
            problem = f"{wanted!r} is a checkpoint of a run, and init={config.init!r} is no run's folder"
            raise ValueError(f"init_step: {problem}; leave it out")
        return folder, str(folder)
    run = RunFolder(folder)
    steps = run.checkpoints()
    if not steps:
        raise ValueError(f"init: the run {config.init!r} has no checkpoint yet")
    step, remark = (steps[-1], "the newest") if wanted == "newest" else (wanted, "by init_step")
    if wanted == "best":
        best = run.best_checkpoint()
        if best is None:
            problem = f"'best', and no checkpoint of {config.init!r} was measured"
            raise ValueError(f"init_step: {problem}; choose newest or one of {_listed(steps)}")
        step, remark = best[0], f"its best, distance {best[1]:.4g}"
    if step not in steps:
        raise ValueError(f"init_step: {config.init!r} has no checkpoint of step {step}; it has {_listed(steps)}")
    return run.checkpoint_path(step), f"step {step} of {folder} ({remark})"


def _listed(numbers):
    return ", ".join(map(str, numbers))


def _mixture_teacher(config):
    return MixtureTeacher(config.teacher.target, signal_levels(config.teacher.betas, config.teacher.steps))

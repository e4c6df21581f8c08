"""A run is one YAML file plus dotted overrides; this file says what may stand in it.

OmegaConf reads and merges, pydantic checks types and ranges. `load_config` is the way in. What it returns is a frozen
dataclass. What is wrong with the input is a ValueError of one line that names the key.
"""

import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"
if not CONFIGS.is_dir():  # a checkout, or an editable install: configs/ stands at the repository's root
    CONFIGS = Path(__file__).resolve().parent.parent / "configs"

ASSETS = PACKAGE / "assets"

# Names that `teacher.checkpoint` may have, and where the files are.
PUBLISHED_TEACHERS = {
    "cifar10": "https://github.com/tqch/ddpm-torch/releases/download/checkpoints/cifar10_2040.pt",
    "imagenet64": "https://openaipublic.blob.core.windows.net/diffusion/march-2021/imagenet64_uncond_100M_1500K.pt",
    "edm_cifar10": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
    "edm_cifar10_cond": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl",
    "edm_ffhq64": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-ffhq-64x64-uncond-vp.pkl",
    "edm_afhqv2": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-afhqv2-64x64-uncond-vp.pkl",
    "edm_imagenet64": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-imagenet-64x64-cond-adm.pkl",
}
_EDM_LICENCE = "NVIDIA's, CC BY-NC-SA 4.0: not for commercial use, and nor is what is distilled from it"
# What has to be said of a teacher's licence where the file is downloaded, and beside what is made of it.
LICENCES = {name: _EDM_LICENCE for name in PUBLISHED_TEACHERS if name.startswith("edm_")}

# Names that `eval.reference` may have, and where EDM publishes the statistics of these data sets on Inception.
PUBLISHED_REFERENCES = {
    "cifar10": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz",
    "ffhq64": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/ffhq-64x64.npz",
    "afhqv2": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/afhqv2-64x64.npz",
    "imagenet64": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/imagenet-64x64.npz",
}
# A name of a file that has no such address: `hsivi prepare` makes it of pictures.
REFERENCES_TO_MAKE = ("celeba64",)

settings = dataclass(frozen=True, config=ConfigDict(extra="forbid"))


def _finite(value):
    if value != value or value in (float("inf"), float("-inf")) or abs(value) > 1e300:
        raise ValueError("must be a finite number")
    return float(value)


def _file_name(value):
    """A name that becomes a folder under runs/."""
    if value in ("", ".", "..") or "/" in value or not value.isprintable() or len(value.encode()) > 200:
        raise ValueError("must be a plain file name, without '/' and at most 200 bytes")
    return value


def _device(value):
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _step_to_start_from(value):
    if value not in ("newest", "best") and (not isinstance(value, int) or not 0 < value <= 1_000_000_000):
        raise ValueError("must be newest, best, or the step of a checkpoint")
    return value


def _no_bool(value):
    """True equals 1, so it would pass where numbers are listed."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _count(most, least=1):
    """An integer from `least` to `most`."""
    return Annotated[StrictInt, Field(ge=least, le=most)]


# The upper bounds are far above every real run. They keep numbers within what can be multiplied, counted and estimated;
# what a machine can hold is asked at the start (training/estimate.py).
MOST_IMAGES = 10_000_000  # of one measurement
# Of a run with a target: those that it has by itself, and all.
DENSITY_DEFAULTS = ("base", "mean_field", "full_rank", "langevin", "particles")
DENSITY_BASELINES = (*DENSITY_DEFAULTS, "single_layer")

Number = Annotated[StrictInt | StrictFloat, AfterValidator(_finite)]
Positive = Annotated[Number, Field(gt=0)]
Rate = Annotated[Number, Field(gt=0, le=1000)]  # of learning
Seconds = Annotated[Number, Field(gt=0, le=1_000_000)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Count = _count(1_000_000_000)
Natural = _count(1_000_000_000, least=0)
BatchSize = _count(100_000)
Evaluations = _count(10_000)
Channels = _count(65_536)
Knots = Annotated[tuple[_count(1_000_000, least=0), ...], Field(max_length=10_001)]  # by hand
Betas = Annotated[tuple[Number, ...], Field(min_length=2, max_length=1_000_000)]
Spacing = Literal["quad", "uniform", "angle"] | Knots


@settings
class NetworkConfig:
    """The noise-prediction network: a `name` known to `nets`, or a `family` with its sizes, or both (overrides)."""

    name: StrictStr | None = None
    family: Literal["ddpm", "adm", "mlp", "song", "dhariwal"] | None = None
    image_channels: _count(1024) | None = None
    image_size: _count(4096) | None = None
    channels: Channels | None = None
    multipliers: Annotated[tuple[_count(64), ...], Field(min_length=1, max_length=10)] | None = None
    res_blocks: _count(16, least=0) | None = None
    # ddpm: true or false a level; adm: downsampling factors; song, dhariwal: resolutions
    attention: Annotated[tuple[StrictBool | _count(4096), ...], Field(max_length=10)] | None = None
    attention_up: Annotated[tuple[StrictBool, ...], Field(max_length=10)] | None = None  # ddpm
    middle: StrictBool | None = None  # ddpm
    middle_attention: StrictBool | None = None  # ddpm
    middle_norm_groups: _count(65_536, least=0) | None = None  # ddpm
    middle_scale: Annotated[Number, Field(gt=0, le=1000)] | None = None  # ddpm
    heads: _count(1024) | None = None  # adm
    up_heads: _count(1024) | None = None  # adm
    head_channels: Channels | None = None  # ddpm
    out_channels: _count(2048) | None = None  # ddpm and adm
    scale_shift: StrictBool | None = None  # ddpm and adm
    classes: _count(1_000_000) | None = None  # not mlp
    freq_shift: _count(1, least=0) | None = None  # ddpm
    cos_first: StrictBool | None = None  # ddpm
    down_padding: _count(1, least=0) | None = None  # ddpm
    center_input: StrictBool | None = None  # ddpm
    norm_groups: Channels | None = None
    norm_eps: Annotated[Number, Field(gt=0, le=1)] | None = None
    embedding: Literal["positional", "fourier"] | None = None  # song
    encoder: Literal["standard", "residual"] | None = None  # song
    noise_multiplier: _count(64) | None = None  # song: of the width of the embedding of noise
    resample_filter: Annotated[tuple[Number, ...], Field(min_length=2, max_length=16)] | None = None  # song
    layers: _count(256) | None = None  # mlp
    dim: _count(10_000) | None = None  # mlp: coordinates
    time_channels: Channels | None = None  # ddpm and mlp


@settings
class BetasConfig:
    """Betas from a start to an end, as diffusers' schedulers have them: see `method.schedule.signal_levels`."""

    kind: Literal["linear", "scaled_linear", "sigmoid"]
    start: Annotated[Number, Field(gt=0, lt=1)] = 1.0e-4
    end: Annotated[Number, Field(gt=0, lt=1)] = 0.02


@settings
class TeacherConfig:
    """The frozen teacher and the noise that it was trained with: a checkpoint, or the exact score of a 2-D `target`."""

    checkpoint: StrictStr | None = None
    target: Literal["checkerboard", "ring", "swiss_roll"] | None = None
    # A folder of diffusers' AutoencoderKL or VQModel: the teacher makes latents, which that decodes to images.
    vae: StrictStr | None = None
    betas: Literal["linear", "cosine", "cosine_4000", "edm"] | BetasConfig | Betas = "linear"
    steps: _count(1_000_000, least=2) = 1000
    # What its network predicts: see `method/parametrisation.py`. "denoiser" is EDM's.
    prediction: Literal["epsilon", "x_0", "v", "denoiser"] = "epsilon"
    # The label that stands for no class, where the teacher has learned what that is: a row of its table of classes, or
    # -1 for the families song and dhariwal.
    null_class: _count(1_000_000, least=-1) | None = None
    # Classifier-free guidance: the noise without a class, and so many times the way from there to that of the class.
    guidance: Annotated[Number, Field(ge=0, le=100)] | None = None
    # All networks of the run are shown t * timestep_scale: for teachers that were trained with rescaled timesteps.
    timestep_scale: Positive = 1.0


@settings
class TargetConfig:
    """A density of one's own in the place of a teacher: see `density.target.load_target`."""

    # A shipped name, or "path/to/file.py:function". The file is Python code, and it is run.
    log_density: StrictStr
    dim: _count(10_000)  # unconstrained coordinates
    score: StrictStr | None = None  # a function of such a file: the gradient, in the place of autograd's
    # A constraint of torch.distributions for each coordinate, or one for all: real, positive, unit_interval, ...
    constraints: tuple[StrictStr, ...] | StrictStr | None = None
    parameters: tuple[StrictStr, ...] | None = None  # their names


@settings
class BridgeConfig:
    """The densities between a Gaussian base and the target, and how the base and the paths are found."""

    # Where the layers' densities are: by equal steps of the particles' effective size, or of lambda or an angle.
    schedule: Literal["adaptive", "linear", "cosine"] = "adaptive"
    # The base, where it is not fitted: a number for each coordinate.
    mean: Annotated[tuple[Number, ...], Field(min_length=1)] | None = None
    scale: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    chains: _count(1_000_000, least=2) = 512  # of the fit
    moves: _count(1_000_000, least=2) = 400  # of each chain
    spread: Positive = 2.0  # the deviation that the chains start with: wider than the target, to find all its modes
    # The noise of a path's last step from one knot to the next, its variance in squared scales of the density there.
    # 0.1 with transport and 0.5 with descent, unless it is said: in many dimensions a student learns single paths.
    noise: Annotated[Number, Field(gt=0, le=2)] | None = None
    # How states at two knots are paired: by the cheapest transport, or by the particles' own descent.
    coupling: Literal["transport", "descent"] | None = None  # transport in up to three dimensions, unless it is said


@settings
class GammaConfig:
    """The shape of the learned noise scale log_gamma: one for all layers or one a layer, one number or one a pixel."""

    per_step: StrictBool = False
    per_pixel: StrictBool = True


@settings
class StartConfig:
    """What the networks are before the distillation.

    `ddim`: the student is the teacher. `trajectory`: it has learned the teacher's own paths, layer by layer.
    """

    kind: Literal["ddim", "trajectory"] = "ddim"
    updates: Count = 300  # of the student, on the paths
    trajectories: _count(100_000_000) = 2000
    substeps: _count(1000) = 4  # of the solver in each layer
    # The timestep that the paths come from: the top knot, unless it is said. From above it the student's first layer
    # takes the noise of `top` as if it were at its own, lower knot.
    top: Count | None = None
    solver: Literal["dpmpp", "ddim"] = "dpmpp"
    lr: Rate = 4.0e-4
    batch_size: BatchSize | None = None  # train.batch_size, unless it is said
    # Updates of the score network alone before the student moves, with either kind.
    score_net_updates: Natural = 0


@settings
class ObjectiveConfig:
    """Where the student is compared with the teacher, and by what loss."""

    # knots: at tau_{k-1}, as published; windows: at timesteps from there to below tau_k.
    match: Literal["knots", "windows"] = "knots"
    gamma_min: Annotated[Number, Field(ge=0, le=1)] = 0.5  # windows only
    alpha: Annotated[Number, Field(ge=0, le=2)] = 0.5  # 1/2 is the published form
    # The start's regression beside the loss: this share of the loss's own gradient. 0: none.
    anchor: Annotated[Number, Field(ge=0, le=1000)] = 0.0
    anchor_batch: BatchSize | None = None  # train.batch_size, unless it is said


@settings
class RolloutConfig:
    """How training states are made: `fresh` for every update, or `pooled`, one rollout for all updates of a cycle."""

    mode: Literal["pooled", "fresh"] = "pooled"
    redraw: _count(1000) = 1  # pooled only: how often each stored mean is used, each time with new noise
    chunk: Count = 4096  # the largest batch of one rollout call, for memory


@settings
class TrainConfig:
    """The distillation; `steps` counts updates of the score network."""

    steps: Count = 200000
    batch_size: BatchSize = 128  # over all processes
    f_learning_times: _count(1_000_000) = 20  # every so many steps the student is updated too
    student_lr: Rate = 1.6e-5
    log_gamma_lr: Rate | None = None  # student_lr, unless it is said
    score_net_lr: Rate = 8.0e-5
    warmup: Natural = 2500
    lr_rule: Literal["decay", "cosine", "linear", "constant"] = "decay"
    beta1: Fraction = 0.9  # Adam's, of both networks
    clip: Positive = 1.0
    ema: Fraction = 0.999


@settings
class EvalConfig:
    """What is measured: each `every` steps (0: at the end alone), on `seeds` sets of `num_samples` images (0: none)."""

    every: Natural = 0
    num_samples: _count(MOST_IMAGES, least=0) = 500
    seeds: _count(1000) = 3
    # The feature network; by default the data set's own, and Inception where it has none.
    metric: Literal["digits", "mnist", "inception"] | None = None
    # In the place of the data: a known name, an address, or a file of statistics (mu, sigma) or of images (arr_0).
    reference: StrictStr | None = None
    # torch-fidelity's weights of Inception; otherwise they are looked for in torch's cache.
    inception: StrictStr | None = None
    # Kernel distance, precision and recall: they need the data itself.
    kid: StrictBool = False
    prc: StrictBool = False
    # Other samplers of the teacher in the table, and the evaluations that each is given. All but ddim and ddpm are
    # diffusers' solvers; best is the one of them, with its spacing, that is the best on the first set of images.
    # Those of the second list are for a run with a target.
    baselines: tuple[
        Literal["ddim", "ddpm", "dpmpp", "dpmpp3", "unipc", "unipc3", "deis", "deis3", "ipndm", "best"]
        | Literal["base", "mean_field", "full_rank", "langevin", "particles", "single_layer"],
        ...,
    ] = ("ddim",)
    # Where the solvers' timesteps are, see `timesteps_of` in sampling/solvers.py.
    solver_spacing: Literal["linspace", "karras", "logsnr", "run"] = "linspace"
    ddim_nfe: Annotated[tuple[Evaluations, ...], Field(min_length=1, max_length=100)] = (5, 10, 20, 50)


@settings
class DistributedConfig:
    """How several processes do the work. Nothing here changes what is computed: it may differ when a run goes on."""

    # plain: one process without DeepSpeed; auto: DeepSpeed where there are several.
    engine: Literal["auto", "plain", "deepspeed"] = "auto"
    zero: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_bool)] = 1  # DeepSpeed's ZeRO stage
    accumulation: BatchSize = 1  # micro-batches that a process takes its share of a batch in, for memory
    deepspeed: StrictStr | None = None  # a JSON file with more of DeepSpeed's settings (bucket sizes, overlap)
    connect_timeout: Seconds = 300  # seconds until all processes have to have met
    timeout: Seconds = 600  # seconds without progress after which a process counts as hanging, and of one collective


@settings
class LogConfig:
    """What is shown of a training besides numbers; nothing here changes what is computed."""

    # Steps between two grids of samples; 0: one with each measurement and at the end, if the run is measured at all.
    images_every: Natural = 0
    wandb: StrictStr | None = None  # a project of Weights & Biases, which scalars and pictures go to as well


@settings
class TeacherTrainConfig:
    """`hsivi teacher`: the loss of what the network predicts, on `data`."""

    steps: Count = 6000
    batch_size: BatchSize = 128
    lr: Rate = 1.0e-3
    warmup: Natural = 200
    ema: Fraction = 0.999
    label_dropout: Fraction = 0.0  # the share of images whose label is teacher.null_class
    # Where noise levels come from: every timestep as often, or ln(sigma) normal with -1.2 +- 1.2, as EDM's.
    levels: Literal["uniform", "edm"] = "uniform"


@settings
class Config:
    """One run. configs/README.md has the same list in words."""

    network: NetworkConfig
    teacher: TeacherConfig
    nfe: Evaluations
    # A density of one's own in the place of a teacher, and the bridge to it.
    target: TargetConfig | None = None
    bridge: BridgeConfig = dataclasses.field(default_factory=BridgeConfig)
    # Reference images for the metric, and the teacher's training data.
    data: Literal["digits", "mnist", "cifar10", "celeba64", "images"] | None = None
    # mnist: a folder of idx files; images: a folder of pictures or an npz file; others: see `load_data` in data.py.
    data_path: StrictStr | None = None
    # A trained run, whose student and score network this one starts from instead of the teacher.
    init: StrictStr | None = None
    # Which of that run's checkpoints: the newest, the best by its own distance, or the one of a step.
    init_step: Annotated[StrictStr | StrictInt, AfterValidator(_step_to_start_from)] = "newest"
    # Which classes the run's samples are of, where its network has them: all, unless it is said.
    classes: Annotated[tuple[_count(999_999, least=0), ...], Field(min_length=1, max_length=1_000_000)] | None = None
    spacing: Spacing = "quad"
    eta: Annotated[Number, Field(gt=0, le=1)] = 0.2
    gamma: GammaConfig = dataclasses.field(default_factory=GammaConfig)
    start: StartConfig = dataclasses.field(default_factory=StartConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    backend: Literal["auto", "torch", "triton"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    channels_last: StrictBool = False  # the memory layout inside the UNets
    compile: StrictBool = False  # the networks by torch.compile
    cuda_graphs: StrictBool = False  # rollout, both updates and the sampler from CUDA graphs
    device: Annotated[StrictStr, AfterValidator(_device)] = "auto"
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    teacher_train: TeacherTrainConfig = dataclasses.field(default_factory=TeacherTrainConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    log_every: Count = 100
    save_every: Count = 5000
    name: Annotated[StrictStr, AfterValidator(_file_name)] = "run"


@dataclasses.dataclass(frozen=True)
class Phases:
    """What a run's steps are: `start` updates of the student on paths, `head` of the score network alone, `train`."""

    start: int
    head: int
    train: int

    @property
    def total(self):
        """All steps of the run."""
        return self.start + self.head + self.train


def phases_of(config):
    """The `Phases` of a configuration; without a start, all steps are the distillation's."""
    start = config.start.updates if config.start.kind == "trajectory" else 0
    return Phases(start, config.start.score_net_updates, config.train.steps)


def load_config(config, overrides=()):
    """Read a run's configuration.

    `config` is a name in configs/ ("digits") or the path of a YAML file; `overrides` are strings "train.steps=400".
    A file may start from another one, `base: NAME`, and say only what is different.
    A teacher checkpoint given as a relative path is looked for beside the file, in the working directory, and among the
    teachers that ship with the package.
    Returns a frozen `Config`. Raises ValueError, in one line, for whatever is wrong.
    """
    path = _find(config)
    values = _read(path)
    for override in overrides:
        values = _override(values, override)
    values.setdefault("name", Path(path).stem)
    values = _with_absolute_paths(values, Path(path).parent)
    return _validated(values)


def resolved_dict(config):
    """The configuration as plain nested dicts, lists and scalars, as config.yaml in a run's folder holds it.

    A file that ships with the package stands there by its name, so that it is the same in every checkout.
    """
    return _with_files(_listed(dataclasses.asdict(config)), _shipped_name)


def resolved_yaml(config):
    """The configuration as the text of config.yaml."""
    return _omegaconf().to_yaml(_omegaconf().create(resolved_dict(config)))


def read_resolved(file):
    """The plain values of a run's config.yaml; ValueError, in one line, where it is not readable."""
    try:
        return _omegaconf().to_container(_omegaconf().load(file))
    except Exception as error:  # whatever the YAML parser raises: its message spans lines
        raise ValueError(f"{Path(file).name} is not readable: {' '.join(str(error).split())}") from None


def config_from_dict(values):
    """The inverse of `resolved_dict`; raises ValueError like `load_config`."""
    return _validated(_with_files(values, _shipped_file))


def change_config(config, changes):
    """The configuration with other values, as {"backend": "torch", "eval.metric": "mnist"}; None changes nothing.

    Raises ValueError, in one line, for an unknown key or a value that does not fit.
    """
    for key, value in changes.items():
        _check_known(key)
        if value is not None:
            config = _replaced(config, key.split("."), value, key)
    return config


def _replaced(section, path, value, key):
    name, *rest = path
    value = _replaced(getattr(section, name), rest, value, key) if rest else value
    try:
        return dataclasses.replace(section, **{name: value})
    except ValidationError as error:
        raise ValueError(f"{key}: {_message(error.errors(include_url=False)[0])}") from None


def config_difference(before, now, prefix=""):
    """The first key in which two resolved configurations differ, in words, or None where they agree.

    before, now: as of `resolved_dict`; the value of `before` comes first.
    """
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            difference = config_difference(old, new, f"{prefix}{key}.")
            if difference:
                return difference
        elif old != new:
            return without_password(f"{prefix}{key} = {old!r}, not {new!r}")
    return None


def without_password(text):
    """A text for messages: in its addresses users, passwords and what follows a question mark are hidden."""
    return re.sub(r"(://[^\s?#'\"]*\?)[^\s#'\"]*", r"\1***", re.sub(r"://[^\s/?#'\"]*@", "://***@", text))


def without_passwords(values):
    """Nested dicts and lists, as of `resolved_dict`, for others to read: `without_password` of every text."""
    if isinstance(values, dict):
        return {key: without_passwords(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_passwords(value) for value in values]
    return without_password(values) if isinstance(values, str) else values


def uses_deepspeed(config, world_size):
    """Whether the networks of a run on `world_size` processes are trained by DeepSpeed."""
    engine = config.distributed.engine
    return engine == "deepspeed" or (engine == "auto" and world_size > 1)


def _read(path, above=()):
    """The keys of a YAML file, over those of the one that its `base` names."""
    if path.resolve() in above:
        raise ValueError(f"config {path}: base leads back to it")
    try:
        values = _omegaconf().load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: {error}") from None
    except Exception as error:  # whatever the YAML parser raises: its message spans lines
        raise ValueError(f"config {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not _omegaconf().is_dict(values):
        raise ValueError(f"config {path}: expected keys and values, got a {type(values).__name__}")
    values = _plain(values, f"config {path}: ")
    if isinstance(values.get("network"), str):
        # "cifar10" is short for {name: cifar10}, so that overrides can go inside.
        values["network"] = {"name": values["network"]}
    values = _with_absolute_paths(values, path.parent)
    base = values.pop("base", None)
    if base is None:
        return values
    # Beside the file first, but for the file itself: a cifar10.yaml of one's own may start from the shipped one.
    candidates = (path.parent / f"{base}.yaml", path.parent / str(base))
    beside = [file for file in candidates if file.is_file() and file.resolve() != path.resolve()]
    below = _read(beside[0] if beside else _find(base), (*above, path.resolve()))
    empty = [key for key, value in values.items() if value == {}]
    if empty:
        raise ValueError(f"config {path}: {empty[0]}: {{}} changes nothing of {base}; leave it out, or say a key of it")
    return _merged(below, _omegaconf().create(values), f"config {path}: ")


def _find(config):
    config = str(config)
    named = CONFIGS / f"{config}.yaml"
    if named.is_file() and "/" not in config:
        return named
    if Path(config).is_file():
        return Path(config)
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise ValueError(f"config {config!r}: neither a file nor one of {', '.join(known)}")


def _omegaconf():
    from omegaconf import OmegaConf  # here: it takes a tenth of a second, which `hsivi --help` need not wait for

    return OmegaConf


def _plain(values, where):
    """Plain values of OmegaConf's; `where` stands before what is wrong with them."""
    missing = sorted(_omegaconf().missing_keys(values))
    if missing:  # OmegaConf's mark of a value that somebody else gives: merged, it would change nothing
        raise ValueError(f"{where}{missing[0]}: '???' is no value; give one, or leave the key out")
    try:
        return _omegaconf().to_container(values, resolve=True)
    except Exception as error:  # an interpolation that leads nowhere
        raise ValueError(f"{where}{' '.join(str(error).split())}") from None


def _merged(below, change, where):
    """`change`, of OmegaConf's, over the plain values `below`; `where` as of `_plain`."""
    _refuse_other_containers(below, change, where)
    try:
        merged = _omegaconf().merge(_omegaconf().create(below), change)
    except Exception as error:  # what else OmegaConf does not merge
        raise ValueError(f"{where}{' '.join(str(error).split())}") from None
    return _plain(merged, where)


def _refuse_other_containers(below, change, where, prefix=""):
    """ValueError for the first key of `change` that is a list over keys and values, or these over a list."""
    for key in _omegaconf().to_container(change):
        old, new = below.get(key), _omegaconf().select(change, str(key), throw_on_resolution_failure=False)
        for kind, is_kind, others in (
            (dict, _omegaconf().is_list, "keys and values"),
            (list, _omegaconf().is_dict, "a list"),
        ):
            if isinstance(old, kind) and is_kind(new):
                got = _shortened(_omegaconf().to_container(new))
                raise ValueError(f"{where}{prefix}{key}: expected {others}, got {got}")
        if isinstance(old, dict) and _omegaconf().is_dict(new):
            _refuse_other_containers(old, new, where, f"{prefix}{key}.")


def _override(values, override):
    """Merge one "a.b=value" into the nested dict."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {_shortened(override)}: expected key=value, as in train.steps=400")
    _check_known(key.strip())
    if key.strip() == "network":
        return {**values, "network": {"name": text.strip()}}
    if text.strip() == "???":
        raise ValueError(f"{key.strip()}: '???' is no value; give one, or leave the key out")
    try:
        change = _omegaconf().from_dotlist([override])
    except Exception as error:  # the YAML of the value
        raise ValueError(f"override {_shortened(override)}: {' '.join(str(error).split())}") from None
    if _omegaconf().select(change, key.strip()) == {}:
        raise ValueError(f"{key.strip()}: {{}} changes nothing; say a key of it, as in train.steps=400")
    return _merged(values, change, f"override {_shortened(override)}: ")


# (section, key) of the settings that name a file or folder.
FILES = (
    (None, "data_path"),
    (None, "init"),
    ("teacher", "checkpoint"),
    ("teacher", "vae"),
    ("eval", "reference"),
    ("distributed", "deepspeed"),
    ("target", "log_density"),  # FILE.py:NAME, as the next
    ("target", "score"),
)


def _with_absolute_paths(values, folder):
    """The values with absolute paths in the place of relative ones; what is not found is left for its reader to name.

    A file is looked for in `folder`, in the working directory and among the package's assets.
    """

    def absolute(key, file):
        if os.path.isabs(file) or _is_known_name(key, file):
            return file
        found = [base / file for base in (folder, Path.cwd(), ASSETS) if (base / file).exists()]
        return str(found[0].resolve()) if found else file

    return _with_files(values, absolute)


def _is_known_name(key, text):
    """Whether a text is a name and no path: a file of that name is ./cifar10."""
    if key == "reference":
        return text in PUBLISHED_REFERENCES or text in REFERENCES_TO_MAKE
    return key == "checkpoint" and text in PUBLISHED_TEACHERS


def _with_files(values, change):
    """The values with change(key, text) in the place of every file or folder that they name."""
    if not isinstance(values, dict):
        return values  # which has a message of its own
    for name, key in FILES:
        section = values.get(name) if name else values
        text = section.get(key) if isinstance(section, dict) else None
        if not isinstance(text, str):
            continue
        file, part = code_file(text) if name == "target" else (text, "")
        changed = text if file is None else change(key, file) + part
        if changed != text:
            section = {**section, key: changed}
            values = {**values, name: section} if name else section
    return values


def code_file(text):
    """("FILE.py", ":NAME") of a text FILE.py:NAME, which names something in a file of code; (None, "") of a name."""
    file, colon, name = text.rpartition(":")
    return (file, colon + name) if file.endswith(".py") else (None, "")


def _shipped_name(key, file):
    """The name of a file among the package's assets; any other text as it is."""
    path = Path(file)
    return path.name if path.parent in (ASSETS, ASSETS.resolve()) and (ASSETS / path.name).is_file() else file


def _shipped_file(key, file):
    """The path of a file of the package's assets: of a name, or of a path in another checkout that is not there now.

    Any other text as it is.
    """
    path = Path(file)
    named = file == path.name and not _is_known_name(key, file)
    elsewhere = path.parts[-3:-1] == ("hsivi_fast", "assets") and not path.exists()
    shipped = ASSETS / path.name
    return str(shipped.resolve()) if (named or elsewhere) and shipped.is_file() else file


def _validated(values):
    if isinstance(values.get("target"), dict):
        values = {"network": {"name": "density"}, "teacher": {}, **values}
        if isinstance(values.get("eval", {}), dict):
            values["eval"] = {"baselines": list(DENSITY_DEFAULTS), **values.get("eval", {})}
    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    for name in config.eval.baselines:
        if (name in DENSITY_BASELINES) != (config.target is not None):
            problem = (
                "is for a run with a target" if config.target is None else "samples a teacher, and there is a target"
            )
            others = "" if config.target is None else f"; choose of {', '.join(DENSITY_BASELINES)}"
            raise ValueError(f"eval.baselines: {name} {problem}{others}")
    if config.target is not None:
        return _validated_density(config)
    if (config.teacher.checkpoint is None) == (config.teacher.target is None):
        raise ValueError("teacher: give either a checkpoint or a 2-D target")
    if config.teacher.target is not None and config.teacher.prediction != "epsilon":
        raise ValueError(f"teacher.prediction: {config.teacher.prediction!r} is of a checkpoint; a 2-D target has none")
    if config.teacher.target is not None and config.teacher.vae is not None:
        raise ValueError(f"teacher.vae: {config.teacher.vae!r} decodes a checkpoint's latents; a 2-D target has none")
    if isinstance(config.teacher.betas, tuple) and len(config.teacher.betas) != config.teacher.steps:
        count, steps = len(config.teacher.betas), config.teacher.steps
        raise ValueError(f"teacher.betas: {count} of them for teacher.steps={steps}; give one a step")
    if not isinstance(config.spacing, str):
        _check_knots(config)
    for key, value, what in (
        ("objective.anchor", config.objective.anchor, "keeps the regression of a start on trajectories"),
        ("start.top", config.start.top, "is where trajectories come from"),
    ):
        if value and config.start.kind == "ddim":
            problem = f"{value} {what}, and start.kind is ddim"
            raise ValueError(f"{key}: {problem}; choose start.kind=trajectory, or leave it out")
    return config


def _validated_density(config):
    """The configuration of a run on a density of one's own; its network has the target's dimensions."""
    network, dim, defaults = config.network, config.target.dim, TeacherConfig()
    for key in ("checkpoint", "target", "vae", "null_class", "guidance"):
        if getattr(config.teacher, key) is not None:
            raise ValueError(
                f"teacher.{key}: {getattr(config.teacher, key)!r}, and the run has a target; leave one out"
            )
    if config.teacher != defaults:
        raise ValueError("teacher: a run with a target has none; leave it out")
    for key in ("data", "data_path", "init", "classes"):
        if getattr(config, key) is not None:
            problem = f"{_shortened(getattr(config, key))} is of runs with a teacher"
            raise ValueError(f"{key}: {problem}, and this one has a target; leave it out")
    if network.family not in (None, "mlp") or network.name not in (None, "density"):
        raise ValueError(f"network: {network.name or network.family!r} makes images; a target needs the family mlp")
    if network.dim not in (None, dim):
        raise ValueError(f"network.dim: {network.dim} for a target of {dim} dimensions; leave it out")
    if config.objective.match != "knots":
        raise ValueError("objective.match: windows are times of a diffusion, and a target has none; choose knots")
    if config.start.top is not None:
        raise ValueError(f"start.top: {config.start.top} is a time of a diffusion, and a target has none; leave it out")
    if config.objective.anchor and config.start.kind == "ddim":
        raise ValueError(f"objective.anchor: {config.objective.anchor} keeps the regression of a start; choose one")
    if (config.bridge.mean is None) != (config.bridge.scale is None):
        raise ValueError("bridge.mean: give bridge.mean and bridge.scale together, or neither")
    for key in ("mean", "scale"):
        values = getattr(config.bridge, key)
        if values is not None and len(values) not in (1, dim):
            raise ValueError(f"bridge.{key}: {len(values)} numbers for {dim} dimensions; give one for each, or one")
    for key in ("metric", "inception"):
        if getattr(config.eval, key) is not None:
            raise ValueError(
                f"eval.{key}: {getattr(config.eval, key)!r} sees images, and a target has none; leave it out"
            )
    names = config.target.parameters or ()
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"target.parameters: {twice!r} is there twice")
    constraints = config.target.constraints
    if isinstance(constraints, tuple) and len(constraints) != dim:
        raise ValueError(f"target.constraints: {len(constraints)} of them for {dim} dimensions; give one for each")
    return dataclasses.replace(config, network=dataclasses.replace(network, name="density", family=None, dim=dim))


def _check_knots(config):
    """ValueError where timesteps that are given by hand are no knots tau_0 < ... < tau_K of the teacher."""
    knots, steps = config.spacing, config.teacher.steps
    if len(knots) != config.nfe + 1:
        wanted = f"nfe: {config.nfe} layers stand between {config.nfe + 1}; give as many, or spacing=angle"
        raise ValueError(f"spacing: {_shortened(list(knots))} are {len(knots)} timesteps, and {wanted}")
    for low, high in zip(knots, knots[1:]):
        if low >= high:
            raise ValueError(f"spacing: {_shortened(list(knots))} does not rise, first at {low}, {high}")
    if knots[-1] >= steps:
        raise ValueError(f"spacing: {knots[-1]} is no timestep of the teacher, whose last is {steps - 1}")


def _first_problem(error):
    """One line for the first thing that pydantic found; an unknown key comes first, since it explains the rest."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "unexpected_keyword_argument"), problems[0])
    # Branches of a union stand in the location beside the keys: keep what is a key or an index.
    key = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or part in _key_parts())
    if problem["type"] == "unexpected_keyword_argument":
        return _unknown(".".join(str(part) for part in problem["loc"]))
    if problem["type"] == "missing":
        return f"{key}: missing; a run must say it"
    return f"{key}: {_message(problem)}"


def _message(problem):
    """What pydantic says of a value, and the value."""
    message = problem["msg"].removeprefix("Value error, ")
    return f"{message[0].lower() + message[1:]}, got {_shortened(problem['input'])}"


def _shortened(value):
    """A value as a message shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def known_keys(cls=Config, prefix=""):
    """All dotted keys of the configuration."""
    keys = []
    for field in dataclasses.fields(cls):
        keys.append(prefix + field.name)
        # A section, or one that may be left out.
        kinds = get_args(field.type) if type(None) in get_args(field.type) else (field.type,)
        for section in kinds:
            if dataclasses.is_dataclass(section) and isinstance(section, type):
                keys += known_keys(section, f"{prefix}{field.name}.")
    return keys


def _key_parts():
    return {part for key in known_keys() for part in key.split(".")}


def _check_known(key):
    if key.split("[")[0] not in known_keys():
        raise ValueError(_unknown(key))


def _unknown(key):
    nearest = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)[0]
    return f"{key}: unknown key; did you mean {nearest}?"


def _listed(value):
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value

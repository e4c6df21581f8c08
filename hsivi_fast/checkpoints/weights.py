"""Weights from files into networks."""

from pathlib import Path

from ..config import resolved_dict
from ..data import brief
from ..nets import all_arguments
from .download import forget_download, locate_checkpoint
from .formats import read_checkpoint
from .sizes import INVISIBLE, TRAINED_RESCALED, known_name
from .tensor_files import DamagedFile, refuse_strange_tensors

NOISE = ("prediction", "betas", "steps", "timestep_scale")  # of a teacher: what it was trained on, and predicts


def read_weights(path, role="teacher"):
    """{name: float32 tensor} of a checkpoint of any format that `read_checkpoint` knows, in our layout, on the CPU.

    `role` says which network of a published HSIVI file: "teacher", "student", "student_ema", "score_net" or
    "score_net_ema". Other files have one network, their "teacher".
    Raises ValueError, in one line, where it is missing, damaged, of an unknown layout, has no such network, or holds
    what cannot be weights.
    """
    return read_checkpoint(path).weights(role)


def read_fetched(path, source):
    """The `Checkpoint` at `path`, where `locate_checkpoint` has found `source`.

    A download that turns out to be damaged is deleted from the cache, so that the next try fetches it again.
    Raises ValueError, in one line, as `read_checkpoint`.
    """
    try:
        return read_checkpoint(path)
    except DamagedFile as error:
        if path != Path(source) and forget_download(path):
            raise ValueError(f"{error}; it was downloaded, and is deleted: the next try fetches it again") from None
        raise


def load_weights(network, weights, source):
    """Copy `weights`, {name: tensor}, into a network whose parameters they must match exactly.

    `source` names the file in the ValueError that says which names or shapes differ, or which tensor cannot be weights:
    NaN would only be noticed in the images.
    """
    difference = weights_difference(dict(network.named_parameters()), weights)
    if difference:
        raise ValueError(f"checkpoint {str(source)!r}: is of another network, it {difference}")
    refuse_strange_tensors(weights, f"checkpoint {str(source)!r}")
    network.load_state_dict(weights, strict=True)


def weights_difference(parameters, weights):
    """In words which names and shapes of `weights` are not those of `parameters`, {name: tensor} both; "" for none."""
    common = [name for name in parameters if name in weights]
    problems = []
    for complaint, names in (
        ("lacks", [name for name in parameters if name not in weights]),
        ("has unknown", [name for name in weights if name not in parameters]),
        ("has another shape for", [name for name in common if parameters[name].shape != weights[name].shape]),
    ):
        if names:
            shown = ", ".join(_described(name, parameters, weights) for name in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{complaint} {shown}{more}")
    return "; it ".join(problems)


def _described(name, parameters, weights):
    if name in parameters and name in weights:
        return f"{name} ({list(weights[name].shape)}, expected {list(parameters[name].shape)})"
    return brief(name, 80)


def locate_teacher(config, progress=False):
    """The path of the checkpoint that `config.teacher.checkpoint` names, which is downloaded where that is due.

    progress: shows a bar on stderr. Raises ValueError, in one line, where it is missing or cannot be had.
    """
    path = locate_checkpoint(config.teacher.checkpoint, progress)
    if not path.exists():
        raise ValueError(f"checkpoint {str(path)!r}: no such file; say where it is with teacher.checkpoint=FILE")
    return path


def read_teacher(config, network, progress=False):
    """Read the checkpoint that `config.teacher.checkpoint` names into `network`, and return the network.

    The checkpoint is a file or folder of any format that `read_checkpoint` knows, a known name or an address.
    `progress` shows a bar on stderr while it is downloaded.
    Raises ValueError, in one line, where it cannot be had or read, or is of another network or another noise than the
    configuration says.
    """
    path = locate_teacher(config, progress)
    checkpoint = read_fetched(path, config.teacher.checkpoint)
    if checkpoint.vae is not None and config.teacher.vae is None:
        problem = f"missing; the teacher {checkpoint.source!r} makes latents, and a VAE stands beside it"
        raise ValueError(f"teacher.vae: {problem}; set teacher.vae={checkpoint.vae}")
    load_weights(network, checkpoint.weights("teacher"), checkpoint.source)
    _check_what_weights_do_not_show(checkpoint, config)
    _check_rescaled_timesteps(checkpoint, config.teacher)
    return network


def _check_what_weights_do_not_show(checkpoint, config):
    """ValueError that names the first setting of which a checkpoint says something else than the configuration."""
    stated = {key: checkpoint.network[key] for key in checkpoint.stated}
    if "family" in stated:  # a whole description: what it leaves out is as it is by default
        stated = all_arguments(stated)
    teacher = resolved_dict(config)["teacher"]
    for group, configured, trained_with, keys in (
        ("network", all_arguments(config.network), stated, INVISIBLE),
        ("teacher", teacher, checkpoint.settings.get("teacher", {}), NOISE),
    ):
        for key in keys:
            if key in configured and key in trained_with and _differ(configured[key], trained_with[key]):
                value = "null" if trained_with[key] is None else trained_with[key]
                raise ValueError(
                    f"{group}.{key}: {configured[key]!r} is not what the teacher {checkpoint.source!r} was trained "
                    f"with; set {group}.{key}={value}"
                )


def _differ(value, other):
    """Whether a setting of a configuration is another than that of a file, whose lists may be tuples there."""
    return (list(value) if isinstance(value, tuple) else value) != (list(other) if isinstance(other, tuple) else other)


def _check_rescaled_timesteps(checkpoint, teacher):
    """ValueError where a teacher that was shown 0 .. 999.75 would be shown others, or was trained on another noise."""
    name = known_name(checkpoint.network or {})
    if name not in TRAINED_RESCALED:
        return
    trained = "was trained with 4000 steps of the cosine schedule, and shown t / 4"
    if teacher.steps * teacher.timestep_scale != 1000:
        shown = f"shows it timesteps up to {(teacher.steps - 1) * teacher.timestep_scale:g}"
        raise ValueError(
            f"teacher.timestep_scale: {teacher.timestep_scale:g} with teacher.steps={teacher.steps} {shown}, and the "
            f"teacher {checkpoint.source!r} {trained}; set teacher.timestep_scale={1000 / teacher.steps:g}"
        )
    if teacher.betas == "linear":
        raise ValueError(
            f"teacher.betas: 'linear' is not what the teacher {checkpoint.source!r} was trained with, it {trained}; "
            "set teacher.betas=cosine_4000 (exact), or cosine as the published HSIVI code"
        )

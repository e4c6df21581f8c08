"""Weights from files into networks."""

from ..nets import network_arguments
from .download import locate_checkpoint
from .formats import read_checkpoint
from .sizes import NORMS


def read_weights(path, role="teacher"):
    """{name: float32 tensor} of a checkpoint of any format that `read_checkpoint` knows, in our layout, on the CPU.

    `role` says which network of a published HSIVI file: "teacher", "student", "student_ema", "score_net" or
    "score_net_ema". Other files have one network, their "teacher".
    Raises ValueError, in one line, where it is missing, damaged, of an unknown layout, or has no such network.
    """
    return read_checkpoint(path).weights(role)


def load_weights(network, weights, source):
    """Copy `weights`, {name: tensor}, into a network whose parameters they must match exactly.

    `source` names the file in the ValueError that says which names or shapes differ.
    """
    parameters = dict(network.named_parameters())
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
    if problems:
        raise ValueError(f"checkpoint {str(source)!r}: is of another network, it {'; it '.join(problems)}")
    network.load_state_dict(weights, strict=True)


def _described(name, parameters, weights):
    if name in parameters and name in weights:
        return f"{name} ({list(weights[name].shape)}, expected {list(parameters[name].shape)})"
    return name


def read_teacher(config, network, progress=False):
    """Read the checkpoint that `config.teacher.checkpoint` names into `network`, and return the network.

    The checkpoint is a file or folder of any format that `read_checkpoint` knows, a known name or an address.
    `progress` shows a bar on stderr while it is downloaded.
    Raises ValueError, in one line, where it cannot be had or read, or is of another network or another noise than the
    configuration says.
    """
    path = locate_checkpoint(config.teacher.checkpoint, progress)
    if not path.exists():
        raise ValueError(f"checkpoint {str(path)!r}: no such file; say where it is with teacher.checkpoint=FILE")
    checkpoint = read_checkpoint(path)
    load_weights(network, checkpoint.weights("teacher"), checkpoint.source)
    _check_what_weights_do_not_show(checkpoint, config)
    return network


def _check_what_weights_do_not_show(checkpoint, config):
    """ValueError that names the first setting of which a checkpoint says something else than the configuration."""
    network = {**NORMS, **network_arguments(config.network)}
    stated = {key: checkpoint.network[key] for key in checkpoint.stated}
    noise = {"betas": config.teacher.betas, "steps": config.teacher.steps}
    for group, configured, trained_with, keys in (
        ("network", network, stated, ("norm_eps", "norm_groups", "image_size", "heads")),
        ("teacher", noise, checkpoint.settings.get("teacher", {}), ("betas", "steps")),
    ):
        for key in keys:
            if key in configured and key in trained_with and configured[key] != trained_with[key]:
                raise ValueError(
                    f"{group}.{key}: {configured[key]!r} is not what the teacher {checkpoint.source!r} was trained "
                    f"with; set {group}.{key}={trained_with[key]}"
                )

"""Reading network weights from files."""

from ..nets import network_arguments
from .download import locate_checkpoint
from .formats import NORMS, read_checkpoint


def read_weights(path, part="teacher"):
    """Name -> float32 tensor, in our layout, of a checkpoint file or folder of any kind that `read_checkpoint` knows, on the CPU.

    `part` says which network of a published HSIVI file: "teacher", "student", "student_ema", "score_net" or "score_net_ema"; other files have one network, their "teacher".
    Raises ValueError, in one line, where it is missing, damaged, of an unknown layout, or has no such part.
    """
    return read_checkpoint(path).weights(part)


def load_weights(network, weights, source):
    """Copy name -> tensor `weights` into a network whose parameters they must match exactly.

    `source` names the file in the ValueError that says which names or shapes differ.
    """
    own = dict(network.named_parameters())
    problems = []
    for word, names in (
        ("lacks", [name for name in own if name not in weights]),
        ("has unknown", [name for name in weights if name not in own]),
        ("has another shape for", [name for name in own if name in weights and own[name].shape != weights[name].shape]),
    ):
        if names:
            shown = ", ".join(_described(name, own, weights) for name in names[:3])
            problems.append(f"{word} {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
    if problems:
        raise ValueError(f"checkpoint {str(source)!r}: is of another network, it {'; it '.join(problems)}")
    network.load_state_dict(weights, strict=True)


def _described(name, own, weights):
    if name in own and name in weights:
        return f"{name} ({list(weights[name].shape)}, expected {list(own[name].shape)})"
    return name


def read_teacher(config, network, progress=False):
    checkpoint = read_checkpoint(locate_checkpoint(config.teacher.checkpoint, progress=progress))
    load_weights(network, checkpoint.weights("teacher"), checkpoint.source)
    _check_what_weights_do_not_show(checkpoint, config)
    return network


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

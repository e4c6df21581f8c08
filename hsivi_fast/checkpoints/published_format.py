"""The published HSIVI code's file: all three networks in `whole_model`, their averages and optimizers beside it."""

import warnings

import torch

from ..config import resolved_dict
from ..data import brief
from ..nets import all_arguments, network_arguments
from .checkpoint import Checkpoint, checked_statements
from .sizes import ASKED, INVISIBLE, NORMS, describe_network, known_name
from .tensor_files import without_module_prefix

LOG_GAMMA = "log_scaled_gamma"
PUBLISHED_NAMES = {"teacher": "target_model", "student": "phinet", "score_net": "fnet"}
_PUBLISHED_NETWORKS = ("cifar10", "celeba64", "imagenet64")


def read_published(path, content):
    """The `Checkpoint` of the content of a file of the published HSIVI code.

    Its averages are lists in the order of the parameters; where one does not fit, a note says so.
    Raises ValueError where a network or the student's log_gamma is missing.
    """
    where = f"checkpoint {str(path)!r}"
    tensors = _networks_of(where, without_module_prefix(content["whole_model"]))
    log_gamma = tensors["student"].get(LOG_GAMMA)
    if log_gamma is None:
        raise ValueError(f"{where}: its phinet has no {LOG_GAMMA}, as the published HSIVI code's has")
    if log_gamma.dim() not in (1, 3, 4) or 0 in log_gamma.shape:
        expected = "[1], [K], [C, H, W] or [K, C, H, W]"
        raise ValueError(f"{where}: its {LOG_GAMMA} is of shape {list(log_gamma.shape)}; expected {expected}")
    averages, notes = _averages_of(content, tensors)
    stated, settings = _written_by_us(content, where)
    if log_gamma.dim() >= 3 and "image_size" not in stated:
        stated["image_size"] = log_gamma.shape[-1]
    per_step = log_gamma.dim() == 4 or log_gamma.dim() == 1 and log_gamma.shape[0] > 1
    settings.setdefault("gamma", {"per_step": per_step, "per_pixel": log_gamma.dim() >= 3})
    if per_step:
        settings.setdefault("nfe", log_gamma.shape[0])
    network, assumed = describe_network(tensors["teacher"], stated)
    step = f", step {content['step']}" if isinstance(content.get("step"), int) else ""
    return Checkpoint(
        source=str(path),
        format=f"the published HSIVI code's{step}",
        tensors={**tensors, **averages},
        network=network,
        stated=tuple(stated),
        assumed=assumed,
        settings=settings,
        notes=tuple(notes),
    )


def _networks_of(where, whole_model):
    """{role: {name: tensor}} of the teacher, the student and the score network."""
    tensors = {}
    for role, published in PUBLISHED_NAMES.items():
        prefix = f"{published}."
        tensors[role] = {
            name.removeprefix(prefix): tensor for name, tensor in whole_model.items() if name.startswith(prefix)
        }
        if not tensors[role]:
            present = ", ".join(sorted({name.split(".")[0] for name in whole_model}))
            raise ValueError(
                f"{where}: its whole_model has no {published}, as the published HSIVI code's has; "
                f"it has {brief(present)}"
            )
    return tensors


def _averages_of(content, tensors):
    """({role: {name: tensor}} of the averages that fit their network, notes on those that do not)."""
    averages, notes = {}, []
    for role in ("student", "score_net"):
        key = f"ema_{PUBLISHED_NAMES[role]}"
        average = content.get(key)
        shadow = average.get("shadow_params") if isinstance(average, dict) else None
        if not isinstance(shadow, (list, tuple)):
            notes.append(f"no {key}, so no {role}_ema")
            continue
        shapes = [tensor.shape for tensor in tensors[role].values()]
        if [getattr(tensor, "shape", None) for tensor in shadow] == shapes:
            averages[f"{role}_ema"] = dict(zip(tensors[role], shadow))
        else:
            notes.append(
                f"{key} has {len(shadow)} tensors that do not fit the {len(shapes)} of {PUBLISHED_NAMES[role]}, "
                f"so no {role}_ema"
            )
    return averages, notes


def _written_by_us(content, where):
    """(network, settings) that `published_content` put into a file of ours, two empty dicts for another file."""
    ours = content.get("hsivi_fast")
    values = [ours.get(key) if isinstance(ours, dict) else None for key in ("network", "settings")]
    return checked_statements(*(dict(value) if isinstance(value, dict) else {} for value in values), where)


def published_content(config, step, network, tensors, averages):
    """What torch.save has to write so that the published code can read a run's networks.

    network: what `publishable_network` returned.
    tensors: {role: {name: tensor}} of "teacher", "student" and "score_net", in the order of their parameters.
    averages: {role: {"decay", "num_updates", "shadow_params"}} of "student" and "score_net".
    """
    whole_model = {}
    for role, published in PUBLISHED_NAMES.items():
        for name, tensor in tensors[role].items():
            whole_model[f"module.{published}.{name}"] = tensor.contiguous()
    resolved = resolved_dict(config)
    settings = {"teacher": {key: resolved["teacher"][key] for key in ("betas", "steps")}}
    settings |= {key: resolved[key] for key in ("nfe", "spacing", "eta", "gamma")}
    return {
        "optimizer_phinet": _fresh_adam(tensors["student"], config.train.student_lr),
        "optimizer_fnet": _fresh_adam(tensors["score_net"], config.train.score_net_lr),
        "whole_model": whole_model,
        "ema_phinet": averages["student"],
        "ema_fnet": averages["score_net"],
        "step": step,
        # The layout has no place for this, and the published code does not look at it.
        "hsivi_fast": {"network": network, "settings": settings},
    }


def publishable_network(config):
    """The full description of a run's network.

    Raises ValueError where the published code has no network of its kind. It also raises where that code's network has
    another noise, or other groups, heads or settings that its file would not show. Another norm_eps is a warning: it
    changes the noise by about 1e-4 of its size, and that code itself does so to ddpm-torch's teachers.
    """
    teacher, network = config.teacher, {**NORMS, **network_arguments(config.network)}
    if teacher.timestep_scale != 1 or teacher.betas not in ("linear", "cosine"):
        key = "betas" if teacher.timestep_scale == 1 else "timestep_scale"
        raise ValueError(
            f"teacher.{key}: {getattr(teacher, key)!r} cannot be published, the published code has its own table of "
            "noise for 1000 steps and would load the file without a word"
        )
    if network["family"] not in ("ddpm", "adm"):
        family = network["family"]
        raise ValueError(f"network.family: {family!r} has no place in the published code's layout, which has two UNets")
    if teacher.prediction != "epsilon":
        raise ValueError(
            f"teacher.prediction: {teacher.prediction!r} cannot be published, the published code's networks predict "
            "the noise"
        )
    if network.get("classes") is not None:
        raise ValueError(
            f"network.classes: {network['classes']} cannot be published, the published code's networks have none"
        )
    network = {key: list(value) if isinstance(value, tuple) else value for key, value in network.items()}
    if network["family"] == "ddpm":
        network.setdefault("middle", True)
    name = known_name(network)
    known = name in _PUBLISHED_NETWORKS
    ours, published = all_arguments(network), all_arguments(name if known else {"family": network["family"]})
    whose = f"{name} network has" if known else "networks have"
    for key in INVISIBLE:
        may_differ = ("image_size", "norm_eps") if known else ASKED
        if key not in may_differ and ours.get(key) != published.get(key):
            raise ValueError(
                f"network.{key}: {ours[key]!r} cannot be published, the published code's {whose} {published[key]!r} "
                "and would load the file without a word"
            )
    if not known:
        return network
    if network["norm_eps"] != NORMS["norm_eps"]:
        warnings.warn(
            f"network.norm_eps: the run has {network['norm_eps']:g}, the published code runs its {name} network with "
            f"{NORMS['norm_eps']:g}: the noise differs a little there",
            stacklevel=4,  # where `convert_checkpoint` was called
        )
    return network


def _fresh_adam(tensors, lr):
    """The state of the published code's optimizer before its first update: going on there starts the moments anew.

    Ours are not carried over. Its Adam is the amsgrad kind, and we do not have the largest second moment that it needs.
    """
    parameters = [torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors.values()]
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), amsgrad=True).state_dict()

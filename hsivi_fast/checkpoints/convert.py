"""Checkpoints of others as ours, and a run of ours as a file of the published HSIVI code."""

import os
import shutil
import warnings
from pathlib import Path

from ..config import resolved_dict
from ..nets import NETWORKS, network_arguments
from .download import locate_checkpoint
from .formats import LOG_GAMMA, NORMS, PUBLISHED_PARTS, metadata_of, name_of, read_checkpoint
from .run_folder import RunFolder

_PUBLISHED_NETWORKS = ("cifar10", "celeba64", "imagenet64")


def convert_checkpoint(source, to, step=None):
    """Convert `source` and return the list of written paths.

    A teacher's file (ddpm-torch, improved-diffusion, ours), a diffusers folder, a known name or an address: `to` becomes a folder with teacher.safetensors
    and network.yaml, the beginning of a run's configuration. A file of the published HSIVI code: student.safetensors, score_net.safetensors and, where it
    has fitting averages, student_ema.safetensors and score_net_ema.safetensors stand there too, so that the folder can be a run's `init`.
    A run's folder: `to` becomes a file of the published code, with the networks of the newest checkpoint or of that of `step`.

    What is written is there as a whole or not at all. Raises ValueError where the source is no checkpoint, `to` is taken or of the other kind, or the
    published code's networks cannot be the run's.
    """
    to = Path(to).absolute()
    if (Path(source) / "config.yaml").is_file():
        return [_run_as_published(RunFolder(source), to, step)]
    if step is not None:
        raise ValueError(f"step: {step} chooses a run's checkpoint, and {str(source)!r} is no run's folder")
    return _as_ours(read_checkpoint(locate_checkpoint(source)), to)


def _as_ours(checkpoint, to):
    from safetensors.torch import save_file

    if checkpoint.network is None or "family" not in checkpoint.network:
        raise ValueError(
            f"checkpoint {checkpoint.source!r}: its tensors are of none of our UNets ({', '.join(list(checkpoint.parts['teacher'])[:3])}, ...)"
        )
    if to.is_file() or to.suffix in (".pt", ".pth", ".safetensors"):
        raise ValueError(
            f"to {str(to)!r}: must be a folder that is not there yet, since {checkpoint.source!r} is a checkpoint and no run's folder"
        )
    if to.is_dir() and any(to.iterdir()):
        raise ValueError(f"to {str(to)!r}: is not empty; choose another folder")
    beside = to.with_name(f".{to.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for part in checkpoint.parts:
            save_file(
                {name: tensor.contiguous() for name, tensor in checkpoint.weights(part).items()},
                beside / f"{part}.safetensors",
                metadata_of(checkpoint),
            )
        (beside / "network.yaml").write_text(_network_yaml(checkpoint))
        if to.is_dir():
            to.rmdir()
        beside.rename(to)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [*(to / f"{part}.safetensors" for part in checkpoint.parts), to / "network.yaml"]


def _network_yaml(checkpoint):
    """The beginning of a run's configuration: what is known of the network and its noise, and in comments what is not."""
    from omegaconf import OmegaConf

    name = name_of(checkpoint.network)
    settings = dict(checkpoint.settings)
    noise = settings.pop("teacher", None)
    lines = [f"# From {checkpoint.source}: {checkpoint.format}."]
    lines += [f"# {note}." for note in checkpoint.notes]
    if name:
        lines.append(f"# Its sizes are those of the network {name}.")
    guessed = [f"network.{key}" for key in checkpoint.assumed if key in checkpoint.network] + (
        [] if noise else ["teacher.betas", "teacher.steps"]
    )
    missing = [f"network.{key}" for key in checkpoint.assumed if key not in checkpoint.network]
    if guessed:
        lines.append(
            f"# The file does not say {', '.join(guessed)}: what stands here is usual{f' for {name}' if name else ''}; check it."
        )
    if "student" in checkpoint.parts:
        missing += [
            key for key in ("nfe", "spacing", "eta") if key not in settings
        ]  # the layers that the student belongs to
    if missing:
        lines.append(f"# The file does not say {', '.join(missing)}: add {'it' if len(missing) == 1 else 'them'}.")
    if "student" in checkpoint.parts:
        lines.append("# To start from the student and score network that stand beside this file: init=. (this folder)")
    noise = noise or {"betas": "cosine" if name == "imagenet64" else "linear", "steps": 1000}
    values = {"network": checkpoint.network, "teacher": {"checkpoint": "teacher.safetensors", **noise}, **settings}
    return "\n".join(lines) + "\n" + OmegaConf.to_yaml(OmegaConf.create(values))


def _run_as_published(run, to, step):
    import torch

    config, steps = run.config(), run.checkpoints()
    if not steps:
        raise ValueError(f"run {str(run.path)!r}: has no checkpoint yet; let `hsivi train` get further")
    if step is not None and step not in steps:
        raise ValueError(f"step: {step} has no checkpoint in {str(run.path)!r}; it has {', '.join(map(str, steps))}")
    if to.exists():
        raise ValueError(f"to {str(to)!r}: is there already; choose another file")
    if to.suffix not in (".pt", ".pth"):
        raise ValueError(f"to {str(to)!r}: the published code's file ends in .pt or .pth")
    step = steps[-1] if step is None else step
    network = _network_that_can_be_published(config)
    from ..nets import build_unet
    from .weights import read_teacher

    teacher = dict(read_teacher(config, build_unet(config.network)).named_parameters())
    # The order of the parameters, which safetensors files do not keep and the lists of averages need: log_gamma is registered first of all.
    names = {"student": [LOG_GAMMA, *teacher], "score_net": list(teacher)}
    state, whole, averages = run.load_state(step), {}, {}
    tensors = {"teacher": {name: tensor.detach() for name, tensor in teacher.items()}}
    for part in names:
        tensors[part] = _in_order(run, step, part, names[part])
        averages[part] = {
            "decay": config.train.ema,
            "num_updates": state[f"{part}_updates"],
            "shadow_params": list(_in_order(run, step, f"{part}_ema", names[part]).values()),
        }
    for part, theirs in PUBLISHED_PARTS.items():
        whole.update({f"module.{theirs}.{name}": tensor.contiguous() for name, tensor in tensors[part].items()})
    resolved = resolved_dict(config)
    settings = {
        "teacher": {key: resolved["teacher"][key] for key in ("betas", "steps")},
        **{key: resolved[key] for key in ("nfe", "spacing", "eta", "gamma")},
    }
    content = {
        "optimizer_phinet": _fresh_adam(tensors["student"], config.train.student_lr),
        "optimizer_fnet": _fresh_adam(tensors["score_net"], config.train.score_net_lr),
        "whole_model": whole,
        "ema_phinet": averages["student"],
        "ema_fnet": averages["score_net"],
        "step": step,
        "hsivi_fast": {
            "network": network,
            "settings": settings,
        },  # what the layout has no place for; the published code does not look at it
    }
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = to.with_name(f".{to.name}.unfinished")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(to)
    finally:
        beside.unlink(missing_ok=True)
    return to


def _network_that_can_be_published(config):
    """The run's network in full; ValueError where the published code has none of its kind, or has it with other groups or heads, which its file would not show.

    Another norm_eps changes the noise by about 1e-4 of its size, and is what that code itself does to ddpm-torch's teachers: that is a warning.
    """
    network = {**NORMS, **network_arguments(config.network)}
    if network["family"] == "mlp":
        raise ValueError("network.family: 'mlp' has no place in the published code's layout, which holds UNets")
    network = {key: list(value) if isinstance(value, tuple) else value for key, value in network.items()}
    if network["family"] == "ddpm":
        network.setdefault("middle", True)
    name = name_of(network)
    if name in _PUBLISHED_NETWORKS:
        theirs = {**NORMS, **NETWORKS[name]}
        for key in ("norm_groups", "heads"):
            if network.get(key) != theirs.get(key):
                raise ValueError(
                    f"network.{key}: {network[key]!r} cannot be published, the published code's {name} network has {theirs[key]!r} and would load the file without a word"
                )
        if network["norm_eps"] != NORMS["norm_eps"]:
            warnings.warn(
                f"network.norm_eps: the run has {network['norm_eps']:g}, the published code runs its {name} network with {NORMS['norm_eps']:g}: the noise differs a little there",
                stacklevel=4,
            )
    return network


def _in_order(run, step, stem, names):
    values = run.load_tensors(step, stem)
    if set(values) != set(names):
        different = sorted(set(values) ^ set(names))
        raise ValueError(
            f"checkpoint {run.checkpoint_path(step) / stem}.safetensors: is of another network than the run's teacher, they differ in {', '.join(different[:3])}"
        )
    return {name: values[name] for name in names}


def _fresh_adam(tensors, lr):
    """The state of the published code's optimizer before its first update: going on with the file there starts the moments anew.

    Ours are not carried over, since its Adam is the amsgrad kind, whose largest second moment we do not have.
    """
    import torch

    return torch.optim.Adam(
        [torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors.values()],
        lr=lr,
        betas=(0.9, 0.999),
        amsgrad=True,
    ).state_dict()

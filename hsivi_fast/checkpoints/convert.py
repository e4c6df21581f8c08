"""Checkpoints of others as ours, and a run of ours as a file of the published HSIVI code."""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ..data import brief
from ..nets import build_unet
from .autoencoder import check_vae
from .download import locate_checkpoint
from .files import as_written, make_folder, write_atomically, write_tensors, written_beside
from .published_format import LOG_GAMMA, publishable_network, published_content
from .run_folder import RunFolder
from .sizes import IMAGENET64_270M, TRAINED_RESCALED, known_name, what_ours_has_not
from .tensor_files import refuse_strange_tensors
from .weights import read_fetched, read_teacher, weights_difference

# What network.yaml says of improved-diffusion's networks.
_RESCALED = (
    "improved-diffusion trained such networks with 4000 steps of the cosine schedule and rescaled timesteps: they were",
    "shown t = 0 .. 999.75. teacher.betas=cosine_4000 with 1000 steps is exactly that noise at t = 0 .. 999. So is",
    "betas=cosine with steps=4000 and timestep_scale=0.25. betas=cosine with 1000 steps is the published HSIVI code's",
    "table: 0.75 of a step too noisy for such a teacher, sigma at tau_0 is 2.05 times too large.",
)
# The noise of networks that are known by their sizes, where it is another than linear in 1000 steps.
_USUAL_NOISE = {
    "imagenet64": {"betas": "cosine", "steps": 1000},
    IMAGENET64_270M: {"betas": "cosine", "steps": 4000},  # its timesteps were not rescaled
}


def convert_checkpoint(source, to, step=None):
    """Convert `source` and return the list of written paths.

    A checkpoint of one network is a ddpm-torch or improved-diffusion file, one of ours, a diffusers folder, a known
    name or an address. For it `to` becomes a folder with teacher.safetensors and network.yaml, the beginning of a run's
    configuration.
    From a file of the published HSIVI code, student.safetensors and score_net.safetensors stand in that folder too,
    and student_ema.safetensors and score_net_ema.safetensors where it has fitting averages. The folder can be a run's
    `init`.
    From a run's folder, `to` becomes a file of the published code, with the networks of the newest checkpoint or of
    that of `step`.

    What is written is there as a whole or not at all. Raises ValueError where the source is no checkpoint, its networks
    cannot be ours (names and shapes are compared before anything is written), `to` is taken or of the other kind, or
    the published code's networks cannot be the run's.
    """
    to = as_written(to).absolute()
    if (Path(source) / "config.yaml").is_file():
        return [_run_as_published(RunFolder(source), to, step)]
    if step is not None:
        raise ValueError(f"step: {step} chooses a run's checkpoint, and {str(source)!r} is no run's folder")
    return _as_ours(read_fetched(locate_checkpoint(source), source), to)


def _as_ours(checkpoint, to):
    """Write a checkpoint's networks and what is known of them to the folder `to`; returns the written paths."""
    _check_networks(checkpoint)
    if to.is_file() or to.suffix in (".pt", ".pth", ".safetensors"):
        raise ValueError(
            f"to {str(to)!r}: must be a folder that is not there yet, "
            f"since {checkpoint.source!r} is a checkpoint and no run's folder"
        )
    if to.is_dir() and any(to.iterdir()):
        raise ValueError(f"to {str(to)!r}: is not empty; choose another folder")
    make_folder(to.parent)
    with written_beside(to) as folder:
        folder.mkdir()
        for role in checkpoint.tensors:
            write_tensors(folder / f"{role}.safetensors", checkpoint.weights(role), checkpoint.metadata())
        write_atomically(folder / "network.yaml", _network_yaml(checkpoint).encode())
    return [*(to / f"{role}.safetensors" for role in checkpoint.tensors), to / "network.yaml"]


def _check_networks(checkpoint):
    """ValueError where a network of a checkpoint is not the one that is described, or cannot be one of ours."""
    where, teacher = f"checkpoint {checkpoint.source!r}", checkpoint.tensors["teacher"]
    if checkpoint.vae is not None:
        check_vae(checkpoint.vae, checkpoint.network["image_channels"])
    strange = what_ours_has_not(teacher)
    if strange:
        raise ValueError(f"{where}: {strange}")
    if checkpoint.network is None or "family" not in checkpoint.network:
        some = brief(", ".join(list(teacher)[:3]))
        raise ValueError(f"{where}: its tensors are of none of our UNets ({some}, ...)")
    described = dict(checkpoint.network)
    described.setdefault("image_size", 2 ** (len(described.get("multipliers", ())) - 1))  # no weight has its size
    if described["family"] in ("ddpm", "adm"):
        described.setdefault("norm_groups", 1)
    try:
        with torch.device("meta"):
            expected = dict(build_unet(described).named_parameters())
    except (ValueError, TypeError, RuntimeError) as error:  # sizes that do not fit each other, or no memory could hold
        raise ValueError(f"{where}: its network cannot be built ({brief(error)})") from None
    for role, tensors in checkpoint.tensors.items():
        refuse_strange_tensors(tensors, where)
        network = {name: tensor for name, tensor in tensors.items() if name != LOG_GAMMA or "student" not in role}
        difference = weights_difference(expected, network)
        if difference:
            raise ValueError(
                f"{where}: its {role} is none of our UNets: compared with what its sizes say it {difference}"
            )


def _network_yaml(checkpoint):
    """The beginning of a run's configuration: what is known of a network and its noise, and in comments what is not."""
    name = known_name(checkpoint.network)
    settings = dict(checkpoint.settings)
    noise = settings.pop("teacher", None)
    is_denoiser = (noise or {}).get("prediction") == "denoiser"
    guessed = [f"network.{key}" for key in checkpoint.assumed if key in checkpoint.network]
    missing = [f"network.{key}" for key in checkpoint.assumed if key not in checkpoint.network]
    rescaled = name in TRAINED_RESCALED
    if not noise and name != "imagenet64" and rescaled:
        noise = {"betas": "cosine_4000", "steps": 1000}
    if is_denoiser:  # it knows every noise: the usual one is a choice, and no guess
        noise = {"betas": "linear", "steps": 1000, **noise}
    if not noise:
        guessed += ["teacher.betas", "teacher.steps"]
        noise = _USUAL_NOISE.get(name, {"betas": "linear", "steps": 1000})
    if "student" in checkpoint.tensors:  # it belongs to the layers of its run
        missing += [key for key in ("nfe", "spacing", "eta") if key not in settings]

    lines = [f"From {checkpoint.source}: {checkpoint.format}.", *(f"{note}." for note in checkpoint.notes)]
    if name:
        lines.append(f"Its sizes are those of the network {name}.")
    if rescaled:
        lines += _RESCALED
    if is_denoiser:
        lines.append("It is a denoiser D(x; sigma), which takes any noise: teacher.betas is a choice.")
    if guessed:
        usual = f"usual for {name}" if name else "usual"
        lines.append(f"The file does not say {', '.join(guessed)}: what stands here is {usual}; check it.")
    if missing:
        them = "it" if len(missing) == 1 else "them"
        lines.append(f"The file does not say {', '.join(missing)}: add {them}.")
    vae = {} if checkpoint.vae is None else {"vae": checkpoint.vae}
    if vae:
        lines.append("It makes latents, which teacher.vae decodes. The folder stays where it is, and is not copied.")
    if "student" in checkpoint.tensors:
        lines.append("To start from the student and score network that stand beside this file: init=. (this folder)")
    comments = "".join(f"# {line}\n" for line in lines)
    teacher = {"checkpoint": "teacher.safetensors", **vae, **noise}
    values = {"network": checkpoint.network, "teacher": teacher, **settings}
    return comments + OmegaConf.to_yaml(OmegaConf.create(values))


def _run_as_published(run, to, step):
    """Write a run's checkpoint to `to`, a file of the published layout; returns it."""
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
    network = publishable_network(config)
    teacher = read_teacher(config, build_unet(config.network), progress=sys.stderr.isatty())
    tensors = {"teacher": {name: parameter.detach() for name, parameter in teacher.named_parameters()}}
    # The lists of averages need the order of the parameters, which safetensors files do not keep. The student's
    # log_gamma is registered before all others.
    names = {"student": [LOG_GAMMA, *tensors["teacher"]], "score_net": list(tensors["teacher"])}
    state, averages = run.load_state(step), {}
    for role in ("student", "score_net"):
        tensors[role] = _in_order(run, step, role, names[role])
        averages[role] = {
            "decay": config.train.ema,
            "num_updates": state[f"{role}_updates"],
            "shadow_params": list(_in_order(run, step, f"{role}_ema", names[role]).values()),
        }
    content = published_content(config, step, network, tensors, averages)
    make_folder(to.parent)
    with written_beside(to) as unfinished, open(unfinished, "wb") as file:
        torch.save(content, file)
    return to


def _in_order(run, step, role, names):
    """{name: tensor} of one network of a checkpoint, in the order of `names`."""
    tensors = run.load_tensors(step, role)
    if set(tensors) != set(names):
        different = sorted(set(tensors) ^ set(names))
        raise ValueError(
            f"checkpoint {run.checkpoint_path(step) / role}.safetensors: is of another network than the run's teacher, "
            f"they differ in {', '.join(different[:3])}"
        )
    return {name: tensors[name] for name in names}

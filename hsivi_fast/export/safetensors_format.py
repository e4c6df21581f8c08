"""The export as safetensors: model.safetensors and its description, and the sampler that is made of them again."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..build import build_context, build_untrained_student
from ..checkpoints.files import file_sha256
from ..checkpoints.tensor_files import refuse_strange_tensors
from ..checkpoints.weights import load_weights, read_weights
from ..config import config_from_dict
from ..parallel.world import ALONE
from ..sampling.sampler import of_parameters, student_sampler
from .check import CHECKED, as_samples, check_samples
from .description import KIND, write_description

CONFIG_KEYS = ("network", "teacher", "nfe", "spacing", "eta", "gamma", "precision", "channels_last")


def write_safetensors(sampler, context, description, folder):
    """Write model.safetensors and config.json, and check them; returns what config.json holds."""
    config, file = context.config, folder / "model.safetensors"
    weights = {name: value.detach().cpu().contiguous() for name, value in sampler.network.state_dict().items()}
    save_file(weights, file, metadata={"format": "pt"})
    description = write_description(folder, description, file)
    exported = load_exported(folder, str(sampler.layers.tau.device), config.backend)
    sampler, seeds = of_parameters(sampler, context), range(CHECKED)
    check_samples(as_samples(exported(seeds), config), as_samples(sampler(seeds), config))
    return description


def load_exported(folder, device="auto", backend="auto"):
    """The `Sampler` of a folder that `export_run` wrote as safetensors.

    sampler(seeds) gives float32 [N, *event], which `data.to_uint8` makes images of. Of a run in latents they are the
    latents: config.json names the VAE that decodes them and says how, and the export does not hold it. Of a run with a
    target they are draws of its parameters [N, D], for which nothing of the target is needed.
    device: "auto", "cpu" or "cuda:N"; backend: "auto", "torch" or "triton". Raises ValueError where the folder holds no
    such export, it has been changed, or the device or backend is not there.
    """
    folder = Path(folder)
    description = _read_description(folder)
    file = folder / "model.safetensors"
    weights = read_weights(file)
    refuse_strange_tensors(weights, f"export {str(folder)!r}: {file.name}")
    if file_sha256(file) != description["sha256"]:
        raise ValueError(
            f"export {str(folder)!r}: model.safetensors is not the file that config.json describes "
            "(its sha256 differs); export the run again"
        )
    settings = {key: description[key] for key in CONFIG_KEYS}
    settings["classes"] = description.get("classes")  # exports from before there were classes say nothing of them
    settings["target"] = description.get("target")
    context = build_context(config_from_dict({**settings, "device": device, "backend": backend}), ALONE)
    if context.config.target is not None:
        context = context.with_base(*(torch.tensor(description["base"][name]) for name in ("mean", "factor")))
    timesteps = context.layers.tau.tolist()
    if timesteps != description["timesteps"]:
        raise ValueError(
            f"export {str(folder)!r}: has timesteps {description['timesteps']}, this version makes {timesteps} of its "
            f"spacing and nfe; use hsivi_fast {description['hsivi_fast']}"
        )
    student = build_untrained_student(context)
    load_weights(student, weights, file)
    return of_parameters(student_sampler(context, student), context)


def _read_description(folder):
    """config.json with every key that `load_exported` reads."""
    try:
        description = json.loads((folder / "config.json").read_text())
        if description["kind"] != KIND:
            raise KeyError(description["kind"])
        for key in ("sha256", "timesteps", "hsivi_fast", *CONFIG_KEYS):
            if key not in description:
                raise KeyError(key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"export {str(folder)!r}: config.json does not describe a sampler of this version "
            f"({' '.join(repr(error).split())}); give the folder of an export"
        ) from None
    return description

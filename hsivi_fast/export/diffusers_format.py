"""The export as a folder that `HSIVIPipeline.from_pretrained` loads."""

import json

import torch

from ..data import to_uint8
from .check import CHECKED, check_samples
from .description import write_description

# diffusers copies the file into its cache and runs it there, after the user has agreed to that.
PIPELINE = '''\
"""The class of this folder's pipeline, for `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`."""

try:
    from hsivi_fast.diffusers import HSIVIPipeline
except ModuleNotFoundError as error:
    if error.name != "hsivi_fast":
        raise
    raise ImportError(
        "hsivi_fast: is not installed, and this pipeline is its code; install hsivi_fast {version}, which wrote it"
    ) from None

__all__ = ["HSIVIPipeline"]
'''


def refuse_diffusers(config):
    """ValueError where a run of this configuration cannot be a pipeline."""
    if config.target is not None:
        raise ValueError(
            "format: 'diffusers' is for image runs only, and this run has a target; choose safetensors or aoti"
        )
    if config.teacher.target is not None:
        raise ValueError(
            f"format: 'diffusers' is for image runs only, and this run makes points ({config.teacher.target}); "
            "choose safetensors or aoti"
        )


def write_diffusers(sampler, context, description, folder):
    """Write the pipeline and config.json, and check them; returns what config.json holds.

    Raises ValueError where diffusers is not installed.
    """
    try:
        # Late: importing it takes seconds, and a machine may lack it.
        from .pipeline import PIPELINE_FILE, HSIVINetwork, HSIVIPipeline, HSIVIScheduler
    except ImportError as error:
        raise ValueError(str(error)) from None
    config = context.config
    network = HSIVINetwork(
        description["network"],
        description["log_scaled_gamma"],
        config.precision,
        config.channels_last,
        config.teacher.timestep_scale,
        config.teacher.prediction,
        description["teacher"]["betas"],
        config.teacher.steps,
        classes=description.get("classes"),
    )
    network.load_student(sampler.network.state_dict())
    scheduler = HSIVIScheduler(
        config.teacher.steps,
        description["teacher"]["betas"],
        config.nfe,
        config.spacing,
        config.eta,
        config.gamma.per_step,
        config.gamma.per_pixel,
    )
    vae = context.decoder and context.decoder.vae
    HSIVIPipeline(network, scheduler, vae).save_pretrained(folder)
    (folder / PIPELINE_FILE).write_text(PIPELINE.format(version=description["hsivi_fast"]))
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    content["_class_name"] = [PIPELINE_FILE.removesuffix(".py"), HSIVIPipeline.__name__]
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    pipeline = HSIVIPipeline.from_pretrained(folder).to(sampler.layers.tau.device)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(seeds=range(CHECKED), output_type="pt").images
    check_samples((images * 255).round().to(torch.uint8), to_uint8(context.images(sampler(range(CHECKED)))))
    return write_description(folder, description, folder / "unet" / "diffusion_pytorch_model.safetensors")

"""config.json of an export: all that is needed to build the sampler again, as plain values."""

import json
from importlib.metadata import version
from pathlib import Path

from ..checkpoints.files import file_sha256
from ..config import resolved_dict, without_password
from ..nets import all_arguments

KIND = "hsivi_fast sampler, 1"  # what config.json describes, and the version of the description

SEEDS = (
    "A sample is a function of its 64-bit seed. Its normal numbers are Philox4x32-10 and Box-Muller with "
    "key = seed (low word first) and counter = (j, k, 0, 0) for the elements 4j .. 4j + 3 in row-major order; "
    "k = 0 draws x_K and k = K .. 2 the noise of layer k; layer 1 gives its mean."
)

SEEDS_OF_TARGET = SEEDS.replace("K .. 2 the noise of layer k; layer 1 gives its mean.", "K .. 1 the noise of layer k.")

LABELS = (
    "The label of a seed is classes[(w * n) >> 32], with n of them and the first word w of Philox4x32-10 at "
    "key = seed and counter = (0, 2^32 - 1, 0, 0)."
)


def describe(context, sampler, step, weights):
    """The description of a run's sampler, without the hash of the file that holds the weights."""
    config = context.config
    network, layers = sampler.network, sampler.layers
    return {
        "kind": KIND,
        "hsivi_fast": version("hsivi_fast"),
        # With its family's defaults in it: they may change, an export may not.
        "network": {key: value for key, value in all_arguments(config.network).items() if value is not None},
        **_origin(context),
        "nfe": layers.nfe,
        "spacing": config.spacing,
        "timesteps": layers.tau.tolist(),  # tau_0 .. tau_K
        "eta": layers.eta,
        "gamma": {"per_step": config.gamma.per_step, "per_pixel": config.gamma.per_pixel},
        "log_scaled_gamma": list(network.log_scaled_gamma.shape),
        "precision": config.precision,
        "channels_last": config.channels_last,
        "sample": {"shape": list(network.event_shape), **_sample_format(context, network.event_shape)},
        "seeds": SEEDS if not layers.ends_with_noise else SEEDS_OF_TARGET,
        **_classes(sampler.class_labels),
        "run": {"name": config.name, "step": step, "weights": weights, "data": config.data},
    }


def _origin(context):
    """What the sampler was trained on: a teacher, or a target with the way from the layers' coordinates to it."""
    config, teacher = context.config, context.config.teacher
    if config.target is not None:
        settings, of_layers = resolved_dict(config)["target"], context.decoder
        name = Path(without_password(settings["log_density"])).name  # of a file of code, the name alone
        base = {"mean": of_layers.mean.tolist(), "factor": of_layers.factor.tolist()}
        rule = "x = mean + factor u of the last layer's u; the parameters are x through the constraints' biject_to"
        return {
            "teacher": {},
            "target": {**settings, "log_density": name, "score": None},
            "base": {**base, "rule": rule},
        }
    if teacher.target:
        source = {"target": teacher.target}
    else:
        source = {"checkpoint": Path(without_password(teacher.checkpoint)).name}
    return {
        "teacher": {
            **source,
            "betas": resolved_dict(config)["teacher"]["betas"],
            "steps": teacher.steps,
            "prediction": teacher.prediction,
            "timestep_scale": teacher.timestep_scale,
            **({} if teacher.null_class is None else {"null_class": teacher.null_class}),
            **({} if teacher.guidance is None else {"guidance": teacher.guidance}),
        }
    }


def _classes(class_labels):
    """What is said of classes: which ones the seeds' own labels are; nothing where there are none."""
    if class_labels.classes is None:
        return {}
    return {"classes": class_labels.chosen.tolist(), "labels": LABELS}


def _sample_format(context, event_shape):
    """What one sample is: points and latents are floats, images are rounded to grey levels."""
    teacher, decoder = context.config.teacher, context.decoder
    if context.config.target is not None:
        return {"type": "float32", "layout": "parameters", "shape": list(decoder.image_shape(event_shape))}
    if teacher.target is not None:
        return {"type": "float32", "layout": "xy"}
    image = {"type": "uint8", "layout": "CHW", "levels": 256, "rule": "round((clamp(x, -1, 1) + 1) * 127.5)"}
    if decoder is None:
        return image
    scaling_factor, shift_factor = decoder.scaling
    latents = {
        "vae": "/".join(Path(teacher.vae).parts[-2:]),
        "class": decoder.name,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "rule": "vae.decode(sample / scaling_factor + shift_factor).sample is the image x",
        "image": {"shape": list(decoder.image_shape(event_shape)), **image},
    }
    return {"type": "float32", "layout": "CHW", "latents": latents}


def write_description(folder, description, weights):
    """Write config.json, with the hash of the file `weights`; returns what it holds."""
    description = {**description, "sha256": file_sha256(weights)}
    (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n")
    return description

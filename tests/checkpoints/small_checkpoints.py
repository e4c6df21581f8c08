"""Small networks with random weights, and the checkpoints that others would write of them."""

import json

import numpy as np
import torch

from hsivi_fast.build import load_teacher
from hsivi_fast.config import load_config
from hsivi_fast.nets import build_unet

DDPM = {
    "family": "ddpm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 32,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [False, True],
}
ADM = {
    "family": "adm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 32,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [2],
    "heads": 4,
    "out_channels": 6,
}


def random_weights(network, seed=0, log_gamma=None):
    """Random weights of a network, in the order of its parameters.

    With `log_gamma`, a shape, those of a student: log_scaled_gamma is registered before the others.
    """
    torch.manual_seed(seed)
    unet = build_unet(network)
    if log_gamma is not None:
        unet.register_parameter("log_scaled_gamma", torch.nn.Parameter(torch.zeros(log_gamma)))
    return {name: torch.randn_like(parameter) * 0.1 for name, parameter in unet.named_parameters()}


def run_config(tmp_path, network, checkpoint, *overrides):
    """The configuration of a run whose teacher is this checkpoint."""
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"network": network, "teacher": {"checkpoint": str(checkpoint)}, "nfe": 3, "eta": 0.5}))
    return load_config(file, overrides)


def teacher_has(tmp_path, network, checkpoint, weights, *overrides):
    """Whether a run with this checkpoint loads a teacher with exactly these weights."""
    loaded = dict(load_teacher(run_config(tmp_path, network, checkpoint, *overrides), "cpu").named_parameters())
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def with_module_prefix(weights):
    """Names as DistributedDataParallel gives them."""
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def published_file(network, log_gamma, averaged=True):
    """(content, {role: weights}) of a file of the published HSIVI code.

    It is as torch_utils/checkpoint.py there writes it in the warm-up, where the learning rate is a number of numpy's.
    """
    networks = {
        "target_model": random_weights(network, 1),
        "phinet": random_weights(network, 2, log_gamma),
        "fnet": random_weights(network, 3),
    }
    means = {"phinet": random_weights(network, 4, log_gamma), "fnet": random_weights(network, 5)}
    content = {
        "whole_model": {
            f"module.{key}.{name}": tensor for key, weights in networks.items() for name, tensor in weights.items()
        },
        "step": 100,
    }
    for key in means:
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in networks[key].values()]
        optimizer = torch.optim.Adam(parameters, lr=1e-4, amsgrad=True)
        parameters[0].grad = torch.ones_like(parameters[0])
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1.6e-5 * np.minimum(100 / 2500, 1.0)
        content[f"optimizer_{key}"] = optimizer.state_dict()
        shadow = list(means[key].values()) if averaged else [torch.ones(2)]
        content[f"ema_{key}"] = {"decay": 0.999, "num_updates": 100, "shadow_params": shadow}
    return content, {
        "teacher": networks["target_model"],
        "student": networks["phinet"],
        "score_net": networks["fnet"],
        "student_ema": means["phinet"],
        "score_net_ema": means["fnet"],
    }

"""The networks: UNets and an MLP with the parameter names of the published checkpoints, and 2-D mixtures.

May import ops only.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass

from .adm import ADMUNet
from .ddpm import DDPMUNet
from .edm_unet import DhariwalUNet, SongUNet
from .mlp import MLP

FAMILIES = {"ddpm": DDPMUNet, "adm": ADMUNet, "mlp": MLP, "song": SongUNet, "dhariwal": DhariwalUNet}

_EDM_CIFAR10 = {
    "family": "song",
    "image_channels": 3,
    "image_size": 32,
    "channels": 128,
    "multipliers": (2, 2, 2),
    "res_blocks": 4,
    "attention": (16,),
}
_EDM_FACES64 = {**_EDM_CIFAR10, "image_size": 64, "multipliers": (1, 2, 2, 2)}
# The published networks, and the small ones that this project trains itself.
NETWORKS = {
    "digits": {
        "family": "ddpm",
        "image_channels": 1,
        "image_size": 8,
        "channels": 32,
        "multipliers": (1, 2, 2),
        "res_blocks": 1,
        "attention": (False, True, False),
        "norm_groups": 8,
    },
    "mnist": {
        "family": "ddpm",
        "image_channels": 1,
        "image_size": 32,
        "channels": 32,
        "multipliers": (1, 2, 2, 2),
        "res_blocks": 1,
        "attention": (False, False, True, False),
    },
    "cifar10": {
        "family": "ddpm",
        "image_channels": 3,
        "image_size": 32,
        "channels": 128,
        "multipliers": (1, 2, 2, 2),
        "res_blocks": 2,
        "attention": (False, True, False, False),
    },
    "celeba64": {
        "family": "ddpm",
        "image_channels": 3,
        "image_size": 64,
        "channels": 128,
        "multipliers": (1, 2, 2, 2, 4),
        "res_blocks": 2,
        "attention": (False, False, True, False, False),
    },
    "imagenet64": {
        "family": "adm",
        "image_channels": 3,
        "image_size": 64,
        "channels": 128,
        "multipliers": (1, 2, 3, 4),
        "res_blocks": 3,
        "attention": (4, 8),
        "heads": 4,
        "out_channels": 6,
    },
    "edm_cifar10": _EDM_CIFAR10,
    "edm_cifar10_cond": {**_EDM_CIFAR10, "classes": 10},
    "edm_ffhq64": _EDM_FACES64,
    "edm_afhqv2": _EDM_FACES64,
    "edm_imagenet64": {
        "family": "dhariwal",
        "image_channels": 3,
        "image_size": 64,
        "channels": 192,
        "multipliers": (1, 2, 3, 4),
        "res_blocks": 3,
        "attention": (32, 16, 8),
        "classes": 1000,
    },
    "smoke": {
        "family": "ddpm",
        "image_channels": 1,
        "image_size": 8,
        "channels": 8,
        "multipliers": (1,),
        "res_blocks": 0,
        "attention": (False,),
        "middle": False,
        "norm_groups": 4,
    },
    "toy2d": {"family": "mlp", "channels": 64, "layers": 3},
    "density": {"family": "mlp", "channels": 128, "layers": 3},
}


def build_unet(network):
    """Build a noise-prediction network with fresh random weights.

    `network` is a name of `NETWORKS`, or a mapping or dataclass with `family` and the arguments of that family's class.
    One with `name` starts from that named network, and its other entries override. Entries that are None are left out.

    Returns a module with `event_shape` and forward(x [B, *event_shape] float, t [B] int) -> [B, *event_shape].
    The families song and dhariwal are EDM's raw networks, which predict no noise: see `edm_unet.py`.
    Raises ValueError for an unknown name, family or argument, or sizes that do not fit each other.
    """
    arguments = network_arguments(network)
    family = arguments.pop("family", None)
    if family not in FAMILIES:
        raise ValueError(f"network.family: {family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    known = inspect.signature(FAMILIES[family]).parameters
    for key in arguments:
        if key not in known:
            raise ValueError(f"network.{key}: the family {family} has no such setting; it has {', '.join(known)}")
    required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ValueError(f"network: the family {family} needs {', '.join(missing)}")
    return FAMILIES[family](**arguments)


def network_arguments(network):
    """The full description of a network as a new dict: the named network's entries with the overrides applied.

    `network` is what `build_unet` takes. Raises ValueError for an unknown name or what is no description.
    """
    if isinstance(network, str):
        network = {"name": network}
    elif is_dataclass(network):
        network = asdict(network)
    elif not isinstance(network, Mapping):
        raise ValueError(f"network: expected a name or a mapping, got {network!r}")
    given = {key: value for key, value in network.items() if value is not None}
    name = given.pop("name", None)
    if name is not None and name not in NETWORKS:
        raise ValueError(
            f"network: {name!r} is unknown; choose one of {', '.join(NETWORKS)} "
            "or describe one with family, channels, ..."
        )
    return {**NETWORKS.get(name, {}), **given}


def all_arguments(network):
    """`network_arguments` with the defaults of its family in it, those that are None too.

    Raises ValueError as `network_arguments`; the family must be known.
    """
    given = network_arguments(network)
    defaults = {}
    for name, parameter in inspect.signature(FAMILIES[given["family"]]).parameters.items():
        if name not in given and parameter.default is not parameter.empty:
            defaults[name] = parameter.default
    return given | defaults

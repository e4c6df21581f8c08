"""The description of a UNet from the names and shapes of its tensors."""

import inspect

from ..nets import FAMILIES, NETWORKS

INVISIBLE = ("image_size", "norm_groups", "norm_eps", "heads")  # settings of a UNet that its weights do not show
# `build_unet`'s values, and the published HSIVI code's. Only diffusers' and our own files say them.
NORMS = {"norm_groups": 32, "norm_eps": 1e-5}
_USUAL = {**NORMS, "heads": 4}


def describe_network(tensors, stated):
    """(description, assumed) of the UNet that tensors belong to.

    The description is what `build_unet` takes: sizes from the tensors, what `stated` says, and usual values for the
    rest. It is None where the tensors are of no UNet and nothing is stated. `assumed` are the keys that are neither
    stated nor shown by the tensors. Keys without a usual value are left out of the description.
    """
    family = family_of(tensors)
    try:
        sizes = {"ddpm": _ddpm_sizes, "adm": _adm_sizes}[family](tensors)
    except (KeyError, IndexError, ValueError):  # no UNet, or one with layers that ours has not: loading will name them
        return dict(stated) or None, ()
    usual = {**_USUAL, **NETWORKS.get(known_name(sizes), {})}  # a network known by its sizes has its other settings too
    settings = inspect.signature(FAMILIES[family]).parameters
    assumed = tuple(key for key in settings if key not in sizes and key not in stated)
    return {**sizes, **{key: usual[key] for key in assumed if key in usual}, **stated}, assumed


def family_of(tensors):
    """The family of a network by its tensors' names: "ddpm", "adm", or None for another network."""
    if "in_conv.weight" in tensors and "embed.0.weight" in tensors:
        return "ddpm"
    if "input_blocks.0.0.weight" in tensors and "time_embed.0.weight" in tensors:
        return "adm"
    return None


def known_name(description):
    """The name in `NETWORKS` of the network with a description's sizes, as far as weights show them, or None."""
    visible = {key: _as_list(value) for key, value in description.items() if key not in INVISIBLE}
    for name, network in NETWORKS.items():
        if network["family"] != description.get("family"):
            continue
        complete = {"middle": True, **network} if network["family"] == "ddpm" else network
        if all(_as_list(complete.get(key)) == value for key, value in visible.items()):
            return name
    return None


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value


def _ddpm_sizes(tensors):
    channels, image_channels = tensors["in_conv.weight"].shape[:2]
    levels = {name.split(".")[1] for name in tensors if name.startswith("upsamples.")}
    multipliers, attention = [], []
    for level in range(len(levels)):
        stage = f"upsamples.level_{level}.0"
        attention.append(f"{stage}.0.conv1.weight" in tensors)
        block = f"{stage}.0" if attention[-1] else stage
        multipliers.append(tensors[f"{block}.conv1.weight"].shape[0] // channels)
    blocks_up = {name.split(".")[2] for name in tensors if name.startswith("upsamples.level_0.")}
    return {
        "family": "ddpm",
        "image_channels": image_channels,
        "channels": channels,
        "multipliers": multipliers,
        "res_blocks": len(blocks_up) - 1,
        "attention": attention,
        "middle": "middle.0.conv1.weight" in tensors,
    }


def _adm_sizes(tensors):
    channels, image_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks."))
    widths, attention = [], []
    blocks = [0]  # of each level
    factor = 1  # of downsampling
    for index in range(1, last + 1):
        if f"input_blocks.{index}.0.op.weight" in tensors:
            factor *= 2
            blocks.append(0)
            continue
        if not blocks[-1]:
            widths.append(tensors[f"input_blocks.{index}.0.in_layers.2.weight"].shape[0])
        blocks[-1] += 1
        if f"input_blocks.{index}.1.qkv.weight" in tensors and factor not in attention:
            attention.append(factor)
    return {
        "family": "adm",
        "image_channels": image_channels,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "res_blocks": blocks[0],
        "attention": attention,
        "out_channels": tensors["out.2.weight"].shape[0],
    }

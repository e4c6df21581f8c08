"""The description of a UNet from the names and shapes of its tensors."""

import inspect
import re

from ..nets import FAMILIES, NETWORKS, all_arguments

# Settings of a UNet that its weights do not show. In a file that does not describe itself, those after the first four
# are what they are by default.
ASKED = ("norm_eps", "norm_groups", "image_size", "heads")
INVISIBLE = (
    *ASKED,
    *("up_heads", "head_channels", "middle_norm_groups", "middle_scale"),
    *("freq_shift", "cos_first", "down_padding", "center_input", "resample_filter"),
)
# `build_unet`'s values, and the published HSIVI code's. Only diffusers' and our own files say them.
NORMS = {"norm_groups": 32, "norm_eps": 1e-5}
# Networks that are known by their sizes: ours, and those of improved-diffusion's that no configuration here has.
CIFAR10_50M = "improved-diffusion's cifar10_uncond_50M_500K"
IMAGENET64_270M = "improved-diffusion's imagenet64_cond_270M_250K"
LSUN_100M = "improved-diffusion's lsun_uncond_100M"
_KNOWN = {
    **NETWORKS,
    CIFAR10_50M: {**NETWORKS["imagenet64"], "image_size": 32, "multipliers": (1, 2, 2, 2), "attention": (2, 4)},
    IMAGENET64_270M: {**NETWORKS["imagenet64"], "channels": 192, "classes": 1000},
    LSUN_100M: {
        **NETWORKS["imagenet64"],
        "image_size": 256,
        "multipliers": (1, 1, 2, 2, 4, 4),
        "res_blocks": 2,
        "attention": (16,),
        "heads": 1,
        "scale_shift": False,
    },
}
# Of these, the ones that improved-diffusion trained with 4000 steps of the cosine schedule and rescaled timesteps: the
# network was shown t / 4, so 0 .. 999.75.
TRAINED_RESCALED = ("imagenet64", CIFAR10_50M)
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
    except (
        KeyError,
        IndexError,
        ValueError,
        ZeroDivisionError,
    ):  # no UNet, or one with layers that ours has not: loading will name them
        return dict(stated) or None, ()
    usual = {**_USUAL, **_KNOWN.get(known_name(sizes), {})}  # a network known by its sizes has its other settings too
    settings = inspect.signature(FAMILIES[family]).parameters
    assumed = tuple(key for key in settings if key in ASKED and key not in sizes and key not in stated)
    for key in ("norm_groups", "heads"):
        if sizes["channels"] % usual[key]:
            del usual[key]  # it cannot be that
    return {**sizes, **{key: usual[key] for key in assumed if key in usual}, **stated}, assumed


def family_of(tensors):
    """The family of a network by its tensors' names: "ddpm", "adm", or None for another network."""
    if "in_conv.weight" in tensors and "embed.0.weight" in tensors:
        return "ddpm"
    if "input_blocks.0.0.weight" in tensors and "time_embed.0.weight" in tensors:
        return "adm"
    return None


def known_name(description):
    """The name of the known network with a description's sizes, as far as weights show them, or None."""
    visible = {key: _as_list(value) for key, value in description.items() if key not in INVISIBLE}
    for name, network in _KNOWN.items():
        if network["family"] != description.get("family"):
            continue
        complete = all_arguments(network)
        if all(_as_list(complete.get(key)) == value for key, value in visible.items()):
            return name
    return None


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value


def _ddpm_sizes(tensors):
    channels, image_channels = tensors["in_conv.weight"].shape[:2]
    if not channels or not image_channels:
        raise ValueError("empty")
    levels = {name.split(".")[1] for name in tensors if name.startswith("upsamples.")}
    multipliers, attention_up = [], []
    for level in range(len(levels)):
        stage = f"upsamples.level_{level}.0"
        attention_up.append(f"{stage}.0.conv1.weight" in tensors)
        block = f"{stage}.0" if attention_up[-1] else stage
        multipliers.append(tensors[f"{block}.conv1.weight"].shape[0] // channels)
    if not multipliers or not min(multipliers):
        raise ValueError("a level narrower than the first")
    blocks_up = {name.split(".")[2] for name in tensors if name.startswith("upsamples.level_0.")}
    attention = attention_up
    if len(blocks_up) > 1:
        attention = [f"downsamples.level_{level}.0.0.conv1.weight" in tensors for level in range(len(levels))]
    sizes = {
        "family": "ddpm",
        "image_channels": image_channels,
        "channels": channels,
        "multipliers": multipliers,
        "res_blocks": len(blocks_up) - 1,
        "attention": attention,
        "middle": "middle.0.conv1.weight" in tensors,
    }
    # What is not as it is by default.
    if attention_up != attention:
        sizes["attention_up"] = attention_up
    if "middle.1.conv1.weight" in tensors:
        sizes["middle_attention"] = False
    elif "middle.1.project_in.weight" in tensors and not any(name.startswith("middle.1.norm.") for name in tensors):
        sizes["middle_norm_groups"] = 0
    outputs, time_channels = _rows(tensors, "out_conv.2.weight"), _rows(tensors, "embed.0.weight")
    if outputs not in (None, image_channels):
        sizes["out_channels"] = outputs
    if time_channels not in (None, 4 * channels):
        sizes["time_channels"] = time_channels
    if _rows(tensors, f"{block}.fc.weight") == 2 * channels * multipliers[-1]:
        sizes["scale_shift"] = True
    if "class_embed.weight" in tensors:
        sizes["classes"] = _rows(tensors, "class_embed.weight")
    return sizes


def _rows(tensors, name):
    """The first size of a tensor, or None where it has none or is not there: loading will name it."""
    return tensors[name].shape[0] if name in tensors and tensors[name].dim() else None


def _adm_sizes(tensors):
    channels, image_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks.")}
    if numbers != set(range(len(numbers))):  # a name may say any number
        raise ValueError("a block without weights")
    widths, attention = [], []
    blocks = [0]  # of each level
    factor = 1  # of downsampling
    for index in range(1, len(numbers)):
        if f"input_blocks.{index}.0.op.weight" in tensors:
            factor *= 2
            blocks.append(0)
            continue
        if not blocks[-1]:
            widths.append(tensors[f"input_blocks.{index}.0.in_layers.2.weight"].shape[0])
        blocks[-1] += 1
        if f"input_blocks.{index}.1.qkv.weight" in tensors and factor not in attention:
            attention.append(factor)
    if not image_channels or not min(widths) // channels:
        raise ValueError("a level narrower than the first")
    sizes = {
        "family": "adm",
        "image_channels": image_channels,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "res_blocks": blocks[0],
        "attention": attention,
        "out_channels": tensors["out.2.weight"].shape[0],
    }
    # What is not as it is by default.
    if _rows(tensors, "input_blocks.1.0.emb_layers.1.weight") == widths[0]:
        sizes["scale_shift"] = False
    if "label_emb.weight" in tensors:
        sizes["classes"] = _rows(tensors, "label_emb.weight")
    return sizes


def what_ours_has_not(tensors):
    """In words what keeps a DDPM or ADM UNet from being one of ours, told by its tensors, or None."""
    try:
        return {"ddpm": _ddpm_strangeness, "adm": _adm_strangeness}[family_of(tensors)](tensors)
    except (KeyError, IndexError, ValueError):  # no UNet, or tensors of other dimensions: the comparison names them
        return None


def _ddpm_strangeness(tensors):
    image_channels, outputs = tensors["in_conv.weight"].shape[1], tensors["out_conv.2.weight"].shape[0]
    if outputs not in (image_channels, 2 * image_channels):
        return f"out_conv.2.weight has {outputs} output channels; ours needs {image_channels}, or {2 * image_channels}"
    levels = {name.split(".")[1] for name in tensors if name.startswith("upsamples.")}
    if len(levels) > 1 and not any(re.fullmatch(r"downsamples\.level_0\.\d+\.1\.weight", name) for name in tensors):
        return "downsamples.level_0 ends without a convolution, so it is average pooling; ours needs resample_with_conv"
    return None


def _adm_strangeness(tensors):
    image_channels, outputs = tensors["input_blocks.0.0.weight"].shape[1], tensors["out.2.weight"].shape[0]
    if image_channels > 4 or outputs < image_channels:
        return (
            f"input_blocks.0.0.weight takes {image_channels} channels, as of a super-resolution network with a second "
            "image; ours takes the noisy image alone"
        )
    if outputs not in (image_channels, 2 * image_channels):
        return f"out.2.weight has {outputs} output channels; ours needs {image_channels}, or {2 * image_channels}"
    block = "input_blocks.1.0"
    rows, width = tensors[f"{block}.emb_layers.1.weight"].shape[0], tensors[f"{block}.in_layers.2.weight"].shape[0]
    if rows not in (width, 2 * width):
        return f"{block}.emb_layers.1.weight has {rows} rows; ours needs {width}, or {2 * width} for scale and shift"
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks.")}
    gap = min(set(range(len(numbers))) - numbers, default=None)
    if gap is not None:
        return f"input_blocks.{gap} has no weights, so it is average pooling; ours needs conv_resample"
    return None

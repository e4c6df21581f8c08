"""A diffusers folder: what UNet2DModel.save_pretrained wrote, or a pipeline's folder with that in unet/."""

import json
import re

import torch

from .checkpoint import Checkpoint
from .tensor_files import is_named_tensors, read_safetensors, read_torch

# What UNet2DModel takes for a key that config.json does not have.
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
# The values with which it is our DDPM UNet.
_NEEDED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (1,),
    "flip_sin_to_cos": (False,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
_BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# diffusers' names of modules and ours: outside of all blocks, and inside of a block.
_OUTER = {
    "conv_in": "in_conv",
    "time_embedding.linear_1": "embed.0",
    "time_embedding.linear_2": "embed.2",
    "conv_norm_out": "out_conv.0",
    "conv_out": "out_conv.2",
}
_INNER = {
    "time_emb_proj": "fc",
    "conv_shortcut": "skip",
    "group_norm": "norm",
    "to_out.0": "project_out",
    "proj_attn": "project_out",
    "to_q": "q",
    "query": "q",
    "to_k": "k",
    "key": "k",
    "to_v": "v",
    "value": "v",
}
# diffusers' names of noise schedules and ours.
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}


def read_diffusers(folder):
    """The `Checkpoint` of such a folder.

    Raises ValueError where a file is missing or damaged, or our DDPM UNet cannot be its network.
    """
    folder = _network_folder(folder)
    network = _network(folder, _read_json(folder / "config.json"))
    file = _existing([folder / name for name in _WEIGHT_FILES])
    if file is None:
        raise ValueError(
            f"checkpoint {str(folder)!r}: has a config.json and no weights; expected {' or '.join(_WEIGHT_FILES)}"
        )
    tensors = read_safetensors(file)[0] if file.suffix == ".safetensors" else read_torch(file)
    if not is_named_tensors(tensors):
        raise ValueError(f"checkpoint {str(file)!r}: holds no named tensors")
    settings = _noise(folder)
    return Checkpoint(
        source=str(folder),
        format="a diffusers UNet2DModel folder",
        tensors={"teacher": _our_tensors(file, tensors, network)},
        network=network,
        stated=tuple(network),
        assumed=() if "image_size" in network else ("image_size",),
        settings=settings,
    )


def _network_folder(folder):
    """The folder itself or its unet/, whichever has a config.json."""
    config = _existing([folder / "config.json", folder / "unet" / "config.json"])
    if config is None:
        entries = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"checkpoint {str(folder)!r}: is a folder without the config.json of a diffusers UNet2DModel, "
            f"it holds {', '.join(entries[:5]) or 'nothing'}; give a file, or such a folder"
        )
    return config.parent


def _existing(files):
    """The first of these files that is there, or None."""
    return next((file for file in files if file.is_file()), None)


def _read_json(file):
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected keys and values, got a {type(value).__name__}")
    return value


def _network(folder, config):
    """Our description of a UNet2DModel; ValueError that names the first key with which it is none of ours."""
    where = f"checkpoint {str(folder)!r}: its config.json"
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"{where} is of a {config.get('_class_name')}, only UNet2DModel can be read")
    for key in ("block_out_channels", *_BLOCKS):
        if not isinstance(config.get(key), list):
            raise ValueError(f"{where} has no list {key}")
    config = {**_DEFAULTS, **config}

    def refuse(key, expected):
        raise ValueError(f"{where} has {key} = {config[key]!r}, which our DDPM UNet cannot be; it needs {expected}")

    for key, values in _NEEDED.items():
        if config[key] not in values:
            refuse(key, " or ".join(map(repr, values)))
    widths = config["block_out_channels"]
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"{where}: block_out_channels {widths!r} are no widths")
    channels = widths[0]
    for key, types in _BLOCKS.items():
        if len(config[key]) != len(widths) or not set(config[key]) <= set(types):
            refuse(key, f"{len(widths)} of {' and '.join(types)}")
    attention = [kind.startswith("Attn") for kind in config["down_block_types"]]
    if [kind.startswith("Attn") for kind in reversed(config["up_block_types"])] != attention:
        refuse("up_block_types", "attention at the same levels as down_block_types")
    if any(width % channels for width in widths):
        refuse("block_out_channels", "multiples of the first")
    attended = {width for width, has_attention in zip(widths, attention) if has_attention}
    attended.add(widths[-1])  # in the middle
    if config["attention_head_dim"] is not None and attended != {config["attention_head_dim"]}:
        refuse("attention_head_dim", f"null, one head over all {' or '.join(map(str, sorted(attended)))} channels")
    if config["time_embedding_dim"] not in (None, 4 * channels):
        refuse("time_embedding_dim", f"{4 * channels}, four times the first width")
    if config["out_channels"] != config["in_channels"]:
        refuse("out_channels", f"{config['in_channels']}, as many as in_channels")
    if config["attn_norm_num_groups"] not in (None, config["norm_num_groups"]):
        refuse("attn_norm_num_groups", f"{config['norm_num_groups']}, as norm_num_groups")
    size = config["sample_size"]
    if isinstance(size, list):
        if len(set(size)) != 1:
            refuse("sample_size", "one number, for square images")
        size = size[0]
    network = {
        "family": "ddpm",
        "image_channels": config["in_channels"],
        "image_size": size,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "res_blocks": config["layers_per_block"],
        "attention": attention,
        "middle": True,
        "norm_groups": config["norm_num_groups"],
        "norm_eps": config["norm_eps"],
    }
    return {key: value for key, value in network.items() if value is not None}


def _noise(folder):
    """{"teacher": {betas, steps}} from the scheduler's configuration, {} where there is none.

    Raises ValueError for a noise that a teacher of ours cannot have.
    """
    folders = (folder, folder / "scheduler", folder.parent / "scheduler")
    file = _existing([place / "scheduler_config.json" for place in folders])
    if file is None:
        return {}
    config = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": "epsilon",
        **_read_json(file),
    }
    needed = {"prediction_type": ("epsilon",), "beta_schedule": tuple(_SCHEDULES), "trained_betas": (None,)}
    if config["beta_schedule"] == "linear":
        needed |= {"beta_start": (1e-4,), "beta_end": (0.02,)}
    for key, values in needed.items():
        if config[key] not in values:
            needs = " or ".join(map(repr, values))
            raise ValueError(f"{file}: {key} = {config[key]!r}, which a teacher here cannot have; it needs {needs}")
    return {"teacher": {"betas": _SCHEDULES[config["beta_schedule"]], "steps": config["num_train_timesteps"]}}


def _our_tensors(file, tensors, network):
    """diffusers' tensors under our names, its separate queries, keys and values joined into one 1x1 convolution.

    Raises ValueError for a tensor that our UNet has no place for, and where one of the three is missing.
    """
    renamed, projections = {}, {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        place, inner = _our_place(module, network)
        if place is None or parameter not in ("weight", "bias"):
            raise ValueError(f"checkpoint {str(file)!r}: has {name}, which our DDPM UNet has no place for")
        if inner in ("q", "k", "v"):
            projections.setdefault(f"{place}.project_in.{parameter}", {})[inner] = tensor
        else:
            our_name = f"{place}.{inner}.{parameter}" if inner else f"{place}.{parameter}"
            renamed[our_name] = _as_1x1(tensor) if inner == "project_out" and parameter == "weight" else tensor
    for name, qkv in projections.items():
        if len(qkv) < 3:
            raise ValueError(f"checkpoint {str(file)!r}: has of {name} only {' and '.join(qkv)}, not all of q, k and v")
        joined = torch.cat([qkv["q"], qkv["k"], qkv["v"]])  # [3 C, C], or [3 C] of biases
        renamed[name] = _as_1x1(joined) if name.endswith("weight") else joined
    return renamed


def _our_place(module, network):
    """(our name of the block, our name inside of it) for a module of diffusers'; (None, None) where there is none."""
    if module in _OUTER:
        return _OUTER[module], ""
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module)
    if match:
        kind, index, inner = match.groups()
        index = 1 if kind == "attentions" else 2 * int(index)
        return f"middle.{index}", _INNER.get(inner, inner)
    kinds = "resnets|attentions|downsamplers|upsamplers"
    match = re.fullmatch(rf"(down|up)_blocks\.(\d+)\.({kinds})\.(\d+)\.(.+)", module)
    levels = len(network["multipliers"])
    if not match or int(match[2]) >= levels:
        return None, None
    way, level, kind, index, inner = match[1], int(match[2]), match[3], match[4], match[5]
    if way == "up":  # diffusers counts these from the lowest resolution
        level = levels - 1 - level
    stage = f"{way}samples.level_{level}"
    if kind in ("downsamplers", "upsamplers"):
        blocks = network["res_blocks"] + (way == "up")  # before the change of resolution
        return (f"{stage}.{blocks}.1", "") if inner == "conv" else (None, None)
    if network["attention"][level]:
        index = f"{index}.1" if kind == "attentions" else f"{index}.0"
    return f"{stage}.{index}", _INNER.get(inner, inner)


def _as_1x1(weight):
    """A matrix [M, N] as the weight of a 1x1 convolution, [M, N, 1, 1]."""
    return weight.reshape(*weight.shape[:2], 1, 1)

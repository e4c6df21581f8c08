"""What a checkpoint file or folder is, told by its content: ours, ddpm-torch's, improved-diffusion's, diffusers', or the published HSIVI code's.

Whatever it is, its tensors come out under the names of `ddpm_unet.py` and `adm_unet.py`, which are those of the published checkpoints.
Nothing that is pickled in a file is ever run.
"""

import inspect
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..nets import FAMILIES, NETWORKS

PARTS = ("teacher", "student", "student_ema", "score_net", "score_net_ema")
READABLE = (
    "ours (safetensors), ddpm-torch, improved-diffusion, a diffusers UNet2DModel folder, the published HSIVI code's"
)
INVISIBLE = ("image_size", "norm_groups", "norm_eps", "heads")  # settings of a UNet that its weights do not show
LOG_GAMMA = "log_scaled_gamma"
NORMS = {
    "norm_groups": 32,
    "norm_eps": 1e-5,
}  # `build_unet`'s, and the published HSIVI code's; no file but a diffusers folder says them
DDPM_TORCH_EPS = 1e-6  # ddpm-torch trains with another one, and of its teachers are cifar10's and celeba64's
PUBLISHED_PARTS = {
    "teacher": "target_model",
    "student": "phinet",
    "score_net": "fnet",
}  # the published code's names of the three networks


@dataclass(frozen=True)
class Checkpoint:
    """What stands in a checkpoint: `parts` maps "teacher", "student", "student_ema", "score_net", "score_net_ema" to {name: tensor} as stored.

    `network` describes the network as `build_unet` takes it, or is None where it is none of the UNets; `stated` are those of its keys that the file
    says itself, `assumed` those that it does not say and its weights do not show. `settings` are further keys of a run's configuration that are
    known from it (teacher.betas and teacher.steps, nfe, gamma); `notes` says what was seen and left out.
    """

    source: str
    format: str
    parts: dict
    network: dict | None = None
    stated: tuple = ()
    assumed: tuple = ()
    settings: dict = field(default_factory=dict)
    notes: tuple = ()

    def weights(self, part="teacher"):
        """{name: float32 tensor} of a part, on the CPU; ValueError where the file has no such part."""
        if part not in self.parts:
            raise ValueError(
                f"checkpoint {self.source!r}: has no {part}; it is {self.format} and has {', '.join(self.parts)}"
            )
        return {name: _as_float32(tensor) for name, tensor in self.parts[part].items()}


def read_checkpoint(path):
    """Read the checkpoint at `path`, a file or a diffusers folder, into a `Checkpoint`.

    Raises ValueError, in one line, where it is missing, damaged, of an unknown layout, holds pickled code, or is of a network that ours cannot be.
    """
    path = Path(path)
    if path.is_dir():
        return _read_diffusers(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r}: no such file")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # eight bytes of a length, then JSON
        content, metadata = _read_safetensors(path)
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # torch's archive, or its format before 1.6
        content, metadata = _read_torch(path), None
    else:
        raise ValueError(
            f"checkpoint {str(path)!r}: is neither a safetensors file nor one of torch.save; readable are {READABLE}"
        )
    return _recognise(path, content, metadata)


# Files


def _read_safetensors(path):
    """({name: tensor}, {key: text})"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(path)!r}: not a readable safetensors file ({error})") from None


class _Ignored:
    """Takes the place of numpy values, which optimizer states hold: they are not needed, and so nothing of numpy is called."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


_NUMPY = [
    (_Ignored, f"numpy{name}")
    for name in (
        ".dtype",
        ".ndarray",
        ".core.multiarray.scalar",
        "._core.multiarray.scalar",
        ".core.multiarray._reconstruct",
        "._core.multiarray._reconstruct",
    )
]


def _read_torch(path):
    """Whatever torch.save wrote, its tensors mapped from the disk where the format allows that, and no code run."""
    where = f"checkpoint {str(path)!r}"
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(_NUMPY):
            mapped = (
                file.read(2) == b"PK" and path.suffix != ".safetensors"
            )  # torch.load takes what has that name for what it says
            file.seek(0)
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        code = re.search(
            r"(?:GLOBAL |function |but got )<?(?:class |function |built-in function )?'?([\w.]+)", str(error)
        )
        if code:
            raise ValueError(
                f"{where}: holds pickled code ({code[1]}), which is never run; save its tensors alone, torch.save(model.state_dict(), ...)"
            ) from None
        raise ValueError(f"{where}: damaged, or pickled code, which is never run") from None
    except Exception as error:  # a cut or altered file: zip, pickle and struct each have errors of their own
        raise ValueError(
            f"{where}: not a readable torch file ({' '.join(str(error).split())[:200] or type(error).__name__})"
        ) from None


def _as_float32(tensor):
    """A tensor of its own in memory: one that is mapped from a file would change with it."""
    return tensor.detach().to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.detach().clone()


# Layouts


def _recognise(path, content, metadata):
    """The `Checkpoint` of what a file holds; `metadata` is the text that a safetensors file has beside its tensors, None for another file."""
    where = f"checkpoint {str(path)!r}"
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where}: holds a {type(content).__name__} and no named tensors; readable are {READABLE}")
    if _is_tensors(content.get("whole_model")):
        return _published(path, content)
    if isinstance(content.get("ema"), dict) and _is_tensors(content["ema"].get("shadow")):
        return _teacher(path, "ddpm-torch's, averaged weights", content["ema"]["shadow"])
    if _is_tensors(content.get("model")):
        return _teacher(path, "ddpm-torch's, not averaged", content["model"])
    if _is_tensors(content):
        if any(name.startswith("down_blocks.") for name in content):
            if not (path.parent / "config.json").is_file():
                raise ValueError(
                    f"{where}: has diffusers' weights without their config.json; give the folder that holds both"
                )
            return _read_diffusers(path.parent)
        family = _family(_plain_names(content))
        if family or metadata is not None:  # a safetensors file may hold any network of ours, a classifier too
            return _teacher(
                path,
                {"ddpm": "a DDPM UNet's weights", "adm": "improved-diffusion's"}.get(family, "a safetensors file"),
                content,
                metadata,
            )
    keys = [str(key) for key in content]
    raise ValueError(
        f"{where}: of an unknown layout, it holds {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}; readable are {READABLE}"
    )


def _is_tensors(value):
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())
    )


def _plain_names(tensors):
    """Without the "module." that DistributedDataParallel puts before every name."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _teacher(path, format, tensors, metadata=None):
    tensors = _plain_names(tensors)
    try:
        said = {key: json.loads((metadata or {}).get(f"hsivi_{key}", "{}")) for key in ("network", "settings")}
        network, assumed = described(tensors, said["network"])
        trained_there = format.startswith("ddpm-torch") or name_of(network or {}) in ("cifar10", "celeba64")
        if "norm_eps" in assumed and network["family"] == "ddpm" and trained_there:
            network = {**network, "norm_eps": DDPM_TORCH_EPS}
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"checkpoint {str(path)!r}: its metadata are not readable: {metadata}") from None
    return Checkpoint(
        str(path), format, {"teacher": tensors}, network, tuple(said["network"]), assumed, said["settings"]
    )


def metadata_of(checkpoint):
    """What a safetensors file of ours has to carry beside the tensors so that nothing that `checkpoint` says is lost."""
    said = {"network": {key: checkpoint.network[key] for key in checkpoint.stated}, "settings": checkpoint.settings}
    return {f"hsivi_{key}": json.dumps(value) for key, value in said.items() if value}


def _published(path, content):
    """The published HSIVI code's file: whole_model has all three networks, the averages are lists in the order of the parameters."""
    whole = _plain_names(content["whole_model"])
    parts, notes = {}, []
    for part, theirs in PUBLISHED_PARTS.items():
        parts[part] = {
            name.removeprefix(f"{theirs}."): tensor for name, tensor in whole.items() if name.startswith(f"{theirs}.")
        }
        if not parts[part]:
            raise ValueError(
                f"checkpoint {str(path)!r}: its whole_model has no {theirs}, as the published HSIVI code's has; it has {', '.join(sorted({name.split('.')[0] for name in whole}))}"
            )
    for part in ("student", "score_net"):
        theirs = PUBLISHED_PARTS[part]
        average = content.get(f"ema_{theirs}")
        shadow = average.get("shadow_params") if isinstance(average, dict) else None
        if not isinstance(shadow, (list, tuple)):
            notes.append(f"no ema_{theirs}, so no {part}_ema")
        elif [getattr(tensor, "shape", None) for tensor in shadow] != [tensor.shape for tensor in parts[part].values()]:
            notes.append(
                f"ema_{theirs} has {len(shadow)} tensors that do not fit the {len(parts[part])} of {theirs}, so no {part}_ema"
            )
        else:
            parts[f"{part}_ema"] = dict(zip(parts[part], shadow))
    said = content.get("hsivi_fast")  # written by our own conversion, with what the published layout has no place for
    stated, settings = (
        dict(said[key]) if isinstance(said, dict) and isinstance(said.get(key), dict) else {}
        for key in ("network", "settings")
    )
    log_gamma = parts["student"].get(LOG_GAMMA)
    if log_gamma is None:
        raise ValueError(f"checkpoint {str(path)!r}: its phinet has no {LOG_GAMMA}, as the published HSIVI code's has")
    if log_gamma.dim() >= 3 and "image_size" not in stated:
        stated["image_size"] = log_gamma.shape[-1]
    per_step = log_gamma.dim() == 4 or log_gamma.dim() == 1 and log_gamma.shape[0] > 1
    settings.setdefault("gamma", {"per_step": per_step, "per_pixel": log_gamma.dim() >= 3})
    if per_step:
        settings.setdefault("nfe", log_gamma.shape[0])
    network, assumed = described(parts["teacher"], stated)
    step = f", step {content['step']}" if isinstance(content.get("step"), int) else ""
    return Checkpoint(
        str(path), f"the published HSIVI code's{step}", parts, network, tuple(stated), assumed, settings, tuple(notes)
    )


# Sizes


def _family(tensors):
    if "in_conv.weight" in tensors and "embed.0.weight" in tensors:
        return "ddpm"
    return "adm" if "input_blocks.0.0.weight" in tensors and "time_embed.0.weight" in tensors else None


def described(tensors, stated):
    """(description of the UNet that tensors belong to, or None where they belong to none; the keys in it that neither they nor `stated` show)."""
    try:
        seen = {"ddpm": _ddpm_sizes, "adm": _adm_sizes}[_family(tensors)](tensors)
    except (
        KeyError,
        IndexError,
        ValueError,
    ):  # no UNet, or one with parts that ours has not: loading it will name them
        return (dict(stated), ()) if stated else (None, ())
    known = NETWORKS.get(name_of(seen), {})  # a network that we know by its sizes has its other settings too
    settings = [key for key in inspect.signature(FAMILIES[seen["family"]]).parameters if key not in seen]
    guessed = {key: known.get(key, {**NORMS, "heads": 4}.get(key)) for key in settings if key not in stated}
    return {**seen, **{key: value for key, value in guessed.items() if value is not None}, **stated}, tuple(guessed)


def name_of(sizes):
    """The name in `NETWORKS` of the network with the sizes of a description, as far as weights show them, or None."""
    as_list = lambda value: list(value) if isinstance(value, (list, tuple)) else value
    for name, network in NETWORKS.items():
        full = {"middle": True, **network} if network["family"] == "ddpm" else network
        if network["family"] == sizes.get("family") and all(
            as_list(full.get(key)) == as_list(value) for key, value in sizes.items() if key not in INVISIBLE
        ):
            return name
    return None


def _ddpm_sizes(tensors):
    channels, image_channels = tensors["in_conv.weight"].shape[:2]
    levels = {name.split(".")[1] for name in tensors if name.startswith("upsamples.")}
    multipliers, attention = [], []
    for level in range(len(levels)):
        attention.append(f"upsamples.level_{level}.0.0.conv1.weight" in tensors)
        multipliers.append(
            tensors[f"upsamples.level_{level}.0{'.0' if attention[-1] else ''}.conv1.weight"].shape[0] // channels
        )
    blocks = {name.split(".")[2] for name in tensors if name.startswith("upsamples.level_0.")}
    return {
        "family": "ddpm",
        "image_channels": image_channels,
        "channels": channels,
        "multipliers": multipliers,
        "res_blocks": len(blocks) - 1,
        "attention": attention,
        "middle": "middle.0.conv1.weight" in tensors,
    }


def _adm_sizes(tensors):
    channels, image_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    widths, attention, blocks, factor = [], [], [0], 1
    for index in range(1, 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks."))):
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


# diffusers

# What UNet2DModel takes for a key that config.json does not have, and the values with which it is our DDPM UNet.
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
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}


def _read_diffusers(folder):
    """A folder that UNet2DModel.save_pretrained wrote, or a pipeline's with that in unet/."""
    folder = next(
        (inside for inside in (folder, folder / "unet") if (inside / "config.json").is_file()), None
    ) or _no_network_in(folder)
    config = _read_json(folder / "config.json")
    network = _diffusers_network(folder, config)
    file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(
            f"checkpoint {str(folder)!r}: has a config.json and no weights; expected {' or '.join(_WEIGHT_FILES)}"
        )
    tensors = _read_safetensors(file)[0] if file.suffix == ".safetensors" else _read_torch(file)
    if not _is_tensors(tensors):
        raise ValueError(f"checkpoint {str(file)!r}: holds no named tensors")
    settings = _diffusers_schedule(folder)
    return Checkpoint(
        str(folder),
        "a diffusers UNet2DModel folder",
        {"teacher": _diffusers_weights(file, tensors, network)},
        network,
        tuple(network),
        () if "image_size" in network else ("image_size",),
        settings,
    )


def _no_network_in(folder):
    inside = sorted(entry.name for entry in folder.iterdir())
    raise ValueError(
        f"checkpoint {str(folder)!r}: is a folder without the config.json of a diffusers UNet2DModel, it holds {', '.join(inside[:5]) or 'nothing'}; give a file, or such a folder"
    )


def _read_json(file):
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected keys and values, got a {type(value).__name__}")
    return value


def _diffusers_network(folder, config):
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
    if not config["block_out_channels"] or not all(
        isinstance(width, int) and width > 0 for width in config["block_out_channels"]
    ):
        raise ValueError(f"{where}: block_out_channels {config['block_out_channels']!r} are no widths")
    widths, channels = config["block_out_channels"], config["block_out_channels"][0]
    for key, types in _BLOCKS.items():
        if len(config[key]) != len(widths) or not set(config[key]) <= set(types):
            refuse(key, f"{len(widths)} of {' and '.join(types)}")
    attention = [kind.startswith("Attn") for kind in config["down_block_types"]]
    if [kind.startswith("Attn") for kind in reversed(config["up_block_types"])] != attention:
        refuse("up_block_types", "attention at the same levels as down_block_types")
    if any(width % channels for width in widths):
        refuse("block_out_channels", "multiples of the first")
    attended = {width for width, attended in zip(widths, attention) if attended} | {widths[-1]}
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


def _diffusers_schedule(folder):
    """{"teacher": {betas, steps}} from the scheduler's configuration where it is there; ValueError for a noise that a teacher of ours cannot have."""
    places = (
        folder / "scheduler_config.json",
        folder / "scheduler" / "scheduler_config.json",
        folder.parent / "scheduler" / "scheduler_config.json",
    )
    file = next((place for place in places if place.is_file()), None)
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
            raise ValueError(
                f"{file}: {key} = {config[key]!r}, which a teacher here cannot have; it needs {' or '.join(map(repr, values))}"
            )
    return {"teacher": {"betas": _SCHEDULES[config["beta_schedule"]], "steps": config["num_train_timesteps"]}}


def _diffusers_weights(file, tensors, network):
    """Our names for diffusers' tensors, its separate queries, keys and values joined into one 1x1 convolution."""
    renamed, projections = {}, {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        place, inner = _diffusers_place(stem, network)
        if place is None or kind not in ("weight", "bias"):
            raise ValueError(f"checkpoint {str(file)!r}: has {name}, which our DDPM UNet has no place for")
        if inner in ("q", "k", "v"):
            projections.setdefault(f"{place}.project_in.{kind}", {})[inner] = tensor
        else:
            renamed[f"{place}.{inner}.{kind}" if inner else f"{place}.{kind}"] = (
                _as_1x1(tensor) if inner == "project_out" and kind == "weight" else tensor
            )
    for name, parts in projections.items():
        if len(parts) < 3:
            raise ValueError(
                f"checkpoint {str(file)!r}: has of {name} only {' and '.join(parts)}, not all of q, k and v"
            )
        joined = torch.cat([parts[each] for each in "qkv"])  # [3 C, C], or [3 C] of biases
        renamed[name] = _as_1x1(joined) if name.endswith("weight") else joined
    return renamed


def _diffusers_place(stem, network):
    """(our name of the block, our name inside of it) for a module of diffusers'; (None, None) where there is none."""
    if stem in _OUTER:
        return _OUTER[stem], ""
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", stem)
    if middle:
        kind, index, inner = middle.groups()
        return f"middle.{1 if kind == 'attentions' else 2 * int(index)}", _INNER.get(inner, inner)
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", stem)
    if not match or int(match[2]) >= len(network["multipliers"]):
        return None, None
    way, level, kind, index, inner = match[1], int(match[2]), match[3], match[4], match[5]
    level = level if way == "down" else len(network["multipliers"]) - 1 - level
    prefix = f"{way}samples.level_{level}"
    if kind in ("downsamplers", "upsamplers"):
        return (f"{prefix}.{network['res_blocks'] + (way == 'up')}.1", "") if inner == "conv" else (None, None)
    if network["attention"][level]:
        index = f"{index}.{1 if kind == 'attentions' else 0}"
    return f"{prefix}.{index}", _INNER.get(inner, inner)


def _as_1x1(weight):
    """A matrix [M, N] as the weight of a 1x1 convolution, [M, N, 1, 1]."""
    return weight.reshape(*weight.shape[:2], 1, 1)

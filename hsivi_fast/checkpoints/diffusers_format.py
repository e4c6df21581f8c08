"""A diffusers folder: what UNet2DModel.save_pretrained wrote, or a pipeline's folder with that in unet/."""

import json
import re

import torch

from ..data import brief, regular_file
from ..nets import all_arguments
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
# The values with which it can be our DDPM UNet.
_NEEDED = {
    "center_input_sample": (False, True),
    "time_embedding_type": ("positional",),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True, False),
    "class_embed_type": (None,),
}
_BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
# The keys that are whole numbers, and the largest that any network has by far.
_COUNTS = {"in_channels": 64, "out_channels": 64, "layers_per_block": 32, "norm_num_groups": 4096}
_NETWORKS = ("unet_ema", "unet")  # where a pipeline has its network; the averaged one first
_LARGEST_WIDTH, _LARGEST_SIZE, _LARGEST_CLASSES, _LARGEST_SCALE = 2**14, 2**14, 10**6, 1000
_STEM, _ENDINGS = "diffusion_pytorch_model", ("safetensors", "bin")
_WEIGHT_FILES = tuple(f"{_STEM}.{ending}" for ending in _ENDINGS)
_LARGEST_JSON = 2**24  # bytes
# What a pipeline calls the network that decodes latents, and how the names of those begin that read a text.
_VAES = ("vae", "vqvae")
_OF_TEXT = ("text_encoder", "tokenizer", "bert")
# diffusers' names of modules and ours: outside of all blocks, and inside of a block.
_OUTER = {
    "conv_in": "in_conv",
    "time_embedding.linear_1": "embed.0",
    "time_embedding.linear_2": "embed.2",
    "class_embedding": "class_embed",
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
# diffusers' kinds of noise schedules that start and end somewhere, and its names of what networks predict and ours.
_BETWEEN = ("linear", "scaled_linear", "sigmoid")
_PREDICTIONS = {"epsilon": "epsilon", "sample": "x_0", "v_prediction": "v"}
# diffusers' schedulers of one noise in discrete steps, given by betas. Others have continuous noise or none of betas.
_DISCRETE = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
_LARGEST_STEPS = 100_000


def read_diffusers(folder):
    """The `Checkpoint` of such a folder.

    Raises ValueError where a file is missing or damaged, or our DDPM UNet cannot be its network.
    """
    folder, notes = _network_folder(folder)
    pipeline = folder.parent if folder.name in _NETWORKS else folder
    _refuse_text(pipeline)
    network = _network(folder, read_json(folder / "config.json"))
    file, tensors, more = read_folder(folder)
    settings, unused = _noise(folder)
    vae = _existing([pipeline / name / "config.json" for name in _VAES])
    return Checkpoint(
        source=str(folder),
        format="a diffusers UNet2DModel folder",
        tensors={"teacher": _our_tensors(file, tensors, network)},
        network=network,
        stated=tuple(network),
        assumed=() if "image_size" in network else ("image_size",),
        settings=settings,
        notes=(*notes, *more, *unused),
        vae=vae and str(vae.parent.resolve()),
    )


def _refuse_text(pipeline):
    """ValueError for a pipeline with a part that reads a text, by its list of parts, or else by its folders."""
    index = pipeline / "model_index.json"
    if index.is_file():
        parts = [name for name, value in read_json(index).items() if value != [None, None]]
    else:
        parts = [entry.name for entry in pipeline.iterdir() if entry.is_dir()]
    of_text = sorted(name for name in parts if name.startswith(_OF_TEXT))
    if of_text:
        raise ValueError(
            f"checkpoint {str(pipeline)!r}: is a pipeline with a {of_text[0]}, whose images are of a text; "
            "a teacher here is unconditional, or conditional on a class"
        )


def _network_folder(folder):
    """(the folder itself, its unet_ema/ or its unet/, whichever has a config.json; notes on the choice)."""
    places = (folder, *(folder / name for name in _NETWORKS))
    config = _existing([place / "config.json" for place in places])
    if config is None:
        entries = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"checkpoint {str(folder)!r}: is a folder without the config.json of a diffusers UNet2DModel, "
            f"it holds {brief(', '.join(entries[:5])) or 'nothing'}; give a file, or such a folder"
        )
    notes = ()
    if config.parent.name == "unet_ema" and config.parent != folder and (folder / "unet").is_dir():
        notes = ("Its unet_ema/ was taken, the averaged weights; give unet/ for the raw ones",)
    return config.parent, notes


def read_folder(folder):
    """(file, {name: tensor}, notes on the choice of the file) of the weights that save_pretrained wrote.

    The file of shards is their list. Raises ValueError where there are none, or one is damaged.
    """
    file, notes = _weights_file(folder)
    return file, _read_shards(file) if file.suffix == ".json" else _read_tensors(file), notes


def _weights_file(folder):
    """(the file of a folder's weights, or the list of its shards; notes on the choice).

    The plain file goes before shards, and these before variants such as fp16; weights that are not averaged come last.
    """
    plain = [*_WEIGHT_FILES, *(f"{name}.index.json" for name in _WEIGHT_FILES)]
    found = _existing([folder / name for name in plain])
    if found:
        return found, ()
    entries = sorted(entry.name for entry in folder.iterdir())
    variants = {}
    for name in entries:
        match = re.fullmatch(rf"{_STEM}\.(?:(\w+)\.(?:{'|'.join(_ENDINGS)})|\w+\.index\.(\w+)\.json)", name)
        if match and (folder / name).is_file():
            variants.setdefault(match[1] or match[2], folder / name)
    if not variants:
        held = brief(", ".join(name for name in entries if name != "config.json")[:200]) or "nothing else"
        raise ValueError(
            f"checkpoint {str(folder)!r}: has a config.json and no weights; expected {' or '.join(_WEIGHT_FILES)}, "
            f"it holds {held}"
        )
    variant = min(variants, key=lambda name: ("non_ema" in name, name))
    raw = ", the weights that are not averaged" if "non_ema" in variant else ""
    return variants[variant], (f"Its weights are the variant {variant}{raw}: {variants[variant].name}",)


def _read_tensors(file):
    """{name: tensor} of a file of weights."""
    tensors = read_safetensors(file)[0] if file.suffix == ".safetensors" else read_torch(file)
    if not is_named_tensors(tensors):
        raise ValueError(f"checkpoint {str(file)!r}: holds no named tensors")
    return tensors


def _read_shards(index):
    """{name: tensor} of all files that an index lists; each has to lie beside it, and to hold what the index says."""
    where, shards = f"checkpoint {str(index)!r}", {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{where}: has no weight_map, which says where each tensor is")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(rf"{_STEM}[\w.-]*\.(?:{'|'.join(_ENDINGS)})", shard):
            raise ValueError(f"{where}: {brief(name, 80)} is in {brief(repr(shard), 80)}; expected a file beside it")
        shards.setdefault(shard, []).append(name)
    tensors = {}
    for shard, names in shards.items():
        file = regular_file(index.parent / shard, f"checkpoint {str(index.parent / shard)!r}")
        held = _read_tensors(file)
        missing = [name for name in names if name not in held]
        if missing:
            raise ValueError(f"checkpoint {str(file)!r}: lacks {brief(missing[0], 80)}, which {index.name} says it has")
        tensors.update({name: held[name] for name in names})
    return tensors


def _existing(files):
    """The first of these files that is there, or None."""
    return next((file for file in files if file.is_file()), None)


def read_json(file):
    """{key: value} of a JSON file; ValueError where it is none, or far too large."""
    if file.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{file}: has {file.stat().st_size} bytes; a configuration has fewer than {_LARGEST_JSON}")
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({brief(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected keys and values, got a {type(value).__name__}")
    return value


def _network(folder, config):
    """Our description of a UNet2DModel, without settings that are as they are by default.

    Raises ValueError that names the first key with which it is none of ours.
    """
    where = f"checkpoint {str(folder)!r}: its config.json"
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"{where} is of a {brief(config.get('_class_name'), 80)}, only UNet2DModel can be read")
    for key in ("block_out_channels", *_BLOCKS):
        if not isinstance(config.get(key), list):
            raise ValueError(f"{where} has no list {key}")
    config = {**_DEFAULTS, **config}

    def refuse(key, expected):
        value = brief(repr(config[key]), 80)
        raise ValueError(f"{where} has {key} = {value}, which our DDPM UNet cannot be; it needs {expected}")

    for key, values in _NEEDED.items():
        if config[key] not in values:
            refuse(key, " or ".join(map(repr, values)))
    for key, largest in _COUNTS.items():
        if not _is_count(config[key], largest):
            refuse(key, f"a whole number from 1 to {largest}")
    widths = config["block_out_channels"]
    if not 0 < len(widths) <= 16 or not all(_is_count(width, _LARGEST_WIDTH) for width in widths):
        refuse("block_out_channels", f"up to 16 widths from 1 to {_LARGEST_WIDTH}")
    channels = widths[0]
    for key, types in _BLOCKS.items():
        if len(config[key]) != len(widths) or any(kind not in types for kind in config[key]):
            refuse(key, f"{len(widths)} of {' and '.join(types)}")
    attention = [kind.startswith("Attn") for kind in config["down_block_types"]]
    attention_up = [kind.startswith("Attn") for kind in reversed(config["up_block_types"])]
    if any(width % channels for width in widths):
        refuse("block_out_channels", "multiples of the first")
    middle = config["mid_block_type"] is not None
    middle_attention = middle and bool(config["add_attention"])
    attended = {width for width, *has_attention in zip(widths, attention, attention_up) if any(has_attention)}
    attended |= {widths[-1]} if middle_attention else set()
    head = config["attention_head_dim"]
    if head is not None and not (_is_count(head, _LARGEST_WIDTH) and all(width % head == 0 for width in attended)):
        refuse("attention_head_dim", f"null, or a divisor of {' and '.join(map(str, sorted(attended)))} channels")
    time_channels = config["time_embedding_dim"] or 4 * channels
    if not _is_count(time_channels, 4 * _LARGEST_WIDTH):
        refuse("time_embedding_dim", f"null, or a whole number from 1 to {4 * _LARGEST_WIDTH}")
    if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
        refuse("out_channels", f"{config['in_channels']}, as many as in_channels, or twice as many")
    if config["num_class_embeds"] is not None and not _is_count(config["num_class_embeds"], _LARGEST_CLASSES):
        refuse("num_class_embeds", f"null, or a whole number from 1 to {_LARGEST_CLASSES}")
    scale = config["mid_block_scale_factor"]
    if type(scale) not in (int, float) or not 0 < scale <= _LARGEST_SCALE:
        refuse("mid_block_scale_factor", f"a number above 0, up to {_LARGEST_SCALE}")
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups = config["attn_norm_num_groups"]  # of the middle alone, which is without a norm where nobody asks for one
    if groups is None:
        groups = 0 if scale_shift else config["norm_num_groups"]
    elif not _is_count(groups, _COUNTS["norm_num_groups"]):
        refuse("attn_norm_num_groups", f"null, or a whole number from 1 to {_COUNTS['norm_num_groups']}")
    size = config["sample_size"]
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            refuse("sample_size", "one number, for square images")
        size = size[0]
    if size is not None and not _is_count(size, _LARGEST_SIZE):
        refuse("sample_size", f"a whole number from 1 to {_LARGEST_SIZE}")
    if type(config["norm_eps"]) is not float or not 0 < config["norm_eps"] < 1:
        refuse("norm_eps", "a number between 0 and 1")
    network = {
        "family": "ddpm",
        "image_channels": config["in_channels"],
        "image_size": size,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "res_blocks": config["layers_per_block"],
        "attention": attention,
        "middle": middle,
        "norm_groups": config["norm_num_groups"],
        "norm_eps": config["norm_eps"],
    }
    others = {
        "out_channels": config["out_channels"] if config["out_channels"] != config["in_channels"] else None,
        "attention_up": attention_up if attention_up != attention else None,
        "head_channels": head if attended - {head} else None,
        "middle_attention": middle_attention or not middle,
        "middle_norm_groups": groups if middle_attention and groups != config["norm_num_groups"] else None,
        "middle_scale": float(scale) if middle else 1.0,
        "scale_shift": scale_shift,
        "time_channels": time_channels if time_channels != 4 * channels else None,
        "classes": config["num_class_embeds"],
        "freq_shift": int(config["freq_shift"]),
        "cos_first": bool(config["flip_sin_to_cos"]),
        "down_padding": int(config["downsample_padding"]),
        "center_input": bool(config["center_input_sample"]),
    }
    usual = all_arguments({"family": "ddpm"})
    network |= {key: value for key, value in others.items() if value != usual[key]}
    return {key: value for key, value in network.items() if value is not None}


def _is_count(value, largest):
    """Whether a value of JSON is a whole number from 1 to `largest`; true is none."""
    return type(value) is int and 1 <= value <= largest


def _noise(folder):
    """({"teacher": {betas, steps, prediction}}, notes) of the scheduler's configuration, ({}, ()) where there is none.

    Raises ValueError for a noise that a teacher of ours cannot have.
    """
    folders = (folder, folder / "scheduler", folder.parent / "scheduler")
    file = _existing([place / "scheduler_config.json" for place in folders])
    if file is None:
        return {}, ()
    given = read_json(file)
    name = given.get("_class_name")
    if name not in _DISCRETE and not (name is None and "beta_schedule" in given):
        raise ValueError(
            f"{file}: is of the scheduler {brief(name, 80)}, whose noise is not given by betas in discrete steps; "
            "a teacher here needs that, as of DDPMScheduler"
        )
    config = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "use_flow_sigmas": False,
        **given,
    }
    needed = {
        "prediction_type": tuple(_PREDICTIONS),
        "beta_schedule": (*_BETWEEN, "squaredcos_cap_v2"),
        "rescale_betas_zero_snr": (False,),
        "use_flow_sigmas": (False, None),
    }
    for key, values in needed.items():
        if config[key] not in values:
            needs = " or ".join(map(repr, values))
            value = brief(repr(config[key]), 80)
            raise ValueError(f"{file}: {key} = {value}, which a teacher here cannot have; it needs {needs}")
    steps = config["num_train_timesteps"]
    if not _is_count(steps, _LARGEST_STEPS) or steps < 2:
        value = brief(repr(steps), 80)
        raise ValueError(f"{file}: num_train_timesteps = {value}; expected a whole number from 2 to {_LARGEST_STEPS}")
    teacher = {"betas": _betas(config, steps, file), "steps": steps}
    if config["prediction_type"] != "epsilon":
        teacher["prediction"] = _PREDICTIONS[config["prediction_type"]]
    return {"teacher": teacher}, _unused(given)


def _unused(config):
    """A note on what a scheduler's configuration says of sampling alone: no layer of ours does that.

    The network is trained without either, so they change nothing of what its student learns.
    """
    reasons = {}
    if config.get("clip_sample") is True:
        limit = config.get("clip_sample_range", 1.0)
        reasons[f"clip_sample = True (to {brief(f'-{limit} .. {limit}', 40)})"] = (
            "neither the layers nor DDIM and DDPM in the table clip x_0, images are clipped when they are rounded"
        )
    if "timestep_spacing" in config:
        reasons[f"timestep_spacing = {brief(config['timestep_spacing'], 40)}"] = (
            "the run's spacing says where the layers' timesteps are"
        )
    if not reasons:
        return ()
    return (f"Of its scheduler not used: {'; '.join(f'{key}, since {reason}' for key, reason in reasons.items())}",)


def _betas(config, steps, file):
    """teacher.betas of a scheduler's configuration; ValueError where they are no betas."""
    given = config["trained_betas"]
    if given is None and config["beta_schedule"] == "squaredcos_cap_v2":
        return "cosine"
    if given is None:
        betas = {"kind": config["beta_schedule"], "start": config["beta_start"], "end": config["beta_end"]}
        numbers, key = [betas["start"], betas["end"]], "beta_start, beta_end"
    else:
        betas = numbers = given if isinstance(given, list) else []
        key = "trained_betas"
    if any(type(number) not in (int, float) or not 0 < number < 1 for number in numbers) or len(numbers) < 2:
        raise ValueError(f"{file}: {key} = {brief(repr(numbers), 80)}; expected numbers between 0 and 1")
    if given is not None and len(given) != steps:
        raise ValueError(f"{file}: trained_betas has {len(given)} of them; num_train_timesteps is {steps}")
    return "linear" if betas == {"kind": "linear", "start": 1e-4, "end": 0.02} else betas


def _our_tensors(file, tensors, network):
    """diffusers' tensors under our names, its separate queries, keys and values joined into one 1x1 convolution.

    Raises ValueError for a tensor that our UNet has no place for, and where one of the three is missing.
    """
    renamed, projections = {}, {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        place, inner = _our_place(module, network)
        if place is None or parameter not in ("weight", "bias"):
            raise ValueError(f"checkpoint {str(file)!r}: has {brief(name, 80)}, which our DDPM UNet has no place for")
        if inner in ("q", "k", "v"):
            projections.setdefault(f"{place}.project_in.{parameter}", {})[inner] = tensor
        else:
            our_name = f"{place}.{inner}.{parameter}" if inner else f"{place}.{parameter}"
            renamed[our_name] = _as_1x1(tensor) if inner == "project_out" and parameter == "weight" else tensor
    for name, qkv in projections.items():
        if len(qkv) < 3:
            raise ValueError(f"checkpoint {str(file)!r}: has of {name} only {' and '.join(qkv)}, not all of q, k and v")
        if len({tensor.shape for tensor in qkv.values()}) > 1 or not qkv["q"].dim():
            shapes = ", ".join(str(list(tensor.shape)) for tensor in qkv.values())
            raise ValueError(f"checkpoint {str(file)!r}: has q, k and v of {name} in the shapes {shapes}; expected one")
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
        between = network.get("middle_attention", True)  # attention stands between the two residual blocks
        index = 1 if kind == "attentions" else (1 + between) * int(index)
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
    attention = network["attention"] if way == "down" else network.get("attention_up", network["attention"])
    if attention[level]:
        index = f"{index}.1" if kind == "attentions" else f"{index}.0"
    return f"{stage}.{index}", _INNER.get(inner, inner)


def _as_1x1(weight):
    """A matrix [M, N] as the weight of a 1x1 convolution, [M, N, 1, 1]; others as they are, loading names them."""
    return weight[:, :, None, None] if weight.dim() == 2 else weight

"""EDM's networks: NVlabs' pickles, which are read and never run, and plain state dicts of the same networks."""

import re

import torch

from ..data import brief
from .checkpoint import Checkpoint
from .network_pickles import read_network_pickle

PREFIX = "model."  # of the raw network in EDMPrecond
# Buffers that the settings say, and the layer of augmentation labels, which are never given here.
_LEFT_OUT = (".resample_filter", "map_augment.weight")
# Arguments of the published classes with which they are our networks, where a pickle says them. They show in no weight.
_PRECONDITIONING = {"sigma_data": 0.5, "sigma_min": 0, "sigma_max": float("inf")}
_NETWORKS = {
    "SongUNet": {"decoder_type": "standard", "encoder_type": ("standard", "residual"), "channel_mult_emb": 4},
    "DhariwalUNet": {"channel_mult_emb": 4},
}


def is_edm(tensors):
    """Whether tensors have the names of one of EDM's networks, with or without the prefix of EDMPrecond."""
    names = {name.removeprefix(PREFIX) for name in tensors}
    return {"map_layer0.weight", "map_layer1.weight"} <= names and any(name.startswith("enc.") for name in names)


def read_edm_pickle(path):
    """The `Checkpoint` of a snapshot of EDM's training: the averaged network `ema`.

    Raises ValueError, in one line, where it holds another network than EDMPrecond's SongUNet or DhariwalUNet.
    """
    where = f"checkpoint {str(path)!r}"
    pickled = read_network_pickle(path)
    if pickled.class_name != "EDMPrecond":
        raise ValueError(f"{where}: holds {brief(pickled.class_name, 60)}; readable is EDM's EDMPrecond alone")
    name, _, arguments = pickled.parts.get("model", ("nothing", (), {}))
    if name not in _NETWORKS:
        raise ValueError(f"{where}: its network is {brief(name, 60)}; readable are SongUNet and DhariwalUNet")
    for needed, given in ((_PRECONDITIONING, pickled.init_kwargs), (_NETWORKS[name], arguments)):
        for key, values in needed.items():
            values = values if isinstance(values, tuple) else (values,)
            if key in given and given[key] not in values:
                raise ValueError(
                    f"{where}: has {key} = {brief(repr(given[key]), 60)}, which ours cannot be; it needs "
                    f"{' or '.join(map(repr, values))}"
                )
    dropped = arguments.get("label_dropout")
    # A network that was trained with dropped labels has learned what no class is: one-hot labels of zeros.
    knows_no_class = isinstance(dropped, float) and dropped > 0
    return edm_checkpoint(path, "an EDM (NVlabs) pickle", pickled.tensors, null_class=-1 if knows_no_class else None)


def edm_checkpoint(path, format, tensors, stated=None, settings=None, null_class=None):
    """The `Checkpoint` of the tensors of one of EDM's networks.

    stated, settings: what a file of ours says of itself; null_class: the label for no class, where it is known.
    Raises ValueError where they are of no network of ours.
    """
    where = f"checkpoint {str(path)!r}"
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    try:
        network = edm_sizes(tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: looks like one of EDM's networks and is none of ours ({brief(error)})") from None
    notes = []
    if "map_augment.weight" in tensors:
        notes.append("Its layer of augmentation labels was left out, which counts nothing without them")
    ours = {name: tensor for name, tensor in tensors.items() if not name.endswith(_LEFT_OUT)}
    shows_all = network["family"] == "dhariwal" or any(name.endswith(".resample_filter") for name in tensors)
    network |= stated or {}
    teacher = {"prediction": "denoiser"}
    if null_class is not None and "classes" in network:
        teacher["null_class"] = null_class
    return Checkpoint(
        source=str(path),
        format=format,
        tensors={"teacher": ours},
        network=network,
        # A file of ours has no filters, which show the taps: what was converted says them.
        stated=tuple(network if shows_all else stated or ()),
        settings={"teacher": teacher, **(settings or {})},
        notes=tuple(notes),
    )


def edm_sizes(tensors):
    """The description of one of EDM's networks, as `build_unet` takes it, by its tensors without the prefix.

    Everything shows in names and shapes; what is as usual is left out. Raises ValueError, KeyError or IndexError where
    they are of no such network.
    """
    stem = next((name for name in tensors if re.fullmatch(r"enc\.(\d{1,5})x\1_conv\.weight", name)), None)
    if stem is None:
        raise ValueError("no first convolution")
    size = int(stem.split(".")[1].split("x")[0])
    channels, image_channels = tensors[stem].shape[:2]
    sizes = sorted({int(match[1]) for name in tensors if (match := _block(name))}, reverse=True)
    if not sizes or sizes != [size >> level for level in range(len(sizes))] or len(sizes) > 10:
        raise ValueError("a level without blocks")
    if any("aux_skip" in name for name in tensors):
        raise ValueError("its encoder or decoder has skip connections; readable are the encoders standard and residual")
    blocks = {int(match[2]) for name in tensors if (match := _block(name)) and int(match[1]) == size}
    widths = [tensors[f"enc.{level}x{level}_block0.conv0.weight"].shape[0] for level in sizes]
    attention = [level for level in sizes if f"enc.{level}x{level}_block0.qkv.weight" in tensors]
    is_song = "out_norm.weight" not in tensors
    noise_channels = tensors["map_layer0.weight"].shape[1]
    width = channels if is_song else noise_channels  # DhariwalUNet's first convolution has the first level's width
    network = {
        "family": "song" if is_song else "dhariwal",
        "image_channels": image_channels,
        "image_size": size,
        "channels": width,
        "multipliers": [of_level // width for of_level in widths],
        "res_blocks": len(blocks),
        "attention": attention,
    }
    if not min(network["multipliers"]):
        raise ValueError("a level narrower than the first")
    if "map_label.weight" in tensors:
        network["classes"] = tensors["map_label.weight"].shape[1]
    if is_song:
        if "map_noise.freqs" in tensors:
            network["embedding"] = "fourier"
        if noise_channels != channels:
            network["noise_multiplier"] = noise_channels // channels
        if any("_aux_residual." in name for name in tensors):
            network["encoder"] = "residual"
        taps = _taps(tensors)
        if taps != (1.0, 1.0):
            network["resample_filter"] = list(taps)
    return network


def _block(name):
    return re.match(r"enc\.(\d{1,5})x\1_block(\d{1,3})\.", name)


def _taps(tensors):
    """The filter of changes of resolution in one dimension, with 1 at its ends; (1, 1) where no buffer is there."""
    filters = [tensor for name, tensor in tensors.items() if name.endswith(".resample_filter")]
    if not filters:
        return (1.0, 1.0)
    first = filters[0].to(torch.float64)
    if any(other.shape != first.shape or not torch.allclose(other.to(first), first) for other in filters):
        raise ValueError("changes of resolution with different filters")
    taps = first[0, 0].sum(0)
    rebuilt = taps.outer(taps) / taps.sum().square()
    if first.shape[:2] != (1, 1) or not taps[0] or not torch.allclose(rebuilt, first[0, 0], atol=1e-6):
        raise ValueError("a filter of changes of resolution that is not the product of two")
    return tuple(round(float(tap / taps[0]), 6) for tap in taps)

"""Which format a checkpoint has, told by its content, and one way to read them all.

The formats are our own safetensors, ddpm-torch's, improved-diffusion's, diffusers', EDM's and the published HSIVI
code's.
"""

import json
from pathlib import Path

from ..data import brief, regular_file
from .checkpoint import Checkpoint, checked_statements
from .diffusers_format import read_diffusers
from .edm_format import edm_checkpoint, is_edm, read_edm_pickle
from .published_format import read_published
from .sizes import describe_network, family_of, known_name
from .tensor_files import (
    DamagedFile,
    is_named_tensors,
    is_of_nvlabs,
    read_safetensors,
    read_torch,
    without_module_prefix,
)

READABLE = (
    "ours (safetensors), ddpm-torch, improved-diffusion, EDM (NVlabs), a diffusers UNet2DModel folder, "
    "the published HSIVI code's"
)
DDPM_TORCH_EPS = 1e-6  # of ddpm-torch's normalisations, and so of the cifar10 and celeba64 teachers that it trained


def read_checkpoint(path):
    """Read the checkpoint at `path`, a file or a diffusers folder, into a `Checkpoint`.

    Nothing that is pickled in a file is ever run. Raises ValueError, in one line, where it is missing, damaged, of an
    unknown layout, holds pickled code, or is of a network that ours cannot be.
    """
    path = Path(path)
    if path.is_dir():
        return read_diffusers(path)
    with open(regular_file(path, f"checkpoint {str(path)!r}"), "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # eight bytes of a length, then JSON
        content, metadata = read_safetensors(path)
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # torch's archive, or its format before 1.6
        if is_of_nvlabs(path):
            return read_edm_pickle(path)
        content, metadata = read_torch(path), None
    else:
        raise DamagedFile(
            f"checkpoint {str(path)!r}: is neither a safetensors file nor one of torch.save; readable are {READABLE}"
        )
    return _recognise(path, content, metadata)


def _recognise(path, content, metadata):
    """The `Checkpoint` of what a file holds.

    `metadata` is the text that a safetensors file has beside its tensors, and None for another file.
    """
    where = f"checkpoint {str(path)!r}"
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where}: holds a {type(content).__name__} and no named tensors; readable are {READABLE}")
    if is_named_tensors(content.get("whole_model")):
        return read_published(path, content)
    if isinstance(content.get("ema"), dict) and is_named_tensors(content["ema"].get("shadow")):
        return _teacher(path, "ddpm-torch's, averaged weights", content["ema"]["shadow"])
    if is_named_tensors(content.get("model")):
        return _teacher(path, "ddpm-torch's, not averaged", content["model"])
    if is_named_tensors(content):
        if any(name.startswith("down_blocks.") for name in content):
            if not (path.parent / "config.json").is_file():
                raise ValueError(
                    f"{where}: has diffusers' weights without their config.json; give the folder that holds both"
                )
            return read_diffusers(path.parent)
        tensors = without_module_prefix(content)
        if is_edm(tensors):
            return edm_checkpoint(path, "EDM's weights", tensors, *_statements(path, metadata or {}))
        family = family_of(tensors)
        if family or metadata is not None:  # a safetensors file may hold any network of ours, a classifier too
            formats = {"ddpm": "a DDPM UNet's weights", "adm": "improved-diffusion's", None: "a safetensors file"}
            return _teacher(path, formats[family], content, metadata)
    keys = [brief(key, 60) for key in content]
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    raise ValueError(f"{where}: of an unknown layout, it holds {', '.join(keys[:5])}{more}; readable are {READABLE}")


def _teacher(path, format, tensors, metadata=None):
    """The `Checkpoint` of a file with one network, which counts as a teacher."""
    tensors = without_module_prefix(tensors)
    stated, settings = _statements(path, metadata or {})
    network, assumed = describe_network(tensors, stated)
    # Ours are safetensors: DDPM weights from torch.save are ddpm-torch's.
    by_ddpm_torch = metadata is None or known_name(network or {}) in ("cifar10", "celeba64")
    if "norm_eps" in assumed and network["family"] == "ddpm" and by_ddpm_torch:
        network = {**network, "norm_eps": DDPM_TORCH_EPS}
    return Checkpoint(str(path), format, {"teacher": tensors}, network, tuple(stated), assumed, settings)


def _statements(path, metadata):
    """(network, settings) that a safetensors file of ours states, two empty dicts for another file."""
    where = f"checkpoint {str(path)!r}"
    try:
        network, settings = (json.loads(metadata.get(f"hsivi_{key}", "{}")) for key in ("network", "settings"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its metadata are not readable ({brief(error)})") from None
    return checked_statements(network, settings, where)

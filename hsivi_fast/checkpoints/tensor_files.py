"""Named tensors from files, without ever running what is pickled in them."""

import pickle
import re
import warnings

import torch
from safetensors import safe_open

from ..data import brief
from .nesting import LARGEST_DEPTH, is_deeply_nested


class _Ignored:
    """Takes the place of numpy's values in optimizer states: they are not needed, so nothing of numpy is called."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


_NUMPY_NAMES = (
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
_PICKLED_NAME = r"(?:GLOBAL |function |but got )<?(?:class |function |built-in function )?'?([\w.]+)"


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NVLABS = (b"torch_utils.persistence", b"torch_utils\npersistence", b"_reconstruct_persistent_obj")


class DamagedFile(ValueError):
    """A file that is cut or altered, or no checkpoint at all: if it was downloaded, that may be tried again."""


def read_safetensors(path):
    """({name: tensor}, {key: text}) of a safetensors file; DamagedFile, a ValueError, where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:  # SafetensorError, and what torch says of types that it has not
        raise DamagedFile(f"checkpoint {str(path)!r}: not a readable safetensors file ({brief(error)})") from None


def read_torch(path):
    """Whatever torch.save wrote, with its tensors mapped from the disk where the format allows that.

    No pickled code is run. Raises ValueError where the file holds some, is of another program or would crash torch, and
    DamagedFile, a ValueError, where it is damaged.
    """
    where = f"checkpoint {str(path)!r}"
    if is_deeply_nested(path):
        raise ValueError(f"{where}: nests values more than {LARGEST_DEPTH} deep; no checkpoint does")
    try:
        with (
            open(path, "rb") as file,
            torch.serialization.safe_globals([(_Ignored, name) for name in _NUMPY_NAMES]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's, of TorchScript and of kinds of tensors that are refused below
            is_archive = file.read(2) == b"PK"
            mapped = is_archive and path.suffix != ".safetensors"  # torch.load goes by that ending, not by the content
            file.seek(0)
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        code = re.search(_PICKLED_NAME, str(error))
        if code:
            raise ValueError(
                f"{where}: holds pickled code ({code[1][:80]}), which is never run; "
                "save its tensors alone, torch.save(model.state_dict(), ...)"
            ) from None
        raise DamagedFile(f"{where}: damaged, or pickled code, which is never run") from None
    except Exception as error:  # a cut or altered file: zip, pickle and struct each have errors of their own
        if "TorchScript" in str(error):
            raise ValueError(
                f"{where}: is a TorchScript program, which is never run; "
                "save its tensors alone, torch.save(module.state_dict(), ...)"
            ) from None
        raise DamagedFile(f"{where}: not a readable torch file ({brief(error)})") from None


def is_of_nvlabs(path):
    """Whether a pickle is one of NVlabs' codes, which put the classes that they save into the file."""
    with open(path, "rb") as file:
        start = file.read(2**16)
    return any(name in start for name in _NVLABS)


def refuse_strange_tensors(tensors, where, finite=True):
    """ValueError that begins with `where` for the first of {name: tensor} that cannot be weights.

    Weights are dense floating-point numbers, at least one, and with `finite` such that are finite in float32.
    """
    for name, tensor in tensors.items():
        strange = _strangeness(tensor, finite)
        if strange:
            raise ValueError(f"{where}: its tensor {brief(name)} is {strange}; weights are dense, finite numbers")


def _strangeness(tensor, finite):
    """What keeps a tensor from being weights, in words, or None."""
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"of the layout {tensor.layout}"
    if tensor.is_meta:
        return "without values, on the meta device"
    if tensor.dtype not in _FLOATS:
        return f"of the type {tensor.dtype}"
    if tensor.numel() == 0:
        return f"empty, {list(tensor.shape)}"
    if finite and not torch.isfinite(tensor.detach().to(torch.float32)).all():
        return "not finite: it holds NaN or infinity"
    return None


def is_named_tensors(value):
    """Whether a value is a dict that is not empty, of names and tensors alone."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())


def without_module_prefix(tensors):
    """The same tensors without the "module." that DistributedDataParallel puts before every name."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}

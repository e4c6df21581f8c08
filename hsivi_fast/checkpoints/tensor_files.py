"""Named tensors from files, without ever running what is pickled in them."""

import pickle
import re

import torch
from safetensors import SafetensorError, safe_open


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


def read_safetensors(path):
    """({name: tensor}, {key: text}) of a safetensors file; ValueError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(path)!r}: not a readable safetensors file ({error})") from None


def read_torch(path):
    """Whatever torch.save wrote, with its tensors mapped from the disk where the format allows that.

    No pickled code is run. Raises ValueError where the file holds some, or is damaged.
    """
    where = f"checkpoint {str(path)!r}"
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals([(_Ignored, name) for name in _NUMPY_NAMES]):
            is_archive = file.read(2) == b"PK"
            mapped = is_archive and path.suffix != ".safetensors"  # torch.load goes by that ending, not by the content
            file.seek(0)
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        code = re.search(_PICKLED_NAME, str(error))
        if code:
            raise ValueError(
                f"{where}: holds pickled code ({code[1]}), which is never run; "
                "save its tensors alone, torch.save(model.state_dict(), ...)"
            ) from None
        raise ValueError(f"{where}: damaged, or pickled code, which is never run") from None
    except Exception as error:  # a cut or altered file: zip, pickle and struct each have errors of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{where}: not a readable torch file ({reason})") from None


def is_named_tensors(value):
    """Whether a value is a dict that is not empty, of names and tensors alone."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())


def without_module_prefix(tensors):
    """The same tensors without the "module." that DistributedDataParallel puts before every name."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}

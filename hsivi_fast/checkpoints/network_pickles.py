"""Tensors, arrays and init arguments from NVlabs' pickles of networks (EDM, EDM2) and of statistics.

A pickle is first read as a whole into inert records (`safe_pickle.py`). What it says of tensors and arrays is checked
before any is made, and then made of its bytes without a copy more than a file's size.
"""

import io
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..data import brief
from .safe_pickle import Call, Named, Record, read_one, read_records
from .tensor_files import DamagedFile

DEEPEST = 32  # of modules, and of what is in an argument
LARGEST_MODULES = 2**14  # names of modules, since a record may stand at many places
LARGEST_VALUES = 2**12  # in the arguments of one module
LONGEST_NAME = 256
LARGEST_DIMENSIONS = 8

_STORED = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_NUMPY_TYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


@dataclass(frozen=True)
class PickledNetwork:
    """A network as a pickle describes it.

    class_name: of the outermost module, as "EDMPrecond". init_args, init_kwargs: what it was made with, as plain values
    of Python. tensors: {name: tensor}, on the CPU, of the stored types, under the names of its state dict; a tensor
    that stands at two places is one object. parts: {name: (class_name, init_args, init_kwargs)} of the persistent
    modules right in it, as "model": ("SongUNet", (), {...}).
    """

    class_name: str
    init_args: tuple
    init_kwargs: dict
    tensors: dict
    parts: dict = field(default_factory=dict)


def read_network_pickle(path, entry="ema"):
    """The `PickledNetwork` at `entry` of the dict that a pickle holds, or the pickled network itself.

    Nothing in the file is run. Raises ValueError, in one line that names the file, where it is no pickle of a network,
    is cut or altered, or has a name that is not allowed.
    """
    where = f"checkpoint {str(path)!r}"
    content = read_records(path, where)
    record = content.get(entry) if isinstance(content, dict) else content
    if not isinstance(record, Record) or record.type != "class":
        raise ValueError(f"{where}: has no pickled network {entry!r}; it holds {_described(content)}")
    values = _Values(where, Path(path).stat().st_size)
    arguments = values.init_arguments(record)
    if arguments is None:
        raise ValueError(f"{where}: does not say with what its {brief(record.class_name, 60)} was made")
    parts = {}
    for name, part in values.table(record, "_modules").items():
        if isinstance(part, Record) and part.type == "class":
            made_with = values.init_arguments(part)
            if made_with is not None:
                parts[name] = (part.class_name, *made_with)
    tensors = values.state_dict(record)
    if not tensors:
        raise ValueError(f"{where}: its network {brief(record.class_name, 60)} has no tensors")
    return PickledNetwork(record.class_name, *arguments, tensors, parts)


def read_array_pickle(path, where=None):
    """{name: numpy array, number or a dict of the same} of a pickle: EDM2's statistics are {"fid": {"mu", "sigma"}}.

    Arrays have their stored type in the machine's byte order, and numbers are Python's. Nothing in the file is run.
    where: begins the ValueError, of one line, for a file that is none, or cut, altered, or of anything else.
    """
    where = where or f"checkpoint {str(path)!r}"
    content = read_records(path, where)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where}: has no named arrays; it holds {_described(content)}")
    return _Values(where, Path(path).stat().st_size).arrays(content)


class _Values:
    """Makes values of what stands in a pickle's records; ValueError that begins with `where` for what is strange.

    size: the file's, in bytes. Tensors and arrays may take no more: a pickle can name the same bytes many times.
    """

    def __init__(self, where, size):
        self.where, self.size = where, size
        self.taken = 0
        self.made = {}  # {call: value}, so that what is shared in the file is shared here

    def _strange(self, what):
        return ValueError(f"{self.where}: {what}")

    def _take(self, data):
        self.taken += len(data)
        if self.taken > self.size:
            raise self._strange("its tensors have more bytes than the file")

    def table(self, record, attribute):
        """A dict of a module's parameters, buffers or modules, by names that have no dots."""
        table = record.state.get(attribute)
        table = {} if table is None else table
        if not isinstance(table, dict) or not all(isinstance(name, str) and name and "." not in name for name in table):
            raise self._strange(f"{brief(record.class_name, 60)} has no names in its {attribute}")
        return table

    def init_arguments(self, record):
        """(init_args, init_kwargs) of a persistent module, or None where it has not recorded them."""
        args, kwargs = (record.state.get(name) for name in ("_init_args", "_init_kwargs"))
        if args is None or kwargs is None:
            return None
        left = iter(range(LARGEST_VALUES))
        if not isinstance(args, tuple | list) or not isinstance(kwargs, dict):
            raise self._strange(f"the arguments of {brief(record.class_name, 60)} are none")
        return tuple(self._plain(list(args), left)), self._plain(kwargs, left)

    def state_dict(self, record):
        """{name: tensor} of a module and all modules in it, in the order of torch's state_dict."""
        tensors, left = {}, iter(range(LARGEST_MODULES))
        self._collect(record, "", tensors, left, DEEPEST)
        return tensors

    def _collect(self, record, prefix, tensors, left, deeper):
        if not isinstance(record, Record):
            raise self._strange(f"its module {brief(prefix, 80)} is {_described(record)}")
        if not deeper or next(left, None) is None or len(prefix) > LONGEST_NAME:
            raise self._strange(f"has modules in modules without an end, as {brief(prefix, 80)}")
        passing = record.state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set | frozenset) else ()
        for attribute in ("_parameters", "_buffers"):
            for name, call in self.table(record, attribute).items():
                if call is None or (attribute == "_buffers" and name in passing):
                    continue
                if len(name) > LONGEST_NAME:
                    raise self._strange(f"has a name of {len(name)} letters")
                tensors[prefix + name] = self.tensor(call, prefix + name)
        for name, module in self.table(record, "_modules").items():
            if module is not None:
                self._collect(module, f"{prefix}{name}.", tensors, left, deeper - 1)

    def tensor(self, call, name):
        """The tensor that a pickle says is to be rebuilt; `name` is for the error."""
        if _is_call(call, "torch._utils._rebuild_parameter") and call.arguments:
            call = call.arguments[0]
        if not _is_call(call, "torch._utils._rebuild_tensor_v2") or len(call.arguments) < 4:
            raise self._strange(f"{brief(name, 80)} is no tensor, it is {_described(call)}")
        if call not in self.made:
            storage, offset, size, stride = call.arguments[:4]
            if not _are_sizes(size) or not _are_sizes(stride) or len(size) != len(stride) or not _are_sizes((offset,)):
                raise self._strange(f"{brief(name, 80)} has a strange shape")
            stored = self._stored(storage, name)
            # A tensor that repeats its values would take any amount of memory once it is copied.
            last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
            if math.prod(size) > len(stored) or (math.prod(size) and last >= len(stored)):
                raise self._strange(f"{brief(name, 80)} has another shape than its {len(stored)} stored values allow")
            self.made[call] = stored.as_strided(size, stride, offset if math.prod(size) else 0)
        return self.made[call]

    def _stored(self, call, name):
        """The values [N] of a tensor, or of several, which are a file of torch.save's within the pickle."""
        if not _is_call(call, "torch.storage._load_from_bytes"):
            raise self._strange(f"the values of {brief(name, 80)} are none of torch's, but {_described(call)}")
        if call not in self.made:
            data = call.arguments[0] if call.arguments else None
            if not isinstance(data, bytes):
                raise self._strange(f"the values of {brief(name, 80)} are no bytes")
            self._take(data)
            _check_stored(data, self.where)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's, that typed storages will go
                    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                    self.made[call] = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
            except Exception as error:  # none is known of what has been checked
                raise DamagedFile(
                    f"{self.where}: the values of {brief(name, 80)} are damaged ({brief(error)})"
                ) from None
            call.arguments = ()  # so that the bytes are not kept beside the tensor
        return self.made[call]

    def _array(self, call):
        """The numpy array, or None where a call is none of one."""
        if _is_call(call, "numpy._core.multiarray._reconstruct"):
            state = call.state if isinstance(call.state, tuple) and len(call.state) == 5 else (None,) * 5
            _, shape, dtype, fortran, data = state
        elif _is_call(call, "numpy._core.numeric._frombuffer") and len(call.arguments) == 4:
            data, dtype, shape, order = call.arguments
            fortran = order == "F"
        else:
            return None
        if call in self.made:
            return self.made[call]
        dtype = self._dtype(dtype)
        if not _are_sizes(shape) or not isinstance(data, bytes | bytearray):
            raise self._strange("has an array without a shape or values")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise self._strange(f"has an array of {len(data)} bytes that is to be {brief(shape)} of {dtype}")
        self._take(data)
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        self.made[call] = array.astype(dtype.newbyteorder("="))  # a copy, that may be written to
        return self.made[call]

    def _dtype(self, call):
        text = call.arguments[0] if _is_call(call, "numpy.dtype") and call.arguments else None
        if isinstance(text, str) and text in _NUMPY_TYPES:
            state = (3, "=") if call.state is None else call.state
            order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
            # Behind the byte order are what makes a type of several, and names of its parts.
            if isinstance(order, str) and order in ("<", ">", "=", "|") and state[2:5] in ((), (None, None, None)):
                return np.dtype(text).newbyteorder(order)
        raise self._strange("has an array or number of a type that is no plain number's")

    def _plain(self, value, left, deeper=DEEPEST):
        """A value of Python alone: numpy's numbers and arrays, torch's types and devices become numbers and texts."""
        if not deeper or next(left, None) is None:
            raise self._strange(f"an argument has more than {LARGEST_VALUES} values, or is in itself")
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(self._plain(item, left, deeper - 1) for item in value)
        if isinstance(value, dict):
            return {key: self._plain(item, left, deeper - 1) for key, item in value.items()}
        if isinstance(value, Named):
            return value.name.removeprefix("torch.")
        if _is_call(value, "torch.device") and value.arguments and isinstance(value.arguments[0], str):
            return value.arguments[0]
        number = self._number(value)
        if number is not None:
            return number
        array = self._array(value)
        if array is None or array.size > LARGEST_VALUES:
            raise self._strange(f"an argument is {_described(value)}, not a plain value")
        return array.tolist()

    def _number(self, call):
        """numpy's number as Python's, or None where a call is none."""
        if not _is_call(call, "numpy._core.multiarray.scalar") or len(call.arguments) != 2:
            return None
        dtype, data = self._dtype(call.arguments[0]), call.arguments[1]
        if not isinstance(data, bytes) or len(data) != dtype.itemsize:
            raise self._strange("has a number of another size than its type")
        return np.frombuffer(data, dtype)[0].item()

    def arrays(self, content):
        """The dict of arrays that `read_array_pickle` returns."""
        return self._arrays(content, "", iter(range(LARGEST_VALUES)), 4)

    def _arrays(self, content, prefix, left, deeper):
        found = {}
        for key, value in content.items():
            name = f"{prefix}{brief(key, 60)}"
            if not deeper or next(left, None) is None:
                raise self._strange(f"has more than {LARGEST_VALUES} arrays, or dicts in dicts without an end")
            if isinstance(value, dict):
                found[key] = self._arrays(value, f"{name}.", left, deeper - 1)
            elif type(value) in (int, float):
                found[key] = value
            else:
                number = self._number(value)
                found[key] = self._array(value) if number is None else number
                if found[key] is None:
                    raise self._strange(f"{name} is {_described(value)}; expected an array")
        return found


def _is_call(value, name):
    return isinstance(value, Call) and value.name == name


def _are_sizes(values):
    """Whether these are a shape, strides or the like: few integers that are not negative, each below 2^48."""
    if not isinstance(values, tuple | list) or len(values) > LARGEST_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


def _described(value):
    """What a value of a pickle is, in a few words."""
    if isinstance(value, dict):
        keys = [brief(key, 60) for key in list(value)[:5]]
        return ", ".join(keys) + (f" and {len(value) - 5} more" if len(value) > 5 else "") or "nothing"
    if isinstance(value, Record):
        return brief(value.class_name, 60)
    return value.name if isinstance(value, Call | Named) else f"a value of the type {type(value).__name__}"


def _check_stored(data, where):
    """DamagedFile, or ValueError, unless bytes are what torch.save writes of one storage in its format before 1.6.

    torch's reader, with weights_only, would run nothing in others either, but may take any memory for them, or crash.
    """
    stream = io.BytesIO(data)
    magic, version, _, stored, keys = (read_one(stream, where, persistent_ids=True) for _ in range(5))
    named = stored.arguments[0] if _is_call(stored, "persistent id") else None
    if isinstance(named, tuple) and len(named) == 6:
        kind, storage, key, _, count, view = named
        dtype = _STORED.get(storage.name) if isinstance(storage, Named) else None
        header = (magic, version, kind, view) == (torch.serialization.MAGIC_NUMBER, 1001, "storage", None)
        if header and dtype and isinstance(key, str) and keys == [key] and _are_sizes((count,)):
            if stream.read(8) == count.to_bytes(8, "little") and len(data) == stream.tell() + count * dtype.itemsize:
                return
    raise DamagedFile(f"{where}: the values of a tensor are not a storage that torch.save wrote")

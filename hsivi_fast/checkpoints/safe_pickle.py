"""Pickles of other programs, read into inert records: no name in them is imported, and nothing in them is called.

Their opcodes are followed here, not by the pickle module: a file of 200 kB whose key of a dict is a deeply nested tuple
crashes the unpicklers of Python and torch, and six bytes make Python's take gigabytes for its memo.
"""

import io
import itertools
import pickletools
from dataclasses import dataclass, field

from ..data import brief, regular_file
from .tensor_files import DamagedFile

LARGEST_OPCODES = 2**19  # a network of a thousand modules has some 10^5; so many take less than 100 MB
PERSISTENCE = "torch_utils.persistence._reconstruct_persistent_obj"
PERSISTENCE_VERSION = 6  # of NVlabs' torch_utils.persistence, the same in EDM and EDM2

# numpy's modules have been renamed: "numpy.core" is read as "numpy._core".
_DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
_SETS = {"builtins.set", "builtins.frozenset"}
_MODULES = {f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential")}
_CALLED = {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.storage._load_from_bytes",
    "torch.device",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
}
_STORAGES = {
    f"torch.{kind}Storage"
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
_NAMED = {
    "numpy.ndarray",
    *_STORAGES,
    *(f"torch.{kind}" for kind in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8")),
    *("torch.uint8", "torch.bool"),
}
_ALLOWED = {PERSISTENCE, *_DICTS, *_SETS, *_MODULES, *_CALLED, *_NAMED}

_PUSHED = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BYTEARRAY8"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Named:
    """An allowed name that stands in a pickle, as "module.name": nothing is imported for it."""

    name: str


@dataclass(eq=False, repr=False)
class Call:
    """What a pickle says is to be called, which is not done here.

    name: of `Named`, or "persistent id"; arguments: a tuple; state: what it is to be given after the call, or None.
    """

    name: str
    arguments: tuple
    state: object = None


@dataclass(eq=False, repr=False)
class Record:
    """An object of a class that is not there, as a pickle describes it.

    type, version, class_name: "class", 6 and a bare name for NVlabs' persistent classes, whose source code in the file
    is left out; "torch.nn", 0 and a bare name for torch's containers. state: {attribute: value}, values as of
    `read_records`.
    """

    type: str
    version: int
    class_name: str
    state: dict = field(default_factory=dict)


def read_records(path, where=None):
    """What is in a pickle: plain values of Python, `Record`, `Call` and `Named`, in dicts, lists, tuples and sets.

    where: begins the errors, "checkpoint 'PATH'" if it is left out.
    Raises ValueError, in one line, where the file is none, or has a name that is not allowed, which the line says; and
    DamagedFile, a ValueError, where it is cut, altered or no pickle at all.
    """
    where = where or f"checkpoint {str(path)!r}"
    path = regular_file(path, where)
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({brief(error.strerror or error)})") from None
    with _Bounded(file) as stream:
        start = stream.peek(2)[:2]
        if start == b"PK":
            raise DamagedFile(f"{where}: is a zip archive and not a pickle")
        if start[:1] != b"\x80":
            raise DamagedFile(f"{where}: is not a pickle")
        value = read_one(stream, where)
        if stream.read(1):
            raise DamagedFile(f"{where}: a damaged pickle (it goes on behind its end)")
        return value


def read_one(stream, where, persistent_ids=False):
    """The value of the pickle at a stream's position, which is then behind it; values and errors as `read_records`.

    The stream must not take memory for more than it has when it is asked for that: see `_Bounded`.
    persistent_ids: whether there may be some; each is a `Call`.
    """
    try:
        return _Machine(where, persistent_ids).run(stream)
    except IndexError:
        raise DamagedFile(f"{where}: a damaged pickle (its stack is too short)") from None
    except (ValueError, OSError) as error:
        if str(error).startswith(where):
            raise
        raise DamagedFile(f"{where}: a damaged pickle ({brief(error)})") from None


class _Bounded(io.BufferedReader):
    """A file which, asked for more than it has, takes no memory for that: lengths in pickles are mere claims."""

    def __init__(self, file):
        super().__init__(file)
        self.length = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size):
        if size > 2**16:
            size = max(0, min(size, self.length - self.tell()))
        return super().read(size)


class _Machine:
    """Follows the opcodes of one pickle, those that pickle.dump writes by protocols 2 to 5."""

    def __init__(self, where, persistent_ids):
        self.where, self.persistent_ids = where, persistent_ids
        self.stack, self.marked, self.memo = [], [], {}

    def run(self, stream):
        """The pickle's value; ValueError, IndexError or OSError where it cannot be had."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            name = opcode.name
            if (name == "PROTO") != (count == 0):
                raise ValueError("it does not begin as one of protocol 2 or newer")
            if count >= LARGEST_OPCODES:
                raise ValueError(f"{self.where}: more than {LARGEST_OPCODES} opcodes; a network's pickle has far fewer")
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                self._put_tuple(self._pop_many(_TUPLES[name]))
            elif name == "STOP":
                return self._result()
            else:
                step = getattr(self, f"_do_{name.lower()}", None)
                if step is None:
                    raise ValueError(f"{self.where}: has the opcode {name}, which no network's pickle has")
                step(argument)

    def _result(self):
        if len(self.stack) != 1 or self.marked:
            raise ValueError("values are left on its stack")
        return self.stack.pop()

    def _pop_many(self, count):
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_marked(self):
        """What has been pushed since the last mark."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def _put_tuple(self, values):
        self.stack.append(tuple(values))

    def _last(self, kind):
        """The value on top of the stack, of a type or several; not an instance of a subclass: there is none."""
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise ValueError(f"{brief(type(value).__name__)} where none can be")
        return value

    def _do_proto(self, version):
        if not 2 <= version <= 5:
            raise ValueError(f"protocol {version}; expected 2 to 5")

    def _do_frame(self, length):
        pass

    def _do_mark(self, _):
        self.marked.append(self.stack)
        self.stack = []

    def _do_pop(self, _):
        self.stack.pop()

    def _do_pop_mark(self, _):
        self._pop_marked()

    def _do_tuple(self, _):
        self._put_tuple(self._pop_marked())

    def _do_frozenset(self, _):
        self.stack.append(frozenset(_keys(self._pop_marked())))

    def _do_append(self, _):
        value = self.stack.pop()
        self._last(list).append(value)

    def _do_appends(self, _):
        values = self._pop_marked()
        self._last(list).extend(values)

    def _do_additems(self, _):
        values = self._pop_marked()
        self._last(set).update(_keys(values))

    def _do_setitem(self, _):
        self._set_items(self._pop_many(2))

    def _do_setitems(self, _):
        self._set_items(self._pop_marked())

    def _set_items(self, values):
        if len(values) % 2:
            raise ValueError("a key without a value")
        self._last(dict).update(zip(_keys(values[::2]), values[1::2], strict=True))

    def _do_binput(self, index):
        self.memo[index] = self.stack[-1]

    _do_long_binput = _do_binput

    def _do_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _do_binget(self, index):
        if index not in self.memo:
            raise ValueError(f"nothing was put at {index}")
        self.stack.append(self.memo[index])

    _do_long_binget = _do_binget

    def _do_global(self, names):
        self._put_named(names.replace(" ", "."))

    def _do_stack_global(self, _):
        names = self._pop_many(2)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a name that is no text")
        self._put_named(".".join(names))

    def _put_named(self, name):
        known = name.replace("numpy.core.", "numpy._core.", 1) if name.startswith("numpy.core.") else name
        if known not in _ALLOWED:
            raise ValueError(
                f"{self.where}: holds pickled code ({brief(name, 80)}), which is never run; readable are NVlabs' "
                "pickles of networks and statistics"
            )
        self.stack.append(Named(known))

    def _do_reduce(self, _):
        named, arguments = self._pop_many(2)
        if not isinstance(named, Named) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        self.stack.append(self._called(named.name, arguments))

    _do_newobj = _do_reduce

    def _called(self, name, arguments):
        """What stands for the call of an allowed name."""
        if name == PERSISTENCE:
            return self._persistent(arguments)
        if name in _DICTS and not arguments:
            return {}
        if name in _MODULES and not arguments:
            return Record("torch.nn", 0, name.rpartition(".")[2])
        if name in _SETS and all(isinstance(argument, list) for argument in arguments):
            return set(_keys(itertools.chain(*arguments)))
        if name in _CALLED:
            return Call(name, arguments)
        raise ValueError(f"{self.where}: calls {name} in a way that no network's pickle does")

    def _persistent(self, arguments):
        meta = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], dict) else {}
        version, class_name, state = meta.get("version"), meta.get("class_name"), meta.get("state")
        if meta.get("type") != "class" or not isinstance(class_name, str) or not isinstance(state, dict | None):
            raise ValueError(f"{self.where}: has a persistent object that is none of NVlabs' torch_utils.persistence")
        if type(version) is not int or version != PERSISTENCE_VERSION:
            raise ValueError(
                f"{self.where}: is of version {brief(version) if type(version) is int else 'none'} of "
                f"torch_utils.persistence; expected {PERSISTENCE_VERSION}"
            )
        return Record("class", version, class_name, {} if state is None else state)

    def _do_build(self, _):
        state = self.stack.pop()
        target = self._last((dict, Call, Record))
        if isinstance(target, Record):
            if target.type == "class" or target.state or not isinstance(state, dict):
                raise ValueError(f"{self.where}: gives {brief(target.class_name)} a second state, or a strange one")
            target.state = state
        elif isinstance(target, Call):
            if target.state is not None:
                raise ValueError(f"{self.where}: gives {target.name} a second state")
            target.state = state
        # What an OrderedDict has besides its items, as the _metadata of a state dict, is left out.

    def _do_binpersid(self, _):
        if not self.persistent_ids:
            raise ValueError(f"{self.where}: has the opcode BINPERSID, which no network's pickle has")
        self.stack.append(Call("persistent id", (self.stack.pop(),)))


def _keys(values):
    """The same values, if each is text or an integer: a key of another type might take forever to hash, or crash."""
    values = list(values)
    for value in values:
        if type(value) not in (str, int):
            raise ValueError(f"a key of the type {brief(type(value).__name__)}")
    return values

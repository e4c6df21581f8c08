"""Pickles that do harm with what is allowed in them: bytes in tensors, strange arguments, endless and huge values."""

import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from hsivi_fast.checkpoints.network_pickles import read_network_pickle
from hsivi_fast.checkpoints.safe_pickle import LARGEST_OPCODES

HEAD = b"\x80\x04"


def _file(tmp_path, data):
    file = tmp_path / "network.pkl"
    file.write_bytes(data)
    return file


def _refusal(tmp_path, data):
    """The line that a file of these bytes is refused with; nothing but the file is in the folder then."""
    file = _file(tmp_path, data)
    with pytest.raises(ValueError) as caught:
        read_network_pickle(file)
    message = str(caught.value)
    assert str(file) in message and "\n" not in message and len(message) < 600
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.pkl"]
    return message


def _text(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _name(module, name):
    return _text(module) + _text(name) + b"\x93"


class _Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


LOAD = _name("torch.storage", "_load_from_bytes")
REBUILD = _name("torch._utils", "_rebuild_tensor_v2")
PERSISTENT = _name("torch_utils.persistence", "_reconstruct_persistent_obj")


def _plain(value):
    """The opcodes of a plain value, without the head and the stop."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]  # which leaves the memo to the test


def _legacy(values):
    """The bytes of a storage as they are in a pickled tensor."""
    return values._typed_storage().__reduce__()[1][0]


def _tensor(stored, offset=0, size=(3,), stride=(1,)):
    """The opcodes of a tensor whose storage has these bytes."""
    data = b"B" + struct.pack("<I", len(stored)) + stored
    return REBUILD + b"(" + LOAD + data + b"\x85R" + b"".join(map(_plain, (offset, size, stride, False, {}))) + b"tR"


def _record(state, version=6, source="", class_name="Net"):
    """The opcodes of a persistent object whose state has these opcodes."""
    meta = {"type": "class", "version": version, "module_src": source, "class_name": class_name}
    return (
        PERSISTENT
        + b"}("
        + b"".join(_plain(key) + _plain(value) for key, value in meta.items())
        + (_plain("state") + state + b"u\x85R")
    )


def _network(tensor, more=b""):
    """A pickle of a network with one parameter of these opcodes, and more opcodes of keys and values in its state."""
    state = b"}(" + _plain("_init_args") + b")" + _plain("_init_kwargs") + b"}" + _plain("_parameters")
    return HEAD + b"}" + _plain("ema") + _record(state + b"}" + _plain("weight") + tensor + b"s" + more + b"u") + b"s."


GOOD = _legacy(torch.arange(3.0))


def test_the_pickles_of_these_tests_are_read_where_nothing_is_wrong(tmp_path):
    found = read_network_pickle(_file(tmp_path, _network(_tensor(GOOD))))
    assert found.tensors["weight"].tolist() == [0.0, 1.0, 2.0] and found.class_name == "Net"


def _nested(tmp_path):
    """{what: bytes in the place of a tensor's storage}."""
    harm, archive, other = _Calls(os.mkdir, str(tmp_path / "harm")), io.BytesIO(), io.BytesIO()
    torch.save(torch.ones(3), archive)
    torch.save({"a": harm}, other, _use_new_zipfile_serialization=False)
    sizes = GOOD.index(b"}q\x00("), GOOD.index(b"]q\x00")
    key_of_tuples = HEAD + b"}" + b")" + b"\x85" * 100_000 + b"Ns."
    return {
        "a call alone": pickle.dumps(harm),
        "a call in torch's layout": other.getvalue(),
        "a call among the sizes": GOOD[: sizes[0] - 2] + pickle.dumps(harm, 2) + GOOD[sizes[0] - 2 :],
        "a call for the keys": GOOD[: sizes[1] - 2] + pickle.dumps(harm, 2) + GOOD[-20:],
        "a module with its source": GOOD.replace(b"X\x07\x00\x00\x00storage", b"X\x06\x00\x00\x00module"),
        "torch's archive": archive.getvalue(),
        "a key that crashes": GOOD[: sizes[0] - 2] + key_of_tuples + GOOD[sizes[0] - 2 :],
        "more values than there are": GOOD.replace(b"K\x03", b"\x8a\x05\xff\xff\xff\xff\x7f"),
        "fewer values": GOOD[:-1],
        "more behind it": GOOD + b"x",
        "nothing": b"",
        "text": b"text",
    }


@pytest.mark.parametrize("what", _nested(Path("/nowhere")))
def test_what_is_nested_in_a_tensor_is_a_storage_and_nothing_else(tmp_path, what):
    _refusal(tmp_path, _network(_tensor(_nested(tmp_path)[what])))


@pytest.mark.parametrize(
    "tensor",
    [
        _tensor(GOOD, size=(4,)),
        _tensor(GOOD, offset=1),
        _tensor(GOOD, offset=-1),
        _tensor(GOOD, size=(2,), stride=(3,)),
        _tensor(GOOD, size=(2**40,), stride=(0,)),
        _tensor(GOOD, size=(2**62, 2**62, 0), stride=(1, 1, 1)),
        _tensor(GOOD, size=(1, 3), stride=(1,)),
        _tensor(GOOD, size="abc"),
        _tensor(GOOD, size=(1.5,)),
        _tensor(GOOD, size=(True,)),
        _tensor(GOOD, size=(1,) * 9, stride=(1,) * 9),
        REBUILD + b")R",
        REBUILD + _plain((1, 2, 3, 4, 5, 6)) + b"R",
        REBUILD + b")" + b"\x85" * 50_000 + b"NNN(" + b"N" * 6 + b"tR",
        REBUILD + b"(" + LOAD + b"C\x03abc\x85R" + b"N" * 5 + b"tR",
        REBUILD + b"(" + LOAD + b")R" + b"K\x00)))Nt" + b"R",
        REBUILD + b"(" + LOAD + b"N\x85R" + b"K\x00)))Nt" + b"R",
        REBUILD + b"(" + b")" + b"\x85" * 50_000 + b"K\x00)))Nt" + b"R",
        REBUILD,
        LOAD + b"C\x03abc\x85R",
        _name("torch._utils", "_rebuild_parameter") + b")R",
        _name("torch._utils", "_rebuild_parameter") + b"N\x85R",
        _name("numpy", "ndarray") + b")R",
        _name("torch", "float32") + b")R",
        _name("collections", "OrderedDict") + b"K\x01\x85R",
        _name("builtins", "set") + b"](K\x01]e\x85R",
        _name("torch.nn.modules.container", "ModuleDict") + b"K\x01\x85\x81",
        PERSISTENT + b")R",
        PERSISTENT + b"K\x01\x85R",
        PERSISTENT + b"}\x85R",
        _record(b"K\x01"),
        _record(b"}", version=7),
        _record(b"}", version="6"),
        _record(b"}") + b"}b",
        _record(b"}") + b"K\x01b",
        _tensor(GOOD) + b"}bN" + b"b",
        REBUILD + b"}b",
        b"K\x01}b",
        b"K\x01K\x02\x85R",
        b"K\x01",
        b"N" + _plain("x") + b"}s",
        _plain("posix") + b"N\x93",
    ],
)
def test_allowed_names_with_strange_arguments_are_refused(tmp_path, tensor):
    _refusal(tmp_path, _network(tensor))


def _growing(opcode, count=60):
    """Opcodes of a value that has the one before it twice, and so on: small here, 2^count where it is walked."""
    return b"N" + b"".join(b"\x94h" + bytes([index]) + opcode for index in range(count))


def _many_modules():
    """Modules that each have the one before twice."""
    modules = b""
    for index in range(31):
        inner = b"N" if not index else b"h" + bytes([index - 1])
        table = b"}(" + _plain("a") + inner + _plain("b") + inner + b"u"
        modules += _record(b"}" + _plain("_modules") + table + b"s") + b"q" + bytes([index]) + b"0"
    table = _plain("_modules") + b"}" + _plain("a") + b"h\x1es"
    return HEAD + modules + _network(_tensor(GOOD), table)[2:]


def _same_bytes_many_times():
    """A hundred tensors of the same bytes."""
    stored = _legacy(torch.zeros(100_000))
    data = b"B" + struct.pack("<I", len(stored)) + stored + b"q\x000"
    tensor = REBUILD + b"(" + LOAD + b"h\x00\x85R" + b"".join(map(_plain, (0, (9,), (1,), False, {}))) + b"tR"
    more = _plain("_buffers") + b"}(" + b"".join(_plain(f"b{index}") + tensor for index in range(100)) + b"u"
    return HEAD + data + _network(tensor, more)[2:]


TUPLES = b")" + b"\x85" * 100_000
ENDLESS = _plain("_modules") + b"}" + _plain("a") + b"h\x00s"
ITSELF = _name("torch.nn.modules.container", "ModuleDict") + b")\x81q\x00}" + ENDLESS + b"sb0"
BOMBS = {
    "a memo's index": (HEAD + b"Nr\xff\xff\xff\x7f.", "has no pickled network"),
    "a key of nested tuples": (HEAD + b"}" + TUPLES + b"Ns.", "a key of the type tuple"),
    "a key of growing tuples": (HEAD + _growing(b"\x86") + b"}h\x3bNs.", "a key of the type tuple"),
    "a set of nested tuples": (HEAD + b"\x8f(" + TUPLES + b"\x90.", "a key of the type tuple"),
    "a frozenset of nested tuples": (HEAD + b"(" + TUPLES + b"\x91.", "a key of the type tuple"),
    "a nested list": (HEAD + b"]" * 100_000 + b"a" * 99_999 + b".", "has no pickled network"),
    "a nested tuple": (HEAD + TUPLES + b".", "has no pickled network"),
    "bytes that are not there": (HEAD + b"\x8e" + struct.pack("<Q", 2**40) + b".", "only 1 remain"),
    "a text that is not there": (HEAD + b"\x8d" + struct.pack("<Q", 2**40) + b".", "only 1 remain"),
    "a bytearray that is not there": (HEAD + b"\x96" + struct.pack("<Q", 2**34) + b".", "only 1 remain"),
    "a frame that is not there": (HEAD + b"\x95" + struct.pack("<Q", 2**40), "before seeing STOP"),
    "a number that is not there": (HEAD + b"\x8b" + struct.pack("<i", 2**31 - 1) + b".", "not enough data"),
    "too many opcodes": (HEAD + b"N0" * (LARGEST_OPCODES // 2) + b"N.", "more than 524288 opcodes"),
    "arguments that grow": (_network(_tensor(GOOD), _plain("_init_args") + _growing(b"\x86") + b"\x85"), "4096"),
    "arguments in themselves": (_network(_tensor(GOOD), _plain("_init_args") + b"]q\xffh\xffa\x85"), "in itself"),
    "deep arguments": (_network(_tensor(GOOD), _plain("_init_args") + TUPLES), "in itself"),
    "modules in themselves": (HEAD + ITSELF + _network(_tensor(GOOD), ENDLESS)[2:], "without an end, as a.a.a"),
    "modules that grow": (_many_modules(), "without an end, as a.a.a"),
    "the same bytes many times": (_same_bytes_many_times(), "more bytes than the file"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_small_files_take_no_large_memory_nor_long_nor_crash(tmp_path, what):
    data, says = BOMBS[what]
    tracemalloc.start()
    try:
        assert says in _refusal(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()

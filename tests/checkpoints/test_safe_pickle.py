"""Pickles that may hold anything: NVlabs' networks and EDM2's statistics are read, and nothing in any file is run."""

import io
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import textwrap

import numpy as np
import nvlabs_pickles
import pytest
import torch

from hsivi_fast.checkpoints.network_pickles import read_array_pickle, read_network_pickle
from hsivi_fast.checkpoints.safe_pickle import LARGEST_OPCODES, Record, read_records

HEAD, STOP = b"\x80\x04", b"."


def _file(tmp_path, data):
    file = tmp_path / "network.pkl"
    file.write_bytes(data)
    return file


def _refusal(tmp_path, data, read=read_network_pickle):
    """The line that a file of these bytes is refused with; nothing but the file is in the folder then."""
    file = _file(tmp_path, data)
    with pytest.raises(ValueError) as caught:
        read(file)
    message = str(caught.value)
    assert str(file) in message and "\n" not in message and len(message) < 600
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.pkl"]
    return message


def _text(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _name(module, name):
    return _text(module) + _text(name) + b"\x93"


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_snapshot_has_the_state_dict_and_the_arguments_of_its_network(tmp_path, protocol, dtype):
    network = nvlabs_pickles.network(dtype)
    found = read_network_pickle(_file(tmp_path, nvlabs_pickles.pickled(nvlabs_pickles.snapshot(network), protocol)))
    expected = network.state_dict()
    assert list(found.tensors) == list(expected) and "model.enc.8x8_block0.norm0.weight" in expected
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)
    assert "model.map_noise.freqs" in expected and "model.map_noise.forgotten" not in expected
    assert expected["u"].shape == ()
    assert (found.class_name, found.init_args) == ("EDMPrecond", ())
    assert found.init_kwargs == network._init_kwargs
    assert found.parts == {"model": ("SongUNet", (8,), network.model._init_kwargs)}
    assert not any(name.startswith(("torch_utils", "dnnlib")) for name in sys.modules)


def test_numpys_numbers_and_types_are_plain_in_arguments(tmp_path):
    made = {"init_weight": np.sqrt(0.2), "steps": np.int64(3), "sizes": np.arange(3), "on": np.bool_(True)}
    options = nvlabs_pickles.EasyDict(filter=[1, 1], pair=(1, 2.5), none=None, text="x")
    loss = nvlabs_pickles.EDMPrecond(8, 3, dtype=torch.float16)
    loss._init_kwargs = {**made, "options": options, "dtype": torch.float16, "device": torch.device("cpu")}
    found = read_network_pickle(_file(tmp_path, nvlabs_pickles.pickled({"ema": loss}))).init_kwargs
    assert found == {
        "init_weight": float(np.sqrt(0.2)),
        "steps": 3,
        "sizes": [0, 1, 2],
        "on": True,
        "options": dict(options),
        "dtype": "float16",
        "device": "cpu",
    }
    assert [type(found[key]) for key in ("init_weight", "steps", "on", "options")] == [float, int, bool, dict]


def test_what_is_shared_stays_shared_and_slices_are_read(tmp_path):
    network = nvlabs_pickles.network()
    block = network.model.enc["8x8_block0"]
    block.norm0.bias = block.norm0.weight
    network.model.enc["again"] = block.norm0
    whole = torch.arange(12.0).reshape(3, 4)
    block.norm0.register_buffer("part", whole[1:, ::2].t())
    found = read_network_pickle(_file(tmp_path, nvlabs_pickles.pickled({"ema": network}))).tensors
    names = [f"model.enc.{name}" for name in ("8x8_block0.norm0.weight", "8x8_block0.norm0.bias", "again.weight")]
    assert len({id(found[name]) for name in names}) == 1 and names[2] in network.state_dict()
    assert found["model.enc.again.part"].tolist() == [[4.0, 8.0], [6.0, 10.0]]


def test_a_network_alone_and_another_entry_are_read(tmp_path):
    network = nvlabs_pickles.network()
    alone = read_network_pickle(_file(tmp_path, nvlabs_pickles.pickled(network)))
    entry = read_network_pickle(_file(tmp_path, nvlabs_pickles.pickled({"net": network})), entry="net")
    assert list(alone.tensors) == list(entry.tensors) == list(network.state_dict())


def test_the_source_in_a_record_is_neither_run_nor_kept(tmp_path):
    class Evil(nvlabs_pickles.EDMPrecond):
        module_src = f"import os; os.mkdir({str(tmp_path / 'harm')!r})"

    file = _file(tmp_path, nvlabs_pickles.pickled({"ema": Evil(8, 3)}))
    assert b"os.mkdir" in file.read_bytes()
    record = read_records(file)["ema"]
    assert isinstance(record, Record) and (record.type, record.version, record.class_name) == ("class", 6, "Evil")
    assert set(vars(record)) == {"type", "version", "class_name", "state"}
    assert read_network_pickle(file).class_name == "Evil"
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.pkl"]


class _Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (os.mkdir, "posix.mkdir"),
        (eval, r"(builtins|__builtin__).eval"),
        (exec, r"(builtins|__builtin__).exec"),
        (subprocess.call, "subprocess.call"),
        (torch.load, "torch.serialization.load"),
        (np.load, "numpy.load"),
        (np.fromfile, r"numpy.*fromfile"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (getattr, r"(builtins|__builtin__).getattr"),
    ],
)
def test_any_other_name_is_refused_by_it_wherever_it_stands(tmp_path, protocol, function, name):
    harm = _Calls(function, f"mkdir {tmp_path / 'harm'}")
    network = nvlabs_pickles.network()
    for content in (harm, {"ema": network, "loss_fn": harm}, {"a": harm, "ema": network}):
        message = _refusal(tmp_path, nvlabs_pickles.pickled(content, protocol))
        if protocol > 2:  # of which Python 3 writes bytes as a call of _codecs.encode
            assert re.search(rf"holds pickled code \({name}\), which is never run", message), message
        assert "holds pickled code (" in message

"""Pickles that may hold anything: NVlabs' networks and EDM2's statistics are read, and nothing in any file is run."""

import io
import os
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import nvlabs_pickles
import pytest
import torch

from hsivi_fast.checkpoints.network_pickles import read_array_pickle, read_network_pickle
from hsivi_fast.checkpoints.safe_pickle import Record, read_records

HEAD = b"\x80\x04"


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


@pytest.mark.parametrize("part", range(20))
def test_a_cut_file_is_damaged(tmp_path, part):
    data = nvlabs_pickles.pickled(nvlabs_pickles.snapshot(nvlabs_pickles.network()))
    message = _refusal(tmp_path, data[: len(data) * part // 20])
    assert "a damaged pickle" in message or "is not a pickle" in message


def test_what_is_no_pickle_is_named(tmp_path):
    archive = io.BytesIO()
    torch.save({"a": torch.ones(2)}, archive)
    assert "is a zip archive and not a pickle" in _refusal(tmp_path, archive.getvalue())
    assert "is not a pickle" in _refusal(tmp_path, b"<html>")
    data = nvlabs_pickles.pickled({"ema": nvlabs_pickles.network()})
    assert "goes on behind its end" in _refusal(tmp_path, data + b"x")
    for content, holds in (
        ({"a": 1, "b": 2}, "a, b"),
        ([1], "a value of the type list"),
        ({}, "nothing"),
        ({"ema": 1}, "ema"),
    ):
        assert f"has no pickled network 'ema'; it holds {holds}" in _refusal(tmp_path, pickle.dumps(content))
    for code, name in (
        (b"(iposix\nsystem\n.", "INST"),
        (b"\x82\x01.", "EXT1"),
        (b"(co\nb\no.", ""),
        (b"NQ.", "BINPERSID"),
    ):
        assert name in _refusal(tmp_path, HEAD + code)
    assert "protocol 99" in _refusal(tmp_path, b"\x80\x63N.")
    with pytest.raises(ValueError, match="no such file"):
        read_network_pickle(tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="is a folder"):
        read_network_pickle(tmp_path)


def test_random_and_altered_bytes_end_in_a_line(tmp_path):
    generator = random.Random(0)
    data = nvlabs_pickles.pickled(nvlabs_pickles.snapshot(nvlabs_pickles.network()))
    for trial in range(300):
        bad = bytearray(generator.randbytes(200) if trial % 3 == 0 else data)
        for _ in range(generator.randrange(1, 4)):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
        if trial % 3 == 0:
            bad[:2] = HEAD
        file = _file(tmp_path, bytes(bad))
        try:
            read_network_pickle(file)  # where a weight's bytes were altered it is read
        except ValueError as error:
            assert "\n" not in str(error) and str(file) in str(error)
        assert [entry.name for entry in tmp_path.iterdir()] == ["network.pkl"]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_statistics_are_arrays_and_dicts_of_them(tmp_path, protocol):
    sigma = np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3))
    statistics = {"fid": {"mu": np.arange(3.0), "sigma": sigma}, "fd_dinov2": {"mu": np.zeros(2, ">f8")}}
    statistics |= {"count": 50_000, "mean": np.float64(2.5), "bytes": np.arange(3, dtype=np.uint8)}
    found = read_array_pickle(_file(tmp_path, pickle.dumps(statistics, protocol)))
    assert (found["count"], found["mean"], type(found["mean"])) == (50_000, 2.5, float)
    for expected, array in (
        (statistics["fid"]["mu"], found["fid"]["mu"]),
        (sigma, found["fid"]["sigma"]),
        (statistics["fd_dinov2"]["mu"], found["fd_dinov2"]["mu"]),
        (statistics["bytes"], found["bytes"]),
    ):
        assert np.array_equal(expected, array) and array.dtype == expected.dtype.newbyteorder("=")
        assert array.flags.writeable and array.dtype.isnative


def test_numpys_modules_by_their_old_names_are_read(tmp_path):
    data = pickle.dumps({"mu": np.arange(3.0), "n": np.float64(2)}, 4)
    for new, old in ((b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray"),):
        data = data.replace(new, old)
    data = re.sub(rb"\x95........", b"", data, flags=re.DOTALL)  # frames, whose lengths are now others
    assert b"numpy.core.multiarray" in data and b"_core" not in data
    found = read_array_pickle(_file(tmp_path, data))
    assert found["mu"].tolist() == [0.0, 1.0, 2.0] and found["n"] == 2.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"mu": np.array([None])}, "plain number"),
        ({"mu": np.zeros(2, "c16")}, "plain number"),
        ({"mu": np.zeros(2, "f4,i4")}, "plain number|pickled code"),
        ({"mu": "text"}, "mu is a value of the type str; expected an array"),
        ({"fid": {"mu": [1, 2]}}, "fid.mu is a value of the type list; expected an array"),
        ({"a": {"b": {"c": {"d": {"e": {}}}}}}, "dicts in dicts"),
        ([np.zeros(2)], "has no named arrays; it holds a value of the type list"),
        ({}, "has no named arrays; it holds nothing"),
        ({"mu": _Calls(os.mkdir, "harm")}, r"holds pickled code \(posix.mkdir\)"),
        ({"mu": torch.zeros(2)}, "expected an array"),
        ({"mu": np.ma.zeros(2)}, "pickled code"),
        ({"mu": np.zeros(2).view(np.matrix)}, "pickled code"),
    ],
)
def test_other_statistics_are_refused(tmp_path, content, says):
    message = _refusal(
        tmp_path, pickle.dumps(content), lambda file: read_array_pickle(file, f"reference {str(file)!r}")
    )
    assert re.search(says, message) and message.startswith("reference '"), message


def test_an_array_has_as_many_bytes_as_its_shape_says(tmp_path):
    data = pickle.dumps({"mu": np.arange(3.0)}, 4)
    for old, new in (
        (b"K\x03\x85", b"K\x04\x85"),
        (b"K\x03\x85", b"N\x85"),
        (b"\x8c\x02f8", b"\x8c\x02O8"),
        (b"f8", b"f4"),
    ):
        assert old in data
        _refusal(tmp_path, re.sub(rb"\x95........", b"", data, flags=re.DOTALL).replace(old, new, 1), read_array_pickle)

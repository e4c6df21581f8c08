"""The parsers that meet foreign bytes end with what they hold or with one line, whatever the bytes are."""

import gzip
import io
import json
import pickle
import struct
import warnings

import numpy as np
import nvlabs_pickles
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hsivi_fast.checkpoints.formats import read_checkpoint
from hsivi_fast.checkpoints.network_pickles import read_array_pickle, read_network_pickle
from hsivi_fast.config import CONFIGS, load_config
from hsivi_fast.data import load_data, read_idx
from hsivi_fast.metrics.distances import load_statistics
from hsivi_fast.metrics.references import load_reference

FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _torch_file(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _npz_file(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


WEIGHTS = {"in_conv.weight": torch.ones(2, 2), "in_conv.bias": torch.ones(2)}
WHOLE = {
    "checkpoint": [
        save(WEIGHTS),
        save(WEIGHTS, {"hsivi_network": '{"family": "ddpm"}'}),
        _torch_file({"ema": WEIGHTS}),
    ],
    "npz": [_npz_file(mu=np.zeros(2), sigma=np.eye(2)), _npz_file(arr_0=np.zeros((2, 4, 4, 1), np.uint8))],
    "pickle": [
        *(nvlabs_pickles.pickled(nvlabs_pickles.snapshot(nvlabs_pickles.network()), protocol) for protocol in (3, 4)),
        *(pickle.dumps({"fid": {"mu": np.zeros(2), "sigma": np.eye(2)}}, protocol) for protocol in (4, 5)),
    ],
    "idx": [data := struct.pack(">HBBIII", 0, 8, 3, 2, 4, 4) + bytes(32), gzip.compress(data)],
    "config": [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))[:4]],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def altered(draw, kind):
    """A whole file of a kind with a few bytes changed, cut or put in; or any bytes at all."""
    data = bytearray(draw(st.sampled_from(WHOLE[kind])))
    for _ in range(draw(st.integers(0, 4))):
        spot = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.sampled_from(("change", "cut", "put", "drop")))
        if what == "change" and data:
            data[spot] = draw(st.integers(0, 255))
        elif what == "cut":
            del data[spot:]
        elif what == "put":
            data[spot:spot] = draw(st.binary(max_size=8))
        else:
            del data[spot : spot + draw(st.integers(1, 8))]
    return draw(st.sampled_from((bytes(data), bytes(data), draw(st.binary(max_size=100)))))


def _ends_in_a_line(call):
    """Call it: nothing but a ValueError of one line may come of it, and no warning of a library."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call()
        except ValueError as error:
            assert str(error) and "\n" not in str(error), repr(str(error))
            assert len(str(error)) < 1000
    # A file that numpy leaves open is told to developers alone.
    assert [str(one.message)[:100] for one in said if not issubclass(one.category, ResourceWarning)] == []


@FEW
@given(altered("checkpoint"), st.sampled_from(("a.pt", "a.safetensors", "a")))
def test_checkpoints(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    _ends_in_a_line(lambda: read_checkpoint(tmp_path / name))


@FEW
@given(JSON, st.sampled_from(("hsivi_network", "hsivi_settings")))
def test_what_a_safetensors_file_says_of_itself(tmp_path, value, key):
    (tmp_path / "a.safetensors").write_bytes(save(WEIGHTS, {key: json.dumps(value)}))
    _ends_in_a_line(lambda: read_checkpoint(tmp_path / "a.safetensors"))


@FEW
@given(altered("pickle"))
def test_pickles(tmp_path, data):
    (tmp_path / "a.pkl").write_bytes(data)
    _ends_in_a_line(lambda: read_network_pickle(tmp_path / "a.pkl"))
    _ends_in_a_line(lambda: read_array_pickle(tmp_path / "a.pkl"))
    _ends_in_a_line(lambda: load_reference(tmp_path / "a.pkl"))


@FEW
@given(altered("npz"))
def test_npz_files(tmp_path, data):
    (tmp_path / "a.npz").write_bytes(data)
    _ends_in_a_line(lambda: load_statistics(tmp_path / "a.npz"))
    _ends_in_a_line(lambda: load_reference(tmp_path / "a.npz"))
    _ends_in_a_line(lambda: load_data("images", str(tmp_path / "a.npz")))


@FEW
@given(altered("idx"))
def test_idx_files(tmp_path, data):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    _ends_in_a_line(lambda: read_idx(tmp_path / "train-images-idx3-ubyte"))
    _ends_in_a_line(lambda: load_data("mnist", str(tmp_path)))


@FEW
@given(altered("config"))
def test_config_files(tmp_path, data):
    (tmp_path / "run.yaml").write_bytes(data)
    _ends_in_a_line(lambda: load_config(tmp_path / "run.yaml"))


@FEW
@given(
    st.sampled_from(("nfe", "train", "teacher.checkpoint", "network", "eval.ddim_nfe", "name")), st.text(max_size=12)
)
def test_overrides(key, text):
    _ends_in_a_line(lambda: load_config("smoke", [f"{key}={text}"]))

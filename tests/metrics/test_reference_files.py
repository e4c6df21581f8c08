"""Files of reference statistics: what cannot be a mean and a covariance is refused when it is read."""

import os

import numpy as np
import pytest
import torch
from contexts import context_of

from hsivi_fast.config import load_config
from hsivi_fast.metrics.distances import load_statistics, save_statistics
from hsivi_fast.metrics.evaluation import ImageMetric

SIZE = 6
MU = np.linspace(0, 1, SIZE)
SIGMA = np.cov(np.random.default_rng(0).standard_normal((SIZE, 40)))


def _changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


def _write(folder, content):
    file = folder / "reference.npz"
    if content == "pipe":
        os.mkfifo(file)
    elif content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    return file


def _damaged(folder):
    """A whole archive with one byte of sigma flipped."""
    file = _write(folder, {"mu": MU, "sigma": SIGMA})
    content = bytearray(file.read_bytes())
    content[content.index(SIGMA.tobytes()) + 3] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    "content, message",
    {
        "nothing there": (None, "no such file"),
        "a folder": ("folder", "is a folder; give a file"),
        "a pipe": ("pipe", "is a pipe, socket or device"),
        "a text": (b"mu = 3", "expected an npz file with mu and sigma"),
        "no sigma": ({"mu": MU, "arr_0": SIGMA}, "expected an npz file with mu and sigma, it holds mu, arr_0"),
        "complex": ({"mu": MU + 0j, "sigma": SIGMA}, "mu is complex128; expected numbers of type float64 or float32"),
        "complex sigma": ({"mu": MU, "sigma": SIGMA * 1j}, "sigma is complex128"),
        "dates": ({"mu": np.zeros(SIZE, "datetime64[s]"), "sigma": SIGMA}, r"mu is datetime64\[s\]"),
        "texts": ({"mu": np.array(list("abcdef")), "sigma": SIGMA}, "mu is <U1"),
        "integers": ({"mu": np.arange(SIZE), "sigma": SIGMA}, "mu is int64"),
        "pickled objects": ({"mu": np.array([{}] * SIZE), "sigma": SIGMA}, "mu is object; expected numbers"),
        "records": ({"mu": np.zeros(SIZE, [("a", "f8")]), "sigma": SIGMA}, "mu is "),
        "two sizes": (
            {"mu": MU[1:], "sigma": SIGMA},
            r"mu \(5,\) and sigma \(6, 6\) do not fit each other; expected \[D\]",
        ),
        "empty": ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, r"mu \(0,\) and sigma \(0, 0\) do not fit"),
        "one number": ({"mu": MU[0], "sigma": SIGMA}, r"mu \(\) and sigma"),
        "not a number": (
            {"mu": _changed(MU, 2, np.nan), "sigma": SIGMA},
            r"mu at \[2\] is nan; expected finite numbers",
        ),
        "infinite": (
            {"mu": MU, "sigma": _changed(SIGMA, (1, 3), -np.inf)},
            r"sigma at \[1, 3\] is -inf; expected finite",
        ),
        "1e300": (
            {"mu": MU, "sigma": _changed(SIGMA, (0, 0), 1e300)},
            r"sigma at \[0, 0\] is 1e\+300; .* below 1e\+12",
        ),
        "asymmetric": ({"mu": MU, "sigma": _changed(SIGMA, (4, 1), 0.5)}, "a covariance is symmetric"),
        "negative": (
            {"mu": MU, "sigma": SIGMA - 2 * np.eye(SIZE)},
            "sigma has the eigenvalue -.*; a covariance has none",
        ),
    }.values(),
)
def test_what_is_no_mean_and_covariance_is_one_line(tmp_path, recwarn, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load_statistics(_write(tmp_path, content))
    text = str(error.value)
    assert text.startswith(f"reference '{tmp_path}/reference.npz'") and "\n" not in text and len(text) < 400
    assert not recwarn.list and "allow_pickle" not in text


def test_a_flipped_byte_and_too_many_features_are_noticed(tmp_path):
    with pytest.raises(ValueError, match="CRC"):
        load_statistics(_write(tmp_path, _damaged(tmp_path)))
    large = {"mu": np.zeros(2**13 + 1, np.float32), "sigma": SIGMA}
    with pytest.raises(ValueError, match=r"with D from 1 to 8192"):
        load_statistics(_write(tmp_path, large))


def test_statistics_with_rounding_are_taken_and_are_float64(tmp_path):
    few = np.random.default_rng(1).standard_normal((SIZE, 3)).astype(np.float32)  # fewer images than features
    covariance = np.cov(few).astype(np.float32)
    assert np.linalg.eigvalsh(covariance.astype(np.float64))[0] < 0
    covariance[0, 1] *= 1 + 3e-7
    found = load_statistics(_write(tmp_path, {"mu": MU.astype(np.float32), "sigma": covariance, "features": "an X"}))
    assert found["mu"].dtype == found["sigma"].dtype == np.float64 and found["features"] == "an X"
    np.testing.assert_array_equal(found["sigma"], covariance)


def test_kept_statistics_that_are_damaged_are_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path))
    metric = ImageMetric(context_of(load_config("digits")))
    images = torch.rand(30, 1, 8, 8) * 2 - 1
    measured = metric.cached_statistics(images)
    (file,) = tmp_path.glob("statistics_*.npz")
    whole = file.read_bytes()
    others = {"mu": MU, "sigma": SIGMA, "features": measured["features"]}
    for spoil in (
        lambda: file.write_bytes(whole[:1000]),
        lambda: file.write_bytes(b""),
        lambda: save_statistics(file, others),
        lambda: save_statistics(file, {**measured, "features": "others"}),
        lambda: save_statistics(file, {**measured, "mu": measured["mu"] * np.nan}),
    ):
        spoil()
        found = metric.cached_statistics(images)
        np.testing.assert_array_equal(found["sigma"], measured["sigma"])
        assert load_statistics(file)["features"] == measured["features"]

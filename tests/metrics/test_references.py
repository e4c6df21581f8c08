"""References by name, by address and as files: every kind's values, and one line for each that cannot be had."""

import functools
import hashlib
import pickle

import numpy as np
import pytest
import torch
from commands import hsivi_here
from contexts import context_of, context_with_teacher
from local_server import LOGIN, Answer, serving

from hsivi_fast import train
from hsivi_fast.checkpoints import download
from hsivi_fast.cli import LONGEST_MESSAGE
from hsivi_fast.config import PUBLISHED_REFERENCES, PUBLISHED_TEACHERS, load_config, resolved_dict
from hsivi_fast.metrics.evaluation import ImageMetric, build_metric, evaluate
from hsivi_fast.metrics.needed_files import fetch_needed
from hsivi_fast.metrics.references import load_reference
from hsivi_fast.training import trainer

MU = np.linspace(0, 1, 6)
SIGMA = np.cov(np.random.default_rng(0).standard_normal((6, 40)))
NAMES = {
    "cifar10": "cifar10-32x32.npz",
    "ffhq64": "ffhq-64x64.npz",
    "afhqv2": "afhqv2-64x64.npz",
    "imagenet64": "imagenet-64x64.npz",
}
PIXELS = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def _npz(folder, **arrays):
    np.savez(folder / "made.npz", **arrays)
    return (folder / "made.npz").read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of the test; it is made at the first use."""
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def network(cache, monkeypatch):
    """(answers, paths asked) of a server that has the place of EDM's."""
    answers = {}
    with serving(answers) as (base, asked):
        for name, file in NAMES.items():
            monkeypatch.setitem(PUBLISHED_REFERENCES, name, f"{base}/{file}")
        yield answers, asked


def _left(cache):
    """What is in the cache besides locks."""
    return sorted(file.name for file in cache.iterdir() if file.suffix != ".lock")


def test_the_names_are_edms_files():
    prefix = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/"
    assert PUBLISHED_REFERENCES == {name: f"{prefix}{file}" for name, file in NAMES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_fetched_once_and_its_sum_is_kept(tmp_path, cache, network, name):
    content = _npz(tmp_path, mu=MU, sigma=SIGMA)
    network[0][f"/{NAMES[name]}"] = Answer(content)
    for _ in range(2):
        found = load_reference(name)
        np.testing.assert_array_equal(found["mu"], MU)
        np.testing.assert_array_equal(found["sigma"], SIGMA)
    assert network[1] == [f"/{NAMES[name]}"] and _left(cache) == [NAMES[name], f"{NAMES[name]}.sha256"]
    assert (cache / f"{NAMES[name]}.sha256").read_text().split()[0] == hashlib.sha256(content).hexdigest()
    (cache / NAMES[name]).write_bytes(_npz(tmp_path, mu=MU + 1, sigma=SIGMA))
    with pytest.raises(ValueError, match=r"^reference '.*npz': its sha256 is .* as at its first use; delete it and"):
        load_reference(name)


def test_a_file_put_into_the_cache_by_hand_is_used(tmp_path, cache, network):
    cache.mkdir()
    (cache / NAMES["ffhq64"]).write_bytes(_npz(tmp_path, mu=MU, sigma=SIGMA))
    np.testing.assert_array_equal(load_reference("ffhq64")["mu"], MU)
    assert network[1] == [] and _left(cache) == [NAMES["ffhq64"], f"{NAMES['ffhq64']}.sha256"]


@pytest.mark.parametrize(
    "kind, message",
    {
        "cut": r"cannot be downloaded \(the answer ended after \d+ of \d+ bytes\); put the file at .*32.npz by hand",
        "cut, no length": r"expected an npz file with mu and sigma, or images as arr_0 \(.*; it was downloaded, and is",
        "redirected": r"cannot be downloaded \(the answer is a web page and not a file\); put the file at",
        "a page": "expected an npz file with mu and sigma, .*; it was downloaded, and is deleted: the next try fetches",
        "other arrays": "it holds a; it was downloaded, and is deleted",
        "not there": r"cannot be downloaded \(Not Found\); put the file at",
    }.items(),
)
def test_a_bad_download_is_one_line_and_leaves_nothing(tmp_path, cache, network, kind, message):
    whole = _npz(tmp_path, mu=MU, sigma=SIGMA)
    network[0]["/login"] = LOGIN
    answer = {
        "cut": Answer(whole[:500], length=len(whole)),
        "cut, no length": Answer(whole[:500]),
        "redirected": Answer(moved_to="/login"),
        "a page": Answer(LOGIN.body),
        "other arrays": Answer(_npz(tmp_path, a=MU)),
    }.get(kind)
    if answer:
        network[0]["/cifar10-32x32.npz"] = answer
    with pytest.raises(ValueError, match=message) as error:
        load_reference("cifar10")
    assert str(error.value).startswith("reference ") and "\n" not in str(error.value) and _left(cache) == []
    network[0]["/cifar10-32x32.npz"] = Answer(whole)
    np.testing.assert_array_equal(load_reference("cifar10")["mu"], MU)


def test_an_address_may_carry_its_sum(tmp_path, cache, network):
    content = _npz(tmp_path, mu=MU, sigma=SIGMA)
    network[0]["/cifar10-32x32.npz"] = Answer(content)
    address = PUBLISHED_REFERENCES["cifar10"]
    with pytest.raises(ValueError, match=rf"^reference {address}: .* expected {'0' * 64}; it was deleted"):
        load_reference(f"{address}#sha256={'0' * 64}")
    assert _left(cache) == []
    np.testing.assert_array_equal(
        load_reference(f"{address}#sha256={hashlib.sha256(content).hexdigest()}")["sigma"], SIGMA
    )
    with pytest.raises(ValueError, match=r"^reference 'http.*': what follows # must be sha256="):
        load_reference(f"{address}#md5=0")


def test_without_a_network_the_line_says_where_to_put_the_file(cache, monkeypatch):
    monkeypatch.setitem(PUBLISHED_REFERENCES, "afhqv2", f"{NOWHERE}/afhqv2-64x64.npz")
    message = rf"^reference {NOWHERE}/afhqv2-64x64.npz: cannot be downloaded \(.*Connection refused\); put the file at "
    with pytest.raises(ValueError, match=f"{message}{cache}/afhqv2-64x64.npz by hand$"):
        load_reference("afhqv2")
    assert _left(cache) == []


def test_celeba64_is_made_by_its_user(tmp_path, cache):
    message = rf"has no address .*`hsivi prepare celeba64 FOLDER --to {cache}/celeba64.npz`, or say eval.reference=FILE"
    with pytest.raises(ValueError, match=rf"^reference 'celeba64': {message}$"):
        load_reference("celeba64")
    cache.mkdir()
    np.savez(cache / "celeba64.npz", PIXELS)
    np.testing.assert_array_equal(load_reference("celeba64")["images"], PIXELS.transpose(0, 3, 1, 2))


def test_a_name_stays_a_name_in_a_run_and_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").touch()  # a file of that name is ./cifar10
    for text, expected in (("cifar10", "cifar10"), ("celeba64", "celeba64"), ("./cifar10", f"{tmp_path}/cifar10")):
        config = load_config("smoke", [f"eval.reference={text}"])
        assert config.eval.reference == expected == resolved_dict(config)["eval"]["reference"]


# Files of images, and files of both.


def _reference_of(file, *overrides):
    """The statistics that digits are compared with, by a reference of that file."""
    config = load_config("digits", [f"eval.reference={file}", *overrides])
    return ImageMetric(context_of(config), event_shape=(1, 8, 8))


def test_features_of_images_are_computed_where_there_is_nothing_else(tmp_path, cache):
    np.savez(tmp_path / "batch.npz", PIXELS)
    metric = _reference_of(tmp_path / "batch.npz")
    images = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        features = metric.extractor(images)[0].double().numpy()
    np.testing.assert_allclose(metric.reference["mu"], features.mean(0), rtol=2e-6)
    np.testing.assert_allclose(metric.reference["sigma"], np.cov(features, rowvar=False), rtol=1e-5, atol=1e-6)
    assert metric.measure(images, len(images))["frechet_distance"] == pytest.approx(0, abs=1e-6)
    (kept,) = _left(cache)  # as of data, so that they are measured once
    assert kept.startswith("statistics_digits_")
    again = _reference_of(tmp_path / "batch.npz")
    np.testing.assert_array_equal(again.reference["sigma"], metric.reference["sigma"])


def test_images_of_a_reference_serve_the_other_distances_too(tmp_path, cache):
    np.savez(tmp_path / "batch.npz", PIXELS)
    metric = _reference_of(tmp_path / "batch.npz", "data=null", "eval.metric=digits", "eval.kid=true", "eval.prc=true")
    values = metric.measure(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()), len(PIXELS))
    assert metric.reference_features.shape == (40, 64)
    assert values["precision"] == values["recall"] == 1


def test_statistics_come_before_the_images_beside_them(tmp_path):
    """As in guided-diffusion's reference batches: of the whole data set, where the images are some of it."""
    moments = {"mu": MU, "sigma": SIGMA, "mu_s": MU[:2], "sigma_s": SIGMA[:2, :2]}
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=PIXELS, **moments)
    found = load_reference(tmp_path / "VIRTUAL.npz")
    assert set(found) == {"mu", "sigma"}
    np.testing.assert_array_equal(found["sigma"], SIGMA)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_0": PIXELS / 255}, r"holds float64 \[40, 8, 8, 1\] as arr_0, expected uint8 \[N, H, W, C\]"),
        ({"arr_0": PIXELS[..., 0]}, r"holds uint8 \[40, 8, 8\] as arr_0, expected uint8"),
        ({"arr_0": PIXELS[:0]}, r"holds uint8 \[0, 8, 8, 1\] as arr_0, expected uint8 .* N at least 1"),
        ({"arr_0": PIXELS, "mu": MU}, "expected an npz file with mu and sigma, it holds arr_0, mu"),
        ({"images": PIXELS}, "expected an npz file with mu and sigma, it holds images"),
    ],
)
def test_files_that_are_no_reference_are_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_reference(tmp_path / "a.npz")
    assert str(error.value).startswith(f"reference '{tmp_path}/a.npz'") and "\n" not in str(error.value)


def test_images_of_another_shape_than_the_runs_and_too_few_are_refused(tmp_path, cache):
    np.savez(tmp_path / "a.npz", np.zeros((3, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "one.npz", PIXELS[:1])
    for file, message in (
        ("a.npz", r"ref: holds images \[3, 16, 16\], the run makes \[1, 8, 8\]"),
        ("one.npz", "num-samples: 1 is too few for a covariance"),
    ):
        config = load_config("digits", [f"eval.reference={tmp_path / file}"])
        with pytest.raises(ValueError, match=message):
            build_metric(context_with_teacher(config))


# EDM2's pickles.


@pytest.mark.parametrize("protocol", [4, 5])
def test_edm2s_statistics_are_read(tmp_path, protocol):
    other = {"mu": np.zeros(3), "sigma": np.eye(3)}
    content = {"num_images": 50000, "fid": {"mu": MU, "sigma": SIGMA.astype(np.float32)}, "fd_dinov2": other}
    (tmp_path / "img64.pkl").write_bytes(pickle.dumps(content, protocol))
    found = load_reference(tmp_path / "img64.pkl")
    assert found["mu"].dtype == found["sigma"].dtype == np.float64 and set(found) == {"mu", "sigma"}
    np.testing.assert_array_equal(found["mu"], MU)
    np.testing.assert_array_equal(found["sigma"], SIGMA.astype(np.float32))


class _Planted:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"mu": MU, "sigma": SIGMA}, "expected a pickle with mu and sigma under fid, it holds mu, sigma"),
        ({"fid": {"mu": MU}}, "expected a pickle with mu and sigma under fid, it holds fid"),
        ({"fid": MU}, "expected a pickle with mu and sigma under fid, it holds fid"),
        ({"fid": {"mu": MU, "sigma": SIGMA[1:]}}, r"mu \(6,\) and sigma \(5, 6\) do not fit each other"),
        ({"fid": {"mu": MU, "sigma": 3}}, "sigma is int64; expected numbers of type float64 or float32"),
        ({"fid": {"mu": MU * np.nan, "sigma": SIGMA}}, r"mu at \[0\] is nan; expected finite numbers"),
        ({"fid": {"mu": MU, "sigma": SIGMA - 2 * np.eye(6)}}, "a covariance has none below 0"),
        ({"fid": {"mu": {"mu": MU}, "sigma": SIGMA}}, "mu is object; expected numbers"),
        ([MU], "has no named arrays"),
        (b"cut", "a damaged pickle"),
    ],
)
def test_pickles_that_are_no_statistics_are_one_line(tmp_path, content, message):
    file = tmp_path / "a.pkl"
    whole = pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}}, 4)
    file.write_bytes(whole[:-50] if content == b"cut" else pickle.dumps(content, 4))
    with pytest.raises(ValueError, match=message) as error:
        load_reference(file)
    assert str(error.value).startswith(f"reference '{file}'") and "\n" not in str(error.value)


def test_code_in_a_pickle_is_never_run(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": _Planted(tmp_path / "planted")}, 4))
    with pytest.raises(ValueError, match="holds pickled code .*which is never run"):
        load_reference(tmp_path / "a.pkl")
    assert not (tmp_path / "planted").exists()


def test_a_pickle_from_an_address_is_a_reference(tmp_path, cache):
    content = pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}}, 4)
    with serving({"/img64.pkl": Answer(content)}) as (base, _):
        np.testing.assert_array_equal(load_reference(f"{base}/img64.pkl")["sigma"], SIGMA)


# All that is missing, at once.

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
CIFAR10 = ["train", "cifar10", "train.batch_size=8", "device=cpu"]


@pytest.fixture
def published(cache, tmp_path, monkeypatch):
    """Says where the files of the published runs are to be had, by a base address."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    def at(base):
        monkeypatch.setitem(PUBLISHED_TEACHERS, "cifar10", f"{base}/cifar10_2040.pt")
        monkeypatch.setitem(PUBLISHED_REFERENCES, "cifar10", f"{base}/cifar10-32x32.npz")
        monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"{base}/{INCEPTION}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    return at


@pytest.fixture
def nothing_is_built(monkeypatch):
    def build(*arguments, **options):
        raise AssertionError("something is built already")

    monkeypatch.setattr(trainer, "build_context", build)


def test_without_a_network_one_line_says_all_that_is_to_be_put_where(
    published, nothing_is_built, cache, tmp_path, capsys
):
    published(NOWHERE)
    done = hsivi_here(capsys, *CIFAR10)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and not (tmp_path / "runs").exists() and _left(cache) == []
    assert line.startswith("hsivi: 3 files are missing or not right; no download was possible (")
    assert line.endswith(
        f"Connection refused), so put {NOWHERE}/cifar10_2040.pt and {NOWHERE}/cifar10-32x32.npz into {cache}, "
        f"and {NOWHERE}/{INCEPTION} into {tmp_path}/torch/hub/checkpoints by hand"
    )


def test_the_real_line_is_shown_whole(tmp_path, monkeypatch):
    """With the real addresses and long folders it is shorter than what the command line shows of a line."""

    def no_network(*arguments, **options):
        raise OSError(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path / ("c" * 60)))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / ("t" * 60)))
    with pytest.raises(ValueError, match="^3 files are missing") as error:
        fetch_needed(load_config("cifar10"), teacher=True, measured=True)
    assert len(str(error.value)) < LONGEST_MESSAGE
    for place in (PUBLISHED_TEACHERS["cifar10"], PUBLISHED_REFERENCES["cifar10"], INCEPTION, "name resolution"):
        assert place in str(error.value)


def test_what_is_there_is_not_named_and_what_is_made_by_hand_stands_behind(published, tmp_path, capsys):
    published(NOWHERE)
    (tmp_path / "weights.pth").touch()
    for arguments, expected in (
        (["eval.num_samples=0"], f"hsivi: checkpoint {NOWHERE}/cifar10_2040.pt: cannot be downloaded ("),
        (["eval.inception=weights.pth"], "hsivi: 2 files are missing or not right; no download was possible ("),
        (
            ["eval.inception=nowhere.pth", "eval.reference=celeba64"],
            "hsivi: 3 files are missing or not right; no download was possible (",
        ),
    ):
        (line,) = hsivi_here(capsys, *CIFAR10, *arguments).stderr.strip().splitlines()
        assert line.startswith(expected)
    assert "by hand; reference 'celeba64': has no address to be fetched from; make it" in line
    assert line.endswith("eval.inception: 'nowhere.pth' is not there")


def test_with_a_network_all_is_fetched_once(published, cache, tmp_path):
    statistics = _npz(tmp_path, mu=MU, sigma=SIGMA)
    weights = b"weights"
    inception = f"weights-{hashlib.sha256(weights).hexdigest()[:8]}.pth"
    answers = {
        "/cifar10_2040.pt": Answer(b"a teacher"),
        "/cifar10-32x32.npz": Answer(statistics),
        f"/{inception}": Answer(weights),
    }
    with serving(answers) as (base, asked):
        published(base)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", f"{base}/{inception}")
            for _ in range(2):
                fetch_needed(load_config("cifar10"), teacher=True, measured=True)
    assert asked == [*answers]
    assert (cache / "cifar10_2040.pt").read_bytes() == b"a teacher"
    assert (cache / "cifar10-32x32.npz").read_bytes() == statistics
    assert (tmp_path / "torch" / "hub" / "checkpoints" / inception).read_bytes() == weights


def test_nothing_is_fetched_where_there_is_nothing_to_compare_with(published):
    published(NOWHERE)
    for overrides in (["eval.reference=null"], ["eval.reference=null", "data=images"]):
        fetch_needed(load_config("cifar10", overrides), teacher=False, measured=True)
    fetch_needed(load_config("toy2d"), teacher=True, measured=True)
    fetch_needed(load_config("digits"), teacher=True, measured=True)


def test_a_run_is_measured_against_a_name_and_goes_on_with_it(tmp_path, cache, network, monkeypatch):
    """A row of a name is that of the same statistics as a file, and as a pickle."""
    monkeypatch.setattr(trainer, "write_report", lambda *arguments, **options: None)
    statistics = {"mu": np.linspace(0, 1, 64), "sigma": np.eye(64)}
    network[0]["/cifar10-32x32.npz"] = Answer(_npz(tmp_path, **statistics))
    settings = ["train.steps=2", "eval.num_samples=4", "eval.seeds=1", "eval.ddim_nfe=[3]", "device=cpu"]
    config = load_config("smoke", [*settings, "eval.reference=cifar10"])
    rows = [train(config, tmp_path / "run").read_json("results.json") for _ in range(2)]
    assert rows[0] == rows[1] and len(network[1]) == 1
    assert "reference: cifar10\n" in (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "statistics.pkl").write_bytes(pickle.dumps({"fid": statistics}, 4))
    for ref in (None, "cifar10", tmp_path / "made.npz", tmp_path / "statistics.pkl"):
        row = evaluate(tmp_path / "run", 4, ref=ref)
        assert row["frechet_distance"] == rows[0][-2]["frechet_distance"] and rows[0][-2]["sampler"] == "hsivi_ema"


def test_an_evaluation_says_all_that_is_missing_too(published, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer, "write_report", lambda *arguments, **options: None)
    run = train(load_config("smoke", ["train.steps=1", "eval.num_samples=0", "device=cpu"]), tmp_path / "run")
    published(NOWHERE)
    hsivi = functools.partial(hsivi_here, capsys)
    done = hsivi("eval", run.path, "--num-samples", 4, "--ref", "cifar10")
    assert done.returncode == 2 and f"reference {NOWHERE}/cifar10-32x32.npz: cannot be downloaded" in done.stderr
    done = hsivi("eval", run.path, "--num-samples", 4, "--ref", "cifar10", "--metric", "inception")
    assert done.returncode == 2 and "2 files are missing or not right; no download was possible (" in done.stderr
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    done = hsivi("eval", run.path, "--num-samples", 4, "--ref", tmp_path / "reference.npz", "--metric", "inception")
    assert done.returncode == 2 and "eval.inception: missing, and Inception's weights could not" in done.stderr

"""Distances on Inception, with random weights in the layout of torch-fidelity's file.

Our stream is compared with torch-fidelity's own route through folders of pictures.
"""

import hashlib
from unittest import mock

import numpy as np
import pytest
import torch
from local_server import LOGIN, Answer, serving

from hsivi_fast import load_config, train
from hsivi_fast.build import build_context
from hsivi_fast.data import load_data
from hsivi_fast.metrics.evaluation import ImageMetric, evaluate
from hsivi_fast.metrics.features import (
    describe_features,
    feature_extractor,
    fetch_inception,
    image_features,
    weights_file,
)
from hsivi_fast.metrics.image_files import ImageFiles
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.training import trainer

CPU = torch.device("cpu")
COUNT = 5  # images a side: Inception looks at them at 299x299
PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity calls the file


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with an untrained Inception whose activations keep their size from layer to layer."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    with (
        mock.patch.object(inception, "load_state_dict_from_url", return_value={}),
        mock.patch.object(inception.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of random pictures, "plain" and "graded", which is paler and has a gradient."""
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    shape = (COUNT, 3, 32, 32)
    plain = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    graded = torch.randint(0, 128, shape, generator=generator) + 4 * torch.arange(32)
    ImageFiles(folder / "plain", ALONE).add(range(COUNT), plain)
    ImageFiles(folder / "graded", ALONE).add(range(COUNT), graded.clamp(0, 255).to(torch.uint8))
    return folder


@pytest.fixture(scope="module")
def torch_fidelitys(weights, pictures):
    """What torch-fidelity says by its own directory route."""
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=str(pictures / "plain"),
        input2=str(pictures / "graded"),
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=COUNT,
        cuda=False,
        verbose=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        save_cpu_ram=True,
        cache=False,
    )


def test_our_stream_is_torch_fidelitys_directory_route(weights, pictures, torch_fidelitys, tmp_path, monkeypatch):
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path))
    overrides = [
        "data=images",
        f"data_path={pictures / 'graded'}",
        f"eval.inception={weights}",
        "eval.kid=true",
        "eval.prc=true",
        "device=cpu",
    ]
    metric = ImageMetric(build_context(load_config("digits", overrides), ALONE))
    metric.batch_size = 3  # a stream of several batches, the last one smaller
    values = metric.measure(torch.from_numpy(load_data("images", pictures / "plain").images), COUNT)
    assert torch_fidelitys["frechet_inception_distance"] > 0.1
    for name, their_name in (
        ("frechet_distance", "frechet_inception_distance"),
        ("kernel_inception_distance", "kernel_inception_distance_mean"),
    ):
        assert values[name] == pytest.approx(torch_fidelitys[their_name], rel=1e-4)
    for name in ("precision", "recall"):
        assert values[name] == torch_fidelitys[name]
    (file,) = tmp_path.iterdir()
    assert str(np.load(file)["features"]) == describe_features("inception", weights)
    assert "torch-fidelity inception-v3-compat, 2048 features" in describe_features("inception", weights)


def test_grey_images_are_seen_in_three_channels(weights):
    extractor = feature_extractor("inception", CPU, weights)
    grey = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = image_features(extractor, grey)
    assert features.shape == (2, 2048) and float(features.std()) > 1e-3
    assert torch.equal(features, extractor(grey.repeat(1, 3, 1, 1))[0])


def test_a_trained_run_is_measured_on_inception_where_it_is_asked_for(weights, tmp_path, monkeypatch):
    """Against statistics, in the place of the run's own network and data."""
    monkeypatch.setattr(trainer, "write_report", lambda *arguments, **options: None)  # nobody looks at the page
    run = train(load_config("smoke", ["train.steps=2", "eval.num_samples=0", "device=cpu"]), tmp_path / "run")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    row = evaluate(
        run,
        2,
        ref=tmp_path / "reference.npz",
        metric="inception",
        inception=weights,
        save_images=tmp_path / "pictures.npz",
    )
    images = torch.from_numpy(np.load(tmp_path / "pictures.npz")["arr_0"]).permute(0, 3, 1, 2)
    features = image_features(feature_extractor("inception", CPU, weights), images).double()
    # To statistics of nothing: the squared mean and the variances.
    assert row["frechet_distance"] == pytest.approx(
        float(features.mean(0).square().sum() + features.var(0).sum()), rel=1e-6
    )
    with pytest.raises(ValueError, match="ref: has 2048 features, the feature network digits gives 64"):
        evaluate(run, 2, ref=tmp_path / "reference.npz")


@pytest.fixture
def network(tmp_path, monkeypatch):
    """An empty cache of torch, and a server that has nothing but what a test lets it have: (answers, paths asked)."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    answers = {}
    with serving(answers) as (base, asked):
        monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"{base}/{PUBLISHED}")
        yield answers, asked


def test_missing_weights_are_one_line_that_names_both_ways(network, tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    assert weights_file("inception") == folder / PUBLISHED
    message = f"eval.inception: missing, .*Not Found.*say eval.inception=FILE, or put http://.*/{PUBLISHED} into "
    with pytest.raises(ValueError, match=message) as caught:
        feature_extractor("inception", CPU)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert network[1] == [f"/{PUBLISHED}"]


def test_weights_are_downloaded_once_and_by_the_sum_in_their_name(network, weights, tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    answers, asked = network
    whole = weights.read_bytes()
    cut = Answer(whole[:99], length=len(whole))
    named = f"weights-{hashlib.sha256(whole).hexdigest()[:8]}.pth"
    address = inception.URL_INCEPTION_V3.replace(PUBLISHED, named)
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", address)
    folder = tmp_path / "hub" / "checkpoints"
    for answer, message in (
        (Answer(whole[:-1]), "what was downloaded has the sha256 [0-9a-f]{64}, expected [0-9a-f]{8}; it was deleted"),
        (cut, rf"could not be downloaded \(the answer ended after 99 of {len(whole)} bytes"),
        (LOGIN, r"could not be downloaded \(the answer is a web page and not a file\)"),
    ):
        answers[f"/{named}"] = answer
        with pytest.raises(ValueError, match=f"^eval.inception.*{message}") as caught:
            fetch_inception()
        assert "\n" not in str(caught.value) and [file.suffix for file in folder.iterdir()] == [".lock"]
    answers[f"/{named}"] = Answer(whole)
    assert fetch_inception().read_bytes() == fetch_inception().read_bytes() == whole
    assert asked == [f"/{named}"] * 4


def test_files_of_something_else_are_named_and_nothing_is_downloaded(network, tmp_path):
    (tmp_path / "text.pth").write_text("weights")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    for name, message in (
        ("absent.pth", "is not there"),
        ("text.pth", "does not hold torch-fidelity's Inception"),
        ("other.pth", "does not hold torch-fidelity's Inception"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            feature_extractor("inception", CPU, tmp_path / name)
        assert "\n" not in str(caught.value)
    found = weights_file("inception")  # in torch's cache: nobody asked for this file, and it is named all the same
    found.parent.mkdir(parents=True)
    found.write_text("half a file")
    with pytest.raises(ValueError, match="does not hold"):
        feature_extractor("inception", CPU)
    assert network[1] == []


class Planted:
    """Code that leaves a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_file_of_inceptions_weights_is_never_run(tmp_path, archive):
    file, trace = tmp_path / "weights.pth", tmp_path / "planted"
    torch.save({"a": torch.zeros(1), "b": Planted(trace)}, file, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match="eval.inception: .*does not hold torch-fidelity's Inception") as caught:
        feature_extractor("inception", CPU, file)
    assert not trace.exists() and "\n" not in str(caught.value)


def test_an_unknown_feature_network_is_named():
    with pytest.raises(ValueError, match="eval.metric: 'vgg' is unknown; choose digits, mnist, inception"):
        feature_extractor("vgg", CPU)

"""Statistics and distances against numpy and torch-fidelity's own route, memory, saved images, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contexts import context_of, context_with_teacher
from ranks import run_ranks

from hsivi_fast import load_config
from hsivi_fast.config import known_keys
from hsivi_fast.data import load_data, to_uint8
from hsivi_fast.execution import EAGER
from hsivi_fast.metrics import evaluation
from hsivi_fast.metrics.distances import (
    FEATURES_KEPT,
    KeptFeatures,
    StreamingMoments,
    frechet_distance,
    kernel_distance,
    load_statistics,
    precision_recall,
)
from hsivi_fast.metrics.evaluation import ImageMetric, build_metric, evaluate, measure_row
from hsivi_fast.metrics.features import DigitsClassifier, describe_features, feature_extractor
from hsivi_fast.metrics.image_files import ImageFiles
from hsivi_fast.metrics.table import format_table, row_title
from hsivi_fast.parallel.world import ALONE, World
from hsivi_fast.sampling.sampler import ddim_sampler


def _digits_metric():
    return ImageMetric(context_of(load_config("digits")))


def _distance(metric, images):
    return metric.measure(images, len(images))["frechet_distance"]


def _save(images, path, seeds=None):
    files = ImageFiles(path, ALONE)
    files.add(range(len(images)) if seeds is None else seeds, images)
    files.finish(len(images))


def test_streaming_statistics_are_numpys():
    features = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) * 3 + 100
    moments = StreamingMoments()
    for part in features.split(77):
        moments.add(part)
    statistics = moments.statistics()
    np.testing.assert_allclose(statistics["mu"], features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        statistics["sigma"], np.cov(features.double().numpy(), rowvar=False), rtol=1e-8, atol=1e-9
    )
    with pytest.raises(ValueError, match="num-samples: 0"):
        StreamingMoments().statistics()


def test_frechet_distance_of_two_known_gaussians():
    first = {"mu": np.zeros(2), "sigma": np.diag([1.0, 4.0])}
    second = {"mu": np.array([3.0, 4.0]), "sigma": np.diag([9.0, 1.0])}
    assert frechet_distance(first, second) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 1) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="2 features on one side and 3"):
        frechet_distance(first, {"mu": np.zeros(3), "sigma": np.eye(3)})


def test_metric_equals_torch_fidelitys_own_route():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    metric = _digits_metric()
    data = load_data("digits")
    generator = torch.Generator().manual_seed(0)
    images = torch.from_numpy(data.images[:600]) + 0.3 * torch.randn(600, 1, 8, 8, generator=generator)
    extractor = feature_extractor("digits", torch.device("cpu"))
    statistics = []
    for value in (images, torch.from_numpy(data.images)):
        with torch.no_grad():
            statistics.append(fid_features_to_statistics(extractor(to_uint8(value, 17))[0]))
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert _distance(metric, images) == pytest.approx(expected, rel=1e-4)
    assert _distance(metric, torch.from_numpy(data.images)) == pytest.approx(0, abs=1e-6)


def test_distance_grows_with_noise_and_rounding_hides_what_the_data_cannot_show():
    metric = _digits_metric()
    images = torch.from_numpy(load_data("digits").images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [_distance(metric, images + scale * noise) for scale in (0.2, 0.5, 1.0)]
    assert 0 < distances[0] < distances[1] < distances[2]
    # Less than half a grey level of 1/8.
    assert _distance(metric, images + 0.06) == pytest.approx(0, abs=1e-6)


def test_reference_files(tmp_path):
    np.savez(tmp_path / "good.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "small.npz", mu=np.zeros(32), sigma=np.eye(32))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(64), sigma=np.eye(32))
    np.savez(tmp_path / "other.npz", mean=np.zeros(64))
    (tmp_path / "text.npz").write_text("mu")
    good, small = (
        context_of(load_config("digits", [f"eval.reference={tmp_path / name}.npz"])) for name in ("good", "small")
    )
    assert ImageMetric(good).reference["mu"].shape == (64,)
    with pytest.raises(ValueError, match="ref: has 32 features, the feature network digits gives 64"):
        ImageMetric(small)
    for name, message in (
        ("odd", "do not fit"),
        ("other", "expected an npz file with mu and sigma"),
        ("text", "expected an npz file"),
        ("missing", "no such file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_statistics(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)


def test_a_row_measures_each_set_of_seeds():
    class Constant:
        execution = EAGER
        nfe, seen = 3, []

        def __call__(self, seeds, batch_size, on_batch=None):
            self.seen.append(seeds)
            return torch.full((len(seeds), 2), float(len(self.seen)))

    class Mean:
        columns, batch_size = ("frechet_distance",), 10

        def measure(self, batches, count):
            assert count == 4
            return {"frechet_distance": float(torch.cat(list(batches)).mean())}

    sampler = Constant()
    row = measure_row("ddim", sampler, Mean(), 4, 3, ALONE)
    assert sampler.seen == [range(0, 4), range(4, 8), range(8, 12)]
    assert row["frechet_distance"] == 2.0 and row["frechet_std"] == 1.0 and row["nfe"] == 3 and row["num_samples"] == 4
    assert "2.00 +- 1.00" in format_table([row]) and "DDIM" in format_table([row])
    dropped = measure_row("ddim", sampler, Mean(), 4, 1, ALONE, nfe=4)  # asked for 4, three distinct timesteps
    assert dropped["nfe"] == 4 and dropped["evaluations"] == 3 and "evaluations" not in row
    assert "4 (3 distinct)" in format_table([dropped]) and dropped["frechet_std"] is None
    sampler.seen.clear()
    sampler.execution = SimpleNamespace(seconds=0.0, warm_up_calls=2)  # of each row
    measure_row("ddim", sampler, Mean(), 4, 2, ALONE)
    assert sampler.seen == [range(0, 4)] * 3 + [range(4, 8)]
    sampler.seen.clear()
    sampler.execution = EAGER
    measure_row("best", sampler, Mean(), 4, 2, ALONE, first_set=1)
    assert sampler.seen == [range(4, 8), range(8, 12)]


def test_a_row_names_the_solver_and_the_spacing_that_were_chosen():
    row = {"sampler": "best", "nfe": 5, "frechet_distance": 1.0, "images_per_second": 2.0, "num_samples": 4}
    for extras, title in (
        ({"solver": "unipc_3", "spacing": "logsnr"}, "best solver: UniPC-3, log-SNR"),
        ({"solver": "dpmpp_2m", "spacing": "linspace"}, "best solver: DPM-Solver++(2M), even spacing"),
        ({"solver": "of a newer version", "spacing": "x"}, "best solver: of a newer version, x"),
        ({}, "best solver"),
        ({"sampler": "unipc"}, "UniPC"),
        ({"sampler": "unipc_3", "spacing": "run"}, "UniPC-3, run's spacing"),
    ):
        assert row_title({**row, **extras}) == title
        assert f"\n{title}  " in format_table([{**row, **extras}, {**row, "sampler": "y" * 60}])


def test_a_search_measures_the_distance_alone():
    metric = ImageMetric(context_of(load_config("digits", ["eval.kid=true", "eval.prc=true"])))
    images = torch.from_numpy(load_data("digits").images[:60])
    alone = metric.distance_alone()
    measured = alone.measure(images, 60)
    assert [*measured] == [*alone.columns] == ["frechet_distance"] and len(metric.columns) == 5
    assert measured["frechet_distance"] == metric.measure(images, 60)["frechet_distance"]


def test_the_floor_of_the_digits_distance_is_what_the_readme_says():
    """500 real digits against all of them: what a perfect sampler of 500 images would score, about."""
    metric = _digits_metric()
    images = torch.from_numpy(load_data("digits").images)
    distances = []
    for seed in range(5):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:500]
        distances.append(_distance(metric, images[chosen]))
    assert np.mean(distances) == pytest.approx(0.61, abs=0.03), distances


class Noise:
    """A sampler that draws uniform images [1, 8, 8] and writes down how many at once."""

    execution, nfe = EAGER, 1

    def __init__(self):
        self.chunks = []

    def __call__(self, seeds, batch_size, on_batch):
        self.chunks.append(len(seeds))
        return torch.stack(
            [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in seeds]
        )


class Watched(torch.nn.Module):
    """A feature network around another one, which writes down how many images it sees at once and their type."""

    def __init__(self, extractor):
        super().__init__()
        self.extractor, self.seen = extractor, []

    def forward(self, images):
        self.seen.append((len(images), images.dtype))
        return self.extractor(images)

    def get_name(self):
        return self.extractor.get_name()


def test_two_thousand_images_are_never_held_at_once_and_give_the_distance_of_all_in_one_tensor():
    metric, sampler = _digits_metric(), Noise()
    metric.extractor = Watched(metric.extractor)
    row = measure_row("hsivi_ema", sampler, metric, 2000, 1, ALONE)
    assert sampler.chunks == [250] * 8 and metric.extractor.seen == [(250, torch.uint8)] * 8
    assert row["frechet_distance"] == _distance(metric, Noise()(range(2000), 250, None))


def test_measuring_takes_little_more_memory_than_the_features_statistics():
    """What is alive while a batch is drawn: the images of no earlier batch."""
    import weakref

    metric, alive, most = _digits_metric(), [], 0

    class Counting(Noise):
        def __call__(self, seeds, batch_size, on_batch):
            nonlocal most
            most = max(most, sum(reference() is not None for reference in alive))
            images = super().__call__(seeds, batch_size, on_batch)
            alive.append(weakref.ref(images))
            return images

    measure_row("hsivi_ema", Counting(), metric, 2000, 1, ALONE)
    assert len(alive) == 8 and most <= 1  # the batch before, whose turn has just ended


def test_the_ddim_row_is_that_of_all_samples_in_one_call():
    context = context_with_teacher(load_config("digits"))
    sampler, metric = ddim_sampler(context, 5, 0.0), build_metric(context)
    row = measure_row("ddim", sampler, metric, 300, 2, ALONE)
    values = [_distance(metric, sampler(range(first, first + 300))) for first in (0, 300)]
    assert row["frechet_distance"] == np.mean(values) and row["frechet_std"] == np.std(values, ddof=1)


def test_kernel_distance_and_precision_are_columns_where_they_are_asked_for():
    config = load_config("digits", ["eval.kid=true", "eval.prc=true"])
    metric = ImageMetric(context_of(config))
    assert metric.columns == ("frechet_distance", "kernel_inception_distance", "precision", "recall", "f_score")
    data = torch.from_numpy(load_data("digits").images)
    good = metric.measure(data[:200], 200)
    bad = metric.measure(Noise()(range(200), 250, None), 200)
    assert abs(good["kernel_inception_distance"]) < 0.1 * bad["kernel_inception_distance"]
    assert (
        good["precision"] == 1.0 and bad["precision"] < 0.1
    )  # each real digit is its own neighbour among the real ones
    row = measure_row("hsivi_ema", Noise(), metric, 50, 2, ALONE)
    assert (
        row["kernel_inception_distance"] > 0
        and row["kernel_inception_std"] > 0
        and row["kernel_inception_subset_std"] >= 0
        and row["recall_std"] is not None
    )
    heading = format_table([row]).splitlines()[0]
    assert [
        title in heading for title in ("Frechet distance", "kernel distance", "precision", "recall", "F-score")
    ] == [True] * 5
    with pytest.raises(ValueError, match="num-samples: 3 images are too few for precision"):
        precision_recall(torch.zeros(3, 4), torch.zeros(9, 4))


def test_kernel_distance_by_hand():
    """One subset of everything: the unbiased estimate with the kernel (x.y / D + 1)^3."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=generator).double(), 1 + torch.randn(20, 4, generator=generator).double()

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    def others(k):
        return float((k.sum() - k.trace()) / (20 * 19))

    expected = others(kernel(x, x)) + others(kernel(y, y)) - 2 * float(kernel(x, y).mean())
    values = kernel_distance(x, y)
    assert values["kernel_inception_distance"] == pytest.approx(expected, rel=1e-9) and values[
        "kernel_inception_subset_std"
    ] == pytest.approx(0, abs=1e-9)


def test_kept_features_leave_out_what_fills_up_the_ranks_shares(monkeypatch):
    """Five samples on four ranks: shares of two. The third rank's second and both of the fourth's are repetitions."""
    world = World(rank=0, size=4)
    shares = [[0, 1], [2, 3], [4, 4], [4, 4]]
    monkeypatch.setattr(World, "gather", lambda self, own: torch.tensor(shares)[:, :, None].float())
    kept = KeptFeatures(world, 5)
    kept.add(torch.tensor([[0.0], [1.0]]))
    assert kept.gathered().flatten().tolist() == [0, 1, 2, 3, 4]
    alone = KeptFeatures(ALONE, 12_000)
    for _ in range(3):
        alone.add(torch.zeros(4000, 1))
    assert len(alone.gathered()) == FEATURES_KEPT == 10_000


def _images_config(tmp_path, images, *overrides):
    """The digits run with pictures of its own, measured by the digits network."""
    _save(images, tmp_path / "images.npz")
    return load_config(
        "digits", ["data=images", f"data_path={tmp_path / 'images.npz'}", "eval.metric=digits", *overrides]
    )


def test_reference_statistics_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path / "cache"))
    images = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    config = _images_config(tmp_path, images)
    first = ImageMetric(context_of(config))
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("statistics_digits_") and str(np.load(file)["features"]) == describe_features("digits")
    assert "hsivi_fast digits, 64 features, weights sha256 " in describe_features("digits")
    calls = []
    monkeypatch.setattr(evaluation, "image_features", lambda *arguments: calls.append(arguments))
    second = ImageMetric(context_of(config))
    assert (
        not calls
        and np.array_equal(first.reference["sigma"], second.reference["sigma"])
        and np.array_equal(first.reference["mu"], second.reference["mu"])
    )
    monkeypatch.undo()
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path / "cache"))
    images[0, 0, 0, 0] ^= 1
    ImageMetric(context_of(_images_config(tmp_path, images)))
    assert len(list((tmp_path / "cache").iterdir())) == 2  # other images, another file


def test_a_run_without_data_is_measured_against_statistics(tmp_path):
    np.savez(tmp_path / "good.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), features="another network")
    config = load_config("digits", ["data=null", "eval.metric=digits", f"eval.reference={tmp_path / 'good.npz'}"])
    metric = build_metric(context_with_teacher(config))
    assert metric.levels == 256 and metric.reference["sigma"].shape == (64, 64)
    assert _distance(metric, Noise()(range(100), 250, None)) > 0
    for overrides, message in (
        (
            [f"eval.reference={tmp_path / 'other.npz'}"],
            "ref: made by 'another network', this run measures by 'hsivi_fast digits",
        ),
        (["eval.kid=true"], "data_path: missing; eval.kid and eval.prc compare with images"),
        (["eval.reference=null"], "data: missing; without reference images"),
        (["data=images", "eval.reference=null"], "data_path: missing; without reference images or statistics"),
        (["eval.metric=mnist"], "eval.metric: 'mnist' sees images .1, 32, 32., the run makes .1, 8, 8."),
    ):
        changed = load_config(
            "digits", ["data=null", "eval.metric=digits", f"eval.reference={tmp_path / 'good.npz'}", *overrides]
        )
        with pytest.raises(ValueError, match=message) as caught:
            build_metric(context_with_teacher(changed))
        assert "\n" not in str(caught.value)


def test_the_classifier_of_larger_digits():
    network = DigitsClassifier(32)
    assert network.features(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape == (2, 64) and network(
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    ).shape == (2, 10)
    assert sum(value.numel() * 4 for value in network.state_dict().values()) < 1_000_000
    assert list(DigitsClassifier().state_dict())[::2] == [
        "conv1.weight",
        "conv2.weight",
        "conv3.weight",
        "hidden.weight",
        "classes.weight",
    ]
    with pytest.raises(ValueError, match="image_size: 28"):
        DigitsClassifier(28)


def test_images_are_saved_as_they_are_and_as_others_read_them(tmp_path):
    from PIL import Image

    images = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    _save(images, tmp_path / "colour", range(3, 8))
    assert sorted(file.name for file in (tmp_path / "colour").iterdir()) == [f"00000{seed}.png" for seed in range(3, 8)]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "colour" / "000004.png")), images[1].permute(1, 2, 0))
    _save(images[:, :1], tmp_path / "grey")
    picture = Image.open(tmp_path / "grey" / "000004.png")
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.array(picture), images[4, 0])
    _save(images, tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], images.permute(0, 2, 3, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "colour", "grey"]
    (tmp_path / "folder.npz").mkdir()
    for path, message in (("grey", "holds pictures already"), ("folder.npz", "is a folder")):
        with pytest.raises(ValueError, match=message):
            _save(images, tmp_path / path)
    with pytest.raises(ValueError, match="images of 2 channels"):
        _save(images[:, :2], tmp_path / "two")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run of two steps."""
    from hsivi_fast import train

    return train(
        load_config("smoke", ["train.steps=2", "eval.num_samples=0", "eval.kid=true", "eval.prc=true", "device=cpu"]),
        tmp_path_factory.mktemp("run") / "run",
    )


def test_evaluation_saves_what_it_measured(tmp_path, run):
    row = evaluate(run, 20, save_images=tmp_path / "pictures")
    again = evaluate(run, 20, save_images=tmp_path / "pictures.npz")
    assert row["frechet_distance"] == again["frechet_distance"] == evaluate(run, 20)["frechet_distance"]
    folder, file = (
        load_data("images", tmp_path / "pictures").images,
        load_data("images", tmp_path / "pictures.npz").images,
    )
    np.testing.assert_array_equal(folder, file)
    assert _distance(_digits_metric(), torch.from_numpy(file)) == pytest.approx(row["frechet_distance"], rel=1e-9)
    with pytest.raises(ValueError, match="metric: 'best' is unknown; choose digits, mnist, inception"):
        evaluate(run, 20, metric="best")
    with pytest.raises(ValueError, match="eval.inception: '/nowhere/weights.pth' is not there"):
        evaluate(run, 20, metric="inception", inception="/nowhere/weights.pth")


def evaluation_on_ranks(run, folder):
    return [evaluate(run, 21, save_images=folder / name) for name in ("pictures", "pictures.npz")][1]


def test_two_ranks_save_and_measure_what_one_does(tmp_path, run):
    """Of 21 images: the second rank's eleventh is a repetition, which is neither written twice nor counted."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected = evaluation_on_ranks(run.path, tmp_path / "one")
    for row in run_ranks(evaluation_on_ranks, 2, run.path, tmp_path / "two"):
        assert {
            column: row[column] for column in ("frechet_distance", "kernel_inception_distance", "precision", "recall")
        } == pytest.approx(
            {
                column: expected[column]
                for column in ("frechet_distance", "kernel_inception_distance", "precision", "recall")
            },
            rel=1e-5,
        )
    names = [[file.name for file in sorted((tmp_path / folder / "pictures").iterdir())] for folder in ("one", "two")]
    assert names[0] == names[1] == [f"{seed:06d}.png" for seed in range(21)]
    one, two = (load_data("images", tmp_path / folder / "pictures").images for folder in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(load_data("images", tmp_path / "two" / "pictures.npz").images, one)


def test_new_keys_have_defaults_that_keep_old_tables():
    config = load_config("smoke")
    assert {"eval.kid", "eval.prc", "eval.baselines", "eval.solver_spacing"} <= set(known_keys())
    assert config.eval.baselines == ("ddim",) and config.eval.solver_spacing == "linspace"
    assert not config.eval.kid and not config.eval.prc

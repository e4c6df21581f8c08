"""Statistics and distances against plain numpy and torch-fidelity's own route, and what they refuse."""

import numpy as np
import pytest
import torch

from hsivi_fast import load_config
from hsivi_fast.data import load_data, to_uint8
from hsivi_fast.evaluation import ImageMetric, StreamingMoments, feature_extractor, format_table, frechet_distance, load_statistics, measure_row
from hsivi_fast.frozen import EAGER


def test_streaming_statistics_are_numpys():
    features = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) * 3 + 100
    moments = StreamingMoments()
    for part in features.split(77):
        moments.add(part)
    statistics = moments.statistics()
    np.testing.assert_allclose(statistics["mu"], features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics["sigma"], np.cov(features.double().numpy(), rowvar=False), rtol=1e-8, atol=1e-9)
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

    metric = ImageMetric(load_config("digits"), torch.device("cpu"))
    data = load_data("digits")
    generator = torch.Generator().manual_seed(0)
    images = torch.from_numpy(data.images[:600]) + 0.3 * torch.randn(600, 1, 8, 8, generator=generator)
    extractor = feature_extractor("digits", torch.device("cpu"))
    statistics = []
    for value in (images, torch.from_numpy(data.images)):
        with torch.no_grad():
            statistics.append(fid_features_to_statistics(extractor(to_uint8(value, 17))[0]))
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert metric.measure(images)["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert metric.measure(torch.from_numpy(data.images))["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_distance_grows_with_noise_and_rounding_hides_what_the_data_cannot_show():
    metric = ImageMetric(load_config("digits"), torch.device("cpu"))
    images = torch.from_numpy(load_data("digits").images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [metric.measure(images + scale * noise)["frechet_distance"] for scale in (0.2, 0.5, 1.0)]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert metric.measure(images + 0.06)["frechet_distance"] == pytest.approx(0, abs=1e-6)  # less than half a grey level of 1/8


def test_reference_files(tmp_path):
    config = load_config("digits")
    np.savez(tmp_path / "good.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "small.npz", mu=np.zeros(32), sigma=np.eye(32))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(64), sigma=np.eye(32))
    np.savez(tmp_path / "other.npz", mean=np.zeros(64))
    (tmp_path / "text.npz").write_text("mu")
    assert ImageMetric(config, torch.device("cpu"), load_statistics(tmp_path / "good.npz")).reference["mu"].shape == (64,)
    with pytest.raises(ValueError, match="ref: has 32 features, the feature network digits gives 64"):
        ImageMetric(config, torch.device("cpu"), load_statistics(tmp_path / "small.npz"))
    for name, message in (("odd", "do not fit"), ("other", "expected an npz file with mu and sigma"), ("text", "expected an npz file"), ("missing", "no such file")):
        with pytest.raises(ValueError, match=message) as caught:
            load_statistics(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)


def test_a_row_measures_each_set_of_seeds():
    class Constant:
        execution = EAGER
        nfe, seen = 3, []

        def __call__(self, seeds, batch_size, on_batch):
            self.seen.append(seeds)
            return torch.full((len(seeds), 2), float(len(self.seen)))

    class Mean:
        columns, batch_size = ("frechet_distance",), 10

        def measure(self, samples, world, count):
            assert count == 4
            return {"frechet_distance": float(samples.mean())}

    sampler = Constant()
    row = measure_row("ddim", sampler, Mean(), 4, 3)
    assert sampler.seen == [range(0, 4), range(4, 8), range(8, 12)]
    assert row["frechet_distance"] == 2.0 and row["frechet_std"] == 1.0 and row["nfe"] == 3 and row["num_samples"] == 4
    assert "2.00 +- 1.00" in format_table([row]) and "DDIM" in format_table([row])
    dropped = measure_row("ddim", sampler, Mean(), 4, 1, nfe=4)  # asked for 4, three distinct timesteps
    assert dropped["nfe"] == 4 and dropped["evaluations"] == 3 and "evaluations" not in row
    assert "4 (3 distinct)" in format_table([dropped]) and dropped["frechet_std"] is None


def test_the_floor_of_the_digits_distance_is_what_the_readme_says():
    """500 real digits against all of them: what a perfect sampler of 500 images would score, about."""
    metric = ImageMetric(load_config("digits"), torch.device("cpu"))
    images = torch.from_numpy(load_data("digits").images)
    distances = []
    for seed in range(5):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:500]
        distances.append(metric.measure(images[chosen])["frechet_distance"])
    assert np.mean(distances) == pytest.approx(0.61, abs=0.03), distances

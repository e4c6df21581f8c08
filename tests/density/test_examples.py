"""The shipped targets: densities that integrate to one, scores against finite differences, exact draws and moments."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from hsivi_fast.density.examples import EXAMPLES
from hsivi_fast.density.target import check_target, load_target
from hsivi_fast.metrics.distances import sliced_wasserstein

EXACT = [name for name in EXAMPLES if name not in ("logistic", "bayesian_network")]


@pytest.fixture(scope="module", params=EXAMPLES)
def target(request):
    return load_target(request.param)


def _points(target, n=16, dtype=torch.float64):
    return torch.randn(n, target.dim, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_every_shipped_target_passes_the_checks(target):
    check_target(target)
    assert len(target.parameters) == target.dim == len(set(target.parameters))


def test_scores_are_the_slopes_of_the_log_density(target):
    x, step = _points(target), 1e-5
    directions = torch.nn.functional.normalize(_points(target).flip(0), dim=1)
    slopes = (target.log_density(x + step * directions) - target.log_density(x - step * directions)) / (2 * step)
    assert torch.allclose((target.score(x) * directions).sum(1), slopes, rtol=1e-6, atol=1e-5)


def test_float32_is_enough(target):
    x = _points(target, dtype=torch.float32)
    exact = target.log_density(x.double())
    assert target.log_density(x).dtype == torch.float32
    assert torch.allclose(target.log_density(x).double(), exact, rtol=2e-5, atol=1e-4)
    scores = target.score(x.double())
    assert (target.score(x) - scores).abs().max() < 1e-5 * (1 + scores.abs().max())


@pytest.mark.parametrize("name", ["banana", "x_shape", "multimodal"])
def test_densities_of_the_plane_integrate_to_one_and_have_these_moments(name):
    example = EXAMPLES[name]()
    first = torch.linspace(-9, 9, 361, dtype=torch.float64)
    second = torch.linspace(-50, 12, 1241, dtype=torch.float64)
    grid = torch.cartesian_prod(first, second)
    masses = example.log_density(grid).exp() * (first[1] - first[0]) * (second[1] - second[0])
    assert float(masses.sum()) == pytest.approx(1, abs=1e-6)
    mean = masses @ grid
    assert np.allclose(mean, example.mean, atol=1e-5)
    assert np.allclose((grid - mean).T @ (masses[:, None] * (grid - mean)), example.covariance, atol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_have_the_exact_moments_and_their_own_seed(name):
    example = EXAMPLES[name]()
    draws = example.samples(40_000, seed=3).double()
    assert torch.equal(draws.float(), example.samples(40_000, seed=3))
    deviations = np.sqrt(np.diagonal(example.covariance))
    scaled = (draws.numpy() - example.mean) / deviations
    assert np.abs(scaled.mean(0)).max() < 0.02  # 4 standard errors
    allowed = 0.6 if name == "funnel" else 0.05  # the funnel's squares have a heavy tail
    assert np.abs(scaled.std(0) - 1).max() < allowed
    assert example.samples(3).dtype == torch.float32


@pytest.mark.parametrize("name", EXACT)
def test_the_score_of_exact_draws_has_mean_0_and_the_trace_identity(name):
    """E score = 0 and E (x - m).score = -dim: draws and density belong together."""
    target = load_target(name)
    x = target.example.samples(20_000, seed=5).double()
    score = target.score(x)
    errors = score.std(0) / math.sqrt(len(x))
    assert bool((score.mean(0).abs() < 5 * errors).all())
    products = (x * score).sum(1)
    assert abs(float(products.mean()) + target.dim) < 5 * float(products.std()) / math.sqrt(len(x))


def test_log_densities_against_torch_distributions():
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    funnel = Normal(0, 3).log_prob(x[:, 0]) + Normal(0, (x[:, :1] / 2).exp()).log_prob(x[:, 1:]).sum(1)
    assert torch.allclose(EXAMPLES["funnel"]().log_density(x), funnel)
    mixture = EXAMPLES["mixture_10"]()
    gaussians = MultivariateNormal(torch.from_numpy(mixture.means), torch.eye(10, dtype=torch.float64))
    exact = MixtureSameFamily(Categorical(torch.from_numpy(mixture.weights)), gaussians)
    assert torch.allclose(mixture.log_density(x), exact.log_prob(x))
    banana = MultivariateNormal(torch.zeros(2), torch.tensor([[1, 0.9], [0.9, 1]])).log_prob
    bent = x[:, :2].float()
    straight = torch.stack([bent[:, 0], bent[:, 1] + bent[:, 0] ** 2 + 1], 1)
    assert torch.allclose(EXAMPLES["banana"]().log_density(bent), banana(straight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [10, 50])
def test_the_modes_of_the_mixtures_are_apart(dim):
    means = torch.from_numpy(EXAMPLES[f"mixture_{dim}"]().means)
    assert 5 < float(torch.pdist(means).min()) and float(torch.pdist(means).max()) < 7


def test_logistic_regression_is_that_of_the_data():
    from sklearn.datasets import load_breast_cancer  # here: it takes a second
    from sklearn.preprocessing import StandardScaler

    data = load_breast_cancer()
    design = torch.from_numpy(np.insert(StandardScaler().fit_transform(data.data), 0, 1.0, axis=1))
    target = load_target("logistic")
    x = _points(target, 5)
    outcomes = torch.from_numpy(data.target).double()
    for row, value in zip(x, target.log_density(x)):
        likelihood = torch.distributions.Bernoulli(logits=design @ row).log_prob(outcomes).sum()
        assert float(value) == pytest.approx(float(likelihood + Normal(0.0, 1.0).log_prob(row).sum()), rel=1e-9)


def test_the_network_is_one_hidden_layer_and_its_units_may_be_permuted():
    target = load_target("bayesian_network")
    example, x = target.example, _points(target, 4)
    rows = example._arrays["trained"].T  # [353, 10], already divided by the root of 10
    likelihood = torch.empty(4, dtype=torch.float64)
    for number, row in enumerate(x):
        weights, biases = row[:80].reshape(8, 10), row[80:88]
        hidden = torch.tanh(torch.from_numpy(rows) @ weights.T + biases)
        outputs = hidden @ row[88:96] / math.sqrt(8) + row[96]
        noise = Normal(outputs, row[97].exp())
        likelihood[number] = noise.log_prob(torch.from_numpy(example._arrays["outcomes"])).sum()
    assert torch.allclose(target.log_density(x), likelihood + Normal(0.0, 1.0).log_prob(x).sum(1))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    permuted = torch.cat([x[:, :80].reshape(4, 8, 10)[:, order].reshape(4, 80), x[:, 80:88][:, order]], 1)
    permuted = torch.cat([permuted, x[:, 88:96][:, order], x[:, 96:]], 1)
    assert torch.allclose(target.log_density(permuted), target.log_density(x))
    assert target.summary(x).shape == (4, 90) and len(target.summary_names) == 90
    assert torch.allclose(target.summary(permuted), target.summary(x))


def test_the_funnel_is_compared_where_exact_draws_agree_with_each_other():
    target = load_target("funnel")
    first, second = (target.example.samples(10_000, seed).double() for seed in (0, 1))
    assert sliced_wasserstein(first, second) > 2
    assert sliced_wasserstein(target.summary(first), target.summary(second)) < 0.1
    assert target.summary_names[:2] == ["v", "asinh_x1"]

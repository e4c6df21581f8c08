"""Distances of draws of a posterior: against closed forms, and against direct loops."""

import math

import numpy as np
import pytest
import torch

from hsivi_fast.density.examples import EXAMPLES
from hsivi_fast.density.target import load_target
from hsivi_fast.metrics import posterior
from hsivi_fast.metrics.distances import _directions, sliced_wasserstein
from hsivi_fast.metrics.posterior import (
    compare_draws,
    energy_distance,
    kernel_stein_discrepancy,
    median_distance,
    mode_weights,
    moment_errors,
)


def _normal(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moment_errors_of_draws_that_are_moved_and_stretched():
    reference = _normal(500, 3, 0)
    deviations = reference.std(0)
    draws = (reference - reference.mean(0)) * torch.tensor([1.0, 1.1, 0.7]) + reference.mean(0)
    draws = draws + deviations * torch.tensor([0.3, 0.0, -0.6])
    errors = moment_errors(draws, reference)
    assert errors["mean_error"] == pytest.approx(0.3) and errors["mean_error_max"] == pytest.approx(0.6)
    assert errors["std_error"] == pytest.approx(0.4 / 3) and errors["std_error_max"] == pytest.approx(0.3)
    assert errors["correlation_error_max"] < 1e-12
    assert set(errors) < set(compare_draws(draws, reference))


def test_moment_errors_against_numpy_and_exact_moments():
    draws, reference = _normal(300, 4, 1).numpy(), _normal(400, 4, 2).numpy() @ np.triu(np.ones((4, 4)))
    errors = moment_errors(draws, reference)
    upper = np.triu_indices(4, 1)
    differences = np.abs(np.corrcoef(draws.T) - np.corrcoef(reference.T))[upper]
    assert errors["correlation_error"] == pytest.approx(differences.mean())
    assert errors["correlation_error_max"] == pytest.approx(differences.max())
    assert moment_errors(draws, (reference.mean(0), np.cov(reference.T))) == pytest.approx(errors)
    assert moment_errors(draws.astype(np.float32), reference) == pytest.approx(errors, rel=1e-4)


def test_one_coordinate_has_no_correlation_and_draws_that_stand_still_have_0():
    reference = _normal(100, 1, 3)
    assert set(moment_errors(reference, reference)) == {"mean_error", "mean_error_max", "std_error", "std_error_max"}
    pair = _normal(100, 2, 3)
    errors = moment_errors(torch.zeros(10, 2), (torch.zeros(2), [[1.0, 0.5], [0.5, 1.0]]))
    assert errors["correlation_error"] == pytest.approx(0.5) and errors["std_error"] == 1
    with pytest.raises(ValueError, match="^reference: coordinate 2 does not move"):
        moment_errors(pair, pair * torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("dim", [1, 2, 3, 20])
def test_sliced_wasserstein_of_two_gaussians(dim):
    """Along a unit vector it is (m.u)^2 + (s(u) - 1)^2, with s(u)^2 = sum of s_i^2 u_i^2."""
    mean, deviations = torch.linspace(0.5, 1.5, dim).double(), torch.linspace(1.0, 2.0, dim).double()
    directions = _directions(dim)
    assert torch.allclose(directions.norm(dim=0), torch.ones(directions.shape[1], dtype=torch.float64))
    along = (mean @ directions) ** 2 + ((deviations**2 @ directions**2).sqrt() - 1) ** 2
    exact = float(along.mean().sqrt())
    normal = _normal(5000, dim, 4)
    draws = mean + deviations * normal
    assert sliced_wasserstein(draws, normal) == pytest.approx(exact, rel=0.03)
    assert sliced_wasserstein(draws, _normal(4000, dim, 5)) == pytest.approx(exact, rel=0.1)  # two standard errors


def test_sliced_wasserstein_of_unequal_numbers_is_that_of_repeated_draws():
    first, second = _normal(6, 3, 6), _normal(4, 3, 7)
    repeated = sliced_wasserstein(first.repeat_interleave(2, 0), second.repeat_interleave(3, 0))
    assert sliced_wasserstein(first, second) == pytest.approx(repeated, rel=1e-12)
    assert sliced_wasserstein(second, first) == pytest.approx(repeated, rel=1e-12)


def test_sliced_wasserstein_in_the_plane_has_32_even_angles():
    first, second = _normal(50, 2, 8), _normal(50, 2, 9)
    angles = torch.arange(32, dtype=torch.float64) * (torch.pi / 32)
    directions = torch.stack([angles.cos(), angles.sin()])
    difference = (first @ directions).sort(dim=0).values - (second @ directions).sort(dim=0).values
    assert sliced_wasserstein(first, second) == float(difference.square().mean().sqrt())


def test_energy_distance_of_two_gaussians():
    """E|N(m, 2)| = 2 exp(-m^2 / 4) / sqrt(pi) + m erf(m / 2)."""
    shift = 0.8
    between = 2 * math.exp(-(shift**2) / 4) / math.sqrt(math.pi) + shift * math.erf(shift / 2)
    exact = 2 * between - 4 / math.sqrt(math.pi)
    moved = energy_distance(_normal(4000, 1, 10) + shift, _normal(4000, 1, 11))
    assert moved == pytest.approx(exact, abs=0.04)
    assert abs(energy_distance(_normal(4000, 1, 10), _normal(4000, 1, 11))) < 0.003


def test_energy_distance_is_that_of_a_direct_loop(monkeypatch):
    draws, reference = _normal(7, 3, 12).numpy(), _normal(9, 3, 13).numpy() + 1

    def mean(first, second, pairs):
        return sum(np.linalg.norm(a - b) for a in first for b in second) / pairs

    exact = 2 * mean(draws, reference, 63) - mean(draws, draws, 42) - mean(reference, reference, 72)
    monkeypatch.setattr(posterior, "PAIR_ROWS", 4)
    assert energy_distance(draws, reference) == pytest.approx(exact, rel=1e-9)
    monkeypatch.setattr(posterior, "PAIRED_DRAWS", 3)
    assert energy_distance(draws, reference) == energy_distance(draws[[0, 2, 4]], reference[[0, 3, 6]])


def _stein_kernel_by_autograd(x, y, target, scale):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    kernel = (1 + ((x - y) / scale).square().sum()).rsqrt()
    (in_x,) = torch.autograd.grad(kernel, x, create_graph=True)
    (in_y,) = torch.autograd.grad(kernel, y, create_graph=True)
    trace = sum(torch.autograd.grad(in_y[i], x, retain_graph=True)[0][i] for i in range(len(x)))
    scores = target.score(torch.stack([x, y]).detach())
    return (scores[0] @ scores[1] * kernel + scores[0] @ in_y + scores[1] @ in_x + trace).item()


@pytest.mark.parametrize("scale", [None, 0.7])
def test_kernel_stein_discrepancy_is_that_of_a_direct_double_loop(monkeypatch, scale):
    target = load_target("banana")
    draws = _normal(7, 2, 14)
    used = float(torch.pdist(draws).median()) if scale is None else scale
    pairs = [(x, y) for i, x in enumerate(draws) for j, y in enumerate(draws) if i != j]
    values = [_stein_kernel_by_autograd(x, y, target, used) for x, y in pairs]
    exact = {"stein_discrepancy": np.mean(values), "stein_noise": math.sqrt(2 * np.sum(np.square(values))) / 42}
    monkeypatch.setattr(posterior, "PAIR_ROWS", 3)
    assert kernel_stein_discrepancy(draws, target.score, scale) == pytest.approx(exact, rel=1e-9)
    assert kernel_stein_discrepancy(draws.numpy(), target.score(draws), used) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", ["banana", "mixture_10"])
def test_kernel_stein_discrepancy_is_noise_for_exact_draws_alone(name):
    target = load_target(name)
    exact = target.example.samples(1000, seed=1)
    scale = median_distance(exact)
    small = kernel_stein_discrepancy(exact, target.score, scale)
    moved = [kernel_stein_discrepancy(exact + shift, target.score, scale) for shift in (0.2, 0.5)]
    assert abs(small["stein_discrepancy"]) < 3 * small["stein_noise"]
    assert 5 * small["stein_noise"] < moved[0]["stein_discrepancy"] < moved[1]["stein_discrepancy"]
    many = [kernel_stein_discrepancy(target.example.samples(200, seed), target.score, scale) for seed in range(20)]
    values = np.array([found["stein_discrepancy"] for found in many])
    noise = np.mean([found["stein_noise"] for found in many])
    assert abs(values.mean()) < 3 * noise / math.sqrt(20) and 0.5 < values.std() / noise < 2


def test_the_discrepancy_asks_for_as_many_scores_as_it_compares(monkeypatch):
    monkeypatch.setattr(posterior, "PAIRED_DRAWS", 10)
    target = load_target("banana")
    draws = target.example.samples(35)
    found = kernel_stein_discrepancy(draws, target.score, 1.0)
    assert target.evaluations == 10
    assert found == pytest.approx(kernel_stein_discrepancy(draws[torch.arange(10) * 35 // 10], target.score, 1.0))


@pytest.mark.parametrize("name", ["multimodal", "mixture_10", "mixture_50"])
def test_mode_weights_of_exact_draws(name):
    example = EXAMPLES[name]()
    found = mode_weights(example.samples(20_000, seed=2), example.means)
    # Multimodal's halves are symmetric. The mixtures' Gaussians reach a little beyond the middle between them.
    assert np.abs(found.numpy() - example.weights).max() < 0.012
    assert float(found.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "draws, reference, words",
    [
        (np.zeros(5), np.zeros((5, 2)), r"draws: they have the shape \[5\]"),
        (np.zeros((1, 2)), np.zeros((5, 2)), r"draws: they have the shape \[1, 2\]"),
        (np.zeros((5, 2)), np.zeros((0, 2)), r"reference: they have the shape \[0, 2\]"),
        (np.zeros((5, 2)), np.zeros((5, 3)), "draws: they have 2 columns, the reference 3"),
        ([[0.0, 1], [np.nan, 0], [0, np.inf]], np.zeros((5, 2)), "draws: 2 of 3 are not finite, the first is row 1"),
    ],
)
def test_draws_that_cannot_be_compared_are_a_line(draws, reference, words):
    for compare in (compare_draws, moment_errors, energy_distance):
        with pytest.raises(ValueError, match=f"^{words}"):
            compare(draws, reference)


def test_discrepancies_that_cannot_be_worked_out_are_a_line():
    with pytest.raises(ValueError, match="^draws: more than half of their distances are 0"):
        kernel_stein_discrepancy(np.zeros((5, 2)), lambda x: x)
    with pytest.raises(ValueError, match=r"^draws: their scores are \[5\] for \[5, 2\]"):
        kernel_stein_discrepancy(_normal(5, 2, 0), lambda x: x[:, 0])
    with pytest.raises(ValueError, match="or are not finite$"):
        kernel_stein_discrepancy(_normal(5, 2, 0), lambda x: x * torch.nan)

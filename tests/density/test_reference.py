"""Reference draws: NUTS, the Gaussian fits and Langevin on a Gaussian, whose moments are known; what ships."""

import builtins
import json
import math

import numpy as np
import pytest
import torch

from hsivi_fast.density import reference
from hsivi_fast.density.examples import EXAMPLES
from hsivi_fast.density.reference import (
    ASSETS,
    SHIPPED,
    _rounded,
    gaussian_fit,
    langevin_draws,
    nuts_draws,
    reference_for,
    reference_kind,
)
from hsivi_fast.density.target import load_target
from hsivi_fast.metrics.posterior import moment_errors

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian(x):
    difference = x - MEAN.to(x)
    return -((difference @ PRECISION.to(x)) * difference).sum(1) / 2


def test_nuts_recovers_a_gaussian():
    pytest.importorskip("pyro")
    target = load_target(gaussian, 2)
    before = torch.get_rng_state()
    draws, diagnostics = nuts_draws(target, 400, chains=2, warmup=60, seed=1)
    assert draws.shape == (400, 2) and draws.dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), before)
    # Standard errors from the effective sample size; four of them.
    error = 4 / math.sqrt(diagnostics["effective_sample_size"])
    errors = moment_errors(draws, (MEAN, COVARIANCE))
    assert error < 0.4
    assert errors["mean_error_max"] < error and errors["std_error_max"] < error
    assert errors["correlation_error_max"] < error
    assert diagnostics["r_hat"] < 1.05 and diagnostics["divergences"] == 0
    assert diagnostics["evaluations"] == target.evaluations > 520


def test_nuts_keeps_every_thin_th_draw_and_its_seed():
    pytest.importorskip("pyro")
    target = load_target(gaussian, 2)
    whole, _ = nuts_draws(target, 8, chains=1, warmup=5, seed=2)
    thinned, _ = nuts_draws(target, 4, chains=1, warmup=5, seed=2, thin=2)
    assert torch.equal(thinned, whole[1::2])
    with pytest.raises(ValueError, match="^target: 4 draws of 2 chains are too few for NUTS"):
        nuts_draws(target, 4, chains=2)


def test_nuts_in_float32_where_the_log_density_fails_in_float64():
    pytest.importorskip("pyro")
    single = PRECISION.float()
    draws, _ = nuts_draws(load_target(lambda x: -((x @ single) * x).sum(1) / 2, 2), 8, chains=1, warmup=2)
    assert draws.dtype == torch.float64 and torch.equal(draws.float().double(), draws)


def test_the_gaussian_fits_of_a_gaussian_are_those_of_the_formula(monkeypatch):
    pytest.importorskip("pyro")
    monkeypatch.setattr("hsivi_fast.density.reference.FIT_STEPS", 400)  # of 80 draws each
    target = load_target(gaussian, 2)
    full = gaussian_fit(target, "full_rank", 32_000, seed=0)
    assert target.evaluations == full.evaluations <= 32_000
    assert torch.allclose(full.mean, MEAN, atol=0.03) and torch.allclose(full.covariance, COVARIANCE, rtol=0, atol=0.04)
    field = gaussian_fit(target, "mean_field", 32_000, seed=0)
    assert torch.allclose(field.mean, MEAN, atol=0.03)
    assert torch.allclose(field.covariance, torch.diag(1 / PRECISION.diagonal()), atol=0.03)
    draws = full.sample(20_000, seed=3)
    assert torch.equal(draws, full.sample(20_000, seed=3))
    assert max(moment_errors(draws, (full.mean, full.covariance)).values()) < 0.03
    with pytest.raises(ValueError, match="^target: 'low_rank' is no Gaussian fit; choose one of mean_field, full_rank"):
        gaussian_fit(target, "low_rank", 100)
    with pytest.raises(ValueError, match="^target: 3 gradient evaluations are not enough for a step of 16"):
        gaussian_fit(target, "full_rank", 3)


def test_fits_take_more_draws_a_step_where_the_budget_is_large(monkeypatch):
    pytest.importorskip("pyro")
    monkeypatch.setattr("hsivi_fast.density.reference.FIT_STEPS", 10)
    target = load_target(gaussian, 2)
    assert gaussian_fit(target, "mean_field", 1001).evaluations == 1001  # ten steps of 100 draws, and one before
    assert target.evaluations == 1001


def test_without_pyro_it_is_a_line_that_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "pyro":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: nuts_draws(load_target("banana"), 10), lambda: gaussian_fit(load_target("banana"), "full", 9)):
        with pytest.raises(ValueError) as refused:
            call()
        assert str(refused.value) == "target: NUTS needs Pyro; pip install 'hsivi_fast[vi]'"


def test_langevin_recovers_a_gaussian_within_its_budget():
    target = load_target(gaussian, 2)
    draws = langevin_draws(target, 4000, 80_000, seed=0)
    assert draws.shape == (4000, 2) and target.evaluations == 80_000
    errors = moment_errors(draws, (MEAN, COVARIANCE))
    assert max(errors.values()) < 0.08
    assert torch.equal(draws, langevin_draws(target, 4000, 80_000, seed=0))


def test_langevin_with_few_evaluations():
    target = load_target(gaussian, 2)
    assert langevin_draws(target, 10, 20).shape == (10, 2) and target.evaluations == 20
    assert langevin_draws(target, 250, 400).shape == (250, 2)
    with pytest.raises(ValueError, match="^target: 300 gradient evaluations are too few for 250 draws by 100 chains"):
        langevin_draws(target, 250, 300)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_shipped_target_has_a_reference(name):
    target = load_target(name)
    draws = reference_for(target, n=500)
    assert draws.dtype == torch.float64 and draws.shape[1] == target.dim
    assert reference_kind(target) == ("nuts" if name in SHIPPED else "exact")
    assert len(draws) == (SHIPPED[name]["draws"] if name in SHIPPED else 500)
    assert bool(torch.isfinite(target.log_density(draws)).all())


def test_a_user_s_target_has_no_reference():
    assert reference_for(load_target(gaussian, 2)) is None and reference_kind(load_target(gaussian, 2)) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_draws_belong_to_their_target(name):
    """Of exact draws the score has mean 0 and E (x - m).score = -dim; and the chains agree with each other."""
    file = ASSETS / f"{name}_draws.npz"
    assert file.stat().st_size < 500_000
    target = load_target(name)
    draws = reference_for(target)
    score = target.score(draws)
    scaled = score.mean(0) / score.std(0) * math.sqrt(len(draws))
    assert float(scaled.abs().max()) < 6  # standard errors of independent draws; these are a little less
    centred = ((draws - draws.mean(0)) * score).sum(1)
    assert abs(float(centred.mean()) / target.dim + 1) < 0.1
    chains = target.summary(draws).reshape(SHIPPED[name]["chains"], -1, target.summary(draws[:1]).shape[1])
    spread = (chains.mean(1) - chains.mean((0, 1))).abs() / chains.std(1).mean(0)
    assert float(spread.max()) < 0.25


def test_what_is_kept_of_the_shipped_draws():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    rounded = _rounded(values)
    assert rounded.dtype == np.float32 and np.abs(rounded / values - 1).max() <= 2.0**-11
    assert not np.any(rounded.view(np.uint32) & 0x1FFF)


def test_the_command_that_makes_the_shipped_draws(tmp_path, monkeypatch, capsys):
    draws = torch.randn(5, 31, dtype=torch.float64)
    monkeypatch.setattr(reference, "nuts_draws", lambda target, **options: (draws, {"r_hat": 1.00012, **options}))
    monkeypatch.setattr("sys.argv", ["reference", "logistic", "--out", str(tmp_path / "a.npz")])
    reference._main()
    assert json.loads(capsys.readouterr().out) == {"r_hat": 1.0001, **SHIPPED["logistic"]}
    with np.load(tmp_path / "a.npz") as file:
        assert file["draws"].dtype == np.float32 and np.array_equal(file["draws"], _rounded(draws.numpy()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]

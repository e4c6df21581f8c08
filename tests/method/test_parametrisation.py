"""What a network predicts as the noise in x_t, for states whose image and noise are known."""

import numpy as np
import pytest

from hsivi_fast.method.parametrisation import PREDICTIONS, noise_coefficients
from hsivi_fast.method.schedule import signal_levels

RANDOM = np.random.default_rng(0)
X_0, NOISE = RANDOM.standard_normal((2, 64, 1000))


def _prediction(name, x, signal, noise):
    """What the exact network returns for x_t [64, T], written from the papers' definitions."""
    if name == "epsilon":
        return NOISE
    if name == "x_0":
        return X_0
    if name == "v":
        return signal * NOISE - noise * X_0
    sigma = noise / signal  # D(x_hat; sigma) = x_0 = c_skip x_hat + c_out F
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / np.sqrt(sigma**2 + 0.25)
    return (X_0 - c_skip * x / signal) / c_out


@pytest.mark.parametrize("betas", ["linear", "cosine", "edm"])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_exact_network_gives_the_exact_noise(name, betas):
    levels = signal_levels(betas, 1000)
    signal, noise = np.sqrt(levels), np.sqrt(1 - levels)
    x = signal * X_0 + noise * NOISE
    inner, time, skip, out = noise_coefficients(name, levels, 0.25)
    np.testing.assert_allclose(skip * x + out * _prediction(name, x, signal, noise), NOISE, atol=1e-6)
    if name == "denoiser":
        sigma = noise / signal
        np.testing.assert_allclose(inner * x, x / signal / np.sqrt(sigma**2 + 0.25), rtol=1e-12)
        np.testing.assert_allclose(time, np.log(sigma) / 4, rtol=1e-9)
    else:
        assert np.array_equal(inner, np.ones(1000)) and np.array_equal(time, np.arange(1000) * 0.25)


def test_the_noise_itself_is_left_as_it_is():
    _, _, skip, out = noise_coefficients("epsilon", signal_levels("linear", 1000))
    assert not skip.any() and (out == 1).all()


def test_a_denoiser_loses_no_digits_where_there_is_hardly_any_noise():
    """At sigma = 1e-6 the noise is -F / 1 and a little of x, and nothing is divided by sigma."""
    sigma = 1e-6
    coefficients = noise_coefficients("denoiser", np.array([1 / (1 + sigma**2)]))
    inner, time, skip, out = coefficients[:, 0]
    assert np.isfinite(coefficients).all()
    assert (inner, out) == (pytest.approx(2), pytest.approx(-1))
    assert skip == pytest.approx(4e-6, rel=1e-3)


def test_another_prediction_is_named():
    with pytest.raises(ValueError, match="teacher.prediction: 'flow' is unknown; choose one of epsilon, x_0, v, den"):
        noise_coefficients("flow", signal_levels("linear", 10))


def test_edm_levels_are_those_of_its_sampler():
    """Karras et al. 2022, eq. 5, at 18 steps."""
    i = np.arange(18)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = signal_levels("edm", 18)
    np.testing.assert_allclose(np.sqrt(1 / levels - 1)[::-1], sigmas, rtol=1e-6)

"""What a teacher predicts, and the noise that this says is in x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

All of them are linear in the state and in what the network F returns:

    eps_hat(x, t) = skip_t x + out_t F(in_t x; time_t)

"epsilon": F is the noise. "x_0": F is the image. "v": F = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans &
Ho 2022, arXiv 2202.00512, section 4). "denoiser": F is the raw network of EDM's D(x; sigma) = c_skip x + c_out
F(c_in x; c_noise) (Karras et al. 2022, arXiv 2206.00364, eq. 7 and table 1), called at x_t / sqrt(alpha_bar_t) and
sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t). Its noise (x - D) / sigma is here without the division by sigma: it
cancels with c_out and 1 - c_skip, so that small noise costs no digits.
"""

import numpy as np

PREDICTIONS = ("epsilon", "x_0", "v", "denoiser")
SIGMA_DATA = 0.5  # of all of EDM's networks


def noise_coefficients(prediction, alpha_bar, timestep_scale=1.0):
    """(in, time, skip, out), float64 [4, T], at each timestep t = 0 .. T-1 of a teacher.

    alpha_bar: of each timestep, float64 [T], between 0 and 1; timestep_scale: what t is multiplied by for a network
    that is shown timesteps. Raises ValueError for another prediction.
    """
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    one, time = np.ones_like(signal), np.arange(len(signal)) * timestep_scale
    if prediction == "epsilon":
        rows = one, time, 0 * one, one
    elif prediction == "x_0":
        rows = one, time, 1 / noise, -signal / noise
    elif prediction == "v":
        rows = one, time, noise, signal
    elif prediction == "denoiser":
        total = np.sqrt(noise**2 + (signal * SIGMA_DATA) ** 2)  # sqrt(alpha_bar) sqrt(sigma^2 + sigma_data^2)
        rows = 1 / total, np.log(noise / signal) / 4, noise / total**2, -SIGMA_DATA * signal / total
    else:
        raise ValueError(f"teacher.prediction: {prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
    return np.stack(rows)

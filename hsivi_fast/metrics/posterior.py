"""How good draws of a posterior are: against draws of a reference, or against the target's score alone.

Draws are numpy arrays or tensors [N, D] of any float type; all is worked out in float64 on the CPU. Raises ValueError,
in one line that begins with `draws` or `reference`, where they have another shape, are fewer than 2, or not finite.
"""

import torch

from .distances import sliced_wasserstein

PAIRED_DRAWS = 2000  # at most, at even distances among the draws, where all pairs are compared
SCALE_DRAWS = 1000  # the same for the median of distances
PAIR_ROWS = 500  # of the matrix of pairs at a time: 16 MB a matrix of 4,000 columns


def compare_draws(draws, reference):
    """A row of a table: `moment_errors`, `sliced_wasserstein` and `energy_distance` of draws to a reference's draws."""
    draws, reference = _checked(draws, reference)
    return {
        **moment_errors(draws, reference),
        "sliced_wasserstein": sliced_wasserstein(draws, reference),
        "energy_distance": energy_distance(draws, reference),
    }


def moment_errors(draws, reference):
    """Errors of means, standard deviations and correlations of draws [N, D].

    reference: draws [M, D], or the exact (mean [D], covariance [D, D]). Returns means and maxima of absolute values:
    `mean_error` and `mean_error_max` over the coordinates, in units of the reference's standard deviation; `std_error`
    and `std_error_max` relative to it; `correlation_error` and `correlation_error_max` over the pairs of coordinates,
    left out where D is 1. Draws that do not move in a coordinate have the correlation 0 there.
    """
    if isinstance(reference, tuple):
        draws = _as_draws(draws, "draws")
        mean, covariance = (torch.as_tensor(value, dtype=torch.float64) for value in reference)
        _check_columns(draws, mean[None])
    else:
        draws, reference = _checked(draws, reference)
        mean, covariance = _moments(reference)
    own_mean, own_covariance = _moments(draws)
    deviation, own_deviation = covariance.diagonal().sqrt(), own_covariance.diagonal().sqrt()
    if not bool((deviation > 0).all()):
        raise ValueError(f"reference: coordinate {int((deviation > 0).int().argmin()) + 1} does not move")
    means = (own_mean - mean).abs() / deviation
    deviations = (own_deviation / deviation - 1).abs()
    errors = {
        "mean_error": float(means.mean()),
        "mean_error_max": float(means.max()),
        "std_error": float(deviations.mean()),
        "std_error_max": float(deviations.max()),
    }
    if len(mean) > 1:
        rows, columns = torch.triu_indices(len(mean), len(mean), offset=1)
        differences = (_correlations(own_covariance) - _correlations(covariance))[rows, columns].abs()
        errors["correlation_error"] = float(differences.mean())
        errors["correlation_error_max"] = float(differences.max())
    return errors


def energy_distance(draws, reference):
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of draws [N, D] to [M, D] (Szekely & Rizzo 2013).

    Without bias: a draw is not compared with itself. So it is 0 on average for draws of the same distribution, and may
    be a little less. Of each side `PAIRED_DRAWS` draws at most are used.
    """
    draws, reference = (_thinned(side, PAIRED_DRAWS) for side in _checked(draws, reference))
    within = sum(_sum_of_distances(side, side) / (len(side) * (len(side) - 1)) for side in (draws, reference))
    return 2 * _sum_of_distances(draws, reference) / (len(draws) * len(reference)) - within


def median_distance(draws):
    """The median of the distances between draws [N, D], of `SCALE_DRAWS` at most: a scale for a kernel."""
    return float(torch.pdist(_thinned(_as_draws(draws, "draws"), SCALE_DRAWS)).median())


def kernel_stein_discrepancy(draws, score, scale=None):
    """Kernel Stein discrepancy of draws [N, D] to a target, of which the score alone is known (Liu et al. 2016).

    score: the target's, a function [B, D] -> [B, D] that is asked with draws of the type and on the device that they
    are given in, or its values [N, D]. The kernel is the inverse multiquadric (1 + |x - y|^2 / scale^2)^(-1/2) (Gorham
    & Mackey 2017). scale: the median distance of the draws by default; what is compared should have one scale, say
    `median_distance` of a reference. Of the draws `PAIRED_DRAWS` at most are used.

    Returns `stein_discrepancy`, the U-statistic of the squared discrepancy: the mean over pairs of two draws, which is
    0 on average for exact and independent draws, and may be below 0. The V-statistic has each draw with itself too,
    whose part is the mean squared score: it makes draws look good that are too narrow. `stein_noise` is the standard
    deviation of the U-statistic where the draws are exact and independent.
    Raises ValueError where more than half of the draws are one point and no scale is given.
    """
    given = torch.as_tensor(draws)
    draws = _as_draws(given, "draws")
    if scale is None:
        scale = median_distance(draws)
    if not scale > 0:
        raise ValueError("draws: more than half of their distances are 0, so that the kernel has no scale")
    if callable(score):
        given = _thinned(given, PAIRED_DRAWS)
        scores = torch.cat([score(rows) for rows in given.split(PAIR_ROWS)])
    else:
        scores = _thinned(torch.as_tensor(score), PAIRED_DRAWS)
    draws, scores = _thinned(draws, PAIRED_DRAWS), scores.detach().double().cpu()
    if scores.shape != draws.shape or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"draws: their scores are {list(scores.shape)} for {list(draws.shape)}, or are not finite")
    total = squares = 0.0
    for start in range(0, len(draws), PAIR_ROWS):
        rows = slice(start, start + PAIR_ROWS)
        kernel = _stein_kernel(draws[rows], scores[rows], draws, scores, scale)
        kernel.diagonal(start).zero_()  # a draw with itself
        total += float(kernel.sum())
        squares += float(kernel.square().sum())
    pairs = len(draws) * (len(draws) - 1)
    return {"stein_discrepancy": total / pairs, "stein_noise": (2 * squares) ** 0.5 / pairs}


def _stein_kernel(x, x_scores, y, y_scores, scale):
    """The Stein kernel of the inverse multiquadric, k = q^(-1/2) with q = 1 + |r|^2 / scale^2 and r = x - y: [N, M].

    s_x.s_y k + s_x.grad_y k + s_y.grad_x k + div_x grad_y k, where grad_y k = -grad_x k = q^(-3/2) r / scale^2.
    """
    dim = x.shape[1]
    squares = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / scale**2
    q = 1 + squares
    # (s_x - s_y).r by products of matrices: r itself would be [N, M, D].
    projected = (x_scores * x).sum(1)[:, None] - x_scores @ y.T - x @ y_scores.T + (y_scores * y).sum(1)
    linear = (x_scores @ y_scores.T) * q.rsqrt()
    return linear + (projected + dim) / scale**2 * q.pow(-1.5) - 3 * squares / scale**2 * q.pow(-2.5)


def mode_weights(draws, means):
    """The part of draws [N, D] that is nearer to each of means [J, D] than to the others: float64 [J].

    For a mixture whose Gaussians are of one width and far from each other these are its weights.
    """
    draws, means = _as_draws(draws, "draws"), torch.as_tensor(means, dtype=torch.float64)
    _check_columns(draws, means)
    nearest = torch.cdist(draws, means).argmin(1)
    return torch.bincount(nearest, minlength=len(means)).double() / len(draws)


def _moments(draws):
    return draws.mean(0), torch.cov(draws.T).reshape(draws.shape[1], -1)


def _correlations(covariance):
    deviations = covariance.diagonal().sqrt()
    products = torch.outer(deviations, deviations)
    return torch.where(products > 0, covariance / products, 0.0)


def _sum_of_distances(first, second):
    return sum(float(torch.cdist(rows, second).sum()) for rows in first.split(PAIR_ROWS))


def _thinned(rows, most):
    """At most that many rows, at even distances."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most, device=rows.device) * len(rows) // most]


def _checked(draws, reference):
    draws, reference = _as_draws(draws, "draws"), _as_draws(reference, "reference")
    _check_columns(draws, reference)
    return draws, reference


def _check_columns(draws, reference):
    if draws.shape[1] != reference.shape[1]:
        raise ValueError(f"draws: they have {draws.shape[1]} columns, the reference {reference.shape[1]}")


def _as_draws(draws, name):
    draws = torch.as_tensor(draws).detach()
    if draws.ndim != 2 or len(draws) < 2 or not draws.shape[1]:
        raise ValueError(f"{name}: they have the shape {list(draws.shape)}; expected [N, D] with N at least 2")
    draws = draws.double().cpu()
    strange = torch.nonzero(~torch.isfinite(draws).all(1))
    if len(strange):
        raise ValueError(f"{name}: {len(strange)} of {len(draws)} are not finite, the first is row {int(strange[0])}")
    return draws

"""The bridge from a Gaussian base to a density of one's own, in the place of a diffusion.

In coordinates u in which the base is N(0, I), the auxiliary densities of the layers are

    log p_k(u) = (1 - lambda_k) log N(u; 0, I) + lambda_k log p(u) + const,    lambda_0 = 1, lambda_K = 0,

so their scores are exact: s_k(u) = -(1 - lambda_k) u + lambda_k grad log p(u) (geometric annealing, Neal 2001,
"Annealed importance sampling", eq. 3). The networks predict e_k(u) = -s_k(u): the "noise" of a density whose scale is
taken as 1. A layer is

    x_{k-1} = x_k - eps_hat(x_k, k) + exp(log_gamma_k) z,

which is Langevin's step where eps_hat is half of the squared noise times e_{k-1}. So one set of tables serves every
bridge, and what belongs to a bridge, its lambda and the weights of its losses, is needed for training alone.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BridgeSchedule:
    """The knots 0 .. K of a bridge with K = `nfe` layers, in the place of `Schedule`. Its last layer adds noise too."""

    nfe: int
    ends_with_noise = True

    @property
    def timesteps(self):
        """The numbers of the knots, int64 [K + 1]: a network is shown k itself."""
        return np.arange(self.nfe + 1)

    def coefficients(self, eta):
        """The tables of `Schedule.coefficients`, the same for all layers; eta is not used."""
        ones = np.ones(self.nfe)
        return {"a": ones, "b": -ones, "c1": ones, "variance": ones}


def path_knots(schedule, nfe, rungs=None, distances=None):
    """lambda_0 .. lambda_K, float64 [K + 1], from 1 down to 0.

    schedule: "linear" is even in lambda, "cosine" in the angle of sin^2. "adaptive" is even in `distances`, how far the
    densities at `rungs` (rising lambda, from 0 to 1) are from the base, added up from rung to rung.
    """
    part = 1 - np.arange(nfe + 1) / nfe
    if schedule == "linear":
        return part
    if schedule == "cosine":
        return np.sin(np.pi / 2 * part) ** 2
    return np.interp(part * distances[-1], distances, rungs)

"""2-D mixtures of Gaussians whose score is known exactly at every noise level: teachers without a checkpoint.

If x_0 ~ sum_j w_j N(m_j, s^2 I), then at signal level alpha_bar x_t ~ sum_j w_j N(sqrt(alpha_bar) m_j, v I) with
v = alpha_bar s^2 + 1 - alpha_bar, and the noise prediction is -sqrt(1 - alpha_bar) times the score of that mixture.
"""

import itertools
import math

import numpy as np
import torch
from torch import nn

TARGETS = ("checkerboard", "ring", "swiss_roll")


class MixtureTeacher(nn.Module):
    """The exact noise prediction of a 2-D mixture: x [B, 2], t [B] int -> [B, 2].

    name: one of `TARGETS`; signal_levels: alpha_bar_t, float64 [T]. Raises ValueError for another name.
    Attributes: the mixture's `means` [J, 2] and `std`; each of its Gaussians has the weight 1/J.
    """

    event_shape = (2,)
    classes = None

    def __init__(self, name, signal_levels):
        super().__init__()
        means, self.std = _mixture(name)
        self.register_buffer("means", torch.from_numpy(means).to(torch.float32), persistent=False)
        self.register_buffer(
            "alpha_bar", torch.from_numpy(np.asarray(signal_levels)).to(torch.float32), persistent=False
        )

    def forward(self, x, t):
        alpha_bar = self.alpha_bar[t][:, None]  # [B, 1]
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        difference = alpha_bar.sqrt()[:, :, None] * self.means - x[:, None]  # [B, J, 2], mean minus x
        membership = torch.softmax(-difference.square().sum(2) / (2 * variance), dim=1)  # [B, J]
        score = (membership[:, :, None] * difference).sum(1) / variance  # [B, 2]
        return -(1 - alpha_bar).sqrt() * score

    def samples(self, n, seed=0):
        """n exact samples of the mixture, float32 [n, 2] on the CPU."""
        random = np.random.default_rng(seed)
        means = self.means.cpu().numpy()
        points = means[random.integers(len(means), size=n)] + self.std * random.standard_normal((n, 2))
        return torch.from_numpy(points.astype(np.float32))

    def bin_masses(self, edges):
        """Exact probability of every cell of a square grid with these edges [M + 1]: float64 [M, M], x first."""
        means = self.means.double().cpu()  # [J, 2]
        z = (torch.as_tensor(edges, dtype=torch.float64)[None, None] - means[:, :, None]) / (self.std * math.sqrt(2))
        mass = (0.5 * torch.erf(z)).diff(dim=2)  # [J, 2, M]
        return torch.einsum("jm,jn->mn", mass[:, 0], mass[:, 1]) / len(means)


class CorrectedTeacher(nn.Module):
    """teacher(x, t) + correction(x, t): a student or score network that starts as the exact teacher."""

    channels_last = False  # what it makes are points

    def __init__(self, teacher, correction):
        super().__init__()
        self.event_shape = correction.event_shape
        self.correction = correction
        self.teacher = teacher  # it has buffers and no parameters, so only the correction is trained

    def forward(self, x, t):
        return self.teacher(x, t) + self.correction(x, t)


def _mixture(name):
    """Means [J, 2] and the common standard deviation, scaled to about unit variance per coordinate."""
    if name == "checkerboard":  # 8 squares of a 4 x 4 board, each tiled by 3 x 3 Gaussians
        squares = [(i, j) for i, j in itertools.product(range(4), range(4)) if (i + j) % 2 == 0]
        tiles = list(itertools.product([-1 / 3, 0.0, 1 / 3], repeat=2))
        means = np.array([(i - 1.5 + u, j - 1.5 + v) for (i, j), (u, v) in itertools.product(squares, tiles)])
        size = np.sqrt((means**2).mean() + (1 / 6) ** 2)
        means, std = means / size, (1 / 6) / size
    elif name == "ring":  # 8 Gaussians on a circle
        angles = np.arange(8) * (2 * np.pi / 8)
        means, std = 1.4 * np.stack([np.cos(angles), np.sin(angles)], 1), 0.14
    elif name == "swiss_roll":  # 60 Gaussians along a spiral
        angles = 1.5 * np.pi * (1 + 2 * np.sqrt(np.linspace(0, 1, 60)))
        means = np.stack([angles * np.cos(angles), angles * np.sin(angles)], 1)
        means, std = means / np.sqrt((means**2).mean()), 0.07
    else:
        raise ValueError(f"teacher.target: {name!r} is unknown; choose one of {', '.join(TARGETS)}")
    return means, float(std)

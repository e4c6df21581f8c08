"""Matching between the knots: a layer's x_{k-1}, noised on to a timestep t of its window, is compared there.

The layer k makes x_{k-1} = A_k x_k + B_k eps_hat + exp(log_gamma) c1_k z. For t in [tau_{k-1}, tau_k) and
r^2 = alpha_bar_t / alpha_bar_{tau_{k-1}},

    x_t = r (A_k x_k + B_k eps_hat) + S z,    S^2 = r^2 c1_k^2 exp(2 log_gamma) + 1 - r^2,

which is a layer of the same form: a virtual layer j = (k, t). Its score is that of the teacher at t, and the score of
x_t given x_k is known. So both losses hold at t with weight sigma_t^2 and z / gamma = z sigma_t / S.
With one layer it is the setting of Score identity Distillation (Zhou et al. 2024, arXiv 2404.04057); with t = tau_{k-1}
alone it is HSIVI-SM.
"""

import numpy as np
import torch
from torch import nn

from .. import ops


class Windows(nn.Module):
    """The virtual layers of a run as tables [J + 1] that are indexed by j = 1 .. J, in the place of `Layers`.

    layer, t: k and t of each, int64; r; weight: sigma_t^2; scale: sigma_t. `rows` has log S for log_gamma, so the
    operators' own scale is `one`.

    layers: `Layers`; timesteps: the knots [K + 1]; alpha_bar: of every timestep of the teacher, float64 [T].
    gamma_min: t is one of the window's where S / sigma_t >= gamma_min with log_gamma = 0. The denoising target is
    z / gamma, so where gamma is small it is mostly noise.
    Raises ValueError where a layer has no such t.
    """

    def __init__(self, layers, timesteps, alpha_bar, gamma_min):
        super().__init__()
        self.nfe, self.per_step = layers.nfe, layers.per_step
        # From the float32 tables, which are what the layers compute with.
        a, b, c1 = (table.double().cpu().numpy() for table in (layers.a, layers.b, layers.c1))
        columns, first = [], [0]
        for k in range(1, layers.nfe + 1):
            low, high = int(timesteps[k - 1]), int(timesteps[k])
            t = np.arange(low, high)
            r2 = alpha_bar[t] / alpha_bar[low]
            gamma = np.sqrt((r2 * c1[k] ** 2 + 1 - r2) / (1 - alpha_bar[t]))
            kept = gamma >= gamma_min
            if not kept.any():
                where = f"in {low} .. {high - 1}, where gamma is at most {gamma.max():.3f}"
                raise ValueError(f"objective.gamma_min: {gamma_min} leaves layer {k} no timestep {where}; lower it")
            columns += [(k, *row) for row in zip(t[kept], r2[kept])]
            first.append(len(columns))
        layer, t, r2 = (np.array(column) for column in zip(*columns))
        layer, t, r = layer.astype(np.int64), t.astype(np.int64), np.sqrt(r2)

        def table(values):
            return torch.from_numpy(np.concatenate([[0.0], values])).to(torch.float32)

        tables = {
            "r": table(r),
            "a": table(r * a[layer]),
            "b": table(r * b[layer]),
            "own": table(r2 * c1[layer] ** 2),  # the layer's own share of S^2
            "rest": table(1 - r2),
            "weight": table(1 - alpha_bar[t]),
            "scale": table(np.sqrt(1 - alpha_bar[t])),
            "one": torch.ones(len(layer) + 1),
            "layer": torch.from_numpy(np.concatenate([[0], layer])),
            "t": torch.from_numpy(np.concatenate([[0], t])),
            "first": torch.tensor([0, *(start + 1 for start in first[:-1])]),  # virtual layer of k
            "count": torch.tensor([0, *np.diff(first).tolist()]),  # how many k has
        }
        for name, values in tables.items():
            self.register_buffer(name, values.to(layers.a.device), persistent=False)

    def choose(self, k, bits):
        """A virtual layer of each layer k [B], with the same chance for all of its t; bits [B]: 32 random bits each."""
        return self.first[k] + (bits * self.count[k] >> 32)

    def step(self, x, eps_hat, log_gamma, noise):
        """x_t of samples x = x_k [B, *event], as of `Layers.step`; the noise's stream [B] is the virtual layer j."""
        return ops.affine_noise_step(x, eps_hat, self.a, self.b, self.one, self.rows(log_gamma), noise)

    def step_from_mean(self, mean, log_gamma, noise):
        """x_t from the stored mean [B, *event] of x_{k-1}."""
        return ops.affine_noise_step(mean, None, self.r, None, self.one, self.rows(log_gamma), noise)

    def rows(self, log_gamma):
        """log S of every virtual layer as `ops` take it, [J, 1 or event size]; differentiable in log_gamma."""
        return 0.5 * self._variance(log_gamma)[0].log()

    def pull_back_rows(self, log_gamma, grad_rows):
        """The gradient at log_gamma, from that at `rows`."""
        variance, own = self._variance(log_gamma)
        by_layer = grad_rows * own / variance
        if self.per_step:
            summed = by_layer.new_zeros(self.nfe, by_layer.shape[1])
            return summed.index_add_(0, self.layer[1:] - 1, by_layer).reshape(log_gamma.shape)
        return by_layer.sum(0).reshape(log_gamma.shape)

    def _variance(self, log_gamma):
        """(S^2, the layer's own part of it), both [J, 1 or event size]."""
        rows = log_gamma.reshape(self.nfe if self.per_step else 1, -1)
        rows = rows[self.layer[1:] - 1] if self.per_step else rows
        own = self.own[1:, None] * (2 * rows).exp()
        return own + self.rest[1:, None], own

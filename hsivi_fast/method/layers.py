"""The semi-implicit layer: x_{k-1} = A_k x_k + B_k eps_hat + exp(log_gamma) c1_k z.

With log_gamma = 0 and the teacher as the network this is DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16) with
that eta, so a student that is a copy of the teacher starts as a known sampler.
"""

import numpy as np
import torch
from torch import nn

from .. import ops


class Layers(nn.Module):
    """All K layers of one sampler, as tables [K + 1] that are indexed by k.

    a, b, c1: A_k, B_k and DDIM's sigma; tau: the knots, int64.
    weight: sigma_{k-1}^2, of the losses; scale: sigma_{k-1} / c1_k, so that z / gamma = z scale exp(-log_gamma).
    one: ones, for a step from a stored mean.
    layer, t: k itself and tau_{k-1}, the timestep of what layer k makes: with `choose` and `pull_back_rows` they are
    what `Windows` has too, so that training does not ask where it compares.

    schedule: `Schedule` or `BridgeSchedule`; eta: DDIM's eta, 0 <= eta <= 1 (training needs more than 0).
    per_step, per_pixel: the shape of log_gamma.
    `Layers` have no parameters: log_gamma belongs to the student (see `attach_log_gamma`) and is passed in.
    """

    def __init__(self, schedule, eta, per_step=False, per_pixel=True):
        super().__init__()
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: {eta} is outside 0 .. 1")
        self.nfe, self.eta, self.per_step, self.per_pixel = schedule.nfe, eta, per_step, per_pixel
        self.ends_with_noise = schedule.ends_with_noise
        of = schedule.coefficients(eta)

        def table(values):  # indexed by k = 1 .. K; entry 0 belongs to no layer
            return torch.from_numpy(np.concatenate([[0.0], values])).to(torch.float32)

        tables = {
            "a": table(of["a"]),
            "b": table(of["b"]),
            "c1": table(of["c1"]),
            "weight": table(of["variance"]),
            "scale": torch.zeros(schedule.nfe + 1),
        }
        if eta > 0:
            tables["scale"] = table(np.sqrt(of["variance"]) / of["c1"])  # z / gamma = z scale exp(-log_gamma)
        for name, values in tables.items():
            self.register_buffer(name, values, persistent=False)
        self.register_buffer("one", torch.ones(schedule.nfe + 1), persistent=False)
        self.register_buffer("tau", torch.from_numpy(schedule.timesteps), persistent=False)
        self.register_buffer("layer", torch.arange(schedule.nfe + 1), persistent=False)
        self.register_buffer("t", torch.cat([self.tau[:1], self.tau[:-1]]), persistent=False)

    def weigh(self, variances):
        """Take other weights for the losses: variances [K + 1], of which layer k has that of knot k - 1."""
        self.weight[1:] = torch.as_tensor(variances[:-1], dtype=torch.float32)

    def log_gamma_shape(self, event_shape):
        """The shape of log_gamma: [1], [K], [*event] or [K, *event]."""
        steps = (self.nfe,) if self.per_step else ()
        pixels = tuple(event_shape) if self.per_pixel else ()
        return steps + pixels or (1,)

    def rows(self, log_gamma):
        """log_gamma as `ops` take it, [1 or K, 1 or event size]."""
        return log_gamma.reshape(self.nfe if self.per_step else 1, -1)

    def pull_back_rows(self, log_gamma, grad_rows):
        """The gradient at log_gamma, from that at `rows`."""
        return grad_rows.reshape(log_gamma.shape)

    def choose(self, k, bits):
        """Where layers k [B] are compared with the teacher: at their knots, so k itself; bits [B] are not used."""
        return k

    def step(self, x, eps_hat, log_gamma, noise):
        """x_{k-1} of samples x = x_k [B, *event]; differentiable in eps_hat and log_gamma.

        noise: `ops.Noise` of the batch, whose stream [B] is the layer k of each sample.
        """
        return ops.affine_noise_step(x, eps_hat, self.a, self.b, self.c1, self.rows(log_gamma), noise)

    def mean(self, x, eps_hat, k):
        """A_k x_k + B_k eps_hat, the mean of x_{k-1}: [B, *event]; k [B] int64."""
        return ops.affine_step(x, eps_hat, self.a, self.b, k)

    def step_from_mean(self, mean, log_gamma, noise):
        """x_{k-1} from its stored mean [B, *event], with other noise than the first time."""
        return ops.affine_noise_step(mean, None, self.one, None, self.c1, self.rows(log_gamma), noise)

    def gamma(self, k, log_gamma, event_shape):
        """gamma_k = exp(log_gamma) c1_k / sigma_{k-1} of layers k [B], [B, *event]."""
        rows = self.rows(log_gamma)
        rows = rows[k - 1] if self.per_step else rows.expand(len(k), -1)
        event = tuple(event_shape) if self.per_pixel else (1,) * len(event_shape)
        scale = self.scale[k].reshape(-1, *[1] * len(event_shape))
        return (rows.reshape(len(k), *event).exp() / scale).expand(len(k), *event_shape)


def attach_log_gamma(network, layer):
    """Make `network` a student of `layer`: add the parameter `log_scaled_gamma`, zero, and return the network."""
    network.register_parameter(
        "log_scaled_gamma", nn.Parameter(torch.zeros(layer.log_gamma_shape(network.event_shape)))
    )
    return network

"""The operations in plain torch: the CPU backend, and what every kernel is tested against.

Conventions shared by all of them. Tensors are [B, *event]; a, b, s, weight and scale are per sample, [B]. `log_gamma` is
[rows, columns] with rows 1 or the number of layers and columns 1 or the size of an event: sample i uses row
stream[i] - 1 (or the only one), broadcast over its event. Noise n is addressed by (seeds[i], stream[i], redraw, element),
or given as a tensor `noise` [B, *event] in its place. Arithmetic is in float32 at least, results in the inputs' dtype.
"""

import torch
from torch.nn import functional as F

from . import philox


def draw_noise(seeds, stream, shape, redraw=0):
    """Standard normal noise by address: seeds [B] int64, stream int or [B] -> float32 [B, *shape]."""
    return philox.normal(seeds, stream, shape, redraw)


def affine_noise_step(x, e, a, b, s, log_gamma, seeds, stream, redraw=0, noise=None):
    """y = a x + b e + s exp(log_gamma) n, differentiable in x, e and log_gamma; [B, *event]."""
    compute = _compute_dtype(x)
    n = _noise(x, seeds, stream, redraw, noise)
    scale = _per_sample(s, x, compute) * _rows(log_gamma, stream, x, compute).exp()
    y = _per_sample(a, x, compute) * x.to(compute) + _per_sample(b, x, compute) * e.to(compute) + scale * n.to(compute)
    return y.to(x.dtype)


def denoising_loss_and_grads(f, weight, scale, log_gamma, seeds, stream, redraw=0, noise=None):
    """weight |f - target|^2 with target = n scale exp(-log_gamma), summed over each event and averaged over the batch.

    Returns (loss per sample [B], whose mean is the loss; d loss / d f [B, *event]).
    """
    compute = _compute_dtype(f)
    w = _per_sample(weight, f, compute)
    residual = f.to(compute) - _target(f, scale, log_gamma, seeds, stream, redraw, noise, compute)
    losses = (w * residual.square()).flatten(1).sum(1)
    return losses, (2.0 * w * residual / len(f)).to(f.dtype)


def fisher_loss_and_grads(f, e, weight, scale, log_gamma, seeds, stream, redraw=0, noise=None):
    """weight (2 g (target - e) - g^2), g = f - e, target = n scale exp(-log_gamma), summed over each event, averaged over the batch.

    Returns (loss per sample [B], whose mean is the loss; d loss / d f; d loss / d e, both [B, *event]; the direct
    d loss / d log_gamma, in log_gamma's shape).
    """
    compute = _compute_dtype(f)
    w = _per_sample(weight, f, compute)
    target = _target(f, scale, log_gamma, seeds, stream, redraw, noise, compute)
    f_, e_ = f.to(compute), e.to(compute)
    g = f_ - e_
    losses = (w * (2.0 * g * (target - e_) - g.square())).flatten(1).sum(1)
    grad_f = 2.0 * w * (target - f_) / len(f)
    grad_e = -2.0 * w * (target - e_) / len(f)
    grad_log_gamma = _sum_to_rows(-2.0 * w * g * target / len(f), log_gamma, stream)
    return losses, grad_f.to(f.dtype), grad_e.to(e.dtype), grad_log_gamma.to(log_gamma.dtype)


def group_norm_silu(x, groups, weight, bias, eps, silu=True, scale=None, shift=None):
    """GroupNorm of x [B, C, ...], then y (1 + scale) + shift with scale, shift [B, C] where given, then SiLU where asked."""
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        broadcast = (*scale.shape, *[1] * (x.ndim - 2))
        y = y * (1.0 + scale.reshape(broadcast)) + shift.reshape(broadcast)
    return F.silu(y) if silu else y


def _compute_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


def _per_sample(values, x, dtype):
    """[B] -> [B, 1, ..., 1] beside x."""
    return values.to(dtype).reshape(-1, *[1] * (x.ndim - 1))


def _noise(x, seeds, stream, redraw, noise):
    return draw_noise(seeds, stream, x.shape[1:], redraw) if noise is None else noise


def _rows(log_gamma, stream, x, dtype):
    """The row of log_gamma of each sample, shaped to broadcast against x: [B or 1, *event or ones]."""
    rows = log_gamma if len(log_gamma) == 1 else log_gamma[stream - 1]
    event = x.shape[1:] if log_gamma.shape[1] > 1 else [1] * (x.ndim - 1)
    return rows.to(dtype).reshape(len(rows), *event)


def _target(f, scale, log_gamma, seeds, stream, redraw, noise, dtype):
    """n scale exp(-log_gamma): the noise over its relative size, z / gamma."""
    n = _noise(f, seeds, stream, redraw, noise).to(dtype)
    return n * _per_sample(scale, f, dtype) * (-_rows(log_gamma, stream, f, dtype)).exp()


def _sum_to_rows(values, log_gamma, stream):
    """Sum values [B, *event] to log_gamma's [rows, columns]."""
    values = values.flatten(1)
    if log_gamma.shape[1] == 1:
        values = values.sum(1, keepdim=True)
    if len(log_gamma) == 1:
        return values.sum(0, keepdim=True)
    return values.new_zeros(log_gamma.shape).index_add_(0, stream - 1, values)

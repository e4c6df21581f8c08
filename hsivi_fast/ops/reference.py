"""The operations in plain torch: the CPU backend, and what every kernel is tested against.

Conventions that all of them share:

* Tensors are [B, *event]. Sample i has a stream k_i in 1 .. K.
* a, b, s, weight and scale are tables [K + 1], of which it takes entry k_i.
* `log_gamma` is [1 or K, 1 or size of an event]: a sample uses row k_i - 1, or the only one, broadcast over its event.
* Noise n is addressed by (seeds[i], k_i, draw, element), or given as a tensor `noise` [B, *event] in its place.
* Arithmetic is in float32 at least, results in the inputs' dtype.
"""

import torch
from torch.nn import functional as F

from . import philox


def draw_noise(seeds, stream, shape, draw=0):
    """Standard normal noise by address: seeds [B] int64, stream int or [B] -> float32 [B, *shape]."""
    return philox.normal(seeds, stream, shape, draw)


def affine_noise_step(x, e, a, b, s, log_gamma, seeds, stream, draw=None, noise=None):
    """y = a x + b e + s exp(log_gamma) n, [B, *event]; no e: no such term; no s: no noise."""
    compute = _compute_dtype(x)
    y = _entries(a, stream, x, compute) * x.to(compute)
    if e is not None:
        y = y + _entries(b, stream, x, compute) * e.to(compute)
    if s is not None:
        scale = _entries(s, stream, x, compute) * _rows(log_gamma, stream, x, compute).exp()
        y = y + scale * _noise(x, seeds, stream, draw, noise).to(compute)
    return y.to(x.dtype)


def affine_noise_step_backward(dy, e, b, s, log_gamma, seeds, stream, draw=None, noise=None):
    """(dL/de, dL/dlog_gamma) of `affine_noise_step` from dy = dL/dy; e is not read."""
    compute = _compute_dtype(dy)
    dy = dy.to(compute)
    de = _entries(b, stream, dy, compute) * dy
    scale = _entries(s, stream, dy, compute) * _rows(log_gamma, stream, dy, compute).exp()
    dlog_gamma = _sum_to_rows(scale * _noise(dy, seeds, stream, draw, noise).to(compute) * dy, log_gamma, stream)
    return de.to(e.dtype), dlog_gamma.to(log_gamma.dtype)


def denoising_loss_and_grads(f, weight, scale, log_gamma, seeds, stream, draw=None, noise=None):
    """weight |f - target|^2 with target = n scale exp(-log_gamma), summed over each event and averaged over the batch.

    Returns (loss per sample [B], whose mean is the loss; d loss / d f [B, *event]).
    """
    compute = _compute_dtype(f)
    w = _entries(weight, stream, f, compute)
    residual = f.to(compute) - _target(f, scale, log_gamma, seeds, stream, draw, noise, compute)
    losses = (w * residual.square()).flatten(1).sum(1)
    return losses, (2.0 * w * residual / len(f)).to(f.dtype)


def fisher_loss_and_grads(f, e, weight, scale, log_gamma, seeds, stream, draw=None, noise=None, alpha=0.5):
    """2 weight (g (target - e) - alpha g^2), g = f - e, target = n scale exp(-log_gamma).

    Summed over each event and averaged over the batch. Returns (loss per sample [B], whose mean is the loss; d loss /
    d f; d loss / d e, both [B, *event]; the direct d loss / d log_gamma, in log_gamma's shape).
    """
    compute = _compute_dtype(f)
    w = _entries(weight, stream, f, compute)
    target = _target(f, scale, log_gamma, seeds, stream, draw, noise, compute)
    f_, e_ = f.to(compute), e.to(compute)
    g = f_ - e_
    terms, slope_f, slope_e = 2.0 * g * (target - e_) - g.square(), target - f_, target - e_
    if alpha != 0.5:  # at 1/2 nothing is added, so that its bits are those of the formula without alpha
        beta = 1.0 - 2.0 * alpha
        terms, slope_f, slope_e = terms + beta * g.square(), slope_f + beta * g, slope_e + beta * g
    losses = (w * terms).flatten(1).sum(1)
    grad_f = 2.0 * w * slope_f / len(f)
    grad_e = -2.0 * w * slope_e / len(f)
    grad_log_gamma = _sum_to_rows(-2.0 * w * g * target / len(f), log_gamma, stream)
    return losses, grad_f.to(f.dtype), grad_e.to(e.dtype), grad_log_gamma.to(log_gamma.dtype)


def group_norm_silu(x, groups, weight, bias, eps, silu=True, scale=None, shift=None, add=None):
    """GroupNorm of x + add, then y (1 + scale) + shift, then SiLU where asked.

    x: [B, C, ...]; scale, shift, add: [B, C] or None.
    """
    broadcast = (*x.shape[:2], *[1] * (x.ndim - 2))
    if add is not None:
        x = x + add.reshape(broadcast)
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        y = y * (1.0 + scale.reshape(broadcast)) + shift.reshape(broadcast)
    return F.silu(y) if silu else y


def joined(x, add=None, residual=None, factor=1.0, beside=None):
    """[(x + add + residual) factor, beside]: [B, C1 + C2, ...].

    x, residual: [B, C1, ...]; add: [B, C1]; beside: [B, C2, ...]. All but x may be None.
    """
    if add is not None:
        x = x + add.reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    if residual is not None:
        x = x + residual
    if factor != 1:
        x = x * factor
    return x if beside is None else torch.cat([x, beside], dim=1)


def _compute_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


def _entries(table, stream, x, dtype):
    """Each sample's entry of a table [K + 1], [B, 1, ..., 1] beside x."""
    return table[stream].to(dtype).reshape(-1, *[1] * (x.ndim - 1))


def _noise(x, seeds, stream, draw, noise):
    return draw_noise(seeds, stream, x.shape[1:], 0 if draw is None else draw) if noise is None else noise


def _rows(log_gamma, stream, x, dtype):
    """The row of log_gamma of each sample, shaped to broadcast against x: [B or 1, *event or ones]."""
    rows = log_gamma if len(log_gamma) == 1 else log_gamma[stream - 1]
    event = x.shape[1:] if log_gamma.shape[1] > 1 else [1] * (x.ndim - 1)
    return rows.to(dtype).reshape(len(rows), *event)


def _target(f, scale, log_gamma, seeds, stream, draw, noise, dtype):
    """n scale exp(-log_gamma): the noise over its relative size, z / gamma."""
    n = _noise(f, seeds, stream, draw, noise).to(dtype)
    return n * _entries(scale, stream, f, dtype) * (-_rows(log_gamma, stream, f, dtype)).exp()


def _sum_to_rows(values, log_gamma, stream):
    """Sum values [B, *event] to log_gamma's [rows, columns]."""
    values = values.flatten(1)
    if log_gamma.shape[1] == 1:
        values = values.sum(1, keepdim=True)
    if len(log_gamma) == 1:
        return values.sum(0, keepdim=True)
    # As a product with the membership of samples in rows, because index_add_ adds in any order on a GPU.
    member = (torch.arange(1, len(log_gamma) + 1, device=stream.device)[:, None] == stream).to(
        values.dtype
    )  # [rows, B]
    return member @ values

"""The operations that everything above calls, and the one switch that says which backend runs them.

`torch` is the plain version in `reference.py`. `triton` names the fused kernels in `kernels/`; this version has none, so
asking for it is an error and `auto` is torch everywhere. The functions below are the interface that the kernels join.
"""

from . import reference
from .philox import integers

BACKENDS = ("auto", "torch", "triton")

__all__ = ["affine_noise_step", "choose_backend", "denoising_loss_and_grads", "draw_noise", "fisher_loss_and_grads", "group_norm_silu", "integers"]


def choose_backend(backend):
    """The backend that will run for the requested one, "torch". Raises ValueError where the request cannot be met."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise ValueError("backend: 'triton' cannot run, this version of hsivi_fast has no Triton kernels; choose auto or torch")
    return "torch"


def affine_noise_step(x, e, a, b, s, log_gamma, seeds, stream, redraw=0, noise=None):
    """y = a x + b e + s exp(log_gamma) n, differentiable in x, e and log_gamma; see `reference.py` for shapes.

    Raises ValueError for tensors that do not fit each other.
    """
    _check(x, e, log_gamma, seeds, stream, noise)
    return reference.affine_noise_step(x, e, a, b, s, log_gamma, seeds, stream, redraw, noise)


def denoising_loss_and_grads(f, weight, scale, log_gamma, seeds, stream, redraw=0, noise=None):
    """(losses [B], grad_f) of mean over the batch of weight |f - n scale exp(-log_gamma)|^2; see `reference.py`."""
    _check(f, f, log_gamma, seeds, stream, noise)
    return reference.denoising_loss_and_grads(f, weight, scale, log_gamma, seeds, stream, redraw, noise)


def fisher_loss_and_grads(f, e, weight, scale, log_gamma, seeds, stream, redraw=0, noise=None):
    """(losses [B], grad_f, grad_e, direct grad_log_gamma) of the minimax Fisher divergence; see `reference.py`."""
    _check(f, e, log_gamma, seeds, stream, noise)
    return reference.fisher_loss_and_grads(f, e, weight, scale, log_gamma, seeds, stream, redraw, noise)


def group_norm_silu(x, groups, weight, bias, eps, silu=True, scale=None, shift=None):
    """GroupNorm, an optional per-sample scale and shift, and SiLU where asked; x [B, C, ...] -> the same shape."""
    return reference.group_norm_silu(x, groups, weight, bias, eps, silu, scale, shift)


def draw_noise(seeds, stream, shape, redraw=0):
    """Standard normal noise by address: seeds [B] int64, stream an int or [B] -> float32 [B, *shape]."""
    return reference.draw_noise(seeds, stream, shape, redraw)


def _check(x, e, log_gamma, seeds, stream, noise):
    """The shapes that a caller can get wrong; values on a device are not read, which would make the host wait."""
    if len(x) == 0:
        raise ValueError("ops: a batch of 0 samples")
    if e.shape != x.shape or e.dtype != x.dtype or e.device != x.device:
        raise ValueError(f"ops: tensors differ, {tuple(x.shape)} {x.dtype} {x.device} and {tuple(e.shape)} {e.dtype} {e.device}")
    size = x[0].numel()
    if log_gamma.ndim != 2 or log_gamma.shape[1] not in (1, size):
        raise ValueError(f"ops: log_gamma of shape {tuple(log_gamma.shape)}; expected [1 or layers, 1 or {size}]")
    if stream.shape != (len(x),):
        raise ValueError(f"ops: stream of shape {tuple(stream.shape)} for {len(x)} samples")
    if noise is None and seeds.shape != (len(x),):
        raise ValueError(f"ops: seeds of shape {tuple(seeds.shape)} for {len(x)} samples")
    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"ops: noise of shape {tuple(noise.shape)} for samples of shape {tuple(x.shape)}")

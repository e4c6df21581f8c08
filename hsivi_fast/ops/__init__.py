"""The operations that the mathematics and the networks call, and the one switch that says which backend runs them.

May import torch, and `kernels/` when the Triton backend runs; nothing else of ours.

`torch` is the plain version in `reference.py`. `triton` is the fused kernels in `kernels/`: on a CUDA device, or with
TRITON_INTERPRET=1 in the environment interpreted on any device, which is slow and meant for checks. `auto` is triton
for CUDA tensors and torch for others. `choose_backend` makes the choice once in a process: from its argument (the
configuration's key `backend`) or, where that is auto, from the environment variable HSIVI_BACKEND. Every function
below also takes `backend` for one call.

Conventions of shapes and tables are on top of `reference.py`. `library.py` holds the operators of torch behind these
functions.
"""

import functools
import logging
import os
from importlib.util import find_spec

import torch

from . import library, philox, reference
from .noise import Noise
from .reference import joined

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "HSIVI_BACKEND"
OLDEST_CAPABILITY = (8, 0)  # the kernels are compiled and checked for these GPUs and newer ones

__all__ = [
    "AdamStep",
    "Noise",
    "affine_noise_step",
    "affine_step",
    "choose_backend",
    "denoising_loss_and_grads",
    "draw_noise",
    "fisher_loss_and_grads",
    "group_norm_silu",
    "integers",
    "integers_below",
    "integers_of_seeds",
    "joined",
    "joined_group_norm_silu",
    "old_capability",
    "running_backend",
    "triton_is_interpreted",
]

logger = logging.getLogger(__name__)
_chosen = None  # by `choose_backend`


def choose_backend(backend="auto", device="cpu"):
    """Choose the backend of this process, and return the one that will run on `device`: "torch" or "triton".

    Raises ValueError for an unknown name, and where "triton" cannot run, saying why.
    """
    global _chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get(VARIABLE, "auto"), VARIABLE
        if backend not in BACKENDS:
            raise ValueError(f"{VARIABLE}: {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    device = torch.device(device)
    if backend == "triton" and (reason := _obstacle(device)):
        raise ValueError(f"{source}: 'triton' cannot run, {reason}; choose auto or torch")
    _chosen = backend
    running = _resolve(None, device)
    logger.info("backend %s on %s", running, device)
    return running


def triton_is_interpreted():
    """Whether Triton kernels run in Triton's interpreter in this process."""
    return _triton_is_installed() and library.kernels("memory").INTERPRETED


def running_backend(device):
    """The backend that runs on a device where no call says another: "torch" or "triton"."""
    return _resolve(None, torch.device(device))


def _resolve(backend, device):
    """The backend of one call: its argument, else the process's choice, else the environment's."""
    if backend is None:
        if _chosen is None:
            return choose_backend("auto", device)
        backend = _chosen
    elif backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and not _obstacle(device) else "torch"
    if backend == "triton" and device.type != "cuda" and (reason := _obstacle(device)):
        raise ValueError(f"backend: 'triton' cannot run, {reason}; choose auto or torch")
    return backend


# A compiled graph holds one choice. torch.compiler.assume_constant_result sets the same mark, but would import the
# compiler: a second at every start.
_resolve._dynamo_marked_constant = True


@functools.cache
def _obstacle(device):
    """Why Triton cannot run on a device, or None."""
    if not _triton_is_installed():
        return "the package triton is not installed"
    if triton_is_interpreted():
        return None
    if device.type != "cuda":
        needed = "Triton needs a CUDA device, or TRITON_INTERPRET=1 in the environment for a slow check"
        return f"the device is {device} and {needed}"
    if old := old_capability(device):
        return f"the GPU has compute capability {old[0]} and the kernels are made for {old[1]} and newer"
    return None


def old_capability(device):
    """("7.5", "8.0"): a GPU's compute capability and the oldest that kernels and bfloat16 need, where it is older.

    None for a newer GPU, and for a CPU.
    """
    if device.type != "cuda" or (found := torch.cuda.get_device_capability(device)) >= OLDEST_CAPABILITY:
        return None
    return tuple(".".join(map(str, version)) for version in (found, OLDEST_CAPABILITY))


def _triton_is_installed():
    return find_spec("triton") is not None


def affine_noise_step(x, e, a, b, s, log_gamma, noise, backend=None):
    """y = a x + b e + s exp(log_gamma) n, differentiable in x, e and log_gamma; like x.

    x, e: [B, *event]; e None for no such term.
    a, b, s: tables [K + 1], of which a sample takes the entry of its stream.
    log_gamma: [1 or K, 1 or size of an event].
    noise: `Noise` of the batch.
    Raises ValueError for tensors that do not fit each other.
    """
    _check(x, e, (a, b, s), noise.stream)
    _check_noise(x, len(a) - 1, log_gamma, noise)
    return library.affine_noise_step(x, e, a, b, s, log_gamma, *_flat(noise), _resolve(backend, x.device))


def affine_step(x, e, a, b, stream, backend=None):
    """y = a x + b e, without noise, differentiable in x and e; stream [B] int, the rest as of `affine_noise_step`."""
    _check(x, e, (a, b), stream)
    return library.affine_noise_step(x, e, a, b, None, None, None, stream, None, None, _resolve(backend, x.device))


def denoising_loss_and_grads(f, weight, scale, log_gamma, noise, backend=None):
    """(losses [B], d loss / d f) of the mean over the batch of weight |f - t|^2, t = n scale exp(-log_gamma).

    f: [B, *event]; weight, scale: tables [K + 1]; the rest as of `affine_noise_step`.
    The losses are not differentiable again.
    """
    _check(f, None, (weight, scale), noise.stream)
    _check_noise(f, len(weight) - 1, log_gamma, noise)
    return library.denoising_loss_and_grads(f, weight, scale, log_gamma, *_flat(noise), _resolve(backend, f.device))


def fisher_loss_and_grads(f, e, weight, scale, log_gamma, noise, alpha=0.5, backend=None):
    """The mean over the batch of 2 weight (g (t - e) - alpha g^2), g = f - e, with its gradients.

    f, e: [B, *event]; alpha: a float, of which 1/2 is computed by the shorter formula without it; the rest as of
    `denoising_loss_and_grads`.
    Returns (losses [B], d loss / d f, d loss / d e, the direct d loss / d log_gamma).
    """
    _check(f, e, (weight, scale), noise.stream)
    _check_noise(f, len(weight) - 1, log_gamma, noise)
    backend = _resolve(backend, f.device)
    return library.fisher_loss_and_grads(f, e, weight, scale, log_gamma, *_flat(noise), backend, alpha)


def group_norm_silu(x, groups, weight, bias, eps, silu=True, scale=None, shift=None, add=None, backend=None):
    """GroupNorm of x + add, then y (1 + scale) + shift, then SiLU where `silu`; differentiable in all tensors; like x.

    x: [B, C, *spatial]; weight, bias: [C] or None; scale, shift, add: [B, C] or None.
    Raises ValueError for what does not fit.
    """
    _check_norm(x, groups, weight, bias, scale, shift, add)
    if _resolve(backend, x.device) == "torch":
        return reference.group_norm_silu(x, groups, weight, bias, eps, silu, scale, shift, add)
    scale, shift, add = map(_dense_rows, (scale, shift, add))
    return library.group_norm_silu(x, groups, weight, bias, eps, silu, scale, shift, add)[0]


def joined_group_norm_silu(
    x, groups, weight, bias, eps, silu=True, add=None, residual=None, factor=1.0, beside=None, backend=None
):
    """GroupNorm, and SiLU where `silu`, of whole = [(x + add + residual) factor, beside], an input in parts.

    Returns (y, whole), both [B, C1 + C2, *spatial] and differentiable in all tensors.
    x, residual: [B, C1, *spatial]; beside: [B, C2, *spatial]; weight, bias: [C1 + C2] or None; add: [B, C1].
    residual, add and beside may be None. x itself is `whole` where it has no other parts.
    The kernel takes parts of one type and memory format. Torch adds or concatenates others before it.
    Raises ValueError for what does not fit.
    """
    _check_norm(x, groups, weight, bias, None, None, add, residual, beside)
    by_kernel = _resolve(backend, x.device) == "triton"
    if not by_kernel or not _lie_alike(x, residual):
        x, add, residual, factor = joined(x, add, residual, factor), None, None, 1.0
    if not by_kernel or not _lie_alike(x, beside):
        x, add, residual, factor, beside = joined(x, add, residual, factor, beside), None, None, 1.0, None
    if all(part is None for part in (add, residual, beside)) and factor == 1:
        return group_norm_silu(x, groups, weight, bias, eps, silu, backend=backend), x
    arguments = (x, groups, weight, bias, eps, silu, _dense_rows(add), residual, factor, beside)
    return library.joined_group_norm_silu(*arguments)[:2]


def _check_norm(x, groups, weight, bias, scale, shift, add, residual=None, beside=None):
    """What a caller of group normalisation can get wrong."""
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"ops: a tensor of shape {tuple(x.shape)} has nothing to normalise")
    batch, own, *spatial = x.shape
    channels = own if beside is None else own + beside.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"ops: {channels} channels cannot be cut into {groups} groups")
    if (weight is None) != (bias is None) or (scale is None) != (shift is None):
        raise ValueError("ops: weight and bias, and scale and shift, come in pairs")
    for name, tensor, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (batch, channels)),
        ("shift", shift, (batch, channels)),
        ("add", add, (batch, own)),
        ("residual", residual, (batch, own, *spatial)),
        ("beside", beside, (batch, channels - own, *spatial)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.device != x.device:
            raise ValueError(
                f"ops: {name} of shape {tuple(tensor.shape)} on {tensor.device}; expected {shape} on {x.device}"
            )


def _lie_alike(x, other):
    """Whether two tensors [B, C, *spatial] have one type and both are row-major or channels_last; other may be None."""
    if other is None:
        return True
    if x.dtype != other.dtype:
        return False
    if x.is_contiguous() and other.is_contiguous():
        return True
    return x.ndim == 4 and all(each.is_contiguous(memory_format=torch.channels_last) for each in (x, other))


def _dense_rows(tensor):
    """[B, C] with neighbouring channels beside each other, or None."""
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()


def draw_noise(seeds, stream, shape, draw=0, backend=None):
    """Standard normal noise by its address: seeds [B] int64, stream and draw an int or [B] -> float32 [B, *shape]."""
    if len(seeds) == 0 or 0 in shape:
        raise ValueError(f"ops: noise of shape {(len(seeds), *shape)} has no elements")
    if not isinstance(stream, torch.Tensor):
        stream = torch.full_like(seeds, stream)
    draw = _draw_numbers(draw, seeds)
    return library.draw_noise(seeds, stream, draw, list(shape), _resolve(backend, seeds.device))


def integers(run_seed, purpose, counter, n, device="cpu", backend=None):
    """64 random bits each for n items: int64 [n], a function of (run seed, purpose, counter, item) alone.

    The same bits from each backend. A CPU has torch's unless `backend` says otherwise.
    """
    device = torch.device(device)
    if _of_integers(backend, device) == "torch":
        return philox.integers(run_seed, purpose, counter, n, device)
    return library.integers(run_seed, purpose, counter, n, device)


def integers_below(limit, run_seed, purpose, counter, n, device="cpu", backend=None):
    """n integers in 0 .. limit - 1, int64 [n]: the low 32 bits of `integers`, scaled."""
    device = torch.device(device)
    if _of_integers(backend, device) == "torch":
        return philox.integers_below(limit, run_seed, purpose, counter, n, device)
    return library.integers(run_seed, purpose, counter, n, device, limit)


def integers_of_seeds(seeds, limit, backend=None):
    """An integer in 0 .. limit - 1 for each of the seeds [B] int64: int64 [B], a function of the seed alone.

    limit: below 2^31.
    """
    if _of_integers(backend, seeds.device) == "torch":
        return philox.integers_of_seeds(seeds, limit)
    return library.integers_of_seeds(seeds, limit)


def _of_integers(backend, device):
    """The backend of a draw of integers. The host draws some of them itself, where the kernels run on its GPU."""
    return "torch" if backend is None and device.type == "cpu" else _resolve(backend, device)


class AdamStep:
    """Adam with amsgrad on clipped gradients, and the average of the weights, in one pass. The Triton backend's alone.

    parameters, exp_avg, exp_avg_sq, max_exp_avg_sq, averages: lists of P float32 tensors, which stay where they are.
    factors: P numbers, of the rate. clip: the largest norm of all gradients. betas, eps: of Adam.
    Raises ValueError for tensors that no kernel takes.
    """

    def __init__(self, parameters, exp_avg, exp_avg_sq, max_exp_avg_sq, averages, factors, clip, betas, eps):
        lists = ([tensor.detach() for tensor in parameters], exp_avg, exp_avg_sq, max_exp_avg_sq, averages)
        self._table, aligned = library.kernels("adam_step").adam_table(*lists, factors)
        self._tensors = [tensor for tensors in lists for tensor in tensors]
        self._constants = (aligned, clip, *betas, eps)

    def __call__(self, gradients, norm, numbers):
        """Update all of them in place. Nothing is copied from the host, so that it can be recorded and replayed.

        gradients: P tensors; norm: [], theirs. numbers: [3], rate / (1 - beta1^n), sqrt(1 - beta2^n), and the weight of
        the average, in step n.
        """
        library.adam_step(self._tensors, gradients, norm, numbers, self._table, *self._constants)


def _flat(noise):
    """`Noise` as the operators take it: (seeds, stream, draw, given)."""
    return noise.seeds, noise.stream, _draw_numbers(noise.draw, noise.stream), noise.given


def _draw_numbers(draw, like):
    """The numbers of the draws as the operators take them: [B], or None for 0."""
    if isinstance(draw, torch.Tensor):
        return draw
    return torch.full((len(like),), draw, dtype=torch.int64, device=like.device) if draw else None


def _check(x, e, tables, stream):
    """What a caller can get wrong, as far as shapes, types and devices tell.

    Values on a device are not read, which would make the host wait.
    """
    if 0 in x.shape:
        raise ValueError(f"ops: a tensor of shape {tuple(x.shape)} has no elements")
    if e is not None and (e.shape != x.shape or e.dtype != x.dtype or e.device != x.device):
        raise ValueError(f"ops: tensors differ, {_described(x)} and {_described(e)}")
    for table in tables:
        if table is not None and (table.ndim != 1 or table.shape != tables[0].shape or table.device != x.device):
            expected = f"expected {tuple(tables[0].shape)} on {x.device}"
            raise ValueError(f"ops: a table of shape {tuple(table.shape)} on {table.device}; {expected}")
    if stream.shape != (len(x),) or stream.device != x.device:
        there = f"stream of shape {tuple(stream.shape)} on {stream.device}"
        raise ValueError(f"ops: {there} for {len(x)} samples on {x.device}")


def _check_noise(x, layers, log_gamma, noise):
    """The same for what a step or loss with noise has on top."""
    seeds, given, size = noise.seeds, noise.given, x[0].numel()
    if given is None and (seeds.shape != (len(x),) or seeds.dtype != torch.int64 or seeds.device != x.device):
        raise ValueError(f"ops: seeds of shape {_described(seeds)} for {len(x)} samples on {x.device}; they are int64")
    if given is not None and (given.shape != x.shape or given.device != x.device):
        there = f"noise of shape {tuple(given.shape)} on {given.device}"
        raise ValueError(f"ops: {there} for samples of shape {tuple(x.shape)} on {x.device}")
    fits = log_gamma.ndim == 2 and log_gamma.shape[0] in (1, layers) and log_gamma.shape[1] in (1, size)
    if not fits or log_gamma.device != x.device:
        there = f"log_gamma of shape {tuple(log_gamma.shape)} on {log_gamma.device}"
        raise ValueError(f"ops: {there}; expected [1 or {layers}, 1 or {size}] on {x.device}")


def _described(tensor):
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"

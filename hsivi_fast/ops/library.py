"""The operations as operators of torch, `torch.ops.hsivi_fast.*`: both backends, output shapes, and gradients.

An operator is opaque to torch.compile, which is the point. Inductor then fuses neither into a Triton kernel nor into
the integers of the plain Philox, which it miscompiles in some forms. The backend is an argument, so that one graph
holds one choice. `kernels/` is imported when a Triton backend runs, and by no other file.
"""

import contextlib
import functools
import importlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import philox, reference


@functools.cache
def kernels(name):
    """A module of `kernels/`, imported at its first use: Triton need not be installed for the torch backend."""
    return importlib.import_module(f"hsivi_fast.kernels.{name}")


def _check_stream(stream, layers):
    """ValueError for a stream outside 1 .. layers, where looking does not make the host wait.

    On a GPU the kernels give NaN for it.
    """
    if stream.device.type == "cpu" and len(stream):
        low, high = int(stream.min()), int(stream.max())
        if low < 1 or high > layers:
            raise ValueError(f"ops: stream {low if low < 1 else high} is outside 1 .. {layers}")


def _device_of(x):
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# ---- noise -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("hsivi_fast::draw_noise", mutates_args=())
def draw_noise(seeds: Tensor, stream: Tensor, draw: Tensor | None, shape: list[int], backend: str) -> Tensor:
    if backend == "triton":
        with _device_of(seeds):
            return kernels("philox").draw_noise(seeds, stream, draw, shape)
    return reference.draw_noise(seeds, stream, shape, 0 if draw is None else draw).contiguous()


@draw_noise.register_fake
def _(seeds, stream, draw, shape, backend):
    return seeds.new_empty(len(seeds), *shape, dtype=torch.float32)


@torch.library.custom_op("hsivi_fast::integers_of_seeds", mutates_args=())
def integers_of_seeds(seeds: Tensor, limit: int) -> Tensor:
    """Triton only. It is an operator because a recorded call takes the labels of its seeds from it."""
    with _device_of(seeds):
        return kernels("philox").integers_of_seeds(seeds.contiguous(), philox.LAST_STREAM, limit)


@integers_of_seeds.register_fake
def _(seeds, limit):
    return torch.empty_like(seeds, memory_format=torch.contiguous_format)


def integers(run_seed, purpose, counter, n, device, limit=None):
    """Triton only. Its inputs are the host's numbers, so that no recorded or compiled call has it."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return kernels("philox").integers(run_seed, purpose, counter, n, device, limit)


# ---- the affine step -------------------------------------------------------------------------------------------------


@torch.library.custom_op("hsivi_fast::affine_noise_step", mutates_args=())
def affine_noise_step(
    x: Tensor,
    e: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    s: Tensor | None,
    log_gamma: Tensor | None,
    seeds: Tensor | None,
    stream: Tensor,
    draw: Tensor | None,
    noise: Tensor | None,
    backend: str,
) -> Tensor:
    _check_stream(stream, len(a) - 1)
    if backend == "triton":
        with _device_of(x):
            return kernels("affine_noise_step").affine_noise_step(x, e, a, b, s, log_gamma, seeds, stream, draw, noise)
    return _laid_out_like(reference.affine_noise_step(x, e, a, b, s, log_gamma, seeds, stream, draw, noise), x)


@affine_noise_step.register_fake
def _(x, e, a, b, s, log_gamma, seeds, stream, draw, noise, backend):
    return torch.empty_like(x)


@torch.library.custom_op("hsivi_fast::affine_noise_step_backward", mutates_args=())
def affine_noise_step_backward(
    dy: Tensor,
    e: Tensor,
    b: Tensor,
    s: Tensor,
    log_gamma: Tensor,
    seeds: Tensor | None,
    stream: Tensor,
    draw: Tensor | None,
    noise: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        with _device_of(dy):
            return kernels("affine_noise_step").affine_noise_step_backward(
                dy, e, b, s, log_gamma, seeds, stream, draw, noise
            )
    de, dlog_gamma = reference.affine_noise_step_backward(dy, e, b, s, log_gamma, seeds, stream, draw, noise)
    return _laid_out_like(de, e), dlog_gamma


@affine_noise_step_backward.register_fake
def _(dy, e, b, s, log_gamma, seeds, stream, draw, noise, backend):
    return torch.empty_like(e), torch.empty_like(log_gamma)


def _save_step(ctx, inputs, output):
    x, e, a, b, s, log_gamma, seeds, stream, draw, noise, backend = inputs
    # e is kept for its layout alone; the noise is not kept, unless it was given.
    ctx.save_for_backward(e, a, b, s, log_gamma, seeds, stream, draw, noise)
    ctx.backend = backend


def _step_gradients(ctx, dy):
    e, a, b, s, log_gamma, seeds, stream, draw, noise = ctx.saved_tensors
    dx = de = dlog_gamma = None
    if not (dy.is_contiguous() or dy.ndim == 4 and dy.is_contiguous(memory_format=torch.channels_last)):
        dy = dy.contiguous()  # as the one of a sum, which repeats one number
    if ctx.needs_input_grad[0]:
        dx = affine_noise_step(dy, None, a, None, None, None, None, stream, None, None, ctx.backend)
    if log_gamma is not None and ctx.needs_input_grad[5]:
        de, dlog_gamma = affine_noise_step_backward(
            dy, dy if e is None else e, a if e is None else b, s, log_gamma, seeds, stream, draw, noise, ctx.backend
        )
    elif ctx.needs_input_grad[1]:
        de = affine_noise_step(dy, None, b, None, None, None, None, stream, None, None, ctx.backend)
    return dx, None if e is None else de, None, None, None, dlog_gamma, None, None, None, None, None


affine_noise_step.register_autograd(_step_gradients, setup_context=_save_step)


# ---- the losses ------------------------------------------------------------------------------------------------------
# Their gradients are outputs, for L = the mean of the losses. They have no autograd formula on purpose: scaling saved
# gradients by a cotangent would read and write all of them once more.


@torch.library.custom_op("hsivi_fast::denoising_loss_and_grads", mutates_args=())
def denoising_loss_and_grads(
    f: Tensor,
    weight: Tensor,
    scale: Tensor,
    log_gamma: Tensor,
    seeds: Tensor | None,
    stream: Tensor,
    draw: Tensor | None,
    noise: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_stream(stream, len(weight) - 1)
    if backend == "triton":
        with _device_of(f):
            return kernels("score_losses").denoising_loss_and_grads(
                f, weight, scale, log_gamma, seeds, stream, draw, noise
            )
    losses, df = reference.denoising_loss_and_grads(f, weight, scale, log_gamma, seeds, stream, draw, noise)
    return losses, _laid_out_like(df, f)


@denoising_loss_and_grads.register_fake
def _(f, weight, scale, log_gamma, seeds, stream, draw, noise, backend):
    return f.new_empty(len(f), dtype=torch.promote_types(f.dtype, torch.float32)), torch.empty_like(f)


@torch.library.custom_op("hsivi_fast::fisher_loss_and_grads", mutates_args=())
def fisher_loss_and_grads(
    f: Tensor,
    e: Tensor,
    weight: Tensor,
    scale: Tensor,
    log_gamma: Tensor,
    seeds: Tensor | None,
    stream: Tensor,
    draw: Tensor | None,
    noise: Tensor | None,
    backend: str,
    alpha: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_stream(stream, len(weight) - 1)
    if backend == "triton":
        with _device_of(f):
            return kernels("score_losses").fisher_loss_and_grads(
                f, e, weight, scale, log_gamma, seeds, stream, draw, noise, alpha
            )
    losses, df, de, dlog_gamma = reference.fisher_loss_and_grads(
        f, e, weight, scale, log_gamma, seeds, stream, draw, noise, alpha
    )
    return losses, _laid_out_like(df, f), _laid_out_like(de, e), dlog_gamma


@fisher_loss_and_grads.register_fake
def _(f, e, weight, scale, log_gamma, seeds, stream, draw, noise, backend, alpha=0.5):
    losses = f.new_empty(len(f), dtype=torch.promote_types(f.dtype, torch.float32))
    return losses, torch.empty_like(f), torch.empty_like(e), torch.empty_like(log_gamma)


# ---- group normalisation ---------------------------------------------------------------------------------------------
# Triton only: the plain version is transparent to Inductor, which fuses it with its neighbours. A network has 50 of
# these a call, and torch takes about as long to find the function of an operator of Python's as that takes to launch
# the kernel. So a call that nobody watches is no operator's.


def _unless_unwatched(operator, function):
    """A function that calls an operator, or the function behind it where nothing wants to see which operators run.

    That may be autograd, a compiler, or a mode that counts or has tensors without memory.
    """

    def call(*arguments):
        watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return (operator if watched else function)(*arguments)

    return call


def _group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with _device_of(x):
        return kernels("group_norm_silu").group_norm_silu(x, groups, weight, bias, eps, silu, scale, shift, add)


norm_operator = torch.library.custom_op("hsivi_fast::group_norm_silu", _group_norm_silu, mutates_args=())
group_norm_silu = _unless_unwatched(norm_operator, _group_norm_silu)


@norm_operator.register_fake
def _(x, groups, weight, bias, eps, silu, scale, shift, add):
    mean = x.new_empty(len(x), groups, dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("hsivi_fast::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    with_dadd: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with _device_of(x):
        dx, sums, dadd = kernels("group_norm_silu").group_norm_silu_backward(
            dy, x, groups, weight, bias, silu, scale, shift, add, mean, rstd, with_dadd
        )
    return dx, sums, sums.new_empty(0) if dadd is None else dadd


@group_norm_silu_backward.register_fake
def _(dy, x, groups, weight, bias, silu, scale, shift, add, mean, rstd, with_dadd):
    sums = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x), sums, torch.empty_like(sums[0]) if with_dadd else sums.new_empty(0)


def _save_norm(ctx, inputs, output):
    x, groups, weight, bias, eps, silu, scale, shift, add = inputs
    y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # of mean and rstd: zeros, which nothing reads
    ctx.save_for_backward(x, weight, bias, scale, shift, add, mean, rstd)
    ctx.groups, ctx.silu = groups, silu


def _norm_gradients(ctx, dy, _mean, _rstd):
    x, weight, bias, scale, shift, add, mean, rstd = ctx.saved_tensors
    if dy is None:
        return (None,) * 9
    with_dadd = add is not None and ctx.needs_input_grad[8]
    dx, sums, dadd = group_norm_silu_backward(
        _laid_out_like(dy, x), x, ctx.groups, weight, bias, ctx.silu, scale, shift, add, mean, rstd, with_dadd
    )
    others = (None,) * 4
    if any(ctx.needs_input_grad[index] for index in (2, 3, 6, 7)):  # not in a pull-back to the input alone
        others = kernels("group_norm_silu").parameter_grads(sums, weight, bias, scale)
    dweight, dbias, dscale, dshift = others
    return dx, None, dweight, dbias, None, None, dscale, dshift, dadd.to(add.dtype) if with_dadd else None


norm_operator.register_autograd(_norm_gradients, setup_context=_save_norm)


def _joined_group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    add: Tensor | None,
    residual: Tensor | None,
    factor: float,
    beside: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _device_of(x):
        return kernels("group_norm_silu").joined_group_norm_silu(
            x, groups, weight, bias, eps, silu, add, residual, factor, beside
        )


joined_norm_operator = torch.library.custom_op(
    "hsivi_fast::joined_group_norm_silu", _joined_group_norm_silu, mutates_args=()
)
joined_group_norm_silu = _unless_unwatched(joined_norm_operator, _joined_group_norm_silu)


@joined_norm_operator.register_fake
def _(x, groups, weight, bias, eps, silu, add, residual, factor, beside):
    whole = kernels("group_norm_silu").empty_whole(x, beside)
    mean = x.new_empty(len(x), groups, dtype=torch.float32)
    return torch.empty_like(whole), whole, mean, torch.empty_like(mean)


@torch.library.custom_op("hsivi_fast::joined_group_norm_silu_backward", mutates_args=())
def joined_group_norm_silu_backward(
    dy: Tensor,
    dwhole: Tensor | None,
    whole: Tensor,
    x_channels: int,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    factor: float,
    mean: Tensor,
    rstd: Tensor,
    with_dadd: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _device_of(whole):
        dx, dbeside, sums, dadd = kernels("group_norm_silu").joined_group_norm_silu_backward(
            dy, dwhole, whole, x_channels, groups, weight, bias, silu, factor, mean, rstd, with_dadd
        )
    dbeside, dadd = (sums.new_empty(0) if gradient is None else gradient for gradient in (dbeside, dadd))
    return dx, dbeside, sums, dadd


@joined_group_norm_silu_backward.register_fake
def _(dy, dwhole, whole, x_channels, groups, weight, bias, silu, factor, mean, rstd, with_dadd):
    like, (batch, channels) = kernels("group_norm_silu").empty_channels, whole.shape[:2]
    sums = whole.new_empty(2, batch, channels, dtype=torch.float32)
    dbeside = like(whole, channels - x_channels) if x_channels < channels else sums.new_empty(0)
    dadd = sums.new_empty_strided((batch, x_channels), (channels, 1)) if with_dadd else sums.new_empty(0)
    return like(whole, x_channels), dbeside, sums, dadd


def _save_joined(ctx, inputs, output):
    x, groups, weight, bias, eps, silu, add, residual, factor, beside = inputs
    y, whole, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(whole, weight, bias, mean, rstd)
    ctx.groups, ctx.silu, ctx.factor, ctx.x_channels = groups, silu, factor, x.shape[1]
    ctx.add_type = None if add is None else add.dtype


def _joined_gradients(ctx, dy, dwhole, _mean, _rstd):
    whole, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None and dwhole is None:
        return (None,) * 10
    dy = torch.zeros_like(whole) if dy is None else _laid_out_like(dy, whole)
    dwhole = None if dwhole is None else _laid_out_like(dwhole, whole)
    dx, dbeside, sums, dadd = joined_group_norm_silu_backward(
        *(dy, dwhole, whole, ctx.x_channels, ctx.groups, weight, bias, ctx.silu, ctx.factor, mean, rstd),
        ctx.needs_input_grad[6],
    )
    dweight = dbias = None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        dweight, dbias, _, _ = kernels("group_norm_silu").parameter_grads(sums, weight, bias, None)
    needs_dadd, needs_dresidual, needs_dbeside = (ctx.needs_input_grad[index] for index in (6, 7, 9))
    return (
        *(dx, None, dweight, dbias, None, None),
        dadd.to(ctx.add_type) if needs_dadd else None,
        dx if needs_dresidual else None,
        None,
        dbeside if needs_dbeside else None,
    )


joined_norm_operator.register_autograd(_joined_gradients, setup_context=_save_joined)


# ---- the optimizer step ----------------------------------------------------------------------------------------------
# Triton only: the plain version is torch.optim.Adam with what stands around it.


@torch.library.custom_op("hsivi_fast::adam_step", mutates_args=("tensors", "table"))
def adam_step(
    tensors: list[Tensor],
    gradients: list[Tensor],
    norm: Tensor,
    numbers: Tensor,
    table: list[Tensor],
    aligned: bool,
    clip: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """tensors: the lists that the table was made of, joined. The kernel knows them by their addresses alone."""
    with _device_of(norm):
        parameters = tensors[: len(gradients)]
        kernels("adam_step").adam_step(parameters, gradients, norm, numbers, table, aligned, clip, beta1, beta2, eps)


def _laid_out_like(value, tensor):
    """`value` with the strides that `torch.empty_like(tensor)` has, copied only where they differ."""
    target = torch.empty_like(tensor, device="meta")
    if value.stride() == target.stride():
        return value
    return torch.empty_like(tensor, dtype=value.dtype).copy_(value)

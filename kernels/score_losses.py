"""The two score-matching losses, each with all of its gradients in one pass.

Sample i has a stream k_i in 1 .. K; w ("weight") and r ("scale") are tables of K + 1 numbers, of which it takes entry
k_i. Its target is t = n r exp(-l), with l ("log_gamma") and the noise n as in noise_scale.py. The noise is made in
registers, not read. There are B samples.

    denoising
        forward     L = 1/B sum w (f - t)^2
        backward    dL/df = 2 w (f - t) / B
    Fisher, with g = f - e and a number alpha, beta = 1 - 2 alpha
        forward     L = 1/B sum 2 w (g (t - e) - alpha g^2) = 1/B sum w (2 g (t - e) - g^2 + beta g^2)
        backward    dL/df = 2 w (t - f + beta g) / B        dL/de = -2 w (t - e + beta g) / B
                    dL/dl[row] = sum over the row's samples of -2 w g t / B

At alpha = 1/2 beta is None, and no code is compiled for it. Any other is a number given at the launch, so one compiled
kernel serves them all.

The losses come a sample, so that a loss that is not finite can be traced to its sample. Sums are in two stages in a
fixed order. A stream outside 1 .. K gives NaN for its sample.

Tensor passes of the size of f: denoising 2 (f, dL/df), Fisher 4 (f, e, dL/df, dL/de).
"""

import torch
import triton
import triton.language as tl

from .memory import cut_samples, element_offset, layout_arguments, load_float, most_registers, store_rounded
from .noise_scale import (
    finish_sum,
    gamma_shape,
    load_log_gamma,
    load_noise,
    noise_source,
    prepare_sum,
    table_entry,
    warps_of_sums,
)

# ---- jitted functions ------------------------------------------------------------------------------------------------


@triton.jit
def _load_target(
    noise_ptr,  # [B, size] row-major, or None
    scale_ptr,  # table [layers + 1]
    log_gamma_ptr,  # [1 or layers, 1 or size]
    seed_ptr, draw_ptr,  # [B]; no draw_ptr: draw 0
    sample, k,  # the sample and its stream
    block, i, mask, size,  # the block, its elements, which of them exist, elements a sample
    layers,  # streams
    NOISE: tl.constexpr,  # kind of noise
    PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr,  # shape of log_gamma
    BLOCK: tl.constexpr, WIDE: tl.constexpr,  # elements a block; 8 in the place of 4 a lane
):  # fmt: skip
    """t = n r exp(-l) of a block of elements."""
    noise = load_noise(
        noise_ptr,
        seed_ptr, draw_ptr,
        sample, k,
        block, i, mask, size,
        NOISE,
        BLOCK, WIDE,
    )  # fmt: skip
    log_gamma = load_log_gamma(log_gamma_ptr, k, layers, i, mask, size, PER_LAYER, PER_ELEMENT)
    return noise * (table_entry(scale_ptr, k, layers) * tl.exp(-log_gamma))


@triton.jit
def _denoising_kernel(
    f_ptr, df_ptr,  # [B, *event]; df written
    weight_ptr, scale_ptr,  # tables [layers + 1]
    log_gamma_ptr,  # [1 or layers, 1 or size]
    seed_ptr, stream_ptr, draw_ptr,  # [B]; no draw_ptr: draw 0
    noise_ptr,  # [B, size] row-major, or None
    loss_ptr,  # [B, blocks], written
    f_stride, F_CHANNEL: tl.constexpr, F_PIXEL: tl.constexpr,  # layout of f
    df_stride, DF_CHANNEL: tl.constexpr, DF_PIXEL: tl.constexpr,  # layout of df
    PIXELS: tl.constexpr,  # elements a channel, where a layout needs them
    size, blocks, layers,  # elements a sample, blocks a sample, streams
    inverse_batch,  # 1 / B
    NOISE: tl.constexpr,  # kind of noise
    PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr,  # shape of log_gamma
    BLOCK: tl.constexpr, WIDE: tl.constexpr,  # elements a block; 8 in the place of 4 a lane
):  # fmt: skip
    """One program: a block of one sample."""
    program = tl.program_id(0)
    sample = program // blocks
    block = program % blocks
    row = sample.to(tl.int64)
    k = tl.load(stream_ptr + sample)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    f = load_float(f_ptr + row * f_stride + element_offset(i, PIXELS, F_CHANNEL, F_PIXEL), mask)
    target = _load_target(
        noise_ptr,
        scale_ptr,
        log_gamma_ptr,
        seed_ptr, draw_ptr,
        sample, k,
        block, i, mask, size,
        layers,
        NOISE,
        PER_LAYER, PER_ELEMENT,
        BLOCK, WIDE,
    )  # fmt: skip
    weight = table_entry(weight_ptr, k, layers)
    residual = tl.where(mask, f - target, 0.0)
    df_pointer = df_ptr + row * df_stride + element_offset(i, PIXELS, DF_CHANNEL, DF_PIXEL)
    store_rounded(df_pointer, 2.0 * inverse_batch * weight * residual, mask)
    tl.store(loss_ptr + program, weight * tl.sum(residual * residual, axis=0))


@triton.jit
def _fisher_sample(
    sample, block, i, mask,  # a sample, a block of it, the block's elements, which of them exist
    f_ptr, e_ptr,  # [B, *event]
    df_ptr, de_ptr,  # like f and e, written
    weight_ptr, scale_ptr,  # tables [layers + 1]
    log_gamma_ptr,  # [1 or layers, 1 or size]
    seed_ptr, stream_ptr, draw_ptr,  # [B]; no draw_ptr: draw 0
    noise_ptr,  # [B, size] row-major, or None
    f_stride, F_CHANNEL: tl.constexpr, F_PIXEL: tl.constexpr,  # layout of f
    e_stride, E_CHANNEL: tl.constexpr, E_PIXEL: tl.constexpr,  # layout of e
    df_stride, DF_CHANNEL: tl.constexpr, DF_PIXEL: tl.constexpr,  # layout of df
    de_stride, DE_CHANNEL: tl.constexpr, DE_PIXEL: tl.constexpr,  # layout of de
    PIXELS: tl.constexpr,  # elements a channel, where a layout needs them
    size, layers,  # elements a sample, streams
    inverse_batch,  # 1 / B
    beta,  # 1 - 2 alpha, or None for 0
    NOISE: tl.constexpr,  # kind of noise
    PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr,  # shape of log_gamma
    BLOCK: tl.constexpr, WIDE: tl.constexpr,  # elements a block; 8 in the place of 4 a lane
):  # fmt: skip
    """Write dL/df and dL/de of a block of one sample. Return its terms of B L and of dL/dl, 0 beyond the end."""
    row = sample.to(tl.int64)
    k = tl.load(stream_ptr + sample)
    f = load_float(f_ptr + row * f_stride + element_offset(i, PIXELS, F_CHANNEL, F_PIXEL), mask)
    e = load_float(e_ptr + row * e_stride + element_offset(i, PIXELS, E_CHANNEL, E_PIXEL), mask)
    target = _load_target(
        noise_ptr,
        scale_ptr,
        log_gamma_ptr,
        seed_ptr, draw_ptr,
        sample, k,
        block, i, mask, size,
        layers,
        NOISE,
        PER_LAYER, PER_ELEMENT,
        BLOCK, WIDE,
    )  # fmt: skip
    weight = table_entry(weight_ptr, k, layers)
    factor = 2.0 * inverse_batch * weight
    df_pointer = df_ptr + row * df_stride + element_offset(i, PIXELS, DF_CHANNEL, DF_PIXEL)
    df = target - f
    if beta is not None:
        shift = beta * (f - e)  # one product for all three: with one each, some variants spill
        df += shift
    store_rounded(df_pointer, factor * df, mask)
    de_pointer = de_ptr + row * de_stride + element_offset(i, PIXELS, DE_CHANNEL, DE_PIXEL)
    de = e - target
    if beta is not None:
        de -= shift
    store_rounded(de_pointer, factor * de, mask)
    g = tl.where(mask, f - e, 0.0)
    loss = weight * g * (2.0 * (target - e) - g)
    if beta is not None:
        loss += weight * g * shift
    return loss, -factor * g * target


@triton.jit
def _fisher_kernel(
    f_ptr, e_ptr,  # [B, *event]
    df_ptr, de_ptr,  # like f and e, written
    weight_ptr, scale_ptr,  # tables [layers + 1]
    log_gamma_ptr,  # [1 or layers, 1 or size]
    seed_ptr, stream_ptr, draw_ptr,  # [B]; no draw_ptr: draw 0
    noise_ptr,  # [B, size] row-major, or None
    order_ptr, first_ptr, last_ptr,  # group g has the samples order[first[g]:last[g]]; None without groups
    loss_ptr,  # [B, blocks], written
    partial_ptr,  # first stage of dL/dl, written: [groups, size], or [B, blocks] without groups
    f_stride, F_CHANNEL: tl.constexpr, F_PIXEL: tl.constexpr,  # layout of f
    e_stride, E_CHANNEL: tl.constexpr, E_PIXEL: tl.constexpr,  # layout of e
    df_stride, DF_CHANNEL: tl.constexpr, DF_PIXEL: tl.constexpr,  # layout of df
    de_stride, DE_CHANNEL: tl.constexpr, DE_PIXEL: tl.constexpr,  # layout of de
    PIXELS: tl.constexpr,  # elements a channel, where a layout needs them
    size, blocks, layers,  # elements a sample, blocks a sample, streams
    inverse_batch,  # 1 / B
    beta,  # 1 - 2 alpha, or None for 0
    NOISE: tl.constexpr,  # kind of noise
    PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr,  # shape of log_gamma
    BLOCK: tl.constexpr, WIDE: tl.constexpr,  # elements a block; 8 in the place of 4 a lane
):  # fmt: skip
    """One program: a block of one sample, or of a group of samples where log_gamma has an entry an element."""
    program = tl.program_id(0)
    group = program // blocks
    block = program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    if PER_ELEMENT:
        total = tl.zeros([BLOCK], tl.float32)
        for position in range(tl.load(first_ptr + group), tl.load(last_ptr + group)):
            sample = tl.load(order_ptr + position)
            loss, slope = _fisher_sample(
                sample, block, i, mask,
                f_ptr, e_ptr,
                df_ptr, de_ptr,
                weight_ptr, scale_ptr,
                log_gamma_ptr,
                seed_ptr, stream_ptr, draw_ptr,
                noise_ptr,
                f_stride, F_CHANNEL, F_PIXEL,
                e_stride, E_CHANNEL, E_PIXEL,
                df_stride, DF_CHANNEL, DF_PIXEL,
                de_stride, DE_CHANNEL, DE_PIXEL,
                PIXELS,
                size, layers,
                inverse_batch,
                beta,
                NOISE,
                PER_LAYER, PER_ELEMENT,
                BLOCK, WIDE,
            )  # fmt: skip
            tl.store(loss_ptr + sample.to(tl.int64) * blocks + block, tl.sum(loss, axis=0))
            total += slope
        tl.store(partial_ptr + group.to(tl.int64) * size + i, total, mask=mask)
    else:
        loss, slope = _fisher_sample(
            group, block, i, mask,
            f_ptr, e_ptr,
            df_ptr, de_ptr,
            weight_ptr, scale_ptr,
            log_gamma_ptr,
            seed_ptr, stream_ptr, draw_ptr,
            noise_ptr,
            f_stride, F_CHANNEL, F_PIXEL,
            e_stride, E_CHANNEL, E_PIXEL,
            df_stride, DF_CHANNEL, DF_PIXEL,
            de_stride, DE_CHANNEL, DE_PIXEL,
            PIXELS,
            size, layers,
            inverse_batch,
            beta,
            NOISE,
            PER_LAYER, PER_ELEMENT,
            BLOCK, WIDE,
        )  # fmt: skip
        tl.store(loss_ptr + program, tl.sum(loss, axis=0))
        tl.store(partial_ptr + program, tl.sum(slope, axis=0))


# ---- public functions ------------------------------------------------------------------------------------------------


def denoising_loss_and_grads(f, weight, scale, log_gamma, seeds, stream, draw, noise, block=None):
    """(losses [B] float32 whose mean is L, dL/df like f) of the denoising loss; see the top of the file.

    f               [B, N] or [B, C, *spatial]
    weight, scale   [K + 1] float32
    log_gamma       [1 or K, 1 or size]
    seeds           [B] int64
    stream          [B] int in 1 .. K
    draw            [B] int, or None for 0
    noise           like f, or None for addressed noise
    block           elements a program, for tests

    Raises ValueError for a layout or type that no kernel has.
    """
    df = torch.empty_like(f)
    layouts = layout_arguments(f=f, df=df)
    size, blocks, block, warps = cut_samples(f, block)
    kind, noise = noise_source(noise)
    losses = torch.empty(len(f), blocks, dtype=torch.float32, device=f.device)
    _denoising_kernel[(len(f) * blocks,)](
        f, df,
        weight, scale,
        log_gamma,
        seeds, stream, draw,
        noise,
        losses,
        **layouts,
        size=size, blocks=blocks, layers=len(weight) - 1,
        inverse_batch=1.0 / len(f),
        NOISE=kind,
        **gamma_shape(log_gamma),
        BLOCK=block, WIDE=f.element_size() == 2, num_warps=warps,
    )  # fmt: skip
    return losses.sum(1), df


def fisher_loss_and_grads(f, e, weight, scale, log_gamma, seeds, stream, draw, noise, alpha=0.5, block=None):
    """(losses [B] float32 whose mean is L, dL/df like f, dL/de like e, dL/dlog_gamma) of the Fisher loss.

    dL/dlog_gamma is the direct one, with f and e held fixed.
    Arguments and errors as of `denoising_loss_and_grads`; e is like f, alpha a float.
    """
    df, de = torch.empty_like(f), torch.empty_like(e)
    layouts = layout_arguments(f=f, e=e, df=df, de=de)
    size, blocks, block, warps = cut_samples(f, block)
    order, first, last, first_group, partial = prepare_sum(stream, log_gamma, size, blocks)
    kind, noise = noise_source(noise)
    wide, strided = f.element_size() == 2, layouts["PIXELS"] > 0
    warps = warps_of_sums(block, warps, wide, strided)
    losses = torch.empty(len(f), blocks, dtype=torch.float32, device=f.device)
    _fisher_kernel[(len(partial) * blocks,)](
        f, e,
        df, de,
        weight, scale,
        log_gamma,
        seeds, stream, draw,
        noise,
        order, first, last,
        losses,
        partial,
        **layouts,
        size=size, blocks=blocks, layers=len(weight) - 1,
        inverse_batch=1.0 / len(f),
        beta=None if alpha == 0.5 else 1.0 - 2.0 * alpha,
        NOISE=kind,
        **gamma_shape(log_gamma),
        BLOCK=block, WIDE=wide, num_warps=warps, maxnreg=most_registers(warps) if strided else None,
    )  # fmt: skip
    return losses.sum(1), df, de, finish_sum(partial, first_group, stream, log_gamma, exponential=False)

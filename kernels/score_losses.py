"""The two score-matching losses, each with all of its gradients in one pass.

Sample i has a stream k_i in 1 .. K; w ("weight") and r ("scale") are tables of K + 1 numbers of which it takes entry k_i. Its target is
t = n r exp(-l) with l ("log_gamma") and the noise n as in affine_noise_step.py: the noise is made again, not read. B samples:

    denoising:  L = 1/B sum w (f - t)^2              dL/df = 2 w (f - t) / B
    Fisher:     L = 1/B sum w (2 g (t - e) - g^2)    with g = f - e
                dL/df = 2 w (t - f) / B     dL/de = -2 w (t - e) / B     dL/dl[row] = sum over the row's samples of -2 w g t / B

Denoising reads f and writes dL/df; Fisher reads f and e and writes dL/df and dL/de: 2 and 4 tensor passes in all. The losses come a
sample, so that a loss that is not finite can be traced to its layer. Sums are in two stages in a fixed order, without atomics. A
stream outside 1 .. K gives NaN for its sample.
"""

import torch
import triton
import triton.language as tl

from .affine_noise_step import gamma_shape, group_samples, load_log_gamma, load_noise, pixels_if_strided, sum_groups, sum_scalars, table_entry
from .affine_noise_step import ADDRESSED, GIVEN
from .memory import element_offset, load_float, sample_layout, store_rounded
from .philox import choose_block

# ---- jitted functions -------------------------------------------------------------------------------------------------


@triton.jit
def _load_target(noise_ptr, scale_ptr, log_gamma_ptr, seed_ptr, redraw_ptr, sample, k, block, i, mask, size, layers,
                 NOISE: tl.constexpr, PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """t = n r exp(-l) of a block of elements."""
    noise = load_noise(noise_ptr, seed_ptr, redraw_ptr, sample, k, block, i, mask, size, NOISE, BLOCK, WIDE)
    log_gamma = load_log_gamma(log_gamma_ptr, k, layers, i, mask, size, PER_LAYER, PER_ELEMENT)
    return noise * (table_entry(scale_ptr, k, layers) * tl.exp(-log_gamma))


@triton.jit
def _denoising_kernel(f_ptr, df_ptr, weight_ptr, scale_ptr, log_gamma_ptr, seed_ptr, stream_ptr, redraw_ptr, noise_ptr, partial_ptr,
                      f_stride, df_stride, size, blocks, layers, inverse_batch,
                      NOISE: tl.constexpr, PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr, PIXELS: tl.constexpr,
                      F_CHANNEL: tl.constexpr, F_PIXEL: tl.constexpr, DF_CHANNEL: tl.constexpr, DF_PIXEL: tl.constexpr,
                      BLOCK: tl.constexpr, WIDE: tl.constexpr):
    program = tl.program_id(0)
    sample = program // blocks
    block = program % blocks
    row = sample.to(tl.int64)
    k = tl.load(stream_ptr + sample)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    f = load_float(f_ptr + row * f_stride + element_offset(i, PIXELS, F_CHANNEL, F_PIXEL), mask)
    target = _load_target(noise_ptr, scale_ptr, log_gamma_ptr, seed_ptr, redraw_ptr, sample, k, block, i, mask, size, layers,
                          NOISE, PER_LAYER, PER_ELEMENT, BLOCK, WIDE)
    weight = table_entry(weight_ptr, k, layers)
    residual = tl.where(mask, f - target, 0.0)
    store_rounded(df_ptr + row * df_stride + element_offset(i, PIXELS, DF_CHANNEL, DF_PIXEL), 2.0 * inverse_batch * weight * residual, mask)
    tl.store(partial_ptr + program, weight * tl.sum(residual * residual, axis=0))


@triton.jit
def _fisher_sample(sample, block, i, mask, f_ptr, e_ptr, df_ptr, de_ptr, weight_ptr, scale_ptr, log_gamma_ptr, seed_ptr, stream_ptr, redraw_ptr, noise_ptr,
                   f_stride, e_stride, df_stride, de_stride, size, layers, inverse_batch,
                   NOISE: tl.constexpr, PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr, PIXELS: tl.constexpr,
                   F_CHANNEL: tl.constexpr, F_PIXEL: tl.constexpr, E_CHANNEL: tl.constexpr, E_PIXEL: tl.constexpr,
                   DF_CHANNEL: tl.constexpr, DF_PIXEL: tl.constexpr, DE_CHANNEL: tl.constexpr, DE_PIXEL: tl.constexpr,
                   BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Write dL/df and dL/de of a block of one sample; return its terms of the loss (not over B) and of dL/dl, 0 beyond the end."""
    row = sample.to(tl.int64)
    k = tl.load(stream_ptr + sample)
    f = load_float(f_ptr + row * f_stride + element_offset(i, PIXELS, F_CHANNEL, F_PIXEL), mask)
    e = load_float(e_ptr + row * e_stride + element_offset(i, PIXELS, E_CHANNEL, E_PIXEL), mask)
    target = _load_target(noise_ptr, scale_ptr, log_gamma_ptr, seed_ptr, redraw_ptr, sample, k, block, i, mask, size, layers,
                          NOISE, PER_LAYER, PER_ELEMENT, BLOCK, WIDE)
    weight = table_entry(weight_ptr, k, layers)
    factor = 2.0 * inverse_batch * weight
    store_rounded(df_ptr + row * df_stride + element_offset(i, PIXELS, DF_CHANNEL, DF_PIXEL), factor * (target - f), mask)
    store_rounded(de_ptr + row * de_stride + element_offset(i, PIXELS, DE_CHANNEL, DE_PIXEL), factor * (e - target), mask)
    g = tl.where(mask, f - e, 0.0)
    return weight * g * (2.0 * (target - e) - g), -factor * g * target


@triton.jit
def _fisher_kernel(f_ptr, e_ptr, df_ptr, de_ptr, weight_ptr, scale_ptr, log_gamma_ptr, seed_ptr, stream_ptr, redraw_ptr, noise_ptr,
                   order_ptr, first_ptr, last_ptr, loss_ptr, partial_ptr,
                   f_stride, e_stride, df_stride, de_stride, size, blocks, layers, inverse_batch,
                   NOISE: tl.constexpr, PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr, PIXELS: tl.constexpr,
                   F_CHANNEL: tl.constexpr, F_PIXEL: tl.constexpr, E_CHANNEL: tl.constexpr, E_PIXEL: tl.constexpr,
                   DF_CHANNEL: tl.constexpr, DF_PIXEL: tl.constexpr, DE_CHANNEL: tl.constexpr, DE_PIXEL: tl.constexpr,
                   BLOCK: tl.constexpr, WIDE: tl.constexpr):
    program = tl.program_id(0)
    group = program // blocks  # a sample, or with an entry a pixel, a group of samples
    block = program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    if PER_ELEMENT:
        total = tl.zeros([BLOCK], tl.float32)
        for position in range(tl.load(first_ptr + group), tl.load(last_ptr + group)):
            sample = tl.load(order_ptr + position)
            loss, slope = _fisher_sample(sample, block, i, mask, f_ptr, e_ptr, df_ptr, de_ptr, weight_ptr, scale_ptr, log_gamma_ptr, seed_ptr, stream_ptr,
                                         redraw_ptr, noise_ptr, f_stride, e_stride, df_stride, de_stride, size, layers, inverse_batch,
                                         NOISE, PER_LAYER, PER_ELEMENT, PIXELS, F_CHANNEL, F_PIXEL, E_CHANNEL, E_PIXEL,
                                         DF_CHANNEL, DF_PIXEL, DE_CHANNEL, DE_PIXEL, BLOCK, WIDE)
            tl.store(loss_ptr + sample.to(tl.int64) * blocks + block, tl.sum(loss, axis=0))
            total += slope
        tl.store(partial_ptr + group.to(tl.int64) * size + i, total, mask=mask)
    else:
        loss, slope = _fisher_sample(group, block, i, mask, f_ptr, e_ptr, df_ptr, de_ptr, weight_ptr, scale_ptr, log_gamma_ptr, seed_ptr, stream_ptr,
                                     redraw_ptr, noise_ptr, f_stride, e_stride, df_stride, de_stride, size, layers, inverse_batch,
                                     NOISE, PER_LAYER, PER_ELEMENT, PIXELS, F_CHANNEL, F_PIXEL, E_CHANNEL, E_PIXEL,
                                     DF_CHANNEL, DF_PIXEL, DE_CHANNEL, DE_PIXEL, BLOCK, WIDE)
        tl.store(loss_ptr + program, tl.sum(loss, axis=0))
        tl.store(partial_ptr + program, tl.sum(slope, axis=0))


# ---- launchers --------------------------------------------------------------------------------------------------------


def denoising_loss_and_grads(f, weight, scale, log_gamma, seeds, stream, redraw, noise, block=None):
    """(losses [B] float32 whose mean is L, dL/df like f) of the denoising loss; see the top of the file.

    f [B, N] or [B, C, *spatial]; weight, scale [K + 1] float32; log_gamma [1 or K, 1 or size]; seeds [B] int64; stream [B]
    int in 1 .. K; redraw [B] int or None for 0; noise None or like f; block: elements a program, for tests.
    Raises ValueError for a layout or type that no kernel has.
    """
    df = torch.empty_like(f)
    size = f[0].numel()
    f_stride, *f_layout = sample_layout(f)
    df_stride, *df_layout = sample_layout(df)
    chosen, warps = choose_block(size, f.element_size())
    block = block or chosen
    blocks = triton.cdiv(size, block)
    partial = torch.empty(len(f), blocks, dtype=torch.float32, device=f.device)
    _denoising_kernel[(len(f) * blocks,)](
        f, df, weight, scale, log_gamma, seeds, stream, redraw, None if noise is None else noise.contiguous(), partial,
        f_stride, df_stride, size, blocks, len(weight) - 1, 1.0 / len(f), NOISE=ADDRESSED if noise is None else GIVEN, **gamma_shape(log_gamma),
        PIXELS=pixels_if_strided(f, f_layout, df_layout), F_CHANNEL=f_layout[0], F_PIXEL=f_layout[1], DF_CHANNEL=df_layout[0], DF_PIXEL=df_layout[1],
        BLOCK=block, WIDE=f.element_size() == 2, num_warps=warps)
    return partial.sum(1), df


def fisher_loss_and_grads(f, e, weight, scale, log_gamma, seeds, stream, redraw, noise, block=None):
    """(losses [B] float32 whose mean is L, dL/df like f, dL/de like e, direct dL/dlog_gamma) of the Fisher divergence in minimax form.

    Arguments and errors as of `denoising_loss_and_grads`; e is like f.
    """
    df, de = torch.empty_like(f), torch.empty_like(e)
    size = f[0].numel()
    f_stride, *f_layout = sample_layout(f)
    e_stride, *e_layout = sample_layout(e)
    df_stride, *df_layout = sample_layout(df)
    de_stride, *de_layout = sample_layout(de)
    per_element = log_gamma.shape[1] > 1
    chosen, warps = choose_block(size, f.element_size())
    block = block or chosen
    blocks = triton.cdiv(size, block)
    order = first = last = None
    groups = len(f)
    if per_element:
        order, first, last, first_group, groups = group_samples(stream, len(log_gamma), blocks)
    losses = torch.empty(len(f), blocks, dtype=torch.float32, device=f.device)
    partial = torch.empty(groups, size if per_element else blocks, dtype=torch.float32, device=f.device)
    _fisher_kernel[(groups * blocks,)](
        f, e, df, de, weight, scale, log_gamma, seeds, stream, redraw, None if noise is None else noise.contiguous(), order, first, last, losses, partial,
        f_stride, e_stride, df_stride, de_stride, size, blocks, len(weight) - 1, 1.0 / len(f),
        NOISE=ADDRESSED if noise is None else GIVEN, **gamma_shape(log_gamma), PIXELS=pixels_if_strided(f, f_layout, e_layout, df_layout, de_layout),
        F_CHANNEL=f_layout[0], F_PIXEL=f_layout[1], E_CHANNEL=e_layout[0], E_PIXEL=e_layout[1], DF_CHANNEL=df_layout[0], DF_PIXEL=df_layout[1],
        DE_CHANNEL=de_layout[0], DE_PIXEL=de_layout[1], BLOCK=block, WIDE=f.element_size() == 2, num_warps=warps)
    if per_element:
        return losses.sum(1), df, de, sum_groups(partial, first_group, log_gamma, exponential=False)
    return losses.sum(1), df, de, sum_scalars(partial, stream, log_gamma)

"""y = a x + b e + s exp(l) n in one pass, and its backward in one.

Sample i has a stream k_i in 1 .. K; a, b and s are tables of K + 1 numbers, of which it takes entry k_i. l
("log_gamma") and the noise n are as in noise_scale.py: n is counter-based, addressed by (seed_i, k_i, draw_i,
element), or a given tensor.

    forward     y = a x + b e + s exp(l) n
    backward    dL/dx = a dy        dL/de = b dy        dL/dl[row] = sum over the row's samples of s exp(l) n dy

with dy = dL/dy. The forward reads x and e and writes y. The backward reads dy and writes dL/de; dL/dx is another
forward. Both make n in registers. dL/dl is summed in two stages in a fixed order. A stream outside 1 .. K gives NaN
for its sample.

Tensor passes of the size of x: forward 3 (2 without e), backward 2.
"""

import torch
import triton
import triton.language as tl

from .memory import cut_samples, element_offset, layout_arguments, load_float, store_rounded
from .noise_scale import (
    NONE,
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
def _affine_forward_kernel(
    x_ptr,  # [B, *event]
    e_ptr,  # like x, or None
    y_ptr,  # like x, written
    a_ptr, b_ptr, s_ptr,  # tables [layers + 1]
    log_gamma_ptr,  # [1 or layers, 1 or size]
    seed_ptr, stream_ptr, draw_ptr,  # [B]; no draw_ptr: draw 0
    noise_ptr,  # [B, size] row-major, or None
    x_stride, X_CHANNEL: tl.constexpr, X_PIXEL: tl.constexpr,  # layout of x
    e_stride, E_CHANNEL: tl.constexpr, E_PIXEL: tl.constexpr,  # layout of e
    y_stride, Y_CHANNEL: tl.constexpr, Y_PIXEL: tl.constexpr,  # layout of y
    PIXELS: tl.constexpr,  # elements a channel, where a layout needs them
    size, blocks, layers,  # elements a sample, blocks a sample, streams
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
    a = table_entry(a_ptr, k, layers)
    y = a * load_float(x_ptr + row * x_stride + element_offset(i, PIXELS, X_CHANNEL, X_PIXEL), mask)
    if e_ptr is not None:
        b = table_entry(b_ptr, k, layers)
        y += b * load_float(e_ptr + row * e_stride + element_offset(i, PIXELS, E_CHANNEL, E_PIXEL), mask)
    if NOISE != 0:
        noise = load_noise(
            noise_ptr,
            seed_ptr, draw_ptr,
            sample, k,
            block, i, mask, size,
            NOISE,
            BLOCK, WIDE,
        )  # fmt: skip
        log_gamma = load_log_gamma(log_gamma_ptr, k, layers, i, mask, size, PER_LAYER, PER_ELEMENT)
        y += tl.exp(log_gamma) * table_entry(s_ptr, k, layers) * noise
    store_rounded(y_ptr + row * y_stride + element_offset(i, PIXELS, Y_CHANNEL, Y_PIXEL), y, mask)


@triton.jit
def _backward_sample(
    sample, block, i, mask,  # a sample, a block of it, the block's elements, which of them exist
    dy_ptr, de_ptr,  # [B, *event]; de written, or None
    b_ptr, s_ptr,  # tables [layers + 1]
    seed_ptr, stream_ptr, draw_ptr,  # [B]; no draw_ptr: draw 0
    noise_ptr,  # [B, size] row-major, or None
    dy_stride, DY_CHANNEL: tl.constexpr, DY_PIXEL: tl.constexpr,  # layout of dy
    de_stride, DE_CHANNEL: tl.constexpr, DE_PIXEL: tl.constexpr,  # layout of de
    PIXELS: tl.constexpr,  # elements a channel, where a layout needs them
    size, layers,  # elements a sample, streams
    NOISE: tl.constexpr,  # kind of noise
    BLOCK: tl.constexpr, WIDE: tl.constexpr,  # elements a block; 8 in the place of 4 a lane
):  # fmt: skip
    """Write dL/de of a block of one sample and return its s n dy, 0 beyond the end."""
    row = sample.to(tl.int64)
    k = tl.load(stream_ptr + sample)
    dy = load_float(dy_ptr + row * dy_stride + element_offset(i, PIXELS, DY_CHANNEL, DY_PIXEL), mask)
    if de_ptr is not None:
        de_pointer = de_ptr + row * de_stride + element_offset(i, PIXELS, DE_CHANNEL, DE_PIXEL)
        store_rounded(de_pointer, table_entry(b_ptr, k, layers) * dy, mask)
    noise = load_noise(
        noise_ptr,
        seed_ptr, draw_ptr,
        sample, k,
        block, i, mask, size,
        NOISE,
        BLOCK, WIDE,
    )  # fmt: skip
    return table_entry(s_ptr, k, layers) * dy * noise


@triton.jit
def _affine_backward_kernel(
    dy_ptr, de_ptr,  # [B, *event]; de written, or None
    b_ptr, s_ptr,  # tables [layers + 1]
    log_gamma_ptr,  # [1 or layers, 1 or size]
    seed_ptr, stream_ptr, draw_ptr,  # [B]; no draw_ptr: draw 0
    noise_ptr,  # [B, size] row-major, or None
    order_ptr, first_ptr, last_ptr,  # group g has the samples order[first[g]:last[g]]; None without groups
    partial_ptr,  # first stage of dL/dl, written: [groups, size], or [B, blocks] without groups
    dy_stride, DY_CHANNEL: tl.constexpr, DY_PIXEL: tl.constexpr,  # layout of dy
    de_stride, DE_CHANNEL: tl.constexpr, DE_PIXEL: tl.constexpr,  # layout of de
    PIXELS: tl.constexpr,  # elements a channel, where a layout needs them
    size, blocks, layers,  # elements a sample, blocks a sample, streams
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
            total += _backward_sample(
                sample, block, i, mask,
                dy_ptr, de_ptr,
                b_ptr, s_ptr,
                seed_ptr, stream_ptr, draw_ptr,
                noise_ptr,
                dy_stride, DY_CHANNEL, DY_PIXEL,
                de_stride, DE_CHANNEL, DE_PIXEL,
                PIXELS,
                size, layers,
                NOISE,
                BLOCK, WIDE,
            )  # fmt: skip
        tl.store(partial_ptr + group.to(tl.int64) * size + i, total, mask=mask)  # exp(l) follows in the second stage
    else:
        value = _backward_sample(
            group, block, i, mask,
            dy_ptr, de_ptr,
            b_ptr, s_ptr,
            seed_ptr, stream_ptr, draw_ptr,
            noise_ptr,
            dy_stride, DY_CHANNEL, DY_PIXEL,
            de_stride, DE_CHANNEL, DE_PIXEL,
            PIXELS,
            size, layers,
            NOISE,
            BLOCK, WIDE,
        )  # fmt: skip
        log_gamma = load_log_gamma(log_gamma_ptr, tl.load(stream_ptr + group), layers, i, mask, size, PER_LAYER, False)
        tl.store(partial_ptr + program, tl.sum(value, axis=0) * tl.exp(log_gamma))


# ---- public functions ------------------------------------------------------------------------------------------------


def affine_noise_step(x, e, a, b, s, log_gamma, seeds, stream, draw, noise, block=None):
    """y = a x + b e + s exp(log_gamma) n, in x's shape, type and layout; see the top of the file.

    x, e        [B, N] or [B, C, *spatial]; e None for no such term
    a, b, s     [K + 1] float32; s None for no noise
    log_gamma   [1 or K, 1 or size]
    seeds       [B] int64
    stream      [B] int in 1 .. K
    draw        [B] int, or None for 0
    noise       like x, or None for addressed noise
    block       elements a program, for tests

    Raises ValueError for a layout or type that no kernel has.
    """
    y = torch.empty_like(x)
    layouts = layout_arguments(x=x, e=e, y=y)
    size, blocks, block, warps = cut_samples(x, block)
    kind, noise = (NONE, None) if s is None else noise_source(noise)
    _affine_forward_kernel[(len(x) * blocks,)](
        x,
        e,
        y,
        a, b, s,
        log_gamma,
        seeds, stream, draw,
        noise,
        **layouts,
        size=size, blocks=blocks, layers=len(a) - 1,
        NOISE=kind,
        **gamma_shape(log_gamma),
        BLOCK=block, WIDE=x.element_size() == 2, num_warps=warps,
    )  # fmt: skip
    return y


def affine_noise_step_backward(dy, e, b, s, log_gamma, seeds, stream, draw, noise, block=None):
    """(dL/de like e, or None where e is; dL/dlog_gamma) of `affine_noise_step` with noise, from dy = dL/dy.

    Arguments and errors as there. e gives its layout alone: it is not read.
    """
    de = None if e is None else torch.empty_like(e)
    layouts = layout_arguments(dy=dy, de=de)
    size, blocks, block, warps = cut_samples(dy, block)
    order, first, last, first_group, partial = prepare_sum(stream, log_gamma, size, blocks)
    kind, noise = noise_source(noise)
    wide = dy.element_size() == 2
    _affine_backward_kernel[(len(partial) * blocks,)](
        dy, de,
        b, s,
        log_gamma,
        seeds, stream, draw,
        noise,
        order, first, last,
        partial,
        **layouts,
        size=size, blocks=blocks, layers=len(s) - 1,
        NOISE=kind,
        **gamma_shape(log_gamma),
        BLOCK=block, WIDE=wide, num_warps=warps_of_sums(block, warps, wide),
    )  # fmt: skip
    return de, finish_sum(partial, first_group, stream, log_gamma, exponential=True)

"""y = a x + b e + s exp(l) n in one pass, and its backward in one.

Sample i has a stream k_i in 1 .. K; a, b and s are tables of K + 1 numbers of which it takes entry k_i. l ("log_gamma") is a
table [1 or K, 1 or size] of which it takes row k_i - 1, or the only one. n is standard normal noise addressed by
(seed_i, k_i, redraw_i, element), see philox.py, or a given tensor. With dy = dL/dy:

    dL/de = b dy        dL/dx = a dy        dL/dl[row] = sum over the row's samples of s exp(l) n dy

The forward reads x and e and writes y; the backward reads dy and writes dL/de: n is made again in registers both times. dL/dl is summed in
two stages in a fixed order, without atomics, so it is the same bits in every run. A stream outside 1 .. K
gives NaN for its sample, so that nothing is read out of bounds and a check of the losses finds it.

Tensor passes of the size of x: forward 3 (2 without e), backward 2.
"""

import torch
import triton
import triton.language as tl

from .memory import element_offset, load_float, pixels_of, sample_layout, store_rounded
from .philox import choose_block, load_redraw, normal_block

# The kinds of noise.
NONE, ADDRESSED, GIVEN = 0, 1, 2

# When log_gamma has an entry a pixel, a program adds up a group of samples, as many as leave this many programs: 8 for each of 132 multiprocessors.
PROGRAMS = 1056

# ---- jitted functions -------------------------------------------------------------------------------------------------


@triton.jit
def table_entry(table_ptr, k, layers):
    """Entry k of a table of layers + 1 numbers; NaN for k outside 1 .. layers."""
    return tl.load(table_ptr + k, mask=(k >= 1) & (k <= layers), other=float("nan")).to(tl.float32)


@triton.jit
def load_log_gamma(log_gamma_ptr, k, layers, i, mask, size, PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr):
    """log_gamma of a sample's layer at elements i, or its one number."""
    row = 0
    inside = (k >= 1) & (k <= layers)
    if PER_LAYER:
        row = tl.where(inside, k - 1, 0)
    if PER_ELEMENT:
        pointer = log_gamma_ptr + i
        if PER_LAYER:
            pointer = pointer + row.to(tl.int64) * size
        value = tl.load(pointer, mask=mask, other=0.0)
    else:
        value = tl.load(log_gamma_ptr + row)
    return value.to(tl.float32)


@triton.jit
def load_noise(noise_ptr, seed_ptr, redraw_ptr, sample, k, block, i, mask, size, NOISE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Noise of a block of elements: addressed, or read from a tensor with row-major samples."""
    if NOISE == 2:
        noise = load_float(noise_ptr + sample.to(tl.int64) * size + i, mask)
    else:
        noise = normal_block(tl.load(seed_ptr + sample), k, load_redraw(redraw_ptr, sample), block, BLOCK, WIDE)
    return noise


@triton.jit
def _forward_kernel(x_ptr, e_ptr, y_ptr, a_ptr, b_ptr, s_ptr, log_gamma_ptr, seed_ptr, stream_ptr, redraw_ptr, noise_ptr,
                    x_stride, e_stride, y_stride, size, blocks, layers,
                    NOISE: tl.constexpr, PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr, PIXELS: tl.constexpr,
                    X_CHANNEL: tl.constexpr, X_PIXEL: tl.constexpr, E_CHANNEL: tl.constexpr, E_PIXEL: tl.constexpr,
                    Y_CHANNEL: tl.constexpr, Y_PIXEL: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    program = tl.program_id(0)
    sample = program // blocks
    block = program % blocks
    row = sample.to(tl.int64)
    k = tl.load(stream_ptr + sample)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    y = table_entry(a_ptr, k, layers) * load_float(x_ptr + row * x_stride + element_offset(i, PIXELS, X_CHANNEL, X_PIXEL), mask)
    if e_ptr is not None:
        y += table_entry(b_ptr, k, layers) * load_float(e_ptr + row * e_stride + element_offset(i, PIXELS, E_CHANNEL, E_PIXEL), mask)
    if NOISE != 0:
        noise = load_noise(noise_ptr, seed_ptr, redraw_ptr, sample, k, block, i, mask, size, NOISE, BLOCK, WIDE)
        log_gamma = load_log_gamma(log_gamma_ptr, k, layers, i, mask, size, PER_LAYER, PER_ELEMENT)
        y += tl.exp(log_gamma) * table_entry(s_ptr, k, layers) * noise
    store_rounded(y_ptr + row * y_stride + element_offset(i, PIXELS, Y_CHANNEL, Y_PIXEL), y, mask)


@triton.jit
def _backward_sample(sample, block, i, mask, dy_ptr, de_ptr, b_ptr, s_ptr, seed_ptr, stream_ptr, redraw_ptr, noise_ptr,
                     dy_stride, de_stride, size, layers, NOISE: tl.constexpr, PIXELS: tl.constexpr, DY_CHANNEL: tl.constexpr,
                     DY_PIXEL: tl.constexpr, DE_CHANNEL: tl.constexpr, DE_PIXEL: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Write dL/de of a block of one sample and return its s n dy, 0 beyond the end."""
    row = sample.to(tl.int64)
    k = tl.load(stream_ptr + sample)
    dy = load_float(dy_ptr + row * dy_stride + element_offset(i, PIXELS, DY_CHANNEL, DY_PIXEL), mask)
    if de_ptr is not None:
        store_rounded(de_ptr + row * de_stride + element_offset(i, PIXELS, DE_CHANNEL, DE_PIXEL), table_entry(b_ptr, k, layers) * dy, mask)
    noise = load_noise(noise_ptr, seed_ptr, redraw_ptr, sample, k, block, i, mask, size, NOISE, BLOCK, WIDE)
    return table_entry(s_ptr, k, layers) * dy * noise


@triton.jit
def _backward_kernel(dy_ptr, de_ptr, b_ptr, s_ptr, log_gamma_ptr, seed_ptr, stream_ptr, redraw_ptr, noise_ptr, order_ptr, first_ptr, last_ptr, partial_ptr,
                     dy_stride, de_stride, size, blocks, layers,
                     NOISE: tl.constexpr, PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr, PIXELS: tl.constexpr,
                     DY_CHANNEL: tl.constexpr, DY_PIXEL: tl.constexpr, DE_CHANNEL: tl.constexpr, DE_PIXEL: tl.constexpr,
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
            total += _backward_sample(sample, block, i, mask, dy_ptr, de_ptr, b_ptr, s_ptr, seed_ptr, stream_ptr, redraw_ptr, noise_ptr,
                                      dy_stride, de_stride, size, layers, NOISE, PIXELS, DY_CHANNEL, DY_PIXEL, DE_CHANNEL, DE_PIXEL, BLOCK, WIDE)
        tl.store(partial_ptr + group.to(tl.int64) * size + i, total, mask=mask)  # exp(l) follows in the second stage
    else:
        value = _backward_sample(group, block, i, mask, dy_ptr, de_ptr, b_ptr, s_ptr, seed_ptr, stream_ptr, redraw_ptr, noise_ptr,
                                 dy_stride, de_stride, size, layers, NOISE, PIXELS, DY_CHANNEL, DY_PIXEL, DE_CHANNEL, DE_PIXEL, BLOCK, WIDE)
        log_gamma = load_log_gamma(log_gamma_ptr, tl.load(stream_ptr + group), layers, i, mask, size, PER_LAYER, False)
        tl.store(partial_ptr + program, tl.sum(value, axis=0) * tl.exp(log_gamma))


@triton.jit
def _sum_groups_kernel(partial_ptr, first_ptr, log_gamma_ptr, total_ptr, size, blocks, EXPONENTIAL: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Second stage: row r is the sum of partial[first[r] : first[r + 1]], GROUPS of them at a time, times exp(log_gamma) where asked."""
    program = tl.program_id(0)
    row = program // blocks
    i = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(first_ptr + row)
    last = tl.load(first_ptr + row + 1)
    group = first + tl.arange(0, GROUPS)[:, None]
    pointer = partial_ptr + group.to(tl.int64) * size + i[None, :]
    total = tl.zeros([GROUPS, BLOCK], tl.float32)
    for done in range(0, last - first, GROUPS):
        total += tl.load(pointer, mask=(group + done < last) & (i[None, :] < size), other=0.0)
        pointer += tl.full([], GROUPS, tl.int64) * size
    value = tl.sum(total, axis=0)
    offset = row.to(tl.int64) * size + i
    if EXPONENTIAL:
        value *= tl.exp(load_float(log_gamma_ptr + offset, i < size))
    store_rounded(total_ptr + offset, value, i < size)


# ---- launchers --------------------------------------------------------------------------------------------------------


def group_samples(stream, rows, blocks):
    """How the batch is cut for a sum per row of log_gamma: groups of samples that share a row, in a fixed order; `blocks` programs work on a group.

    Returns int32 (order [B], first [G], last [G], first_group [rows + 1], G): group g holds the samples order[first[g]:last[g]], and row
    r the groups first_group[r] : first_group[r + 1]. G depends on shapes alone, so the host does not wait; groups at the end may be empty.
    """
    batch, device = len(stream), stream.device
    samples_a_group = max(1, batch * blocks // PROGRAMS)
    if rows == 1:
        bounds = torch.arange(0, batch + samples_a_group, samples_a_group, device=device, dtype=torch.int32).clamp_(max=batch)
        order = torch.arange(batch, device=device, dtype=torch.int32)
        groups = len(bounds) - 1
        return order, bounds[:-1], bounds[1:], torch.arange(0, groups + 1, groups, device=device, dtype=torch.int32), groups
    groups = batch // samples_a_group + rows
    layers, order = torch.sort(stream.to(torch.int32).clamp(1, rows), stable=True)  # a stream outside joins a row, and makes it NaN
    ends = torch.searchsorted(layers, torch.arange(1, rows + 2, device=device, dtype=torch.int32))  # [rows + 1], where each layer begins
    chunks = (ends.diff() + samples_a_group - 1) // samples_a_group
    first_group = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])  # [rows + 1]
    group = torch.arange(groups, device=device)
    row = (torch.searchsorted(first_group, group, right=True) - 1).clamp_(max=rows - 1)
    first = torch.minimum(ends[row] + (group - first_group[row]) * samples_a_group, ends[row + 1])
    last = torch.minimum(first + samples_a_group, ends[row + 1])
    return order.to(torch.int32), first.to(torch.int32), last.to(torch.int32), first_group.to(torch.int32), groups


def sum_scalars(partial, stream, log_gamma):
    """Second stage where log_gamma has no entry a pixel: partial [B, blocks] -> log_gamma's [rows, 1], in a fixed order."""
    samples = partial.sum(1)
    if len(log_gamma) == 1:
        return samples.sum().reshape(1, 1).to(log_gamma.dtype)
    rows = torch.arange(1, len(log_gamma) + 1, device=stream.device)[:, None]
    return torch.where(stream == rows, samples, 0.0).sum(1, keepdim=True).to(log_gamma.dtype)


def sum_groups(partial, first_group, log_gamma, exponential):
    """Second stage where log_gamma has an entry a pixel: partial [G, size] -> log_gamma's [rows, size]."""
    total = torch.empty_like(log_gamma)
    size = log_gamma.shape[1]
    block = 32
    blocks = triton.cdiv(size, block)
    _sum_groups_kernel[(len(log_gamma) * blocks,)](partial, first_group, log_gamma, total, size, blocks, EXPONENTIAL=exponential, GROUPS=64, BLOCK=block, num_warps=4)
    return total


def affine_noise_step(x, e, a, b, s, log_gamma, seeds, stream, redraw, noise, block=None):
    """y = a x + b e + s exp(log_gamma) n, in x's shape, type and layout; see the top of the file.

    x, e [B, N] or [B, C, *spatial], e None for no such term; a, b, s [K + 1] float32, s None for no noise; log_gamma
    [1 or K, 1 or size]; seeds [B] int64; stream [B] int in 1 .. K; redraw [B] int or None for 0; noise None or like x; block: elements a program, for tests.
    Raises ValueError for a layout or type that no kernel has.
    """
    y = torch.empty_like(x)
    size = x[0].numel()
    x_stride, *x_layout = sample_layout(x)
    e_stride, *e_layout = (0, 0, 0) if e is None else sample_layout(e)
    y_stride, *y_layout = sample_layout(y)
    chosen, warps = choose_block(size, x.element_size())
    block = block or chosen
    blocks = triton.cdiv(size, block)
    _forward_kernel[(len(x) * blocks,)](
        x, e, y, a, b, s, log_gamma, seeds, stream, redraw, _row_major(noise),
        x_stride, e_stride, y_stride, size, blocks, len(a) - 1, NOISE=_kind(s, noise), **gamma_shape(log_gamma),
        PIXELS=pixels_if_strided(x, x_layout, e_layout, y_layout), X_CHANNEL=x_layout[0], X_PIXEL=x_layout[1], E_CHANNEL=e_layout[0], E_PIXEL=e_layout[1],
        Y_CHANNEL=y_layout[0], Y_PIXEL=y_layout[1], BLOCK=block, WIDE=x.element_size() == 2, num_warps=warps)
    return y


def affine_noise_step_backward(dy, e, b, s, log_gamma, seeds, stream, redraw, noise, block=None):
    """(dL/de like e, or None where e is; dL/dlog_gamma) of `affine_noise_step` with noise, from dy = dL/dy. e gives layout alone."""
    de = None if e is None else torch.empty_like(e)
    size = dy[0].numel()
    dy_stride, *dy_layout = sample_layout(dy)
    de_stride, *de_layout = (0, 0, 0) if e is None else sample_layout(de)
    per_element = log_gamma.shape[1] > 1
    chosen, warps = choose_block(size, dy.element_size())
    block = block or chosen
    blocks = triton.cdiv(size, block)
    order = first = last = None
    groups = len(dy)
    if per_element:
        order, first, last, first_group, groups = group_samples(stream, len(log_gamma), blocks)
    partial = torch.empty(groups, size if per_element else blocks, dtype=torch.float32, device=dy.device)
    _backward_kernel[(groups * blocks,)](
        dy, de, b, s, log_gamma, seeds, stream, redraw, _row_major(noise), order, first, last, partial,
        dy_stride, de_stride, size, blocks, len(s) - 1, NOISE=_kind(s, noise), **gamma_shape(log_gamma),
        PIXELS=pixels_if_strided(dy, dy_layout, de_layout), DY_CHANNEL=dy_layout[0], DY_PIXEL=dy_layout[1],
        DE_CHANNEL=de_layout[0], DE_PIXEL=de_layout[1], BLOCK=block, WIDE=dy.element_size() == 2, num_warps=warps)
    if per_element:
        return de, sum_groups(partial, first_group, log_gamma, exponential=True)
    return de, sum_scalars(partial, stream, log_gamma)


def gamma_shape(log_gamma):
    """The two switches of log_gamma's four shapes, as kernel arguments."""
    rows, columns = (1, 1) if log_gamma is None else log_gamma.shape
    return {"PER_LAYER": rows > 1, "PER_ELEMENT": columns > 1}


def pixels_if_strided(x, *layouts):
    """Elements a channel where any tensor needs them to find its elements, else 0: then one compiled kernel serves all shapes."""
    return pixels_of(x.shape) if any(channel for channel, _ in layouts) else 0


def _kind(s, noise):
    if s is None:
        return NONE
    return ADDRESSED if noise is None else GIVEN


def _row_major(noise):
    return None if noise is None else noise.contiguous()

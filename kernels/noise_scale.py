"""What the kernels with scaled noise s exp(l) n share: table entries, log_gamma, the noise, sums over log_gamma's rows.

Sample i has a stream k_i in 1 .. K. A table has K + 1 numbers, of which the sample takes entry k_i. l ("log_gamma")
is a table [1 or K, 1 or size], of which it takes row k_i - 1, or the only row. n is counter-based noise (philox.py),
or a given tensor.

    forward     l and n of a block of elements of one sample
    backward    dL/dl[row] = sum of v over the samples of the row, over all elements where l has one number a row

Each kernel has its own v. The sum over rows is made in two stages, in a fixed order and without atomics on floats, so
it has the same bits in every run. Where l has one number a row, the first stage sums the blocks of single samples.
Where l has an entry an element, it sums groups of samples that share a row, element by element. The second stage sums
what the first wrote.

A stream outside 1 .. K makes the table entries NaN. So its sample is NaN, nothing is read out of bounds, and a check
of the results finds it.
"""

import torch
import triton
import triton.language as tl

from .memory import load_float, store_rounded
from .philox import load_draw, normal_block

# The kinds of noise. Jitted functions have the numbers.
NONE, ADDRESSED, GIVEN = 0, 1, 2

# Samples are added up in groups as large as leave this many programs: 8 for each of 132 multiprocessors.
PROGRAMS = 1056

# ---- jitted functions ------------------------------------------------------------------------------------------------


@triton.jit
def table_entry(table_ptr, k, layers):
    """Entry k of a table of layers + 1 numbers; NaN for k outside 1 .. layers."""
    return tl.load(table_ptr + k, mask=(k >= 1) & (k <= layers), other=float("nan")).to(tl.float32)


@triton.jit
def load_log_gamma(
    log_gamma_ptr,  # [1 or layers, 1 or size]
    k, layers,  # the sample's stream, and how many there are
    i, mask, size,  # elements, which of them exist, elements a sample
    PER_LAYER: tl.constexpr, PER_ELEMENT: tl.constexpr,  # log_gamma has a row a layer, an entry an element
):  # fmt: skip
    """log_gamma of a sample at elements i, or its one number."""
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
def load_noise(
    noise_ptr,  # [B, size], row-major; read if NOISE is GIVEN
    seed_ptr, draw_ptr,  # [B]; read if NOISE is ADDRESSED
    sample, k,  # the sample and its stream
    block, i, mask, size,  # the block, its elements, which of them exist, elements a sample
    NOISE: tl.constexpr,  # kind of noise
    BLOCK: tl.constexpr, WIDE: tl.constexpr,  # elements a block; 8 in the place of 4 a lane
):  # fmt: skip
    """Noise of a block of elements: made from its address, or read."""
    if NOISE == 2:
        noise = load_float(noise_ptr + sample.to(tl.int64) * size + i, mask)
    else:
        noise = normal_block(tl.load(seed_ptr + sample), k, load_draw(draw_ptr, sample), block, BLOCK, WIDE)
    return noise


@triton.jit
def _sum_groups_kernel(
    partial_ptr,  # [groups, size] float32
    first_group_ptr,  # [rows + 1]: row r has the groups first_group[r] : first_group[r + 1]
    log_gamma_ptr,  # [rows, size]
    total_ptr,  # [rows, size], written
    size, blocks,  # elements a row, blocks a row
    EXPONENTIAL: tl.constexpr,  # multiply by exp(log_gamma)
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,  # groups at a time, elements a block
):  # fmt: skip
    """One program: a block of one row. It adds up the groups of the row, GROUPS at a time."""
    program = tl.program_id(0)
    row = program // blocks
    i = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(first_group_ptr + row)
    last = tl.load(first_group_ptr + row + 1)
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


# ---- for the launchers -----------------------------------------------------------------------------------------------


def noise_source(noise):
    """(kind of noise, noise with row-major samples) where noise is given; (ADDRESSED, None) for None."""
    return (ADDRESSED, None) if noise is None else (GIVEN, noise.contiguous())


def warps_of_sums(block, warps, wide, strided=False):
    """Warps of a program that sums over samples: it has 8 elements a thread, and not 16, in two cases.

    wide: its lanes take 8 elements beside each other. With 16 and blocks of 1024, what Triton 3.6 made for sm_90 got
    many sums wrong, each time the sixth of 8: measured on an H200, in `affine_noise_step_backward`.
    strided: its samples are, and their offsets leave too few registers for 16.
    """
    return max(1, block // 256) if wide or strided else warps


def gamma_shape(log_gamma):
    """The two switches of log_gamma's four shapes, as kernel arguments."""
    rows, columns = (1, 1) if log_gamma is None else log_gamma.shape
    return {"PER_LAYER": rows > 1, "PER_ELEMENT": columns > 1}


def group_samples(stream, rows, blocks):
    """How the batch is cut for a sum per row of log_gamma: groups of samples that share a row, in a fixed order.

    `blocks` programs work on a group. Returns int32 (order [B], first [G], last [G], first_group [rows + 1], G):
    group g holds the samples order[first[g]:last[g]], and row r the groups first_group[r] : first_group[r + 1]. G
    depends on shapes alone, so the host does not wait. Groups at the end may be empty.
    """
    batch, device = len(stream), stream.device
    samples_a_group = max(1, batch * blocks // PROGRAMS)
    if rows == 1:
        bounds = torch.arange(0, batch + samples_a_group, samples_a_group, device=device, dtype=torch.int32)
        bounds = bounds.clamp_(max=batch)
        order = torch.arange(batch, device=device, dtype=torch.int32)
        groups = len(bounds) - 1
        first_group = torch.arange(0, groups + 1, groups, device=device, dtype=torch.int32)
        return order, bounds[:-1], bounds[1:], first_group, groups
    groups = batch // samples_a_group + rows
    # A stream outside joins a row, and makes it NaN.
    layers, order = torch.sort(stream.to(torch.int32).clamp(1, rows), stable=True)
    # [rows + 1], where each layer begins
    ends = torch.searchsorted(layers, torch.arange(1, rows + 2, device=device, dtype=torch.int32))
    chunks = (ends.diff() + samples_a_group - 1) // samples_a_group
    first_group = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])  # [rows + 1]
    group = torch.arange(groups, device=device)
    row = (torch.searchsorted(first_group, group, right=True) - 1).clamp_(max=rows - 1)
    first = torch.minimum(ends[row] + (group - first_group[row]) * samples_a_group, ends[row + 1])
    last = torch.minimum(first + samples_a_group, ends[row + 1])
    return order.to(torch.int32), first.to(torch.int32), last.to(torch.int32), first_group.to(torch.int32), groups


def prepare_sum(stream, log_gamma, size, blocks):
    """For the first stage of a sum over rows of log_gamma: (order, first, last, first_group, partial).

    The kernel has a program for each block of each row of `partial`, which it fills: [G, size] float32, one row a
    group of samples, where log_gamma has an entry an element; else [B, blocks], and there are no groups.
    """
    if log_gamma.shape[1] == 1:
        return None, None, None, None, torch.empty(len(stream), blocks, dtype=torch.float32, device=stream.device)
    order, first, last, first_group, groups = group_samples(stream, len(log_gamma), blocks)
    return order, first, last, first_group, torch.empty(groups, size, dtype=torch.float32, device=stream.device)


def finish_sum(partial, first_group, stream, log_gamma, exponential):
    """The second stage: what the kernel wrote, summed to log_gamma's shape.

    exponential: a sum over groups is multiplied by exp(log_gamma). Without groups the kernel has done so.
    """
    if first_group is None:
        return sum_scalars(partial, stream, log_gamma)
    return sum_groups(partial, first_group, log_gamma, exponential)


def sum_scalars(partial, stream, log_gamma):
    """Second stage where log_gamma has one number a row: partial [B, blocks] -> log_gamma's [rows, 1]."""
    samples = partial.sum(1)
    if len(log_gamma) == 1:
        return samples.sum().reshape(1, 1).to(log_gamma.dtype)
    rows = torch.arange(1, len(log_gamma) + 1, device=stream.device)[:, None]
    return torch.where(stream == rows, samples, 0.0).sum(1, keepdim=True).to(log_gamma.dtype)


def sum_groups(partial, first_group, log_gamma, exponential):
    """Second stage where log_gamma has an entry an element: partial [G, size] -> log_gamma's [rows, size]."""
    total = torch.empty_like(log_gamma)
    size = log_gamma.shape[1]
    block = 32
    blocks = triton.cdiv(size, block)
    _sum_groups_kernel[(len(log_gamma) * blocks,)](
        partial,
        first_group,
        log_gamma,
        total,
        size, blocks,
        EXPONENTIAL=exponential,
        GROUPS=64, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return total

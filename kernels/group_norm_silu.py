"""GroupNorm with what stands around it in a UNet, in one kernel.

    y = act(((x + add) normalised) (w (1 + scale)) + b (1 + scale) + shift)

x is [B, C, *spatial], row-major or channels_last, in G groups of C / G channels. w and b [C] are the affine
parameters. scale and shift [B, C] modulate a sample's channels (ADM network). add [B, C] is the time embedding that
is added before the normalisation (DDPM network). act is SiLU or nothing. Statistics are float32. With xh = (x + add -
mean) rstd over the n elements of a group, w' = w (1 + scale) and u the argument of act:

    forward     y = act(u),  u = xh w' + b (1 + scale) + shift
    backward    du = dy act'(u)                     P = sum over pixels of du xh,  Q = of du     (each [B, C])
                dx = rstd (du w' - mean_group(w' Q / pixels) - xh mean_group(w' P / pixels))
                dw = sum_B P (1 + scale)   db = sum_B Q (1 + scale)   dscale = w P + b Q   dshift = Q
                dadd = sum over pixels of dx

The joined form takes its input in parts, and writes it as a whole, which the convolution of a skip connection reads:

    forward     whole = [(x + add + residual) factor, beside]        y = act((whole normalised) w + b)
    backward    d = dwhole + dx of the above,  dbeside = d of its channels,  dx = dresidual = d factor of the others

residual is like x, and beside [B, C2, *spatial] is channels after x's C1; a group may have channels of both. So the sum
at the end of a residual block and the concatenation of a UNet's way up have no passes of their own. What is normalised
is `whole` as it is stored, rounded to its type: the backward reads it.

Two forms. Where a group fits into the registers of one program, it is read once: forward 2 tensor passes, backward 3.
Larger groups are split over programs of a few pixels each, and so are those that are narrow in memory (see `plan`). One
kernel makes partial sums, a second finishes and applies them. That reads the input twice: 3 and 5 passes, some of them
from the cache. Sums have a fixed order and no atomics.
"""

import functools

import torch
import triton
import triton.language as tl

from .launch import launch
from .memory import DTYPES, as_stored, load_float, most_registers, pixels_of, store_rounded

# A program holds at most this many elements, padded to powers of two. Larger groups are split.
ONE_PASS_ELEMENTS = 16384
SPLIT_ELEMENTS = 4096
MOST_WARPS = 16
LEAST_ELEMENTS = 512
LARGE_TILE = 8192  # from so many elements on, a thread takes twice as many
# So many warps has a large tile at least where groups have one or two channels, and where two sources of float32 are
# joined. With fewer the backward spills, the latter with Triton 3.6 for sm_80.
WARPS_OF_CROWDED_TILES = 8
# Bytes beside each other of a pixel's row: two sectors, which are what memory moves. A program of the split form has
# more. With fewer the same sectors are moved again by the next program.
SEGMENT, SPLIT_SEGMENT = 64, 128

# How the programs of one direction are cut, by what was fastest on an H200: (elements of a thread, unless the tile is
# large; bytes of a pixel's row below which a group is split although it would fit). Split, the forward reads twice, and
# the backward has three launches.
FORWARD, BACKWARD = (16, 32), (32, 16)

# ---- jitted functions ------------------------------------------------------------------------------------------------


@triton.jit
def _offset(
    pixel, channel,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,  # of a sample
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Offset of (pixel, channel) within a sample."""
    if CHANNELS_LAST:
        offset = pixel * CHANNELS + channel
    else:
        offset = channel * PIXELS + pixel
    return offset


@triton.jit
def _tile(
    sample, first_group, first_pixel,  # where the tile begins
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,  # shape of a sample
    GROUPS_HERE: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,  # shape of the tile
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(pixel, group, channel, mask of channels, mask, offset in the tensor) of a tile.

    It is [groups, pixels, a group's channels]. The groups come first: of axes that are equally far apart in memory the
    compiler gives neighbouring threads to the first, and groups lie beside each other in a pixel's row.
    """
    pixel = first_pixel + tl.arange(0, PIXEL_TILE)[None, :, None]
    group = first_group + tl.arange(0, GROUPS_HERE)[:, None, None]
    inner = tl.arange(0, CHANNEL_TILE)[None, None, :]
    channel = group * GROUP_CHANNELS + inner
    channel_mask = inner < GROUP_CHANNELS
    mask = (pixel < PIXELS) & channel_mask
    offset = sample * (PIXELS * GROUPS * GROUP_CHANNELS)
    offset += _offset(pixel, channel, PIXELS, GROUPS * GROUP_CHANNELS, CHANNELS_LAST)
    return pixel, group, channel, channel_mask, mask, offset


@triton.jit
def _modulation(
    w_ptr, b_ptr,  # [C], or None for ones and zeros
    scale_ptr, shift_ptr,  # [B, C], or None
    sample, channel, mask,  # a sample, a block of channels, which of them exist
    scale_stride, shift_stride,  # of the batch
):  # fmt: skip
    """(w', b (1 + scale) + shift) at a block of channels, float32."""
    if w_ptr is None:
        w = tl.where(mask, 1.0, 0.0)
        b = tl.where(mask, 0.0, 0.0)
    else:
        w = load_float(w_ptr + channel, mask)
        b = load_float(b_ptr + channel, mask)
    if scale_ptr is not None:
        factor = 1.0 + load_float(scale_ptr + sample * scale_stride + channel, mask)
        w = w * factor
        b = b * factor + load_float(shift_ptr + sample * shift_stride + channel, mask)
    return w, b


@triton.jit
def _load_input(
    x_ptr,  # [B, C, *spatial]
    add_ptr,  # [B, C], or None
    sample, offset, channel, mask, channel_mask,  # of the tile
    add_stride,  # of the batch
):  # fmt: skip
    """x + add of a tile, 0 where masked."""
    x = load_float(x_ptr + offset, mask)
    if add_ptr is not None:
        x = tl.where(mask, x + load_float(add_ptr + sample * add_stride + channel, channel_mask), 0.0)
    return x


@triton.jit
def _load_parts(
    x_ptr,  # [B, X_CHANNELS, *spatial]
    add_ptr,  # [B, X_CHANNELS], or None
    residual_ptr,  # like x, or None
    beside_ptr,  # [B, CHANNELS - X_CHANNELS, *spatial], or None
    whole_ptr,  # [B, CHANNELS, *spatial], written; None where x + add is all
    sample, offset, pixel, channel, mask, channel_mask,  # of the tile
    add_stride,  # of the batch
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,  # of a sample
    X_CHANNELS: tl.constexpr,
    FACTOR: tl.constexpr,  # of the sum
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The input of a tile, 0 where masked, put together of its parts and written where there are some.

    Two masked loads: one of pointers into either tensor would be narrow.
    """
    if whole_ptr is None:
        x = _load_input(x_ptr, add_ptr, sample, offset, channel, mask, channel_mask, add_stride)
    else:
        if beside_ptr is None:
            x_mask = mask
            x_offset = offset
            x = load_float(x_ptr + offset, mask)
        else:
            x_mask = mask & (channel < X_CHANNELS)
            x_offset = sample * (PIXELS * X_CHANNELS) + _offset(pixel, channel, PIXELS, X_CHANNELS, CHANNELS_LAST)
            BESIDE: tl.constexpr = CHANNELS - X_CHANNELS
            beside_offset = _offset(pixel, channel - X_CHANNELS, PIXELS, BESIDE, CHANNELS_LAST)
            x = load_float(x_ptr + x_offset, x_mask)
            x += load_float(beside_ptr + sample * (PIXELS * BESIDE) + beside_offset, mask & (channel >= X_CHANNELS))
        if add_ptr is not None:
            add = load_float(add_ptr + sample * add_stride + channel, channel_mask & (channel < X_CHANNELS))
            x = tl.where(mask, x + add, 0.0)
        if residual_ptr is not None:
            x += load_float(residual_ptr + x_offset, x_mask)
        if FACTOR != 1:
            x *= tl.where(channel < X_CHANNELS, FACTOR, 1.0)
        x = as_stored(x, whole_ptr)
        store_rounded(whole_ptr + offset, x, mask)
    return x


@triton.jit
def _activate(u, SILU: tl.constexpr):
    """act(u)."""
    if SILU:
        u = u / (1.0 + tl.exp(-u))
    return u


@triton.jit
def _pull_back(dy, u, SILU: tl.constexpr):
    """dy act'(u)."""
    if SILU:
        gate = 1.0 / (1.0 + tl.exp(-u))
        dy = dy * gate * (1.0 + u * (1.0 - gate))
    return dy


@triton.jit
def _group_norm_forward_kernel(
    x_ptr,  # [B, X_CHANNELS, *spatial]
    add_ptr,  # [B, X_CHANNELS], or None
    residual_ptr, beside_ptr, whole_ptr,  # see `_load_parts`
    w_ptr, b_ptr,  # [C], or None
    scale_ptr, shift_ptr,  # [B, C], or None
    y_ptr,  # [B, C, *spatial], written
    mean_ptr, rstd_ptr,  # [B, G], written
    add_stride, scale_stride, shift_stride,  # of the batch
    eps,
    X_CHANNELS: tl.constexpr, FACTOR: tl.constexpr,  # see `_load_parts`
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,  # shape of a sample
    GROUPS_HERE: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,  # shape of the tile
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS_HERE whole groups of one sample, in a tile [groups, pixels, channels of a group]."""
    program = tl.program_id(0)
    sample = (program // (GROUPS // GROUPS_HERE)).to(tl.int64)
    first_group = (program % (GROUPS // GROUPS_HERE)) * GROUPS_HERE
    pixel, group, channel, channel_mask, mask, offset = _tile(
        sample, first_group, 0,
        PIXELS, GROUPS, GROUP_CHANNELS,
        GROUPS_HERE, PIXEL_TILE, CHANNEL_TILE,
        CHANNELS_LAST,
    )  # fmt: skip
    x = _load_parts(
        x_ptr,
        add_ptr,
        residual_ptr, beside_ptr, whole_ptr,
        sample, offset, pixel, channel, mask, channel_mask,
        add_stride,
        PIXELS, GROUPS * GROUP_CHANNELS,
        X_CHANNELS, FACTOR,
        CHANNELS_LAST,
    )  # fmt: skip
    count = PIXELS * GROUP_CHANNELS
    mean = tl.sum(tl.sum(x, axis=2), axis=1) / count  # [GROUPS_HERE]
    centred = tl.where(mask, x - mean[:, None, None], 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=2), axis=1) / count
    rstd = 1.0 / tl.sqrt(variance + eps)
    w, b = _modulation(
        w_ptr, b_ptr,
        scale_ptr, shift_ptr,
        sample, channel, channel_mask,
        scale_stride, shift_stride,
    )  # fmt: skip
    store_rounded(y_ptr + offset, _activate(centred * rstd[:, None, None] * w + b, SILU), mask)
    statistics = sample * GROUPS + first_group + tl.arange(0, GROUPS_HERE)
    tl.store(mean_ptr + statistics, mean)
    tl.store(rstd_ptr + statistics, rstd)


@triton.jit
def _store_gradient(
    dx,
    dwhole_ptr,  # [B, C, *spatial], what reaches the whole input otherwise, or None
    dx_ptr, dbeside_ptr,  # [B, X_CHANNELS, *spatial] and of the other channels, or None, written
    sample, offset, pixel, channel, mask,  # of the tile
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,  # of a sample
    X_CHANNELS: tl.constexpr,
    FACTOR: tl.constexpr,  # of the sum
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile's parts; returns it.

    Where there are more tensors, their addresses are made anew: the tile's 64-bit offsets would be kept in registers up
    to here, and spill.
    """
    of_sample = _offset(pixel, channel, PIXELS, CHANNELS, CHANNELS_LAST)
    if dwhole_ptr is not None:
        dx += load_float(dwhole_ptr + sample * (PIXELS * CHANNELS) + of_sample, mask)
    if FACTOR != 1:
        dx *= tl.where(channel < X_CHANNELS, FACTOR, 1.0)
    if dbeside_ptr is not None:
        BESIDE: tl.constexpr = CHANNELS - X_CHANNELS
        x_offset = _offset(pixel, channel, PIXELS, X_CHANNELS, CHANNELS_LAST)
        store_rounded(dx_ptr + sample * (PIXELS * X_CHANNELS) + x_offset, dx, mask & (channel < X_CHANNELS))
        beside_offset = _offset(pixel, channel - X_CHANNELS, PIXELS, BESIDE, CHANNELS_LAST)
        store_rounded(dbeside_ptr + sample * (PIXELS * BESIDE) + beside_offset, dx, mask & (channel >= X_CHANNELS))
    elif dwhole_ptr is not None:
        store_rounded(dx_ptr + sample * (PIXELS * CHANNELS) + of_sample, dx, mask)
    else:
        store_rounded(dx_ptr + offset, dx, mask)
    return dx


@triton.jit
def _group_norm_backward_kernel(
    dy_ptr,  # like x
    x_ptr,  # [B, C, *spatial]
    add_ptr,  # [B, C], or None
    w_ptr, b_ptr,  # [C], or None
    scale_ptr, shift_ptr,  # [B, C], or None
    mean_ptr, rstd_ptr,  # [B, G]
    dwhole_ptr, dx_ptr, dbeside_ptr,  # see `_store_gradient`
    p_ptr, q_ptr,  # [B, C], written
    dadd_ptr,  # [B, C], written, or None
    add_stride, scale_stride, shift_stride,  # of the batch
    X_CHANNELS: tl.constexpr, FACTOR: tl.constexpr,  # see `_store_gradient`
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,  # shape of a sample
    GROUPS_HERE: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,  # shape of the tile
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program: as `_group_norm_forward_kernel`. It writes dx, the sums P and Q and, where there is an add, dadd."""
    program = tl.program_id(0)
    sample = (program // (GROUPS // GROUPS_HERE)).to(tl.int64)
    first_group = (program % (GROUPS // GROUPS_HERE)) * GROUPS_HERE
    pixel, group, channel, channel_mask, mask, offset = _tile(
        sample, first_group, 0,
        PIXELS, GROUPS, GROUP_CHANNELS,
        GROUPS_HERE, PIXEL_TILE, CHANNEL_TILE,
        CHANNELS_LAST,
    )  # fmt: skip
    x = _load_input(x_ptr, add_ptr, sample, offset, channel, mask, channel_mask, add_stride)
    mean = tl.load(mean_ptr + sample * GROUPS + group)
    rstd = tl.load(rstd_ptr + sample * GROUPS + group)
    normed = tl.where(mask, (x - mean) * rstd, 0.0)
    w, b = _modulation(
        w_ptr, b_ptr,
        scale_ptr, shift_ptr,
        sample, channel, channel_mask,
        scale_stride, shift_stride,
    )  # fmt: skip
    du = _pull_back(load_float(dy_ptr + offset, mask), normed * w + b, SILU)
    p = tl.sum(du * normed, axis=1)  # [GROUPS_HERE, CHANNEL_TILE]
    q = tl.sum(du, axis=1)
    flat_inner = tl.arange(0, CHANNEL_TILE)[None, :]
    flat = (
        sample * (GROUPS * GROUP_CHANNELS)
        + (first_group + tl.arange(0, GROUPS_HERE)[:, None]) * GROUP_CHANNELS
        + flat_inner
    )
    flat_mask = (flat_inner < GROUP_CHANNELS) & (tl.arange(0, GROUPS_HERE)[:, None] >= 0)
    tl.store(p_ptr + flat, p, mask=flat_mask)
    tl.store(q_ptr + flat, q, mask=flat_mask)
    # Indexing with None: tl.reshape gives the compiler a replicated layout and a 38 KB stack here (Triton 3.8.0).
    count = PIXELS * GROUP_CHANNELS
    along = tl.sum(p[:, None, :] * w, axis=2)[:, :, None] / count
    across = tl.sum(q[:, None, :] * w, axis=2)[:, :, None] / count
    dx = rstd * (du * w - across - normed * along)
    dx = _store_gradient(
        dx,
        dwhole_ptr,
        dx_ptr, dbeside_ptr,
        sample, offset, pixel, channel, mask,
        PIXELS, GROUPS * GROUP_CHANNELS,
        X_CHANNELS, FACTOR,
        CHANNELS_LAST,
    )  # fmt: skip
    if dadd_ptr is not None:
        if PIXEL_TILE * CHANNEL_TILE != PIXELS * GROUP_CHANNELS:
            dx = tl.where(mask, dx, 0.0)
        tl.store(dadd_ptr + flat, tl.sum(dx, axis=1), mask=flat_mask)


@triton.jit
def _group_norm_split_statistics_kernel(
    x_ptr,  # [B, X_CHANNELS, *spatial]
    add_ptr,  # [B, X_CHANNELS], or None
    residual_ptr, beside_ptr, whole_ptr,  # see `_load_parts`
    mean_ptr, deviation_ptr,  # [B, G, chunks], written
    add_stride,  # of the batch
    chunks,  # chunks of pixels a sample
    X_CHANNELS: tl.constexpr, FACTOR: tl.constexpr,  # see `_load_parts`
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,  # shape of a sample
    GROUPS_HERE: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,  # shape of the tile
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of pixels of some groups of a sample. It writes their mean and sum of squared deviations."""
    program = tl.program_id(0)
    chunk = program % chunks
    rest = program // chunks
    sample = (rest // (GROUPS // GROUPS_HERE)).to(tl.int64)
    first_group = (rest % (GROUPS // GROUPS_HERE)) * GROUPS_HERE
    pixel, group, channel, channel_mask, mask, offset = _tile(
        sample, first_group, chunk * PIXEL_TILE,
        PIXELS, GROUPS, GROUP_CHANNELS,
        GROUPS_HERE, PIXEL_TILE, CHANNEL_TILE,
        CHANNELS_LAST,
    )  # fmt: skip
    x = _load_parts(
        x_ptr,
        add_ptr,
        residual_ptr, beside_ptr, whole_ptr,
        sample, offset, pixel, channel, mask, channel_mask,
        add_stride,
        PIXELS, GROUPS * GROUP_CHANNELS,
        X_CHANNELS, FACTOR,
        CHANNELS_LAST,
    )  # fmt: skip
    count = tl.minimum(PIXELS - chunk * PIXEL_TILE, PIXEL_TILE) * GROUP_CHANNELS
    mean = tl.sum(tl.sum(x, axis=2), axis=1) / count  # [GROUPS_HERE]
    centred = tl.where(mask, x - mean[:, None, None], 0.0)
    target = (sample * GROUPS + first_group + tl.arange(0, GROUPS_HERE)) * chunks + chunk
    tl.store(mean_ptr + target, mean)
    tl.store(deviation_ptr + target, tl.sum(tl.sum(centred * centred, axis=2), axis=1))


@triton.jit
def _group_norm_split_forward_kernel(
    x_ptr,  # [B, C, *spatial]
    add_ptr,  # [B, C], or None
    w_ptr, b_ptr,  # [C], or None
    scale_ptr, shift_ptr,  # [B, C], or None
    chunk_mean_ptr, chunk_deviation_ptr,  # [B, G, chunks]
    y_ptr,  # like x, written
    mean_ptr, rstd_ptr,  # [B, G], written
    add_stride, scale_stride, shift_stride,  # of the batch
    eps,
    chunks,  # chunks of pixels a sample
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,  # shape of a sample
    GROUPS_HERE: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,  # shape of the tile
    CHUNK_TILE: tl.constexpr,  # chunks, padded to a power of two
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program: joins the chunks' statistics (Chan et al. 1979) and applies them to its chunk.

    The program of the first chunk keeps the joined statistics.
    """
    program = tl.program_id(0)
    chunk = program % chunks
    rest = program // chunks
    sample = (rest // (GROUPS // GROUPS_HERE)).to(tl.int64)
    first_group = (rest % (GROUPS // GROUPS_HERE)) * GROUPS_HERE
    group_row = sample * GROUPS + first_group + tl.arange(0, GROUPS_HERE)
    joined = tl.arange(0, CHUNK_TILE)[None, :]  # the chunks that are joined
    joined_mask = (joined < chunks) & (tl.arange(0, GROUPS_HERE)[:, None] >= 0)
    joined_count = tl.where(  # [1, CHUNK_TILE]
        joined < chunks,
        tl.minimum(PIXELS - joined * PIXEL_TILE, PIXEL_TILE) * GROUP_CHANNELS,
        0,
    ).to(tl.float32)
    joined_mean = tl.load(chunk_mean_ptr + group_row[:, None] * chunks + joined, mask=joined_mask, other=0.0)
    deviation = tl.load(chunk_deviation_ptr + group_row[:, None] * chunks + joined, mask=joined_mask, other=0.0)
    count = PIXELS * GROUP_CHANNELS
    mean = tl.sum(joined_mean * joined_count, axis=1) / count  # [GROUPS_HERE]
    between = joined_mean - mean[:, None]
    variance = tl.sum(deviation + between * between * joined_count, axis=1) / count
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean_ptr + group_row, mean, mask=(tl.arange(0, GROUPS_HERE) >= 0) & (chunk == 0))
    tl.store(rstd_ptr + group_row, rstd, mask=(tl.arange(0, GROUPS_HERE) >= 0) & (chunk == 0))

    pixel, group, channel, channel_mask, mask, offset = _tile(
        sample, first_group, chunk * PIXEL_TILE,
        PIXELS, GROUPS, GROUP_CHANNELS,
        GROUPS_HERE, PIXEL_TILE, CHANNEL_TILE,
        CHANNELS_LAST,
    )  # fmt: skip
    x = _load_input(x_ptr, add_ptr, sample, offset, channel, mask, channel_mask, add_stride)
    w, b = _modulation(
        w_ptr, b_ptr,
        scale_ptr, shift_ptr,
        sample, channel, channel_mask,
        scale_stride, shift_stride,
    )  # fmt: skip
    normed = (x - mean[:, None, None]) * rstd[:, None, None]
    store_rounded(y_ptr + offset, _activate(normed * w + b, SILU), mask)


@triton.jit
def _group_norm_split_backward_kernel(
    dy_ptr,  # like x
    x_ptr,  # [B, C, *spatial]
    add_ptr,  # [B, C], or None
    w_ptr, b_ptr,  # [C], or None
    scale_ptr, shift_ptr,  # [B, C], or None
    mean_ptr, rstd_ptr,  # [B, G]
    along_ptr, across_ptr,  # [B, G], mean_group(w' P / pixels) and of Q; None in the first launch
    dwhole_ptr, dx_ptr, dbeside_ptr,  # see `_store_gradient`; dx None in the first launch
    p_ptr, q_ptr,  # [B, chunks, C], written; None in the second launch
    dadd_ptr,  # [B, chunks, C], written, or None
    add_stride, scale_stride, shift_stride,  # of the batch
    chunks,  # chunks of pixels a sample
    X_CHANNELS: tl.constexpr, FACTOR: tl.constexpr,  # see `_store_gradient`
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,  # shape of a sample
    GROUPS_HERE: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,  # shape of the tile
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of pixels of some groups of one sample.

    It is launched twice. The first launch writes the chunk's sums P and Q. The second writes dx, from the groups'
    sums, and the chunk's sum dadd.
    """
    program = tl.program_id(0)
    chunk = program % chunks
    rest = program // chunks
    sample = (rest // (GROUPS // GROUPS_HERE)).to(tl.int64)
    first_group = (rest % (GROUPS // GROUPS_HERE)) * GROUPS_HERE
    pixel, group, channel, channel_mask, mask, offset = _tile(
        sample, first_group, chunk * PIXEL_TILE,
        PIXELS, GROUPS, GROUP_CHANNELS,
        GROUPS_HERE, PIXEL_TILE, CHANNEL_TILE,
        CHANNELS_LAST,
    )  # fmt: skip
    x = _load_input(x_ptr, add_ptr, sample, offset, channel, mask, channel_mask, add_stride)
    mean = tl.load(mean_ptr + sample * GROUPS + group)
    rstd = tl.load(rstd_ptr + sample * GROUPS + group)
    normed = tl.where(mask, (x - mean) * rstd, 0.0)
    w, b = _modulation(
        w_ptr, b_ptr,
        scale_ptr, shift_ptr,
        sample, channel, channel_mask,
        scale_stride, shift_stride,
    )  # fmt: skip
    du = _pull_back(load_float(dy_ptr + offset, mask), normed * w + b, SILU)
    flat_inner = tl.arange(0, CHANNEL_TILE)[None, :]
    flat = (
        (sample * chunks + chunk) * (GROUPS * GROUP_CHANNELS)
        + (first_group + tl.arange(0, GROUPS_HERE)[:, None]) * GROUP_CHANNELS
        + flat_inner
    )
    flat_mask = (flat_inner < GROUP_CHANNELS) & (tl.arange(0, GROUPS_HERE)[:, None] >= 0)
    if dx_ptr is None:
        tl.store(p_ptr + flat, tl.sum(du * normed, axis=1), mask=flat_mask)
        tl.store(q_ptr + flat, tl.sum(du, axis=1), mask=flat_mask)
    else:
        along = tl.load(along_ptr + sample * GROUPS + group)
        across = tl.load(across_ptr + sample * GROUPS + group)
        dx = rstd * (du * w - across - normed * along)
        dx = _store_gradient(
            dx,
            dwhole_ptr,
            dx_ptr, dbeside_ptr,
            sample, offset, pixel, channel, mask,
            PIXELS, GROUPS * GROUP_CHANNELS,
            X_CHANNELS, FACTOR,
            CHANNELS_LAST,
        )  # fmt: skip
        if dadd_ptr is not None:
            tl.store(dadd_ptr + flat, tl.sum(tl.where(mask, dx, 0.0), axis=1), mask=flat_mask)


# ---- for the launchers -----------------------------------------------------------------------------------------------


def _joined_groups(groups, column, limit, least, segment, wanted):
    """How many groups a program takes: a divisor of them, doubled until the tile and its segments are large enough.

    column: elements that one more group adds to the tile; limit, least: of the tile.
    segment: bytes that one more group adds to what lies beside each other, or 0; wanted: how many of them are enough.
    """
    here = 1
    while groups % (2 * here) == 0 and 2 * here * column <= limit:
        if here * column >= least and (segment == 0 or here * segment >= wanted):
            break
        here *= 2
    return here


@functools.cache
def plan(channels, groups, pixels, element_size, channels_last, direction=FORWARD, joined=False):
    """How one (shape, groups) runs, whatever the batch: tile sizes, compiler options, and `chunks`, 1 for one pass.

    joined: whether the channels are of two sources. The dict is kept and given again: copy it to change it.

    A program takes several small groups until a warp has enough to do. In channels_last memory the channels of one
    group are a few bytes in each pixel's row. There a program takes groups until it uses SEGMENT bytes of the row, as
    far as its registers go. Where they end too early, see `FORWARD`.
    """
    group_channels = channels // groups
    channel_tile = triton.next_power_of_2(group_channels)
    pixel_tile = triton.next_power_of_2(pixels)
    segment = group_channels * element_size if channels_last else 0  # bytes of a group in a pixel's row; 0: no matter
    a_thread, least_segment = direction
    column = pixel_tile * channel_tile
    groups_here = _joined_groups(groups, column, ONE_PASS_ELEMENTS, LEAST_ELEMENTS, segment, SEGMENT)
    narrow = channels_last and groups_here < groups and groups_here * segment < least_segment
    if column > ONE_PASS_ELEMENTS or narrow:
        limit = max(SPLIT_ELEMENTS, channel_tile)
        groups_here = _joined_groups(groups, channel_tile, limit, 0, segment, SPLIT_SEGMENT)
        pixel_tile = max(1, limit // (groups_here * channel_tile))
    elements = pixel_tile * groups_here * channel_tile
    large = elements >= LARGE_TILE
    crowded = large and (channel_tile <= 2 or joined and element_size == 4)
    least = WARPS_OF_CROWDED_TILES if crowded else 1
    warps = min(MOST_WARPS, max(least, elements // (32 * a_thread * (2 if large else 1))))
    return {
        "PIXELS": pixels,
        "GROUPS": groups,
        "GROUP_CHANNELS": group_channels,
        "GROUPS_HERE": groups_here,
        "PIXEL_TILE": pixel_tile,
        "CHANNEL_TILE": channel_tile,
        "chunks": triton.cdiv(pixels, pixel_tile),
        "num_warps": warps,
        "maxnreg": most_registers(warps),
    }


def _arrange(x, channels, groups, direction, joined):
    """(chunks, tile arguments, grid) for x or what is joined to `channels`; ValueError for what no kernel has."""
    if x.dtype not in DTYPES:
        raise ValueError(
            f"kernels: {x.dtype} is not supported; use float32, bfloat16 or float16 (the torch backend takes float64)"
        )
    channels_last = not x.is_contiguous()
    if channels_last and not (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(
            f"kernels: a tensor of shape {tuple(x.shape)} with strides {x.stride()} "
            "is neither contiguous nor channels_last; call .contiguous()"
        )
    tile = dict(plan(channels, groups, pixels_of(x.shape), x.element_size(), channels_last, direction, joined))
    chunks = tile.pop("chunks")
    grid = (len(x) * (tile["GROUPS"] // tile["GROUPS_HERE"]) * chunks,)
    return chunks, {**tile, "CHANNELS_LAST": channels_last}, grid


def _row_stride(tensor):
    return 0 if tensor is None else tensor.stride(0)


def _effective_weight(weight, scale):
    """w (1 + scale), float32, broadcastable to [B, C]; None for ones."""
    if scale is None:
        return None if weight is None else weight.to(torch.float32)
    factor = 1.0 + scale.to(torch.float32)
    return factor if weight is None else factor * weight.to(torch.float32)


def _group_means(sums, factor, groups, elements):
    """mean_group(w' S / pixels) of both channel sums S [2, B, C]: [2, B, groups].

    factor: w' or None; elements: of a group.
    """
    weighted = sums if factor is None else factor * sums
    return weighted.reshape(*sums.shape[:2], groups, -1).sum(3) / elements


def _forward(x, add, residual, beside, factor, whole, groups, weight, bias, eps, silu, scale, shift):
    """(y, mean, rstd); whole: where the joined input goes, None where x + add is all."""
    y = torch.empty_like(x if whole is None else whole)
    chunks, tile, grid = _arrange(x, y.shape[1], groups, FORWARD, beside is not None)
    mean = torch.empty(len(x), groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    parts, join = (x, add, residual, beside, whole), {"X_CHANNELS": x.shape[1], "FACTOR": factor}
    strides = (_row_stride(add), _row_stride(scale), _row_stride(shift))
    if chunks == 1:
        launch(
            _group_norm_forward_kernel,
            grid,
            (*parts, weight, bias, scale, shift, y, mean, rstd),
            (*strides, eps),
            {**join, **tile, "SILU": silu},
        )
        return y, mean, rstd
    chunk_mean = torch.empty(len(x), groups, chunks, dtype=torch.float32, device=x.device)
    deviation = torch.empty_like(chunk_mean)
    launch(
        _group_norm_split_statistics_kernel,
        grid,
        (*parts, chunk_mean, deviation),
        (_row_stride(add), chunks),
        {**join, **tile},
    )
    if whole is not None:  # it is there now
        x, add = whole, None
    launch(
        _group_norm_split_forward_kernel,
        grid,
        (x, add, weight, bias, scale, shift, chunk_mean, deviation, y, mean, rstd),
        (_row_stride(add), *strides[1:], eps, chunks),
        {**tile, "CHUNK_TILE": triton.next_power_of_2(chunks), "SILU": silu},
    )
    return y, mean, rstd


def _backward(dy, x, groups, weight, bias, silu, scale, shift, add, mean, rstd, dwhole, dx, dbeside, factor, with_dadd):
    """(P and Q [2, B, C], dadd [B, C] or None); writes dx, and dbeside if that is not None."""
    chunks, tile, grid = _arrange(x, x.shape[1], groups, BACKWARD, dbeside is not None)
    batch, channels = x.shape[:2]
    sums = torch.empty(2, batch, chunks, channels, dtype=torch.float32, device=x.device)  # in one, for one reduction
    dadd = torch.empty_like(sums[0]) if with_dadd else None
    inputs = (dy, x, add, weight, bias, scale, shift, mean, rstd)
    strides = (_row_stride(add), _row_stride(scale), _row_stride(shift))
    join = {"X_CHANNELS": dx.shape[1], "FACTOR": factor}
    if chunks == 1:
        launch(
            _group_norm_backward_kernel,
            grid,
            (*inputs, dwhole, dx, dbeside, *sums, dadd),
            strides,
            {**join, **tile, "SILU": silu},
        )
        return sums[:, :, 0], None if dadd is None else dadd[:, 0]
    no_means, no_gradients, no_sums = (None, None), (None, None, None), (None, None)
    launch(
        _group_norm_split_backward_kernel,
        grid,
        (*inputs, *no_means, *no_gradients, *sums, None),
        (*strides, chunks),
        {"X_CHANNELS": channels, "FACTOR": 1.0, **tile, "SILU": silu},
    )
    sums = sums.sum(2)
    along, across = _group_means(sums, _effective_weight(weight, scale), groups, x[0].numel() // groups)
    launch(
        _group_norm_split_backward_kernel,
        grid,
        (*inputs, along, across, dwhole, dx, dbeside, *no_sums, dadd),
        (*strides, chunks),
        {**join, **tile, "SILU": silu},
    )
    return sums, None if dadd is None else dadd.sum(1)


# ---- public functions ------------------------------------------------------------------------------------------------


def group_norm_silu(x, groups, weight, bias, eps, silu, scale, shift, add):
    """(y like x, mean [B, groups], rstd [B, groups], both float32); see the top of the file.

    x              [B, C, *spatial], row-major or channels_last
    weight, bias   [C], or both None
    scale, shift   [B, C] with contiguous rows, or both None
    add            [B, C] with contiguous rows, or None

    Raises ValueError for a layout or type that no kernel has.
    """
    return _forward(x, add, None, None, 1.0, None, groups, weight, bias, eps, silu, scale, shift)


def group_norm_silu_backward(dy, x, groups, weight, bias, silu, scale, shift, add, mean, rstd, with_dadd=True):
    """(dx like x, P and Q [2, B, C], dadd [B, C] or None without add), all but dx float32; see the top of the file.

    dy is laid out like x. mean and rstd are what the forward returned; the other arguments and errors are as there.
    with_dadd: whether dadd is wanted.
    """
    dx, with_dadd = torch.empty_like(x), with_dadd and add is not None
    sums, dadd = _backward(
        dy, x, groups, weight, bias, silu, scale, shift, add, mean, rstd, None, dx, None, 1.0, with_dadd
    )
    return dx, sums, dadd


def empty_channels(x, channels):
    """An empty tensor like x, in its memory format, with as many channels."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    shape = (len(x), channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def empty_whole(x, beside):
    """An empty tensor for the channels of both, in the memory format of x."""
    return empty_channels(x, x.shape[1] + (0 if beside is None else beside.shape[1]))


def joined_group_norm_silu(x, groups, weight, bias, eps, silu, add, residual, factor, beside):
    """(y, whole, mean [B, groups], rstd [B, groups]) of an input in parts; see the top of the file.

    x              [B, C1, *spatial], row-major or channels_last
    weight, bias   [C] for the C = C1 + C2 channels of y and whole, or both None
    add            [B, C1] with contiguous rows, or None
    residual       like x, or None
    beside         [B, C2, *spatial] of the type and memory format of x, or None for C2 = 0
    factor         a number

    Raises ValueError as `group_norm_silu`.
    """
    whole = empty_whole(x, beside)
    y, mean, rstd = _forward(x, add, residual, beside, factor, whole, groups, weight, bias, eps, silu, None, None)
    return y, whole, mean, rstd


def joined_group_norm_silu_backward(
    dy, dwhole, whole, x_channels, groups, weight, bias, silu, factor, mean, rstd, with_dadd
):
    """(dx [B, x_channels, *spatial], dbeside or None, P and Q [2, B, C], dadd [B, x_channels] or None).

    dx is the gradient of x and of residual. dy and dwhole are laid out like whole; dwhole is None where y alone is
    used. with_dadd: whether there is an add whose gradient is wanted. The rest is as of `joined_group_norm_silu`.
    """
    beside = whole.shape[1] - x_channels
    dx, dbeside = empty_channels(whole, x_channels), empty_channels(whole, beside) if beside else None
    sums, dadd = _backward(
        *(dy, whole, groups, weight, bias, silu, None, None, None, mean, rstd),
        *(dwhole, dx, dbeside, factor, with_dadd),
    )
    return dx, dbeside, sums, None if dadd is None else dadd[:, :x_channels]


def parameter_grads(sums, weight, bias, scale):
    """(dweight, dbias, dscale, dshift) from P and Q [2, B, C], None where there is no such input."""
    dweight = dbias = dscale = dshift = None
    if weight is not None:
        weighted = sums if scale is None else sums * (1.0 + scale.to(torch.float32))
        dweight, dbias = weighted.sum(1).to(weight.dtype)
    if scale is not None:
        p, q = sums
        dscale = p if weight is None else weight.to(torch.float32) * p + bias.to(torch.float32) * q
        dscale, dshift = dscale.to(scale.dtype), q.to(scale.dtype)
    return dweight, dbias, dscale, dshift

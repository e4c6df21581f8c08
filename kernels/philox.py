"""Counter-based standard normal noise, made in registers: Philox4x32-10 and Box-Muller.

A counter-based generator has no state. Its numbers are a function of a key and a counter. Here these are an address:
the number of element i of a sample depends on (seed, stream, draw, i) alone ("noise by address").

    key = seed (low word, high word);  counter = (i // 4, stream, draw, 0)
    words w0..w3 = Philox4x32-10(key, counter);  u = folded to [0, 1), clamped at 1e-7 under the logarithm
    n = sqrt(-2 ln u0) (cos 2 pi u1, sin 2 pi u1), sqrt(-2 ln u2) (cos 2 pi u3, sin 2 pi u3)   for i = 4j .. 4j + 3

These are the numbers of `tl.randn4x(seed, (stream << 32) | j)`. Two things are done in another way, for speed. A
half-round is one 32 x 32 -> 64 bit multiplication. Sine and cosine are polynomials on an eighth of a turn: the
library's carry a slow path with a stack for huge angles. There is no backward, because noise has no inputs to
differentiate.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
import triton
import triton.language as tl

from .memory import check_size, cut_samples

# ---- jitted functions ------------------------------------------------------------------------------------------------


@triton.jit
def philox4x32(
    key0, key1,  # uint32
    c0, c1, c2, c3,  # the counter, uint32
):  # fmt: skip
    """Ten rounds of Philox4x32: four words of the counter's shape."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """uint32 -> float32 in [0, 1), as Triton's `uint_to_uniform_float`: the sign bit folds instead of being dropped."""
    signed = word.to(tl.int32, bitcast=True)
    signed = tl.where(signed < 0, -signed - 1, signed)
    return signed.to(tl.float32) * 4.6566127342e-10


@triton.jit
def _box_muller(u0, u1):
    """Two independent normals from two uniforms."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(1.0e-7, u0)))
    quarter = tl.floor(4.0 * u1 + 0.5)  # the nearest quarter turn; the rest is within an eighth
    x = (u1 - 0.25 * quarter) * 6.283185307179586
    x2 = x * x
    sine = x + x * x2 * (-1.6666654611e-1 + x2 * (8.3321608736e-3 + x2 * -1.9515295891e-4))
    cosine = (
        1.0 - 0.5 * x2 + x2 * x2 * (4.166664568298827e-2 + x2 * (-1.388731625493765e-3 + x2 * 2.443315711809948e-5))
    )
    turns = quarter.to(tl.int32)
    swapped = (turns & 1) != 0
    c = tl.where(swapped, sine, cosine)
    s = tl.where(swapped, cosine, sine)
    c = tl.where(((turns + 1) & 2) != 0, -c, c)
    s = tl.where((turns & 2) != 0, -s, s)
    return radius * c, radius * s


@triton.jit
def _normal4(
    seed, stream, draw,  # scalars
    j,  # a block of int32
):  # fmt: skip
    """The normals of elements 4j .. 4j + 3."""
    key = seed.to(tl.uint64, bitcast=True)
    c0 = j.to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = philox4x32(
        (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32),
        c0, zero + stream.to(tl.uint32), zero + draw.to(tl.uint32), zero,
    )  # fmt: skip
    n0, n1 = _box_muller(_uniform(w0), _uniform(w1))
    n2, n3 = _box_muller(_uniform(w2), _uniform(w3))
    return n0, n1, n2, n3


@triton.jit
def normal_block(
    seed,  # int64 scalar
    stream, draw,  # integer scalars
    block,  # the block's number within the sample
    BLOCK: tl.constexpr,  # elements a block
    WIDE: tl.constexpr,  # every lane gets 8 consecutive elements in the place of 4
):  # fmt: skip
    """Noise of elements block * BLOCK + [0, BLOCK) of one sample, float32 [BLOCK].

    With WIDE, 16-bit tensors are accessed 16 bytes at a time.
    """
    if WIDE:
        j = block * (BLOCK // 4) + 2 * tl.arange(0, BLOCK // 8)
        a0, a1, a2, a3 = _normal4(seed, stream, draw, j)
        b0, b1, b2, b3 = _normal4(seed, stream, draw, j + 1)
        n0 = tl.join(a0, b0)
        n1 = tl.join(a1, b1)
        n2 = tl.join(a2, b2)
        n3 = tl.join(a3, b3)
    else:
        j = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        n0, n1, n2, n3 = _normal4(seed, stream, draw, j)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def load_draw(draw_ptr, sample):
    """The number of a sample's draw; 0 where there is no tensor of them."""
    if draw_ptr is None:
        draw = tl.program_id(0) * 0
    else:
        draw = tl.load(draw_ptr + sample)
    return draw


@triton.jit
def _draw_kernel(
    noise_ptr,  # [B, size] float32, written
    seed_ptr, stream_ptr, draw_ptr,  # [B]; no draw_ptr: draw 0
    size, blocks,  # elements a sample, blocks a sample
    BLOCK: tl.constexpr,  # elements a block
):  # fmt: skip
    """One program: a block of one sample."""
    program = tl.program_id(0)
    sample = program // blocks
    block = program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    noise = normal_block(
        tl.load(seed_ptr + sample), tl.load(stream_ptr + sample), load_draw(draw_ptr, sample),
        block, BLOCK, False,
    )  # fmt: skip
    tl.store(noise_ptr + sample.to(tl.int64) * size + i, noise, mask=i < size)


@triton.jit
def _store_integers(
    out_ptr,  # int64, written
    i, mask,  # the items, and which of them exist
    word0, word1,  # two words an item
    limit,  # or None
):  # fmt: skip
    """64 bits an item or, with a limit, an integer below it from the first word."""
    if limit is None:
        value = word0.to(tl.int64) | (word1.to(tl.int64) << 32)
    else:
        value = word0.to(tl.int64) * limit >> 32
    tl.store(out_ptr + i, value, mask=mask)


# Counters change in every step: no kernel is compiled anew for what divides them.
@triton.jit(do_not_specialize=["key0", "key1", "c1", "c2", "c3", "limit"])
def _integers_kernel(
    out_ptr,  # [n] int64, written
    key0, key1, c1, c2, c3,  # words of the key and the counter, each 0 .. 2^32 - 1
    limit,  # or None
    size,  # n
    BLOCK: tl.constexpr,  # items a program
):  # fmt: skip
    """One program: a block of items, which are the counter's first word."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c0 = i.to(tl.uint32)
    zero = c0 * 0
    w0, w1, _, _ = philox4x32(
        key0.to(tl.uint32), key1.to(tl.uint32),
        c0, zero + c1.to(tl.uint32), zero + c2.to(tl.uint32), zero + c3.to(tl.uint32),
    )  # fmt: skip
    _store_integers(out_ptr, i, i < size, w0, w1, limit)


@triton.jit(do_not_specialize=["limit"])
def _integers_of_seeds_kernel(
    out_ptr,  # [B] int64, written
    seed_ptr,  # [B] int64
    limit,
    size,  # B
    STREAM: tl.constexpr,  # below 2^32
    BLOCK: tl.constexpr,  # items a program
):  # fmt: skip
    """One program: a block of seeds, each of which is a key. counter = (0, STREAM, 0, 0)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed_ptr + i, mask=i < size, other=0)
    zero = (key * 0).to(tl.uint32)
    w0, w1, _, _ = philox4x32(
        (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
        zero, zero + STREAM, zero, zero,
    )  # fmt: skip
    _store_integers(out_ptr, i, i < size, w0, w1, limit)


# ---- public functions ------------------------------------------------------------------------------------------------

INTEGERS_BLOCK, INTEGERS_WARPS = 256, 4  # two items a thread, which it stores at once
WORD = 0xFFFFFFFF


def integers(run_seed, purpose, counter, n, device, limit=None):
    """int64 [n] on a device: 64 random bits an item, or an integer below the limit from the low 32 of them.

    key = run_seed, counter = (item, counter (low word, high word), purpose).
    """
    out = torch.empty(n, dtype=torch.int64, device=device)
    _integers_kernel[(triton.cdiv(n, INTEGERS_BLOCK),)](
        out,
        run_seed & WORD, run_seed >> 32 & WORD, counter & WORD, counter >> 32 & WORD, purpose & WORD,
        limit,
        n,
        BLOCK=INTEGERS_BLOCK, num_warps=INTEGERS_WARPS,
    )  # fmt: skip
    return out


def integers_of_seeds(seeds, stream, limit):
    """An integer below the limit for each of the seeds [B] int64, from its first word of a stream: int64 [B]."""
    out = torch.empty(seeds.shape, dtype=torch.int64, device=seeds.device)
    _integers_of_seeds_kernel[(triton.cdiv(len(seeds), INTEGERS_BLOCK),)](
        out,
        seeds,
        limit,
        len(seeds),
        STREAM=stream, BLOCK=INTEGERS_BLOCK, num_warps=INTEGERS_WARPS,
    )  # fmt: skip
    return out


def draw_noise(seeds, stream, draw, shape, block=None):
    """Standard normal noise, float32 [B, *shape].

    seeds [B] int64; stream [B] int; draw [B] int or None for 0; block: elements a program, for tests.
    Raises ValueError for a shape with too many elements.
    """
    noise = torch.empty(len(seeds), *shape, dtype=torch.float32, device=seeds.device)
    check_size(noise[0].numel())
    size, blocks, block, warps = cut_samples(noise, block)
    _draw_kernel[(len(seeds) * blocks,)](
        noise,
        seeds, stream, draw,
        size, blocks,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return noise

"""Counter-based noise, that is noise by address: Philox4x32-10 and Box-Muller in plain torch.

Every normal number is a pure function of its address: the 64-bit seed of its sample, a stream (the layer), the number
of the draw, and the index of its element. Nothing is stored, and there is no generator state. The rule is that of
Triton's `tl.randn4x(seed, (stream << 32) | j)`: key = the seed (low word first), counter = (j, stream, draw, 0). The
four outputs make two Box-Muller pairs for the elements 4 j .. 4 j + 3.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; tested against Random123's known answers.
"""

import torch

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
UNIT = 4.6566127342e-10  # what Triton multiplies a 31-bit integer by: just under 2^-31
SMALLEST = 1.0e-7  # uniforms are clamped here before the logarithm, so |normal| < 5.68
TWO_PI = 6.283185307179586
LAST_STREAM = MASK  # layers have the streams 1 .. K, and x_K has 0


def philox4x32(key, counter):
    """Philox4x32-10 on int64 tensors of 32-bit words: a key of 2 and a counter of 4, broadcastable -> 4 of them."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _multiply(word, constant):
    """High and low 32 bits of word * constant. The constant is taken minus 2^32, so that int64 holds every product."""
    product = word * (constant - (1 << 32))
    return (product >> 32) + word, product & MASK


def normal(seeds, stream, shape, draw=0):
    """Standard normal numbers by address: seeds [B] int64, stream an int or [B] int -> float32 [B, *shape].

    The element index is the row-major index inside one sample. `draw` (an int or [B]) numbers independent draws at one
    address.
    """
    size = 1
    for extent in shape:
        size *= extent
    words = _words(seeds, stream, (size + 3) // 4, draw)
    normals = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))  # four of [B, ceil(size / 4)]
    return torch.stack(normals, dim=2).flatten(1)[:, :size].reshape(len(seeds), *shape)


def integers(run_seed, purpose, counter, n, device="cpu"):
    """64 random bits each for n items: int64 [n], a function of (run seed, purpose, counter, item) alone.

    This is where sample seeds, layer draws and shuffles come from; `purpose` keeps their numbers apart.
    """
    items = torch.arange(n, dtype=torch.int64, device=device)
    # Filled on the device: torch.tensor would copy the numbers there, and the host would wait.
    key = torch.full_like(items, int(run_seed))
    low, high = torch.full_like(items, int(counter) & MASK), torch.full_like(items, int(counter) >> 32)
    address = (items, low, high, torch.full_like(items, int(purpose)))
    words = philox4x32((key & MASK, (key >> 32) & MASK), address)
    return words[0] | (words[1] << 32)


def integers_below(limit, run_seed, purpose, counter, n, device="cpu"):
    """n integers in 0 .. limit - 1, int64 [n]: the low 32 bits of `integers`, scaled."""
    return (integers(run_seed, purpose, counter, n, device) & MASK) * limit >> 32


def integers_of_seeds(seeds, limit):
    """An integer in 0 .. limit - 1 for each of the seeds [B] int64: int64 [B], a function of the seed alone.

    limit: below 2^31. The words are those of a stream that no layer has, so no noise shares them.
    """
    return _words(seeds, LAST_STREAM, 1, 0)[0][:, 0] * limit >> 32


def _words(seeds, stream, groups, draw):
    """The Philox words of element groups 0 .. groups-1 of every sample: four of [B, groups]."""
    seeds = seeds.to(torch.int64)[:, None]  # [B, 1]
    stream, draw = _column(stream, seeds), _column(draw, seeds)
    group = torch.arange(groups, dtype=torch.int64, device=seeds.device)[None]  # [1, groups]
    # "| (stream & 0)": Inductor folds a bare arange times a constant into an index with a 32-bit step, and returns
    # wrong integers.
    group = group | (stream & 0)
    counter = (group, stream & MASK, draw & MASK, torch.zeros_like(stream))
    return philox4x32((seeds & MASK, (seeds >> 32) & MASK), counter)


def _column(number, seeds):
    """An int or [B] as int64 [B, 1] beside seeds [B, 1]."""
    if not isinstance(number, torch.Tensor):
        return torch.full_like(seeds, number)  # filled on the device, as in `integers`
    return number.to(torch.int64).reshape(-1, 1).expand(len(seeds), 1)


def _box_muller(word0, word1):
    """Two independent normals from two words."""
    radius = torch.sqrt(-2.0 * torch.log(_uniform(word0).clamp_min(SMALLEST)))
    angle = TWO_PI * _uniform(word1)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _uniform(word):
    """A word as a float32 in [0, 1), as Triton's `uint_to_uniform_float`: the sign bit folds, it is not dropped."""
    return torch.where(word > 0x7FFFFFFF, MASK - word, word).to(torch.float32) * UNIT

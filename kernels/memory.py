"""How tensors lie in memory, for all kernels: addresses of strided samples, loads as float32, rounded stores.

A kernel counts the elements of one sample in row-major order of its shape [C, *spatial], whatever its memory looks like,
because that is the order in which noise is addressed. `sample_layout` turns a tensor's strides into what the kernels need to find
an element; samples that are row-major in memory are the fast case, in which the address is the count itself.
"""

import math

import torch
import triton
import triton.language as tl

# Read when the kernels are defined, as Triton reads it: they are interpreted, or compiled, for the life of the process.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_SAMPLE = 2**31 - 2**16  # element counts within a sample are 32-bit integers; the margin is a block beyond the end


@triton.jit
def element_offset(i, PIXELS: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr):
    """Offset of element i of a sample from its first one. CHANNEL_STRIDE 0 says that the sample is row-major."""
    if CHANNEL_STRIDE == 0:
        offset = i
    else:
        offset = (i // PIXELS).to(tl.int64) * CHANNEL_STRIDE + (i % PIXELS).to(tl.int64) * PIXEL_STRIDE
    return offset


@triton.jit
def load_float(pointer, mask):
    """Load as float32. Upcasting at the load is not only for accuracy: the interpreter computes bfloat16 wrongly."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rounded(pointer, value, mask):
    """Store float32 in the pointer's type, rounded to nearest even. The interpreter would truncate to bfloat16, so there the bits are rounded here."""
    if _INTERPRETED:
        if pointer.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            value = bits.to(tl.float32, bitcast=True)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


def sample_layout(tensor):
    """(stride of the batch, stride of a channel, stride of a pixel) of a tensor [B, N] or [B, C, *spatial]; (.., 0, 0) for row-major samples.

    The spatial axes must collapse into one, as they do in contiguous and in channels_last tensors and in slices of their
    channels. Raises ValueError for other strides, for a type that no kernel has, and for a sample too large.
    """
    shape, strides = tensor.shape, tensor.stride()
    if tensor.dtype not in DTYPES:
        raise ValueError(f"kernels: {tensor.dtype} is not supported; use float32, bfloat16 or float16 (the torch backend takes float64)")
    size = math.prod(shape[1:])
    if size > LARGEST_SAMPLE:
        raise ValueError(f"kernels: a sample of {size} elements is too large; at most {LARGEST_SAMPLE}")
    channel_axis = [] if tensor.ndim < 3 else [1]
    axes = [axis for axis in range(1 + len(channel_axis), tensor.ndim) if shape[axis] > 1]
    for outer, inner in zip(axes, axes[1:]):
        if strides[outer] != strides[inner] * shape[inner]:
            raise ValueError(f"kernels: a tensor of shape {tuple(shape)} with strides {strides} is neither contiguous nor channels_last; call .contiguous()")
    pixels = math.prod(shape[1 + len(channel_axis):])
    pixel_stride = strides[axes[-1]] if axes else 1
    channel_stride = strides[1] if channel_axis and shape[1] > 1 else pixels * pixel_stride
    if size > 1 and 0 in (channel_stride, pixel_stride):
        raise ValueError(f"kernels: a tensor of shape {tuple(shape)} with strides {strides} repeats elements; call .contiguous()")
    if pixel_stride == 1 and channel_stride == pixels:
        return strides[0], 0, 0
    return strides[0], channel_stride, pixel_stride


def pixels_of(shape):
    """Elements of one channel of a shape [B, N] or [B, C, *spatial]."""
    return math.prod(shape[1:] if len(shape) < 3 else shape[2:])

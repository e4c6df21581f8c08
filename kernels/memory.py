"""How tensors lie in memory: addresses of strided samples, loads as float32, rounded stores, samples cut into blocks.

A kernel counts the elements of one sample in row-major order of its shape [C, *spatial], whatever the memory looks
like. That is the order in which the noise is counted. `sample_layout` turns a tensor's strides into what a kernel
needs to find an element. Samples that are row-major in memory are the fast case: there the count itself is the
offset.
"""

import math

import torch
import triton
import triton.language as tl

# Triton reads its switch when a kernel is defined. The kernels are interpreted, or compiled, for the life of the
# process.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Element counts within a sample are 32-bit integers. The margin is for a block that reaches beyond the end.
LARGEST_SAMPLE = 2**31 - 2**16
REGISTERS, MOST_REGISTERS = 65536, 255  # of a multiprocessor, and of a thread at most

# ---- jitted functions ------------------------------------------------------------------------------------------------


@triton.jit
def element_offset(
    i,  # elements of a sample, counted in row-major order
    PIXELS: tl.constexpr,  # elements a channel; not used for row-major samples
    CHANNEL_STRIDE: tl.constexpr,  # 0 says that the sample is row-major
    PIXEL_STRIDE: tl.constexpr,
):
    """Offset of element i of a sample from its first element."""
    if CHANNEL_STRIDE == 0:
        offset = i
    else:
        offset = (i // PIXELS).to(tl.int64) * CHANNEL_STRIDE + (i % PIXELS).to(tl.int64) * PIXEL_STRIDE
    return offset


@triton.jit
def load_float(pointer, mask):
    """Load as float32, 0 where masked. The interpreter computes bfloat16 wrongly, so nothing is computed in it."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _round_by_hand(value, TYPE: tl.constexpr):
    """float32 that TYPE holds, to nearest even. The interpreter would truncate to bfloat16: there, the bits."""
    if _INTERPRETED:
        if TYPE == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def store_rounded(pointer, value, mask):
    """Store float32 in the pointer's type, rounded to nearest even."""
    value = _round_by_hand(value, pointer.dtype.element_ty)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def as_stored(value, pointer):
    """float32 as it will be read again from where `store_rounded` puts it."""
    if pointer.dtype.element_ty != tl.float32:
        value = _round_by_hand(value, pointer.dtype.element_ty)
        if not (_INTERPRETED and pointer.dtype.element_ty == tl.bfloat16):
            value = value.to(pointer.dtype.element_ty).to(tl.float32)
    return value


# ---- for the launchers -----------------------------------------------------------------------------------------------


def choose_block(size, element_size=4):
    """(BLOCK, num_warps) for samples of `size` elements.

    A thread has 16 elements, and at least 16 bytes. As few elements as may be lie beyond the end of the sample.
    """
    block = min(2048, max(512 // element_size, triton.next_power_of_2(size)))
    if block == 2048 and -(-size // 2048) * 2048 > -(-size // 1024) * 1024:
        block = 1024
    return block, max(1, block // 512)


def most_registers(warps):
    """`maxnreg` of a program of so many warps: a thread may have all registers that the warps can have.

    Left to itself the assembler squeezes some variants to the next step of occupancy, and spills for it.
    """
    return min(MOST_REGISTERS, REGISTERS // (32 * warps))


def cut_samples(tensor, block=None):
    """(size, blocks, BLOCK, num_warps): how the samples of a tensor [B, *event] are cut into blocks of elements.

    block: elements a program in the place of the choice, for tests.
    """
    size = tensor[0].numel()
    chosen, warps = choose_block(size, tensor.element_size())
    block = block or chosen
    return size, triton.cdiv(size, block), block, warps


def check_size(size):
    """ValueError for a sample with too many elements."""
    if size > LARGEST_SAMPLE:
        raise ValueError(f"kernels: a sample of {size} elements is too large; at most {LARGEST_SAMPLE}")


def sample_layout(tensor):
    """(stride of the batch, stride of a channel, stride of a pixel) of a tensor [B, N] or [B, C, *spatial].

    The last two are 0 for row-major samples. The spatial axes must collapse into one. They do in contiguous and in
    channels_last tensors, and in slices of their channels. Raises ValueError for other strides, for a type that no
    kernel has, and for a sample with too many elements.
    """
    shape, strides = tensor.shape, tensor.stride()
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"kernels: {tensor.dtype} is not supported; "
            "use float32, bfloat16 or float16 (the torch backend takes float64)"
        )
    size = math.prod(shape[1:])
    check_size(size)
    channel_axis = [] if tensor.ndim < 3 else [1]
    axes = [axis for axis in range(1 + len(channel_axis), tensor.ndim) if shape[axis] > 1]
    for outer, inner in zip(axes, axes[1:]):
        if strides[outer] != strides[inner] * shape[inner]:
            raise ValueError(
                f"kernels: a tensor of shape {tuple(shape)} with strides {strides} "
                "is neither contiguous nor channels_last; call .contiguous()"
            )
    pixels = pixels_of(shape)
    pixel_stride = strides[axes[-1]] if axes else 1
    channel_stride = strides[1] if channel_axis and shape[1] > 1 else pixels * pixel_stride
    if size > 1 and 0 in (channel_stride, pixel_stride):
        raise ValueError(
            f"kernels: a tensor of shape {tuple(shape)} with strides {strides} repeats elements; call .contiguous()"
        )
    if pixel_stride == 1 and channel_stride == pixels:
        return strides[0], 0, 0
    return strides[0], channel_stride, pixel_stride


def layout_arguments(**tensors):
    """Kernel arguments for tensors of one shape: for `x` x_stride, X_CHANNEL and X_PIXEL, and one PIXELS for all.

    Those of a tensor that is None are 0. Raises ValueError as `sample_layout`.
    """
    arguments, layouts = {}, []
    for name, tensor in tensors.items():
        stride, *layout = (0, 0, 0) if tensor is None else sample_layout(tensor)
        layouts.append(layout)
        arguments[f"{name}_stride"] = stride
        arguments[f"{name.upper()}_CHANNEL"], arguments[f"{name.upper()}_PIXEL"] = layout
    shape = next(tensor.shape for tensor in tensors.values() if tensor is not None)
    return {**arguments, "PIXELS": pixels_if_strided(shape, layouts)}


def pixels_if_strided(shape, layouts):
    """Elements a channel if any of the layouts needs them, else 0. With 0, one compiled kernel serves all shapes."""
    return pixels_of(shape) if any(channel for channel, _ in layouts) else 0


def pixels_of(shape):
    """Elements of one channel of a shape [B, N] or [B, C, *spatial]."""
    return math.prod(shape[1:] if len(shape) < 3 else shape[2:])

"""One step of Adam with amsgrad for all parameters of a network, with clipping before it and their average after it.

    c  = min(1, clip / (|g| + 1e-6))                       |g|: the norm of all gradients as one vector
    m  = beta1 m + (1 - beta1) c g,   v = beta2 v + (1 - beta2) (c g)^2,   h = max(h, v)
    p  = p - f (rate / (1 - beta1^n)) m / (sqrt(h) / sqrt(1 - beta2^n) + eps)       n: the number of the step
    a  = a + weight (p - a)                                f: the parameter's own factor of the rate

These are the formulas of torch.optim.Adam and torch.nn.utils.clip_grad_norm_. All tensors are float32. There is no
backward.

Transfers an element: g, p, m, v, h and a are read, and all but g are written: 11. The norm is made before, by torch,
and reads g once: 12. torch's own kernels make 15 to 20: clipping 3 with the norm, fused Adam 9, and the average 3, or 8
where its weight is a tensor.

The tensors stay where they are. The kernel finds them through a table of addresses on the device. Those of the
gradients are new in each step, because a backward pass hands its own tensors over. One buffer for all gradients would
have fixed addresses, but torch would add to it: 3 more transfers and one more kernel a parameter. So the addresses are
written into the table by a small kernel that has them as its arguments. Nothing is copied from the host, nobody waits,
and a CUDA graph keeps the addresses that it was recorded with.
"""

import torch
import triton
import triton.language as tl

from .memory import INTERPRETED

# Elements and warps of a program: 8 elements a thread of each of six tensors. The interpreter pays for each program.
BLOCK, WARPS = (2**14 if INTERPRETED else 2**10), 4
WRITTEN = 128  # addresses that one launch takes as arguments: 1 KB of the 4 KB that a kernel may have
ALIGNMENT = 16  # bytes of the widest access

# ---- jitted functions ------------------------------------------------------------------------------------------------


@triton.jit
def _write_addresses_kernel(
    addresses,  # a tuple of COUNT odd int64: each is an address plus 1
    address_ptr,  # [COUNT] int64, written
    COUNT: tl.constexpr,
):
    """One program: a row of the table.

    Triton compiles a kernel anew for an argument that is a multiple of 16. Odd numbers are one kernel for all.
    """
    for index in tl.static_range(COUNT):
        tl.store(address_ptr + index, addresses[index] - 1)


@triton.jit
def _at(
    address_ptr,  # [P] int64
    parameter, start,  # which of them, and the first element
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16 bytes
):  # fmt: skip
    """Where a block of a parameter's tensor begins."""
    pointer = tl.load(address_ptr + parameter).to(tl.pointer_type(tl.float32)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _update_block(
    gradient_ptr, parameter_ptr,  # a block of each
    exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr,
    average_ptr,
    mask,  # which of its elements exist, or None for all
    clipping, rate, correction, weight,  # c, f rate / (1 - beta1^n), sqrt(1 - beta2^n), of the average
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of one block of one parameter."""
    i = tl.arange(0, BLOCK)
    gradient = clipping * tl.load(gradient_ptr + i, mask=mask)
    exp_avg = BETA1 * tl.load(exp_avg_ptr + i, mask=mask) + (1.0 - BETA1) * gradient
    exp_avg_sq = BETA2 * tl.load(exp_avg_sq_ptr + i, mask=mask) + (1.0 - BETA2) * gradient * gradient
    largest = tl.load(max_exp_avg_sq_ptr + i, mask=mask)
    largest = tl.where(largest < exp_avg_sq, exp_avg_sq, largest)
    parameter = tl.load(parameter_ptr + i, mask=mask) - rate * exp_avg / (tl.sqrt(largest) / correction + EPS)
    average = tl.load(average_ptr + i, mask=mask)
    average += weight * (parameter - average)
    tl.store(exp_avg_ptr + i, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + i, exp_avg_sq, mask=mask)
    tl.store(max_exp_avg_sq_ptr + i, largest, mask=mask)
    tl.store(parameter_ptr + i, parameter, mask=mask)
    tl.store(average_ptr + i, average, mask=mask)


@triton.jit
def _adam_update_kernel(
    block_ptr,  # [programs, 2] int32: the number of a parameter, and of a block in it
    size_ptr,  # [P] int64, elements of each parameter
    factor_ptr,  # [P], of the rate
    gradient_ptr, parameter_ptr,  # [P] int64, addresses
    exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr,
    average_ptr,
    norm_ptr,  # []
    number_ptr,  # [3]: rate / (1 - beta1^n), sqrt(1 - beta2^n), the weight of the average
    clip,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: a block of one parameter. A whole block has no mask, so that its accesses are wide."""
    program = tl.program_id(0)
    index = tl.load(block_ptr + 2 * program)
    start = tl.load(block_ptr + 2 * program + 1).to(tl.int64) * BLOCK
    left = tl.load(size_ptr + index) - start
    clipping = clip / (tl.load(norm_ptr) + 1.0e-6)
    clipping = tl.where(clipping > 1.0, 1.0, clipping)  # not a minimum, which would lose a NaN
    rate = tl.load(factor_ptr + index) * tl.load(number_ptr)
    correction, weight = tl.load(number_ptr + 1), tl.load(number_ptr + 2)
    gradient = _at(gradient_ptr, index, start, ALIGNED)
    parameter = _at(parameter_ptr, index, start, ALIGNED)
    exp_avg = _at(exp_avg_ptr, index, start, ALIGNED)
    exp_avg_sq = _at(exp_avg_sq_ptr, index, start, ALIGNED)
    largest = _at(max_exp_avg_sq_ptr, index, start, ALIGNED)
    average = _at(average_ptr, index, start, ALIGNED)
    if left >= BLOCK:
        _update_block(
            gradient, parameter, exp_avg, exp_avg_sq, largest, average,
            None,
            clipping, rate, correction, weight,
            BETA1, BETA2, EPS, BLOCK,
        )  # fmt: skip
    else:
        _update_block(
            gradient, parameter, exp_avg, exp_avg_sq, largest, average,
            tl.arange(0, BLOCK) < left,
            clipping, rate, correction, weight,
            BETA1, BETA2, EPS, BLOCK,
        )  # fmt: skip


# ---- for the launchers -----------------------------------------------------------------------------------------------


def is_dense(tensor):
    """Whether a tensor's elements lie beside each other in some order of its axes, as channels_last ones do."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) == tensor.numel()


def lies_as(tensor, parameter):
    """Whether a tensor's elements have the order in memory that a parameter's have."""
    if tensor.stride() == parameter.stride():
        return True
    pairs = zip(parameter.shape, tensor.stride(), parameter.stride())
    return all(own == expected for size, own, expected in pairs if size > 1)


# ---- public functions ------------------------------------------------------------------------------------------------


def adam_table(parameters, exp_avg, exp_avg_sq, max_exp_avg_sq, averages, factors, block=BLOCK):
    """Where everything lies, for `adam_step`: four tensors and a bool.

    parameters and the four after it: lists of P tensors, which must stay where they are; factors: P numbers.
    block: elements a program, for tests.

    Returns (blocks [programs, 2], sizes [P], factors [P], addresses [6, P and more]) on their device, and whether the
    addresses allow the widest accesses. The first row is that of the gradients, which is written before each step.

    Raises ValueError for tensors that are not float32, have holes, or are not laid out as their parameter.
    """
    lists = (parameters, exp_avg, exp_avg_sq, max_exp_avg_sq, averages)
    for tensors in lists:
        for tensor, parameter in zip(tensors, parameters, strict=True):
            if tensor.dtype != torch.float32 or not is_dense(tensor) or not lies_as(tensor, parameter):
                raise ValueError(
                    f"kernels: a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, with strides "
                    f"{tensor.stride()}; an optimizer step takes dense float32 tensors, laid out as their parameter"
                )
    device = parameters[0].device
    sizes = torch.tensor([parameter.numel() for parameter in parameters])
    counts = -(-sizes // block)
    index = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = counts.cumsum(0) - counts
    blocks = torch.stack([index, torch.arange(len(index)) - first[index]], dim=1).to(torch.int32)
    addresses = torch.zeros(1 + len(lists), triton.cdiv(len(sizes), WRITTEN) * WRITTEN, dtype=torch.int64)
    addresses[1:, : len(sizes)] = torch.tensor([[tensor.data_ptr() for tensor in tensors] for tensors in lists])
    on_device = (blocks, sizes, torch.tensor(factors, dtype=torch.float32), addresses)
    return [tensor.to(device) for tensor in on_device], bool((addresses % ALIGNMENT == 0).all())


def adam_step(parameters, gradients, norm, numbers, table, aligned, clip, beta1, beta2, eps, block=BLOCK):
    """The step of all parameters, in place; see the top of the file.

    parameters, gradients: lists of P tensors; norm: [], of all gradients; table, aligned: of `adam_table`, with
    the same block.
    numbers: [3], rate / (1 - beta1^n), sqrt(1 - beta2^n) and the weight of the average.
    """
    blocks, sizes, factors, addresses = table
    # A gradient that lies otherwise is copied. torch's accumulation makes them like their parameters.
    gradients = [
        gradient if lies_as(gradient, parameter) else torch.empty_like(parameter).copy_(gradient)
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    found = [gradient.data_ptr() for gradient in gradients]
    aligned = aligned and all(address % ALIGNMENT == 0 for address in found)
    odd = [address + 1 for address in found]
    odd += odd[-1:] * (addresses.shape[1] - len(odd))
    for start in range(0, len(odd), WRITTEN):
        _write_addresses_kernel[(1,)](
            tuple(odd[start : start + WRITTEN]),
            addresses[0, start:],
            COUNT=WRITTEN, num_warps=1,
        )  # fmt: skip
    _adam_update_kernel[(len(blocks),)](
        blocks,
        sizes,
        factors,
        *addresses,
        norm,
        numbers,
        clip,
        BETA1=beta1, BETA2=beta2, EPS=eps,
        BLOCK=block,
        ALIGNED=aligned, num_warps=WARPS,
    )  # fmt: skip

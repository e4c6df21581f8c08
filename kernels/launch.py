"""Launching one kernel many times, with less work for the host than Triton's own way takes.

Triton looks at every argument of every launch: its type, whether its address or value is a multiple of 16, whether it
is 1. Then it binds 30 names. A network normalises 50 times a call, and outside of a CUDA graph the GPU waits for that.
The launchers here know what a launch depends on. So they look a compiled kernel up by that, and start it directly.
"""

from .memory import INTERPRETED

_compiled = {}  # what a launch was compiled for -> (the compiled kernel, its constants in the order of its signature)


def launch(kernel, grid, tensors, numbers, constants):
    """Do kernel[grid](*tensors, *numbers, **constants).

    tensors: of the current device, or None; the first is a tensor.
    numbers: int and float, whatever follows the tensors in the signature.
    constants: {name: value} of tl.constexpr and of the compiler's options, for a kernel always in one order.
    """
    if INTERPRETED:
        kernel[grid](*tensors, *numbers, **constants)
        return
    # A kernel is compiled for these. An equal number is specialised alike, so numbers stand for what Triton makes of
    # them; kernels are globals of their modules, and so keep their ids.
    key = (
        id(kernel),
        tensors[0].get_device(),
        *[None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors],
        *numbers,
        *constants.values(),
    )
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*tensors, *numbers, **constants)
        if compiled is not None:  # somebody records launches instead
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            _compiled[key] = compiled, [constants[name] for name in names]
        return
    compiled, in_order = found
    compiled[(*grid, 1, 1)](*tensors, *numbers, *in_order)

"""Triton's interpreter with less overhead, and with a numpy that is newer than it: what it computes is the same."""

import dataclasses
import functools
import math

import triton
import triton.language as tl
from triton.runtime import interpreter

VERSIONS = ("3.6.", "3.8.")  # of Triton, whose private names are those below; another keeps its own way


def spare_the_interpreter_work():
    """For a process that interprets its kernels: the types and tensors are triton.language's own, changed for good."""
    if not triton.__version__.startswith(VERSIONS):
        return
    global _patch_language, _patch_tensor, _numpy_type, _make_block_type, _broadcast, _constant, _cast, _operands
    semantic, interpreter_builder = type(interpreter.interpreter_semantic), interpreter.interpreter_builder
    _patch_language, interpreter._patch_lang = interpreter._patch_lang, _patch_language_once
    _patch_tensor, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, _patch_tensor_for_new_numpy
    _numpy_type, interpreter._get_np_dtype = interpreter._get_np_dtype, _numpy_type_once
    _broadcast, semantic.broadcast_impl_value = semantic.broadcast_impl_value, _broadcast_once
    _constant, semantic.scalar_constant = semantic.scalar_constant, _constant_once
    _cast, semantic.cast = semantic.cast, _cast_unless_alike
    _operands, semantic.binary_op_type_checking_impl = semantic.binary_op_type_checking_impl, _operands_unless_alike
    _make_block_type = tl.block_type.__init__
    tl.block_type.__new__ = _block_type_once
    tl.block_type.__init__ = lambda self, element_ty, shape: None  # it was made when it was new
    tl.block_type.with_element_ty = _with_element_type_once
    tl.tensor.__init__ = _make_tensor
    options = interpreter_builder.options
    if not options.debug:
        # Each sum and product of integers is made again in 64 bits, for an assertion that only debugging looks at.
        interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


@functools.cache
def _languages_of(function):
    return [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]


def _patch_language_once(function):
    """A launch puts the interpreter's functions into triton.language and takes them out at its end.

    Each call of a jitted function from a kernel would put them there again: a third of the interpreter's time.
    """
    are_there = not any(tl.core.is_builtin(module.load) for module in _languages_of(function))
    return interpreter._LangPatchScope() if are_there else _patch_language(function)


def _patch_tensor_for_new_numpy(tensor, scope):
    """A loop up to a loaded number makes an integer of it. Triton 3.6 makes it of [n], which numpy 2.5 refuses."""
    _patch_tensor(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


# An operation makes five types and three tensors, from the same few types and shapes: half of the rest.


def _block_type_once(cls, element_ty, shape):
    sizes = tuple([tl.core._unwrap_if_constexpr(size) for size in shape])
    known = element_ty.__dict__.setdefault("block_types", {})
    if sizes not in known:
        made = object.__new__(cls)
        _make_block_type(made, element_ty, shape)
        made.of_tensor = _shape_of_tensor(sizes)
        known[sizes] = made
    return known[sizes]


def _with_element_type_once(self, element_ty):
    known = self.__dict__.setdefault("of_other_elements", {})
    if id(element_ty) not in known:  # the type is kept, so that no other has its id
        known[id(element_ty)] = element_ty, tl.block_type(element_ty, self.shape)
    return known[id(element_ty)][1]


@functools.cache
def _shape_of_tensor(sizes):
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else _shape_of_tensor(())


_numpy_types = {}


def _numpy_type_once(type):
    if type.name not in _numpy_types:
        _numpy_types[type.name] = _numpy_type(type)
    return _numpy_types[type.name]


# A number in a kernel's source becomes a tensor, and that a block, in each operation that has it.


_constants = {}


def _constant_once(self, value, dtype):
    key = type(value), value, dtype.name if dtype else None
    if key not in _constants:
        _constants[key] = _constant(self, value, dtype)
    return _constants[key]


def _broadcast_once(self, lhs, rhs):
    if lhs.shape is rhs.shape:
        return lhs, rhs
    if not rhs.type.is_block():
        return lhs, _as_block(self, rhs, lhs)
    if not lhs.type.is_block():
        return _as_block(self, lhs, rhs), rhs
    return _broadcast(self, lhs, rhs)


def _as_block(self, scalar, like):
    """A scalar repeated in the shape of a block; it keeps what it was repeated to."""
    blocks, sizes = scalar.__dict__.setdefault("blocks", {}), like.type.shape
    if sizes not in blocks:
        blocks[sizes] = _broadcast(self, like, scalar)[1]
    return blocks[sizes]


def _cast_unless_alike(self, input, dst_ty, fp_downcast_rounding=None):
    if input.dtype is dst_ty and fp_downcast_rounding is None:
        return input
    return _cast(self, input, dst_ty, fp_downcast_rounding)


# Types that arithmetic with the same type, or with a number of their kind, does not change; and what they can hold.
PLAIN = {
    id(tl.float32): (-math.inf, math.inf),
    **{id(kind): (-(2**bits), 2**bits - 1) for kind, bits in ((tl.int32, 31), (tl.int64, 63))},
    **{id(kind): (0, 2**bits - 1) for kind, bits in ((tl.uint32, 32), (tl.uint64, 64))},
}


def _operands_unless_alike(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div=False):
    if arithmetic_check:
        lhs, rhs = _of_type(self, lhs, rhs), _of_type(self, rhs, lhs)
        if type(lhs) is type(rhs) is tl.tensor and lhs.dtype is rhs.dtype and id(lhs.dtype) in PLAIN:
            return self.broadcast_impl_value(lhs, rhs)
    return _operands(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div)


def _of_type(self, value, other):
    """A number as a tensor of the other operand's type, where that is plain and can hold it; all else as it is."""
    if type(other) is tl.tensor and id(other.dtype) in PLAIN:
        if type(value) is int or type(value) is float and other.dtype is tl.float32:
            low, high = PLAIN[id(other.dtype)]
            if low <= value <= high:
                return self.scalar_constant(value, other.dtype)
    return value

"""Triton's interpreter with less overhead: what it computes is the same."""

import functools

import triton.language as tl
from triton.runtime import interpreter

# Private names: where a version of Triton has others, its own way stays.
_patch_language = getattr(interpreter, "_patch_lang", None)
_scope = getattr(interpreter, "_LangPatchScope", None)


@functools.cache
def _languages_of(function):
    return [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]


def _patch_language_once(function):
    """A launch puts the interpreter's functions into triton.language and takes them out at its end.

    Each call of a jitted function from a kernel would put them there again: a third of the interpreter's time.
    """
    are_there = not any(tl.core.is_builtin(module.load) for module in _languages_of(function))
    return _scope() if are_there else _patch_language(function)


def patch_the_language_once_a_launch():
    if _patch_language and _scope:
        interpreter._patch_lang = _patch_language_once

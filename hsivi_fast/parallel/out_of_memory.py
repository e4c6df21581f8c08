"""What libraries raise where memory is not enough, as one kind of error. Needs no torch, which may not fit itself."""

import contextlib
import re

# What libraries say instead of raising MemoryError.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "failed to map segment",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't start new thread",
)


def is_out_of_memory(error):
    """Whether an exception says that memory, of the machine or of a GPU, was not enough.

    Or the one before it, which it hides: a graph whose recording has failed so can only say that it has.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, (RuntimeError, OSError, ImportError)) and any(text in str(error) for text in _OUT_OF_MEMORY):
        return True
    return isinstance(error, RuntimeError) and error.__context__ is not None and is_out_of_memory(error.__context__)


@contextlib.contextmanager
def memory_advice(advice):
    """Within it an exception for want of memory becomes a MemoryError of one line that ends in `advice`.

    advice: what was asked for and what to lower, as "batch: 250; use a smaller one".
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or str(error).startswith("out of memory"):  # the latter has its advice
            raise
        asked = re.search(r"[Tt]ried to allocate (\d+ bytes|[\d.]+ \w+)", f"{error} {error.__context__}")
        asked = f" (for {asked[1]} more)" if asked else ""
        raise MemoryError(f"out of memory{asked}; {advice}") from None

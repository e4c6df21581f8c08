"""What libraries raise where memory is not enough, as one kind of error. Needs no torch, which may not fit itself."""

import contextlib
import re

# What libraries say instead of raising MemoryError.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "failed to map segment",
    "out of memory",
    "can't start new thread",
)


def is_out_of_memory(error):
    """Whether an exception says that memory, of the machine or of a GPU, was not enough."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError, ImportError)) and any(
        text in str(error) for text in _OUT_OF_MEMORY
    )


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
        asked = re.search(r"[Tt]ried to allocate (\d+ bytes|[\d.]+ \w+)", str(error))
        asked = f" (for {asked[1]} more)" if asked else ""
        raise MemoryError(f"out of memory{asked}; {advice}") from None

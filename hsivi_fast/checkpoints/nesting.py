"""How deep the values of a pickle are nested, told by its opcodes before an unpickler sees them.

Python's hash of a tuple goes into its items without a limit: a deeply nested one as a key ends the process.
"""

import mmap
import pickletools

import torch

LARGEST_DEPTH = 100  # a checkpoint with its optimizer's state has some 10
_LEGACY_PICKLES = 5  # torch's format before 1.6: a magic number, a version, the system, the content, the storages' keys

_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_ADDED = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}  # how many values an opcode adds to the one below them
_ADDED_MARKED = {"APPENDS", "SETITEMS", "ADDITEMS"}


def _effect(opcode):
    """(how many values it takes, whether it takes all since the last mark, how many it gives) of another opcode."""
    taken = opcode.stack_before
    if pickletools.markobject in taken:
        return taken.index(pickletools.markobject), True, len(opcode.stack_after)
    return len(taken), False, len(opcode.stack_after)


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
# Those of values that hold no others.
_PLAIN = {name for name, effect in _EFFECTS.items() if effect == (0, False, 1)} - _GET - {"MARK"}


def is_deeply_nested(path):
    """Whether a pickle that torch.load would read in a file nests values deeper than `LARGEST_DEPTH`.

    A file that cannot be followed is not deeply nested: torch.load gets no further in it, and says why.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":  # an archive, the format since 1.6; its record as torch.load takes it
                return _is_deep(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
            # Of a mapped file no opcode can ask for more bytes than it has.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
                return any(_is_deep(stream) for _ in range(_LEGACY_PICKLES))
    except (ValueError, IndexError, OSError, RuntimeError):
        return False


def _is_deep(pickled):
    """Whether a pickle, bytes or a stream at its start, nests values too deep; a stream is behind it then, if not."""
    stack, marked, memo = [], [], {}  # of depths: 0 is of a value that holds no others
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in _PLAIN:
            stack.append(0)
        elif name in _PUT:
            memo[argument] = stack[-1]
        elif name in _GET:
            stack.append(memo.get(argument, 0))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            marked.append(stack)
            stack = []
        else:
            if name in _ADDED_MARKED:
                items, stack = stack, marked.pop()
                depths = [max(stack.pop(), _around(items))]
            elif name in _ADDED:
                items = [stack.pop() for _ in range(_ADDED[name])]
                depths = [max(stack.pop(), _around(items))]
            else:
                count, takes_marked, gives = _EFFECTS[name]
                items = []
                if takes_marked:
                    items, stack = stack, marked.pop()
                items += [stack.pop() for _ in range(count)]
                depths = [_around(items)] * gives
            if depths and depths[0] > LARGEST_DEPTH:
                return True
            stack.extend(depths)
    return False


def _around(depths):
    """The depth of a value that holds values of these depths."""
    return 1 + max(depths, default=-1)

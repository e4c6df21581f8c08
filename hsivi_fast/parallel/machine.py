"""What this machine has: memory, the GPU's memory, room on a disk. Asked before anything is allocated or written."""

import contextlib
import math
import os
import re
import resource
import shutil
from pathlib import Path

import torch

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
BLOCK = 4096  # bytes: the smallest file takes as much on nearly all disks


def size_in_words(count):
    """A number of bytes as "3.2 GiB"."""
    power = min(max(int(count).bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{count / 1024**power:.1f} {UNITS[power]}" if power else f"{int(count)} bytes"


def memory_of(device):
    """Bytes of all the memory that a process can have there, what others hold included.

    Of a CPU: memory and swap of the machine, or less where a container or `ulimit -v` allows less.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _swap()]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file
            limits.append(int(Path(file).read_text()))
    return min(limits)


def _swap():
    with contextlib.suppress(OSError):  # a system without this file
        found = re.search(r"^SwapTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


def refuse_beyond_memory(what, needed, device, advice):
    """ValueError where `needed` bytes are more than all the memory of a device.

    what: the key with its value, as "train.batch_size: 10000"; advice: what to lower.
    """
    there = memory_of(device)
    if needed > there:
        has = f"this machine's {'GPU' if device.type == 'cuda' else 'memory'} has {size_in_words(there)}"
        raise ValueError(f"{what} needs about {size_in_words(needed)} and {has}; {advice}")


def refuse_beyond_disk(what, needed, path, advice, files=0):
    """ValueError where `needed` bytes, or that many new files, are more than the disk of a path has room for.

    path: need not be there yet.
    """
    there = Path(os.path.abspath(path))
    while not there.exists() and there != there.parent:
        there = there.parent
    free, disk = shutil.disk_usage(there).free, os.statvfs(there)
    if needed > free:
        raise ValueError(
            f"{what} needs about {size_in_words(needed)} and the disk of {str(there)!r} has {size_in_words(free)} "
            f"free; {advice}"
        )
    if disk.f_files and files > disk.f_favail:
        raise ValueError(
            f"{what} makes {files} files and the disk of {str(there)!r} has room for {disk.f_favail}; {advice}"
        )


def picture_size(event_shape):
    """The bytes that a PNG of an image [C, H, W] takes on a disk at least, where it shrinks to a half."""
    return -(-math.prod(event_shape) // 2 // BLOCK) * BLOCK

"""The one writer of files: what a command writes is there as a whole or not at all, whatever happens to it or the disk.

Errors name the file, and what is written has the mode that the user's umask gives.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file

UNFINISHED = ".unfinished"


def as_written(path):
    """The path that a user's path means when it is written to.

    Behind a folder that is not there yet, ".." means another place before that folder is made than after; so such a
    path is resolved first.
    """
    path = Path(path)
    return path.resolve() if ".." in path.parts else path


@contextlib.contextmanager
def written_beside(path, replace=False, shared=False):
    """Give a hidden path beside `path`, where the caller writes a file or folder that becomes `path` at the end.

    What an earlier process left at the hidden path is deleted first, and what is written there reaches the disk
    before it is renamed. After an error nothing of it is left, and `path` is as it was.
    A file or an empty folder at `path` gives way, with `replace` any folder. `shared`: several processes may write it
    at the same time, so each has a hidden path of its own.
    Raises OSError that names `path` where it cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}" if shared else f".{path.name}{UNFINISHED}")
    with _named(path, unfinished):
        _remove(unfinished)
        try:
            mode = _mode_of_a_new_file(unfinished)
            yield unfinished
            for entry in [unfinished, *unfinished.rglob("*")]:
                if entry.is_file():
                    entry.chmod(mode)  # safetensors writes files that no one else may read
                    sync(entry)
            if path.is_dir():
                shutil.rmtree(path) if replace else path.rmdir()
            unfinished.replace(path)
        finally:
            _remove(unfinished)


def write_atomically(file, data, shared=False):
    """Write bytes to a file, or leave it as it was and raise OSError that names it; `shared` as of `written_beside`."""
    with written_beside(file, shared=shared) as unfinished:
        unfinished.write_bytes(data)


def write_json(file, value):
    """Write a value as JSON to a file, as `write_atomically` does."""
    write_atomically(file, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(file, tensors, metadata=None):
    """Write {name: tensor} to a safetensors file, as `write_atomically` does."""
    with written_beside(file) as unfinished:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, unfinished, metadata)


def write_arrays(file, shared=False, **arrays):
    """Write arrays by their names to an npz file; `shared` as of `written_beside`."""
    with written_beside(file, shared=shared) as unfinished, open(unfinished, "wb") as stream:
        np.savez(stream, **arrays)


def append_line(file, text):
    """Add a line to a file. Raises OSError that names it where it cannot be written, or is a link: to elsewhere."""
    with _named(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(descriptor, "a") as stream:
            stream.write(f"{text}\n")


def make_folder(path):
    """Make a folder and those above it. Raises OSError that names it where it cannot be made."""
    with _named(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def remove_unfinished(folder):
    """Delete what killed processes left in a folder before it was whole."""
    for entry in Path(folder).glob(f".*{UNFINISHED}"):
        _remove(entry)


def file_sha256(file):
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path):
    """Return when a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriteError(OSError):
    """A file that cannot be written: `reason` says why, and the message names it too."""

    def __init__(self, path, reason):
        super().__init__(f"cannot write {path}: {reason}")
        self.path, self.reason = Path(path), reason


@contextlib.contextmanager
def _named(path, unfinished=None):
    """Errors of writing as a `WriteError` that names `path`; not those of another file that the block reads."""
    try:
        yield
    except WriteError as error:  # of a file in a folder that was to become `path`
        if unfinished is None or unfinished not in error.path.parents:
            raise
        raise WriteError(path / error.path.relative_to(unfinished), error.reason) from None
    except (OSError, SafetensorError) as error:
        named = getattr(error, "filename", None)
        if named is not None and not str(named).startswith((str(path), str(unfinished or path))):
            raise
        raise WriteError(path, getattr(error, "strerror", None) or error) from None


def _mode_of_a_new_file(path):
    """The mode that a file has which is made at `path`, where nothing is and nothing stays."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        os.unlink(path)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

"""Files and folders that are there as a whole or not at all, whatever happens to the process or the disk."""

import contextlib
import os
import shutil
from pathlib import Path


def as_written(path):
    """The path that a user's path means when it is written to.

    Behind a folder that is not there yet, ".." means another place before that folder is made than after; so such a
    path is resolved first.
    """
    path = Path(path)
    return path.resolve() if ".." in path.parts else path


@contextlib.contextmanager
def written_beside(path, replace=False):
    """Give a hidden path beside `path`, where the caller writes a file or folder that becomes `path` at the end.

    What an earlier process left at the hidden path is deleted first, and what is written there reaches the disk
    before it is renamed. After an error nothing of it is left, and `path` is as it was.
    A file or an empty folder at `path` gives way, with `replace` any folder; otherwise OSError.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    _remove(unfinished)
    try:
        yield unfinished
        for entry in [unfinished, *unfinished.rglob("*")]:
            if entry.is_file():
                sync(entry)
        if path.is_dir():
            shutil.rmtree(path) if replace else path.rmdir()
        unfinished.replace(path)
    finally:
        _remove(unfinished)


def write_atomically(file, data):
    """Write bytes to a file, or leave it as it was and raise OSError that names it."""
    try:
        with written_beside(file) as unfinished:
            unfinished.write_bytes(data)
    except OSError as error:
        raise OSError(f"cannot write {file}: {error.strerror or error}") from None


def sync(path):
    """Return when a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

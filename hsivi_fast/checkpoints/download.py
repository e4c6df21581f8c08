"""Checkpoints from the network, once: a name or an address becomes a file in the cache, and its sum is checked at every use."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import sys
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ..config import PUBLISHED_TEACHERS

CACHE_VARIABLE = "HSIVI_CACHE"
_PIECE = 1 << 20  # bytes read at once
_PATIENCE = 30  # seconds without an answer


def locate_checkpoint(text, progress=False):
    """The path of a checkpoint that a configuration or a command names: a file or folder as it is, a known name or an address through the cache."""
    return (
        fetch_checkpoint(str(text), progress)
        if str(text) in PUBLISHED_TEACHERS or _is_address(str(text))
        else Path(text)
    )


def fetch_checkpoint(name_or_url, progress=False):
    """The local path of a checkpoint: `name_or_url` is a name of `PUBLISHED_TEACHERS` or an http, https or file address, with "#sha256=HEX" where its sum is known.

    It is downloaded once, into $HSIVI_CACHE or torch's cache, beside its place and renamed when it is whole. The names' sums are not known beforehand:
    the sum of the first download (or of a file put there by hand) is written down beside it, in FILE.sha256, and compared at every later use, so a file
    that changes on the disk is noticed, one that was wrong from the start is not. `progress` shows a bar on stderr.

    Raises ValueError, in one line, for an unknown name, a file that cannot be had (it says where to put it by hand), or a wrong sum (it says both).
    """
    address = PUBLISHED_TEACHERS.get(name_or_url, name_or_url)
    if not _is_address(address):
        raise ValueError(
            f"checkpoint {name_or_url!r}: neither a known name ({', '.join(PUBLISHED_TEACHERS)}) nor an http, https or file address"
        )
    address, _, fragment = address.partition("#")
    expected = _sum_in(fragment, name_or_url)
    file = cache_folder() / _file_name(address)
    with _alone(file):  # several processes of a machine may want it at the same time
        if file.is_file():
            _check_cached(file, expected)
        else:
            _download(address, file, expected, progress)
    return file


def cache_folder():
    """Where downloaded checkpoints lie."""
    import torch

    return Path(os.environ.get(CACHE_VARIABLE) or Path(torch.hub.get_dir()) / "checkpoints")


def _is_address(text):
    return text.startswith(("http://", "https://", "file://"))


def _sum_in(fragment, address):
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if not match:
        raise ValueError(f"checkpoint {address!r}: what follows # must be sha256= and 64 hexadecimal digits")
    return match[1].lower()


def _file_name(address):
    """A known file keeps its name; others get a part of their address's sum, since two addresses may end alike."""
    name = PurePosixPath(unquote(urlsplit(address).path)).name or "checkpoint"
    return (
        name if address in PUBLISHED_TEACHERS.values() else f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}"
    )


@contextlib.contextmanager
def _alone(file):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_name(f"{file.name}.lock"), "w")
    except OSError as error:
        raise ValueError(
            f"cache {str(file.parent)!r}: cannot be written ({error.strerror or error}); set {CACHE_VARIABLE} to another folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_cached(file, expected):
    recorded = file.with_name(f"{file.name}.sha256")
    found = file_sha256(file)
    wanted = expected or (
        recorded.read_text().split()[0] if recorded.is_file() and recorded.read_text().split() else None
    )
    if wanted is None:
        _record(file, found)
    elif found != wanted:
        raise ValueError(
            f"checkpoint {str(file)!r}: its sha256 is {found}, expected {wanted}{'' if expected else ' as at its first use'}; delete it and {recorded.name} to have it downloaded again"
        )


def _record(file, found):
    file.with_name(f"{file.name}.sha256").write_text(f"{found}  {file.name}\n")


def file_sha256(file):
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(address, file, expected, progress):
    from tqdm import tqdm

    unfinished, found = file.with_name(f"{file.name}.part"), hashlib.sha256()
    try:
        with urllib.request.urlopen(address, timeout=_PATIENCE) as answer, open(unfinished, "wb") as out:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(
                total=size or None,
                desc=file.name,
                unit="B",
                unit_scale=True,
                disable=not progress,
                file=sys.stderr,
                dynamic_ncols=True,
            ) as bar:
                while piece := answer.read(_PIECE):
                    out.write(piece)
                    found.update(piece)
                    bar.update(len(piece))
            if size and out.tell() != size:
                raise OSError(f"the answer ended after {out.tell()} of {size} bytes")
        found = found.hexdigest()
        if expected and found != expected:
            raise ValueError(
                f"checkpoint {address}: what was downloaded has the sha256 {found}, expected {expected}; it was deleted"
            )
        _record(file, found)
        unfinished.replace(file)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ValueError(
            f"checkpoint {address}: cannot be downloaded ({' '.join(str(reason).split())}); put the file at {file} by hand"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)

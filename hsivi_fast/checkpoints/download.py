"""Checkpoints from the network, once: a name or an address becomes a file in the cache.

Its sum is checked at every use.
"""

import base64
import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import sys
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit, urlunsplit

import torch
from tqdm import tqdm

from ..config import LICENCES, PUBLISHED_TEACHERS, without_password
from ..data import brief, regular_file
from .files import file_sha256, write_atomically

CACHE_VARIABLE = "HSIVI_CACHE"
_BYTES_AT_ONCE = 1 << 20
_TIMEOUT = 30  # seconds without an answer
_DOWNLOADED = "# downloaded by hsivi"  # a line of FILE.sha256: the file may be deleted and fetched again


def locate_checkpoint(text, progress=False):
    """The path of a checkpoint that a configuration or a command names.

    A file or folder is taken as it is, a known name or an address goes through `fetch_checkpoint`.
    """
    if str(text) in PUBLISHED_TEACHERS or _is_address(str(text)):
        return fetch_checkpoint(str(text), progress)
    return Path(text)


def fetch_checkpoint(name_or_url, progress=False):
    """The local path of a checkpoint, which is downloaded where it is not there yet.

    `name_or_url` is a name of `PUBLISHED_TEACHERS` or an http, https or file address, with "#sha256=HEX" where its sum
    is known. The file goes into $HSIVI_CACHE or torch's cache, and is renamed to its place there when it is whole.
    Without a known sum, the sum of the first download, or of a file put there by hand, is written to FILE.sha256 and
    compared at every later use. So a file that changes on the disk is noticed, and one that was wrong from the start is
    not. `progress` shows a bar on stderr. A user and password in the address, USER:PASSWORD@HOST, are sent to that host
    alone and shown in no message.

    Raises ValueError, in one line, for an unknown name, for a file that cannot be had, which says where to put it by
    hand, and for a wrong sum, which says both sums.
    """
    address = PUBLISHED_TEACHERS.get(name_or_url, name_or_url)
    if not _is_address(address):
        raise ValueError(
            f"checkpoint {without_password(name_or_url)!r}: neither a known name ({', '.join(PUBLISHED_TEACHERS)}) "
            "nor an http, https or file address"
        )
    address, _, fragment = address.partition("#")
    expected = _sum_in(fragment, name_or_url)
    _check_address(address)
    file = cache_folder() / _file_name(address)
    with _locked(file):  # several processes of a machine may want it at the same time
        if file.is_file():
            _check_cached(file, expected)
        else:
            _download(address, file, expected, progress)
            if name_or_url in LICENCES:
                print(f"{file.name}: its licence is {LICENCES[name_or_url]}", file=sys.stderr)
    return file


def cache_folder(fallback=None):
    """Where files of this machine are kept: $HSIVI_CACHE, or else `fallback`, or torch's own cache of checkpoints."""
    return Path(os.environ.get(CACHE_VARIABLE) or fallback or Path(torch.hub.get_dir()) / "checkpoints")


def _is_address(text):
    return text.startswith(("http://", "https://", "file://"))


def _sum_in(fragment, address):
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if not match:
        address = without_password(address)
        raise ValueError(f"checkpoint {address!r}: what follows # must be sha256= and 64 hexadecimal digits")
    return match[1].lower()


def _file_name(address):
    """A known file keeps its name; others start with digits of their address's sum, since two may end alike."""
    name = PurePosixPath(unquote(urlsplit(address).path)).name or "checkpoint"
    if address in PUBLISHED_TEACHERS.values():
        return name
    return f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}"


@contextlib.contextmanager
def _locked(file):
    """Hold a file of the cache for one process; ValueError where the cache cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_name(f"{file.name}.lock"), "w")
    except OSError as error:
        raise ValueError(
            f"cache {str(file.parent)!r}: cannot be written ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to another folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_cached(file, expected):
    """Compare a file's sum with the expected one or, where that is None, with the one of its first use."""
    found, wanted = file_sha256(file), expected or _recorded_sum(file)
    if wanted is None:
        _record_sum(file, found)
    elif found != wanted:
        since = "" if expected else " as at its first use"
        raise ValueError(
            f"checkpoint {str(file)!r}: its sha256 is {found}, expected {wanted}{since}; "
            f"delete it and {_sum_file(file).name} to have it downloaded again"
        )


def _sum_file(file):
    return file.with_name(f"{file.name}.sha256")


def _record_sum(file, found, downloaded=False):
    note = f"{_DOWNLOADED}\n" if downloaded else ""
    write_atomically(_sum_file(file), f"{found}  {file.name}\n{note}".encode())


def forget_download(file):
    """Delete a file of the cache that was downloaded, with its sum; returns False for one put there by hand."""
    if not _sum_file(file).is_file() or _DOWNLOADED not in _sum_file(file).read_text():
        return False
    file.unlink(missing_ok=True)
    _sum_file(file).unlink()
    return True


def _recorded_sum(file):
    words = _sum_file(file).read_text().split() if _sum_file(file).is_file() else []
    return words[0] if words else None


def _check_address(address):
    """ValueError where an address cannot be taken apart."""
    try:
        urlsplit(address).port  # noqa: B018, it is what raises for a port that is no number
    except ValueError as error:
        shown = without_password(address)
        raise ValueError(f"checkpoint {shown}: is no address ({without_password(brief(error))})") from None


def _request(address):
    """What urllib opens: the address without its user and password, which go into a header for that host alone."""
    parts = urlsplit(address)
    user, password, port = parts.username, parts.password, parts.port
    if user is None:
        return urllib.request.Request(address)
    host = parts.hostname if port is None else f"{parts.hostname}:{port}"
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
    secret = base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()
    request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


def _download(address, file, expected, progress):
    unfinished, digest = file.with_name(f"{file.name}.part"), hashlib.sha256()
    shown = without_password(address)
    if address.startswith("file://") and Path(local := unquote(urlsplit(address).path)).exists():
        regular_file(local, f"checkpoint {shown}")
    try:
        with urllib.request.urlopen(_request(address), timeout=_TIMEOUT) as answer, open(unfinished, "wb") as out:
            stated = answer.headers.get("Content-Length") or ""
            size = int(stated) if stated.isdecimal() else 0
            with tqdm(
                total=size or None,
                desc=file.name,
                unit="B",
                unit_scale=True,
                disable=not progress,
                file=sys.stderr,
                dynamic_ncols=True,
            ) as bar:
                while data := answer.read(_BYTES_AT_ONCE):
                    out.write(data)
                    digest.update(data)
                    bar.update(len(data))
            if size and out.tell() != size:
                raise OSError(f"the answer ended after {out.tell()} of {size} bytes")
        found = digest.hexdigest()
        if expected and found != expected:
            raise ValueError(
                f"checkpoint {shown}: what was downloaded has the sha256 {found}, expected {expected}; it was deleted"
            )
        _record_sum(file, found, downloaded=True)
        unfinished.replace(file)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ValueError(
            f"checkpoint {shown}: cannot be downloaded ({without_password(brief(reason))}); "
            f"put the file at {file} by hand"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)

"""Checkpoints and reference statistics from the network, once: a name or an address becomes a file in the cache.

Its sum is checked at every use.
"""

import base64
import hashlib
import http.client
import re
import sys
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit, urlunsplit

from tqdm import tqdm

from ..config import LICENCES, PUBLISHED_REFERENCES, PUBLISHED_TEACHERS, REFERENCES_TO_MAKE, without_password
from ..data import PATIENCE, MissingFile, brief, cache_folder, held_in_cache, regular_file
from .files import file_sha256, write_atomically

_BYTES_AT_ONCE = 1 << 20
_DOWNLOADED = "# downloaded by hsivi"  # a line of FILE.sha256: the file may be deleted and fetched again


def locate_checkpoint(text, progress=False):
    """The path of a checkpoint that a configuration or a command names.

    A file or folder is taken as it is, a known name or an address goes through `fetch_checkpoint`.
    """
    if str(text) in PUBLISHED_TEACHERS or _is_address(str(text)):
        return fetch_checkpoint(str(text), progress)
    return Path(text)


def locate_reference(text, progress=False):
    """The path of a reference that a configuration or a command names; it may be missing where it is a path.

    A file is taken as it is. A name of `PUBLISHED_REFERENCES` or an address is fetched, with the errors of
    `fetch_checkpoint`. A name of `REFERENCES_TO_MAKE` is a file of the cache; ValueError where it is not there says how
    it is made.
    """
    text = str(text)
    if text in PUBLISHED_REFERENCES or _is_address(text):
        return _fetch("reference", PUBLISHED_REFERENCES, text, progress)
    if text not in REFERENCES_TO_MAKE:
        return Path(text)
    file = cache_folder() / f"{text}.npz"
    if not file.is_file():
        raise ValueError(
            f"reference {text!r}: has no address to be fetched from; make it of CelebA's aligned pictures with "
            f"`hsivi prepare {text} FOLDER --to {file}`, or say eval.reference=FILE"
        )
    return file


def fetch_checkpoint(name_or_url, progress=False):
    """The local path of a checkpoint, which is downloaded where it is not there yet.

    `name_or_url` is a name of `PUBLISHED_TEACHERS` or an http, https or file address, with "#sha256=HEX" where its sum
    is known. The file goes into $HSIVI_CACHE or torch's cache, and is renamed to its place there when it is whole.
    Without a known sum, the sum of the first download, or of a file put there by hand, is written to FILE.sha256 and
    compared at every later use. So a file that changes on the disk is noticed, and one that was wrong from the start is
    not. `progress` shows a bar on stderr. A user and password in the address, USER:PASSWORD@HOST, are sent to that host
    alone and shown in no message.

    Raises ValueError, in one line, for an unknown name, for a file that cannot be had (`MissingFile`), which says where
    to put it by hand, and for a wrong sum, which says both sums.
    """
    return _fetch("checkpoint", PUBLISHED_TEACHERS, name_or_url, progress)


def fetch_file(address, file, start_of_sum, what, progress=False):
    """Download a file to its place, unless it is there already; returns the place.

    start_of_sum: the first hexadecimal digits of its sha256; what: begins the errors, which are `fetch_checkpoint`'s.
    """
    file = Path(file)
    if not file.is_file():
        with held_in_cache(file):
            if not file.is_file():
                _download(what, address, file, start_of_sum, progress)
    return file


def _fetch(what, known, name_or_url, progress):
    """`fetch_checkpoint` of something else too; what: begins the errors; known: {name: address}."""
    address = known.get(name_or_url, name_or_url)
    if not _is_address(address):
        raise ValueError(
            f"{what} {without_password(name_or_url)!r}: neither a known name ({', '.join(known)}) "
            "nor an http, https or file address"
        )
    address, _, fragment = address.partition("#")
    expected = _sum_in(what, fragment, name_or_url)
    _check_address(what, address)
    file = cache_folder() / _file_name(address)
    with held_in_cache(file):  # several processes of a machine may want it at the same time
        if file.is_file():
            _check_cached(what, file, expected)
        else:
            _download(what, address, file, expected, progress)
            if name_or_url in LICENCES:
                print(f"{file.name}: its licence is {LICENCES[name_or_url]}", file=sys.stderr)
    return file


def _is_address(text):
    return text.startswith(("http://", "https://", "file://"))


def _sum_in(what, fragment, address):
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if not match:
        address = without_password(address)
        raise ValueError(f"{what} {address!r}: what follows # must be sha256= and 64 hexadecimal digits")
    return match[1].lower()


def _file_name(address):
    """A known file keeps its name; others start with digits of their address's sum, since two may end alike."""
    name = PurePosixPath(unquote(urlsplit(address).path)).name or "checkpoint"
    if address in (*PUBLISHED_TEACHERS.values(), *PUBLISHED_REFERENCES.values()):
        return name
    return f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}"


def _check_cached(what, file, expected):
    """Compare a file's sum with the expected one or, where that is None, with the one of its first use."""
    found, wanted = file_sha256(file), expected or _recorded_sum(file)
    if wanted is None:
        _record_sum(file, found)
    elif found != wanted:
        since = "" if expected else " as at its first use"
        raise ValueError(
            f"{what} {str(file)!r}: its sha256 is {found}, expected {wanted}{since}; "
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


def _check_address(what, address):
    """ValueError where an address cannot be taken apart."""
    try:
        urlsplit(address).port  # noqa: B018, it is what raises for a port that is no number
    except ValueError as error:
        shown = without_password(address)
        raise ValueError(f"{what} {shown}: is no address ({without_password(brief(error))})") from None


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


def _download(what, address, file, expected, progress):
    """Fetch a file to its place, with its sum beside it; expected: its sum or the start of it, or None."""
    unfinished, digest = file.with_name(f"{file.name}.part"), hashlib.sha256()
    shown = without_password(address)
    if address.startswith("file://") and Path(local := unquote(urlsplit(address).path)).exists():
        regular_file(local, f"{what} {shown}")
    try:
        with urllib.request.urlopen(_request(address), timeout=PATIENCE) as answer, open(unfinished, "wb") as out:
            if answer.headers.get_content_type() == "text/html":  # of a login, or of what has moved
                raise OSError("the answer is a web page and not a file")
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
        if expected and not found.startswith(expected):
            raise ValueError(
                f"{what} {shown}: what was downloaded has the sha256 {found}, expected {expected}; it was deleted"
            )
        _record_sum(file, found, downloaded=True)
        unfinished.replace(file)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        reason = without_password(brief(reason))
        raise MissingFile(
            f"{what} {shown}: cannot be downloaded ({reason}); put the file at {file} by hand", shown, file, reason
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)

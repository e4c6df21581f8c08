"""Whether all ranks are about to run the same thing: their configuration, the code of this package, and versions."""

import contextlib
import hashlib
import importlib.metadata
import platform
from pathlib import Path

from ..config import PACKAGE, config_difference, resolved_dict


def refuse_strangers(world, config):
    """Compare what each rank is about to run.

    Raises ValueError, naming the rank and the difference, where one differs from rank 0.
    """
    fingerprints = world.all(_fingerprint(config))
    for rank, fingerprint in enumerate(fingerprints):
        problem = _difference(fingerprints[0], fingerprint)
        if problem:
            advice = "start every rank with the same configuration and the same code"
            raise ValueError(f"rank {rank} has {problem}; {advice}")


def _difference(main, other):
    """In what a rank's fingerprint differs from that of rank 0, in words; None where it does not."""
    different = config_difference(main["config"], other["config"])
    if different:
        return f"another configuration: {different} (rank 0's value first)"
    for name in main:
        if name != "config" and main[name] != other[name]:
            return f"another {name}: {other[name]}, rank 0 has {main[name]}"
    return None


def _fingerprint(config):
    settings = Path(config.distributed.deepspeed or "")
    fingerprint = {
        "config": resolved_dict(config),
        "distributed.deepspeed": settings.read_text() if settings.is_file() else None,
        "code of hsivi_fast (hash)": code_hash(),
        "Python": platform.python_version(),
    }
    for package in ("torch", "deepspeed", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            fingerprint[package] = importlib.metadata.version(package)
    return fingerprint


def code_hash():
    """A hash of all source files of the package that run, kernels included."""
    files = {file.relative_to(PACKAGE).as_posix(): file for file in PACKAGE.rglob("*.py")}
    # A link, which a search does not follow.
    files.update({file.relative_to(PACKAGE).as_posix(): file for file in (PACKAGE / "kernels").glob("*.py")})
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + files[name].read_bytes())
    return digest.hexdigest()[:16]

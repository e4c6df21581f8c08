"""What a run ran on."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from . import ops


def describe_environment(config, backend, device):
    """Versions, device, commit, the backend that runs, precision and processes, as environment.json holds them."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version()}
    for package in ("hsivi_fast", "torch", "triton", "numpy", "deepspeed", "torch-fidelity"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions, "device": str(device), "device_name": name, "threads": torch.get_num_threads(), "commit": commit(),
        "backend": backend, "triton_interpreted": backend == "triton" and ops.triton_is_interpreted(), "precision": config.precision, "world_size": 1, "samples_per_rank": config.train.batch_size,
    }


def commit():
    """The checkout's commit, or None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None

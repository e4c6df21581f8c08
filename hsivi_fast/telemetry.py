"""What a run ran on, and what it took."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from . import ops
from .distributed import ALONE
from .engine import uses_deepspeed


def describe_environment(config, backend, device, world=ALONE):
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
        "backend": backend, "triton_interpreted": backend == "triton" and ops.triton_is_interpreted(), "precision": config.precision, 
        "world_size": world.size, "samples_per_rank": config.train.batch_size // world.size,
        "zero": config.distributed.zero if uses_deepspeed(config, world.size) else None,
    }


class EnergyMeter:
    """Joules that a GPU took since this was made, from the counter that NVIDIA's driver keeps (Volta and newer); None where there is no such GPU or counter."""

    def __init__(self, device):
        self.handle = None
        if device.type == "cuda":
            try:
                import pynvml
                import torch

                pynvml.nvmlInit()
                # By its UUID: CUDA_VISIBLE_DEVICES renumbers the devices of a process, and NVML does not know.
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
                self.start = pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
            except (ImportError, AttributeError, pynvml.NVMLError):
                self.handle = None

    def joules(self):
        """Energy so far, in joules, or None."""
        if self.handle is None:
            return None
        import pynvml

        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self.start) / 1e3  # the counter is in millijoules


def commit():
    """The checkout's commit, or None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None

"""What a run ran on, and what it took."""

import platform
import subprocess
import threading
from importlib import metadata

from .. import ops
from ..config import PACKAGE
from ..parallel.world import ALONE
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
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "backend": backend,
        "triton_interpreted": backend == "triton" and ops.triton_is_interpreted(),
        "precision": config.precision,
        "world_size": world.size,
        "samples_per_rank": config.train.batch_size // world.size,
        "zero": config.distributed.zero if uses_deepspeed(config, world.size) else None,
    }


def _nvml_handle(device):
    """NVML's handle of a CUDA device; None where there is no such device, driver or package."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    import torch

    try:
        pynvml.nvmlInit()
        # By its UUID: CUDA_VISIBLE_DEVICES renumbers the devices of a process, and NVML does not know.
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (AttributeError, pynvml.NVMLError):
        return None


class EnergyMeter:
    """Joules that a GPU took since this was made, from the counter that NVIDIA's driver keeps (Volta and newer); None where there is no such GPU or counter."""

    def __init__(self, device):
        self.handle = _nvml_handle(device)
        if self.handle is not None:
            import pynvml

            try:
                self.start = pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
            except pynvml.NVMLError:
                self.handle = None

    def joules(self):
        """Energy so far, in joules, or None."""
        if self.handle is None:
            return None
        import pynvml

        return (
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self.start
        ) / 1e3  # the counter is in millijoules


class GpuMonitor:
    """Power, utilisation, memory and energy of one GPU, averaged from one `record` to the next.

    A thread asks the driver once in `period` seconds, away from the training's own thread: asked only at log steps, when the host has just waited for the
    device, it would find the GPU idle. Without an NVIDIA GPU there is no thread.
    """

    def __init__(self, device, period=1.0):
        self.handle, self.meter, self.period = _nvml_handle(device), EnergyMeter(device), period
        self.samples, self.joules, self.stopped, self.thread = [], 0.0, threading.Event(), None
        if self.handle is not None:
            self.thread = threading.Thread(target=self._run, name="gpu monitor", daemon=True)
            self.thread.start()

    def record(self, images):
        """{"gpu_power_watts", "gpu_utilisation_percent", "gpu_memory_bytes": means since the last call, "joules_per_image": energy by `images`, trained since then}.

        What the driver does not tell is left out, so without a GPU it is {}.
        """
        if self.handle is None:
            return {}
        samples, self.samples = self.samples, []
        samples = samples or [self._sample()]  # a call sooner than a period after the last one
        names, record = ("gpu_power_watts", "gpu_utilisation_percent", "gpu_memory_bytes"), {}
        for name, values in zip(names, zip(*samples)):
            told = [value for value in values if value is not None]
            if told:
                record[name] = sum(told) / len(told)
        joules = self.meter.joules()
        if joules is not None and images:
            record["joules_per_image"], self.joules = (joules - self.joules) / images, joules
        return record

    def stop(self):
        """End the thread."""
        self.stopped.set()
        if self.thread is not None:
            self.thread.join()

    def _run(self):
        while not self.stopped.wait(self.period):
            self.samples.append(self._sample())

    def _sample(self):
        """(watts, percent, bytes) of this moment, None for what the driver does not tell (memory on some, utilisation of a MIG part)."""
        import pynvml

        def told(read):
            try:
                return read()
            except pynvml.NVMLError:
                return None

        return (
            told(lambda: pynvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3),  # it gives milliwatts
            told(lambda: pynvml.nvmlDeviceGetUtilizationRates(self.handle).gpu),
            told(lambda: pynvml.nvmlDeviceGetMemoryInfo(self.handle).used),
        )


def commit():
    """The checkout's commit, or None for an installed package."""
    root = PACKAGE.resolve().parent
    if not (root / ".git").exists():
        return None
    try:
        return (
            subprocess.run(
                ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        return None

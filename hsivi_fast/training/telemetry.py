"""What a run ran on, and what it took."""

import contextlib
import platform
import subprocess
import threading
from importlib import metadata

import torch

from .. import ops
from ..config import PACKAGE, uses_deepspeed


def describe_environment(context):
    """Versions, device, commit, the backend that runs, precision and processes, as environment.json holds them."""
    config, world, device, backend = context.config, context.world, context.device, context.backend
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    packages = ("hsivi_fast", "torch", "triton", "numpy", "deepspeed", "torch-fidelity")
    return {
        "versions": {"python": platform.python_version(), **package_versions(packages)},
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


def package_versions(packages):
    """{name: version, or None for a package that is not installed}, as this one where it is a plain folder."""
    versions = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _pynvml():
    """NVIDIA's package; None where it is not installed, and so no GPU can be asked."""
    try:
        import pynvml  # here: it is of use on a machine with a GPU alone
    except ImportError:
        return None
    return pynvml


def _nvml_handle(device):
    """NVML's handle of a CUDA device; None where there is no such device, driver or package."""
    return _handle_or_problem(device)[0]


def nvml_problem(device):
    """Why the driver of a CUDA device cannot be asked, in a few words; None where it can."""
    return _handle_or_problem(device)[1]


def _handle_or_problem(device):
    pynvml = _pynvml() if device.type == "cuda" else None
    if pynvml is None:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        # By its UUID: CUDA_VISIBLE_DEVICES renumbers the devices of a process, and NVML does not know.
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"), None
    except (AttributeError, pynvml.NVMLError) as error:
        return None, f"the driver does not answer ({error})"


def gpu_clocks(device):
    """A GPU's clocks at this moment, its highest ones, and its power limit, as the driver tells them.

    {"sm_mhz", "memory_mhz", "sm_mhz_at_most", "memory_mhz_at_most", "power_limit_watts"}, each None where the driver
    does not tell it; None for a CPU, and where no driver can be asked.
    """
    handle, pynvml = _nvml_handle(device), _pynvml()
    if handle is None:
        return None

    def told(name, *arguments):
        try:
            return getattr(pynvml, name)(handle, *arguments)
        except pynvml.NVMLError:
            return None

    milliwatts = told("nvmlDeviceGetPowerManagementLimit")
    return {
        "sm_mhz": told("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
        "memory_mhz": told("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),
        "sm_mhz_at_most": told("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM),
        "memory_mhz_at_most": told("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_MEM),
        "power_limit_watts": None if milliwatts is None else milliwatts / 1e3,
    }


class EnergyMeter:
    """Joules that a GPU took since this was made, from the counter that NVIDIA's driver keeps (Volta and newer)."""

    def __init__(self, device):
        self.handle, self.pynvml = _nvml_handle(device), _pynvml()
        if self.handle is not None:
            try:
                self.start = self._read()
            except self.pynvml.NVMLError:
                self.handle = None

    def joules(self):
        """Energy so far, in joules, or None where there is no such GPU or counter."""
        return None if self.handle is None else self._read() - self.start

    def _read(self):
        return self.pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3  # it counts millijoules


class GpuMonitor:
    """Power, utilisation, memory and energy of one GPU, averaged from one `record` to the next.

    A thread asks the driver once in `period` seconds, away from the training's own thread: asked only at log steps,
    when the host has just waited for the device, it would find the GPU idle. Without an NVIDIA GPU there is no thread.
    """

    def __init__(self, device, period=1.0):
        self.handle, self.pynvml = _nvml_handle(device), _pynvml()
        self.meter, self.period = EnergyMeter(device), period
        self.samples, self.joules, self.stopped, self.thread = [], 0.0, threading.Event(), None
        if self.handle is not None:
            self.thread = threading.Thread(target=self._run, name="gpu monitor", daemon=True)
            self.thread.start()

    def record(self, images):
        """What was measured since the last call, as keys of a record; images: how many were trained since then.

        gpu_power_watts, gpu_utilisation_percent, gpu_memory_bytes: means; joules_per_image: energy by images. What the
        driver does not tell is left out, so without a GPU it is {}.
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
        """(watts, percent, bytes) of this moment.

        None for what the driver does not tell: memory on some GPUs, the utilisation of a MIG part.
        """
        milliwatts = self._told(self.pynvml.nvmlDeviceGetPowerUsage)
        utilisation = self._told(self.pynvml.nvmlDeviceGetUtilizationRates)
        memory = self._told(self.pynvml.nvmlDeviceGetMemoryInfo)
        watts = None if milliwatts is None else milliwatts / 1e3
        return watts, getattr(utilisation, "gpu", None), getattr(memory, "used", None)

    def _told(self, read):
        try:
            return read(self.handle)
        except self.pynvml.NVMLError:
            return None


def commit():
    """The checkout's commit, or None for an installed package."""
    root = PACKAGE.resolve().parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None

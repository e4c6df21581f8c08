"""What a training records of its GPU: power, utilisation, memory and energy, on a driver that is made up."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hsivi_fast import load_config, train
from hsivi_fast.training import telemetry


class FakeNvml(SimpleNamespace):
    """A driver whose GPU takes 100 W, 200 W, ... at each question, and 5 kJ between two looks at its counter."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.asked = self.energy = 0
        self.nvmlInit = lambda: None
        self.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
        self.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=10 * self.asked, memory=99)
        self.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=1000 * self.asked)

    def nvmlDeviceGetPowerUsage(self, handle):
        self.asked += 1
        return 100_000 * self.asked

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.energy += 5_000_000
        return self.energy


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    return fake


def test_a_gpu_is_averaged_between_records(nvml):
    monitor = telemetry.GpuMonitor(torch.device("cuda", 0), period=3600)
    monitor.samples += [monitor._sample(), monitor._sample(), monitor._sample()]
    assert monitor.record(100) == {
        "gpu_power_watts": 200,
        "gpu_utilisation_percent": 20,
        "gpu_memory_bytes": 2000,
        "joules_per_image": 50,
    }
    assert monitor.record(50) == {
        "gpu_power_watts": 400,
        "gpu_utilisation_percent": 40,
        "gpu_memory_bytes": 4000,
        "joules_per_image": 100,
    }  # asked at once
    monitor.stop()
    assert not monitor.thread.is_alive()


def test_the_thread_asks_by_itself(nvml):
    monitor = telemetry.GpuMonitor(torch.device("cuda", 0), period=0.001)
    while len(monitor.samples) < 3:
        pass
    monitor.stop()
    assert monitor.samples[:2] == [(100, 10, 1000), (200, 20, 2000)]


def test_what_the_driver_does_not_tell_is_left_out(nvml):
    def refused(handle):
        raise FakeNvml.NVMLError("not supported")

    nvml.nvmlDeviceGetUtilizationRates = nvml.nvmlDeviceGetTotalEnergyConsumption = refused
    monitor = telemetry.GpuMonitor(torch.device("cuda", 0), period=3600)
    assert monitor.record(10) == {"gpu_power_watts": 100, "gpu_memory_bytes": 1000}
    monitor.stop()


def test_clocks_are_the_driver_s_and_what_it_does_not_tell_is_none(nvml, monkeypatch):
    def refused(handle):
        raise FakeNvml.NVMLError("not supported")

    nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM = 1, 2
    nvml.nvmlDeviceGetClockInfo = lambda handle, kind: 1000 * kind
    nvml.nvmlDeviceGetMaxClockInfo = lambda handle, kind: 3000 * kind
    nvml.nvmlDeviceGetPowerManagementLimit = refused
    assert telemetry.gpu_clocks(torch.device("cuda", 0)) == {
        **{"sm_mhz": 1000, "memory_mhz": 2000, "sm_mhz_at_most": 3000, "memory_mhz_at_most": 6000},
        "power_limit_watts": None,
    }
    nvml.nvmlDeviceGetPowerManagementLimit = lambda handle: 700_000
    assert telemetry.gpu_clocks(torch.device("cuda", 0))["power_limit_watts"] == 700
    assert telemetry.gpu_clocks(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert telemetry.gpu_clocks(torch.device("cuda", 0)) is None


def test_without_a_gpu_or_its_package_there_is_no_thread_and_no_record(monkeypatch):
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        monitor = telemetry.GpuMonitor(device)
        assert monitor.thread is None and monitor.record(10) == {} and telemetry.EnergyMeter(device).joules() is None
        monitor.stop()


def test_records_of_a_training_have_the_gpu(tmp_path, monkeypatch):
    class Monitor:
        def __init__(self, device):
            self.images = []

        def record(self, images):
            return {"gpu_power_watts": 300.0, "joules_per_image": 600.0 / images}

        def stop(self):
            stopped.append(self)

    stopped = []
    monkeypatch.setattr("hsivi_fast.training.journal.GpuMonitor", Monitor)
    settings = ["device=cpu", "train.batch_size=4", "train.steps=4", "log_every=2"]
    folder = train(load_config("smoke", settings), tmp_path / "run")
    assert [record["joules_per_image"] for record in folder.metrics()] == [75.0, 75.0] and len(stopped) == 1
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert events.Scalars("gpu_power_watts")[1].value == 300
    assert "GPU of rank 0" in (folder.path / "report.html").read_text()

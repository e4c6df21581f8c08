"""What a training leaves for the eye: pictures that change nothing, one record of the GPU, and Weights & Biases, which must never end a run."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file

from hsivi_fast import load_config, sample, train
from hsivi_fast.training import telemetry
from hsivi_fast.training.journal import pictures_due

RUN = ["device=cpu", "train.batch_size=4", "train.steps=4", "log_every=2"]
MEASURED = ["eval.num_samples=20", "eval.seeds=1", "eval.ddim_nfe=[3]"]


class FakeWandb(SimpleNamespace):
    """The parts of the package that are used, which note their calls."""

    def __init__(self, failing=()):
        super().__init__(calls=[], failing=failing, Image=lambda pixels: ("image", pixels.shape))

    def init(self, **arguments):
        self._note("init", arguments)
        return SimpleNamespace(
            log=lambda values: self._note("log", values),
            finish=lambda exit_code: self._note("finish", exit_code),
            define_metric=lambda name, step_metric=None: self._note("define_metric", (name, step_metric)),
        )

    def _note(self, name, value):
        self.calls.append((name, value))
        if name in self.failing:
            raise RuntimeError("no network,\nnone at all")

    def of(self, name):
        return [value for kind, value in self.calls if kind == name]


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize(
    "overrides, every, steps",
    [
        (["log.images_every=3"], 0, [3, 6, 8]),
        (["log.images_every=3", "eval.num_samples=0"], 4, [3, 6, 8]),
        (["eval.num_samples=5"], 3, [3, 6, 8]),
        (["eval.num_samples=5"], 0, [8]),
        (["eval.num_samples=0"], 0, []),
    ],
)
def test_which_steps_end_with_pictures(overrides, every, steps):
    config = load_config("smoke", ["train.steps=8", *overrides])
    assert [
        step
        for step in range(1, 9)
        if pictures_due(config, step, config.eval.num_samples > 0 and every > 0 and step % every == 0)
    ] == steps


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def _weights(folder, step):
    return {
        (file.name, key): value
        for file in sorted(folder.checkpoint_path(step).glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def test_pictures_change_nothing_and_show_the_averaged_student(tmp_path):
    plain = train(load_config("smoke", RUN), tmp_path / "plain")
    assert not list((plain.path / "samples").glob("step_*"))
    shown = train(load_config("smoke", [*RUN, "train.steps=3", "log.images_every=2"]), tmp_path / "shown")
    shown = train(load_config("smoke", [*RUN, "log.images_every=2"]), shown.path)  # and goes on
    first, second = _weights(plain, 4), _weights(shown, 4)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert [record["loss_score_net"] for record in plain.metrics()][0] == [
        record["loss_score_net"] for record in shown.metrics()
    ][0]
    assert sorted(file.name for file in (shown.path / "samples").glob("step_*")) == [
        "step_0000002.png",
        "step_0000003.png",
        "step_0000004.png",
    ]
    pixels = np.asarray(Image.open(shown.path / "samples" / "step_0000004.png"))
    expected = sample(shown, range(64)).numpy()
    assert pixels.shape == (
        8 * 9 * 6 + 6,
        8 * 9 * 6 + 6,
    )  # 8 x 8 images of 8 x 8 pixels and lines between them, 6 times enlarged
    assert np.array_equal(pixels[6:54:6, 6 + 9 * 6 : 54 + 9 * 6 : 6], expected[1, 0]) and np.array_equal(
        pixels[-54:-6:6, -54:-6:6], expected[63, 0]
    )
    events = _events(shown.path)
    assert [event.step for event in events.Images("samples")] == [2, 3, 4] and [
        event.step for event in events.Images("log_gamma")
    ] == [2, 3, 4]
    assert {"loss_score_net", "images_per_second"} <= set(events.Tags()["scalars"])


def test_a_measured_run_has_pictures_with_its_measurements_and_a_plane_run_only_log_gamma(tmp_path):
    folder = train(load_config("toy2d", [*RUN, *MEASURED, "eval.every=2"]), tmp_path / "run")
    assert not list((folder.path / "samples").glob("step_*"))
    assert [event.step for event in _events(folder.path).Images("log_gamma")] == [2, 4] and "samples" not in _events(
        folder.path
    ).Tags()["images"]


def _train_without_and_with_pictures(folder, overrides):
    for name, more in (("plain", []), ("shown", ["log.images_every=1"])):
        train(load_config("smoke", [*RUN, *overrides, *more]), folder / name)


def test_ranks_with_cut_parameters_draw_the_picture_of_one_and_go_on_alike(tmp_path):
    """ZeRO 3 puts the averaged weights together by a collective: a rank that did not come to it would leave the other one waiting."""
    (tmp_path / "pieces.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    run_ranks(
        _train_without_and_with_pictures,
        2,
        tmp_path,
        ["distributed.zero=3", f"distributed.deepspeed={tmp_path / 'pieces.json'}"],
    )
    first, second = (
        load_file(tmp_path / name / "checkpoints" / "step_4" / "student_ema.safetensors") for name in ("plain", "shown")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(list((tmp_path / "shown" / "samples").glob("step_*"))) == 4
    pixels = np.asarray(Image.open(tmp_path / "shown" / "samples" / "step_0000004.png"))
    drawn = pixels[6:, 6:].reshape(8, 54, 8, 54)[:, :48:6, :, :48:6].transpose(0, 2, 1, 3).reshape(64, 8, 8).astype(int)
    assert (
        np.abs(drawn - sample(tmp_path / "shown", range(64)).numpy()[:, 0]).max() <= 1
    )  # the second half is the second rank's


def test_weights_and_biases_gets_the_records_and_pictures_and_goes_on_with_the_same_run(tmp_path, wandb):
    folder = train(
        load_config("smoke", [*RUN, "train.steps=2", "log.images_every=2", "log.wandb=few-steps"]), tmp_path / "run"
    )
    (start,) = wandb.of("init")
    assert (
        start["project"] == "few-steps"
        and start["resume"] == "allow"
        and start["name"] == "smoke"
        and start["dir"] == str(folder.path)
    )
    assert start["config"]["train"]["steps"] == 2 and folder.read_json("wandb.json") == {
        "project": "few-steps",
        "id": start["id"],
    }
    assert wandb.of("define_metric") == [("step", None), ("*", "step")] and wandb.of("finish") == [0]
    numbers, pictures = wandb.of("log")
    (record,) = folder.metrics()
    assert (
        numbers == record
        and pictures["step"] == 2
        and pictures["samples"] == ("image", (438, 438, 3))
        and pictures["log_gamma"][1][2] == 3
    )
    train(load_config("smoke", [*RUN, "train.steps=4", "log.images_every=2", "log.wandb=few-steps"]), folder.path)
    assert wandb.of("init")[1]["id"] == start["id"] and [values["step"] for values in wandb.of("log")] == [2, 2, 4, 4]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_trouble_there_is_one_warning(tmp_path, wandb, capsys, failing):
    wandb.failing = (failing,)
    folder = train(load_config("smoke", [*RUN, "log.wandb=few-steps"]), tmp_path / "run")
    assert folder.checkpoints() == [4] and len(folder.metrics()) == 2 and len(wandb.of(failing)) == 1
    errors = capsys.readouterr().err
    assert errors.count("warning: Weights & Biases: no network, none at all; nothing more is sent there\n") == 1


@pytest.mark.parametrize("module", [None, SimpleNamespace()])  # not there; a folder of that name
def test_without_the_package_nothing_starts(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(
        ValueError, match=r"^log.wandb: 'few-steps' needs the package wandb, which is not installed; pip install wandb$"
    ):
        train(load_config("smoke", [*RUN, "log.wandb=few-steps"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_the_key_does_not_import_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would raise
    assert train(load_config("smoke", RUN), tmp_path / "run").checkpoints() == [4]
    assert not (tmp_path / "run" / "wandb.json").exists()


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
    folder = train(load_config("smoke", RUN), tmp_path / "run")
    assert [record["joules_per_image"] for record in folder.metrics()] == [75.0, 75.0] and len(stopped) == 1
    assert _events(folder.path).Scalars("gpu_power_watts")[1].value == 300
    assert "GPU of rank 0" in (folder.path / "report.html").read_text()

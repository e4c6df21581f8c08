"""What a training leaves for the eye: pictures that change nothing, and Weights & Biases, which must not end a run."""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file

from hsivi_fast import load_config, sample, train
from hsivi_fast.training.journal import pictures_due

pytestmark = pytest.mark.usefixtures("no_report")
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


DDIM_START = ["start.kind=ddim", "start.score_net_updates=0"]


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
    measured = {step: config.eval.num_samples > 0 and every > 0 and step % every == 0 for step in range(1, 9)}
    assert [step for step in measured if pictures_due(config, step, measured[step])] == steps


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
    time.sleep(1.1)  # TensorBoard orders its files by whole seconds, and by a number as text within one
    shown = train(load_config("smoke", [*RUN, "log.images_every=2"]), shown.path)  # and goes on
    first, second = _weights(plain, 4), _weights(shown, 4)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert plain.metrics()[0]["loss_score_net"] == shown.metrics()[0]["loss_score_net"]
    names = sorted(file.name for file in (shown.path / "samples").glob("step_*"))
    assert names == ["step_0000002.png", "step_0000003.png", "step_0000004.png"]
    pixels = np.asarray(Image.open(shown.path / "samples" / "step_0000004.png"))
    expected = sample(shown, range(64)).numpy()
    # 8 x 8 images of 8 x 8 pixels and lines between them, 6 times enlarged.
    assert pixels.shape == (8 * 9 * 6 + 6, 8 * 9 * 6 + 6)
    assert np.array_equal(pixels[6:54:6, 6 + 9 * 6 : 54 + 9 * 6 : 6], expected[1, 0])
    assert np.array_equal(pixels[-54:-6:6, -54:-6:6], expected[63, 0])
    events = _events(shown.path)
    for name in ("samples", "log_gamma"):
        assert [event.step for event in events.Images(name)] == [2, 3, 4]
    assert {"loss_score_net", "images_per_second"} <= set(events.Tags()["scalars"])


def test_a_measured_run_has_pictures_with_its_measurements_and_a_plane_run_only_log_gamma(tmp_path):
    folder = train(load_config("toy2d", [*RUN, *MEASURED, *DDIM_START, "eval.every=2"]), tmp_path / "run")
    assert not list((folder.path / "samples").glob("step_*"))
    events = _events(folder.path)
    assert [event.step for event in events.Images("log_gamma")] == [2, 4]
    assert "samples" not in events.Tags()["images"]


def _train_without_and_with_pictures(folder, overrides):
    for name, more in (("plain", []), ("shown", ["log.images_every=1"])):
        train(load_config("smoke", [*RUN, *overrides, *more]), folder / name)


def test_ranks_with_cut_parameters_draw_the_picture_of_one_and_go_on_alike(tmp_path):
    """ZeRO 3 puts the averaged weights together by a collective: a rank that did not come to it would leave the other
    one waiting.
    """
    pieces = tmp_path / "pieces.json"
    pieces.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    settings = ["distributed.zero=3", f"distributed.deepspeed={pieces}"]
    run_ranks(_train_without_and_with_pictures, 2, tmp_path, settings)
    first, second = (
        load_file(tmp_path / name / "checkpoints" / "step_4" / "student_ema.safetensors") for name in ("plain", "shown")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(list((tmp_path / "shown" / "samples").glob("step_*"))) == 4
    pixels = np.asarray(Image.open(tmp_path / "shown" / "samples" / "step_0000004.png"))
    drawn = pixels[6:, 6:].reshape(8, 54, 8, 54)[:, :48:6, :, :48:6].transpose(0, 2, 1, 3).reshape(64, 8, 8).astype(int)
    expected = sample(tmp_path / "shown", range(64)).numpy()[:, 0]  # the second half is the second rank's
    assert np.abs(drawn - expected).max() <= 1


def test_weights_and_biases_gets_the_records_and_pictures_and_goes_on_with_the_same_run(tmp_path, wandb):
    settings = [*RUN, "log.images_every=2", "log.wandb=few-steps"]
    folder = train(load_config("smoke", [*settings, "train.steps=2"]), tmp_path / "run")
    (start,) = wandb.of("init")
    chosen = {key: start[key] for key in ("project", "resume", "name", "dir")}
    assert chosen == {"project": "few-steps", "resume": "allow", "name": "smoke", "dir": str(folder.path)}
    assert start["config"]["train"]["steps"] == 2
    assert folder.read_json("wandb.json") == {"project": "few-steps", "id": start["id"]}
    assert wandb.of("define_metric") == [("step", None), ("*", "step")] and wandb.of("finish") == [0]
    numbers, pictures = wandb.of("log")
    (record,) = folder.metrics()
    assert numbers == record and pictures["step"] == 2
    assert pictures["samples"] == ("image", (438, 438, 3)) and pictures["log_gamma"][1][2] == 3
    train(load_config("smoke", [*settings, "train.steps=4"]), folder.path)
    assert wandb.of("init")[1]["id"] == start["id"] and [values["step"] for values in wandb.of("log")] == [2, 2, 4, 4]


def test_weights_and_biases_gets_no_password(tmp_path, wandb):
    teacher = load_config("smoke").teacher.checkpoint
    address = f"file://anna:s3cret@{teacher}"
    train(load_config("smoke", [*RUN, "log.wandb=few-steps", f"teacher.checkpoint={address}"]), tmp_path / "run")
    (start,) = wandb.of("init")
    assert start["config"]["teacher"]["checkpoint"] == f"file://***@{teacher}"


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
    message = r"log.wandb: 'few-steps' needs the package wandb, which is not installed; pip install wandb"
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(load_config("smoke", [*RUN, "log.wandb=few-steps"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_the_key_does_not_import_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would raise
    assert train(load_config("smoke", RUN), tmp_path / "run").checkpoints() == [4]
    assert not (tmp_path / "run" / "wandb.json").exists()

"""Small teachers: the loss of what a network predicts, and classes."""

import dataclasses

import numpy as np
import pytest
import torch
from edm_networks import SONG
from safetensors.torch import load_file

from hsivi_fast import load_config
from hsivi_fast.build import build_network
from hsivi_fast.data import DataSet, load_data
from hsivi_fast.method.schedule import signal_levels
from hsivi_fast.nets import build_unet
from hsivi_fast.training.pretrain import _edm_timesteps, _Loss, train_teacher


@pytest.fixture
def config(tmp_path):
    """(overrides) -> the configuration of a small denoiser of the digits with ten classes."""
    file = tmp_path / "denoiser.yaml"
    lines = [f"  {key}: {value}" for key, value in {**SONG, "classes": 10}.items()]
    teacher = "teacher: {checkpoint: none.safetensors, prediction: denoiser, betas: edm, null_class: -1}"
    train = "teacher_train: {steps: 4, batch_size: 64, levels: edm, label_dropout: 0.25, warmup: 1}"
    file.write_text("\n".join(["network:", *lines, teacher, "data: digits\nnfe: 3\ndevice: cpu\nsave_every: 2", train]))
    return lambda *overrides: load_config(file, overrides)


def test_the_loss_is_that_of_the_raw_network(config):
    """|F - F_hat|^2 with F = (D - c_skip x) / c_out of EDM, whatever stands around the network."""
    settings = config("teacher_train.levels=uniform")
    network, data = build_network(settings, "cpu"), load_data("digits")
    loss_of, calls = _Loss(settings, network, data, "cpu"), []

    def predict(x, t, labels):
        calls.append((x, t, labels))
        return network(x, t, labels)

    loss, gradient, eps_hat = loss_of(predict, 1)
    (x, t, _), alpha_bar = calls[0], torch.from_numpy(signal_levels("edm", 1000))
    assert t.unique().numel() > 50
    signal, noise = alpha_bar[t].sqrt().reshape(-1, 1, 1, 1), (1 - alpha_bar[t]).sqrt().reshape(-1, 1, 1, 1)
    sigma = noise / signal
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    denoised = (x.double() - noise * eps_hat.detach().double()) / signal
    raw = (denoised - c_skip * x / signal) / c_out
    images = torch.from_numpy(data.images).double()
    candidates = ((images[None] - c_skip[:, None] * x[:, None] / signal[:, None]) / c_out[:, None]).flatten(2)
    errors = (candidates - raw.flatten(1)[:, None]).square().mean(2)  # [B, N]: the loss if image n was the one
    index = (
        (x[:, None] / signal[:, None] - images[None]).flatten(2).square().mean(2) - sigma.flatten()[:, None] ** 2
    ).abs()
    low = sigma.flatten() < 0.05  # there the nearest image is the one
    found = errors.gather(1, index.argmin(1, keepdim=True))[:, 0]
    difference = (gradient / (2 / eps_hat.numel())).double() * loss_of.factor[t].reshape(-1, 1, 1, 1)
    per_image = difference.square().flatten(1).mean(1)
    assert low.sum() > 5
    np.testing.assert_allclose(per_image[low].numpy(), found[low].numpy(), rtol=2e-2)
    assert float(loss) == pytest.approx(float(per_image.mean()), rel=1e-5)


def test_the_gradient_is_that_of_the_loss(config):
    settings = config()
    loss_of = _Loss(settings, build_network(settings, "cpu"), load_data("digits"), "cpu")
    eps_hat = torch.randn(64, 1, 8, 8)

    def loss_at(value):
        return float(loss_of(lambda x, t, labels: value, 3)[0])

    _, gradient, _ = loss_of(lambda x, t, labels: eps_hat, 3)
    direction = gradient.sign()  # in which the slope is not small by chance, against what float32 rounds
    slope = (loss_at(eps_hat + 1e-2 * direction) - loss_at(eps_hat - 1e-2 * direction)) / 2e-2
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


def test_the_levels_are_those_of_edm():
    levels = signal_levels("edm", 1000)
    times = _edm_timesteps(levels)
    log_sigma = np.log((1 - levels[times]) / levels[times]) / 2
    assert log_sigma.mean() == pytest.approx(-1.2, abs=0.01) and log_sigma.std() == pytest.approx(1.2, abs=0.01)
    assert (np.diff(times) >= 0).all() and times.dtype == np.int64


def test_labels_are_the_images_own_and_some_are_dropped(config):
    settings, data, seen = config(), load_data("digits"), []
    network = build_network(settings, "cpu")
    loss_of = _Loss(settings, network, data, "cpu")
    for step in range(40):
        loss_of(lambda x, t, labels: seen.append(labels) or torch.zeros_like(x), step)
    labels = torch.cat(seen)
    assert float((labels == -1).double().mean()) == pytest.approx(0.25, abs=0.035)  # 4 deviations of 2,560
    assert set(labels.tolist()) == {-1, *range(10)}


def test_all_classes_are_learned(config, tmp_path):
    before = build_network(config(), "cpu").state_dict()
    after = load_file(train_teacher(config(), tmp_path / "run"))
    moved = (after["map_label.weight"] - before["map_label.weight"]).abs().amax(0)
    assert moved.shape == (10,) and (moved > 1e-5).all()
    assert (after["map_label.bias"] - before["map_label.bias"]).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("network.classes=5", "network.classes: 5, and the data 'digits' has the label 9; use at least 10"),
        (
            "teacher.null_class=null",
            "teacher_train.label_dropout: 0.25 needs the label that stands for no class; say it",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(config, tmp_path, change, problem):
    with pytest.raises(ValueError) as error:
        train_teacher(config(change), tmp_path / "run")
    assert str(error.value).startswith(problem) and not (tmp_path / "run").exists()


def test_data_without_labels_and_networks_without_classes(config):
    settings = config()
    network, data = build_network(settings, "cpu"), load_data("digits")
    with pytest.raises(ValueError, match="network.classes: 10, and the data 'digits' has no labels"):
        _Loss(settings, network, DataSet(data.images, None, 17), "cpu")
    plain = dataclasses.replace(settings, network=dataclasses.replace(settings.network, classes=None))
    with pytest.raises(ValueError, match="teacher_train.label_dropout: 0.25, and the network has no classes"):
        _Loss(plain, build_unet(plain.network), data, "cpu")

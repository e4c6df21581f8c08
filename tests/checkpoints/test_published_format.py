"""Files of the published HSIVI code: all their networks are read, and a run's network must be one that it has."""

import dataclasses

import pytest
import torch
from contexts import context_with_teacher
from small_checkpoints import ADM, DDPM, published_file, run_config, teacher_has

from hsivi_fast.build import build_score_net, build_student
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.published_format import publishable_network
from hsivi_fast.checkpoints.weights import read_weights
from hsivi_fast.config import load_config


@pytest.mark.parametrize(
    "network, log_gamma, gamma",
    [
        (DDPM, (3, 8, 8), {"per_step": False, "per_pixel": True}),
        (DDPM, (1,), {"per_step": False, "per_pixel": False}),
        (DDPM, (3,), {"per_step": True, "per_pixel": False}),
        (ADM, (3, 3, 8, 8), {"per_step": True, "per_pixel": True}),
    ],
)
def test_a_published_file_gives_all_five_networks(tmp_path, network, log_gamma, gamma):
    content, networks = published_file(network, log_gamma)
    torch.save(content, tmp_path / "final_checkpoint.pth")
    assert teacher_has(tmp_path, network, tmp_path / "final_checkpoint.pth", networks["teacher"])
    written = convert_checkpoint(tmp_path / "final_checkpoint.pth", tmp_path / "ours")
    assert sorted(path.name for path in written) == sorted(
        [*(f"{role}.safetensors" for role in networks), "network.yaml"]
    )
    for role, weights in networks.items():
        for read in (
            read_weights(tmp_path / "final_checkpoint.pth", role),
            read_weights(tmp_path / "ours" / f"{role}.safetensors"),
        ):
            assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)

    unknown = ["network.image_size", "nfe", "spacing", "eta"]
    if gamma["per_pixel"]:
        unknown.remove("network.image_size")
    if gamma["per_step"]:
        unknown.remove("nfe")
    assert f"# The file does not say {', '.join(unknown)}: add them." in written[-1].read_text()
    size = [] if gamma["per_pixel"] else ["network.image_size=8"]
    config = load_config(tmp_path / "ours" / "network.yaml", ["nfe=3", "eta=0.5", "init=.", *size])
    assert dataclasses.asdict(config.gamma) == gamma
    context = context_with_teacher(config)
    student, score_net = build_student(context), build_score_net(context)
    assert all(torch.equal(parameter, networks["student"][name]) for name, parameter in student.named_parameters())
    assert all(torch.equal(parameter, networks["score_net"][name]) for name, parameter in score_net.named_parameters())


def test_a_published_file_without_fitting_averages_says_so(tmp_path):
    torch.save(published_file(DDPM, (3, 8, 8), averaged=False)[0], tmp_path / "a.pth")
    written = convert_checkpoint(tmp_path / "a.pth", tmp_path / "ours")
    assert [path.name for path in written] == [
        "teacher.safetensors",
        "student.safetensors",
        "score_net.safetensors",
        "network.yaml",
    ]
    assert "# ema_phinet has 1 tensors that do not fit the " in written[-1].read_text()
    content = published_file(DDPM, (3, 8, 8))[0]
    without = {name: tensor for name, tensor in content["whole_model"].items() if "fnet" not in name}
    torch.save({**content, "whole_model": without}, tmp_path / "b.pth")
    with pytest.raises(
        ValueError, match="its whole_model has no fnet, as the published HSIVI code's has; it has phinet, target_model"
    ):
        convert_checkpoint(tmp_path / "b.pth", tmp_path / "more")


def test_other_groups_or_heads_cannot_be_published_and_another_norm_eps_warns(tmp_path):
    with pytest.raises(
        ValueError, match="network.norm_groups: 16 cannot be published, the published code's cifar10 network has 32"
    ):
        publishable_network(run_config(tmp_path, {"name": "cifar10", "norm_groups": 16}, "cifar10.pt"))
    with pytest.raises(
        ValueError, match="network.heads: 8 cannot be published, the published code's imagenet64 network has 4"
    ):
        publishable_network(run_config(tmp_path, {"name": "imagenet64", "heads": 8}, "imagenet64.pt"))
    for network in ("cifar10", "digits"):
        with pytest.raises(
            ValueError, match="network.freq_shift: 0 cannot be published, the published code's .* 1 and"
        ):
            publishable_network(run_config(tmp_path, {"name": network, "freq_shift": 0}, "cifar10.pt"))
    with pytest.raises(ValueError, match="network.classes: 10 cannot be published, the published code's networks have"):
        publishable_network(run_config(tmp_path, {"name": "cifar10", "classes": 10}, "cifar10.pt"))
    with pytest.warns(
        UserWarning, match="network.norm_eps: the run has 1e-06, the published code runs its cifar10 network with 1e-05"
    ):
        publishable_network(run_config(tmp_path, {"name": "cifar10", "norm_eps": 1e-6}, "cifar10.pt"))
    digits = publishable_network(load_config("digits"))  # the published code has no network of its sizes
    assert digits["norm_groups"] == 8
    with pytest.raises(ValueError, match="network.family: 'mlp'"):
        publishable_network(load_config("toy2d"))

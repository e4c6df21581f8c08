"""Conversions: a run goes to the published layout and back, a teacher becomes the base of a run."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import DDPM, random_weights, run_config, with_module_prefix

from hsivi_fast.build import build_layers, load_teacher
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.config import load_config, resolved_dict
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.nets import build_unet


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has two checkpoints, and what the second one holds."""
    torch.save(random_weights(DDPM, 1), tmp_path / "teacher.pt")
    config = run_config(tmp_path, DDPM, tmp_path / "teacher.pt", "gamma.per_step=true")
    folder = RunFolder.start(tmp_path / "run", config)
    for step in (10, 20):
        tensors = {
            "student": random_weights(DDPM, step, (3, 3, 8, 8)),
            "student_ema": random_weights(DDPM, step + 1, (3, 3, 8, 8)),
            "score_net": random_weights(DDPM, step + 2),
            "score_net_ema": random_weights(DDPM, step + 3),
        }
        folder.save_checkpoint(step, tensors, {"metric": None, "student_updates": step // 2, "score_net_updates": step})
    return folder, {**tensors, "teacher": random_weights(DDPM, 1)}


def test_a_run_goes_to_the_published_layout_and_back_bit_for_bit(tmp_path, run):
    folder, networks = run
    assert convert_checkpoint(folder, tmp_path / "out" / "hsivi.pth") == [tmp_path / "out" / "hsivi.pth"]
    content = torch.load(tmp_path / "out" / "hsivi.pth", weights_only=True)
    assert {"optimizer_phinet", "optimizer_fnet", "whole_model", "ema_phinet", "ema_fnet", "step"} < set(content)
    assert content["step"] == 20
    names = list(content["whole_model"])
    expected = [f"module.target_model.{name}" for name in networks["teacher"]]
    expected += [f"module.phinet.{name}" for name in networks["student"]]
    expected += [f"module.fnet.{name}" for name in networks["score_net"]]
    assert names == expected and "module.phinet.log_scaled_gamma" in names
    for role, published, updates in (("student", "phinet", 10), ("score_net", "fnet", 20)):
        average = content[f"ema_{published}"]
        assert (average["decay"], average["num_updates"]) == (0.999, updates)
        pairs = zip(average["shadow_params"], networks[f"{role}_ema"].values(), strict=True)
        assert all(torch.equal(written, expected) for written, expected in pairs)
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in networks[role].values()]
        torch.optim.Adam(parameters, amsgrad=True).load_state_dict(content[f"optimizer_{published}"])

    written = convert_checkpoint(tmp_path / "out" / "hsivi.pth", tmp_path / "back")
    for role, weights in networks.items():
        back = load_file(tmp_path / "back" / f"{role}.safetensors")
        assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    before, after = resolved_dict(folder.config()), resolved_dict(load_config(written[-1]))
    described = {key: value for key, value in after["network"].items() if value is not None}
    assert described == {**DDPM, "middle": True, "norm_groups": 32, "norm_eps": 1e-5}
    assert all(before[key] == after[key] for key in ("nfe", "spacing", "eta", "gamma"))
    assert convert_checkpoint(folder, tmp_path / "early.pt", step=10)
    assert torch.load(tmp_path / "early.pt", weights_only=True)["step"] == 10


def test_the_model_of_the_published_code_loads_the_file(tmp_path, run):
    """A module with the submodules and the parameter of `SpeedDDPM` in models/ddpm_cifar.py there.

    Its names are those that DistributedDataParallel gives, and it is loaded strictly.
    """
    folder, networks = run
    convert_checkpoint(folder, tmp_path / "hsivi.pth")
    model = torch.nn.Module()
    model.target_model = build_unet(DDPM).requires_grad_(False)
    model.phinet = attach_log_gamma(build_unet(DDPM), build_layers(folder.config(), "cpu"))
    model.fnet = build_unet(DDPM)
    whole = torch.nn.Module()
    whole.module = model
    written = torch.load(tmp_path / "hsivi.pth", weights_only=True)["whole_model"]
    whole.load_state_dict(written, strict=True)
    assert torch.equal(model.phinet.log_scaled_gamma, networks["student"]["log_scaled_gamma"])
    assert [name for name, _ in whole.named_parameters()] == list(written)


def test_conversions_that_cannot_be_are_named(tmp_path, run):
    folder, _ = run

    def message(*arguments, **options):
        with pytest.raises(ValueError) as caught:
            convert_checkpoint(*arguments, **options)
        return str(caught.value)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is not empty; choose another folder" in message(tmp_path / "teacher.pt", tmp_path / "full")
    assert "must be a folder" in message(tmp_path / "teacher.pt", tmp_path / "x.pt")
    assert "ends in .pt or .pth" in message(folder, tmp_path / "x")
    assert "is there already" in message(folder, tmp_path / "teacher.pt")
    assert "step: 15 has no checkpoint" in message(folder, tmp_path / "x.pt", step=15)
    assert "10, 20" in message(folder, tmp_path / "x.pt", step=15)
    assert "is no run's folder" in message(tmp_path / "teacher.pt", tmp_path / "x", step=15)
    assert message(tmp_path / "none.pt", tmp_path / "x").endswith("no such file")
    save_file({"layers.0.weight": torch.ones(2, 2)}, tmp_path / "classifier.safetensors")
    assert "its tensors are of none of our UNets (layers.0.weight, ...)" in message(
        tmp_path / "classifier.safetensors", tmp_path / "x"
    )
    save_file(random_weights(DDPM), folder.checkpoint_path(20) / "student.safetensors")
    assert "of another network than the run's teacher, they differ in log_scaled_gamma" in message(
        folder, tmp_path / "x.pt"
    )
    (tmp_path / "teacher.pt").unlink()
    assert message(folder, tmp_path / "x.pt").endswith("no such file; say where it is with teacher.checkpoint=FILE")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "x"))]


def test_the_snippet_of_a_plain_teacher_is_the_base_of_a_run(tmp_path):
    weights = random_weights("digits")
    torch.save(with_module_prefix(weights), tmp_path / "t.pt")
    written = convert_checkpoint(tmp_path / "t.pt", tmp_path / "ours")
    assert [path.name for path in written] == ["teacher.safetensors", "network.yaml"]
    text = written[1].read_text()
    assert "# Its sizes are those of the network digits." in text
    assert (
        "# The file does not say network.image_size, network.norm_groups, network.norm_eps, teacher.betas, "
        "teacher.steps: what stands here is usual for digits; check it."
    ) in text
    config = load_config(written[1], ["nfe=5"])
    assert (config.network.image_size, config.network.norm_groups, config.network.middle) == (8, 8, True)
    teacher = load_teacher(config, "cpu")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in teacher.named_parameters())

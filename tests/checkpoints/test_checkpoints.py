"""Checkpoints of others, written here in their exact layouts on small networks: every one loads as a teacher, and a run goes to the published layout and back."""

import dataclasses
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hsivi_fast.build import build_layer, build_score_net, build_student, load_teacher
from hsivi_fast.checkpoints import download
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.formats import read_checkpoint
from hsivi_fast.checkpoints.published_format import publishable_network
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.checkpoints.weights import read_weights
from hsivi_fast.config import load_config, resolved_dict
from hsivi_fast.method.layers import attach_log_gamma
from hsivi_fast.nets import build_unet

DDPM = {
    "family": "ddpm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 32,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [False, True],
}
ADM = {
    "family": "adm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 32,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [2],
    "heads": 4,
    "out_channels": 6,
}


def _weights(network, seed=0, log_gamma=None):
    """Random weights of a network in the order of its parameters; with those of log_gamma's shape before them, as a student has them."""
    torch.manual_seed(seed)
    unet = build_unet(network)
    if log_gamma is not None:
        unet.register_parameter("log_scaled_gamma", torch.nn.Parameter(torch.zeros(log_gamma)))
    return {name: torch.randn_like(parameter) * 0.1 for name, parameter in unet.named_parameters()}


def _config(tmp_path, network, checkpoint, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"network": network, "teacher": {"checkpoint": str(checkpoint)}, "nfe": 3, "eta": 0.5}))
    return load_config(file, overrides)


def _teacher_is(tmp_path, network, checkpoint, weights, *overrides):
    loaded = dict(load_teacher(_config(tmp_path, network, checkpoint, *overrides), "cpu").named_parameters())
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def _parallel(weights):
    return {f"module.{name}": tensor for name, tensor in weights.items()}


# Files that torch.save wrote


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("layout", ["bare", "model", "ema"])
def test_ddpm_torch(tmp_path, layout, prefixed):
    """As its trainer saves: model, optimizer, ema, scheduler, epoch and results, which are numpy's floats; the averages come first."""
    weights, others = _weights(DDPM), _weights(DDPM, seed=1)
    form = _parallel if prefixed else dict
    content = form(weights)
    if layout != "bare":
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=np.float64(2e-4) * 1)
        content = {
            "model": content,
            "optimizer": optimizer.state_dict(),
            "scheduler": {"last_epoch": 7, "_last_lr": [np.float64(2e-4)], "lr_lambdas": [None]},
            "epoch": 2040,
            "loss": 0.03,
            "fid": np.float64(3.2),
            "statistics": np.arange(3.0),
        }
    if layout == "ema":
        content = {
            **content,
            "model": form(others),
            "ema": {"decay": 0.9999, "shadow": form(weights), "num_updates": 5},
        }
    torch.save(content, tmp_path / "cifar10_2040")
    assert _teacher_is(tmp_path, DDPM, tmp_path / "cifar10_2040", weights)


def test_torch_before_its_archives_half_precision_and_a_misleading_name(tmp_path):
    weights = _weights(DDPM)
    for archive in (False, True):
        torch.save(weights, tmp_path / "old.safetensors", _use_new_zipfile_serialization=archive)
        assert _teacher_is(tmp_path, DDPM, tmp_path / "old.safetensors", weights)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {name: tensor.to(dtype) for name, tensor in weights.items()}
        save_file(rounded, tmp_path / "half.pt")
        assert _teacher_is(
            tmp_path, DDPM, tmp_path / "half.pt", {name: tensor.float() for name, tensor in rounded.items()}
        )


def test_improved_diffusion_has_six_outputs_of_which_three_are_used(tmp_path):
    weights = _weights(ADM)
    torch.save(weights, tmp_path / "imagenet64.pt")
    assert _teacher_is(tmp_path, ADM, tmp_path / "imagenet64.pt", weights)
    teacher = load_teacher(_config(tmp_path, ADM, tmp_path / "imagenet64.pt"), "cpu")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    last, seen = teacher.out["2"], []
    last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(teacher(x, t), seen[0][:, :3]) and seen[0].shape == (2, 6, 8, 8)
    found = read_checkpoint(tmp_path / "imagenet64.pt").network
    assert {key: found[key] for key in ADM if key != "image_size"} == {
        key: value for key, value in ADM.items() if key != "image_size"
    } and "image_size" not in found


class Malicious:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (os.mkdir, (self.file,))


@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
        lambda content, file: pickle.dump(content, open(file, "wb"), protocol=2),
    ],
    ids=["archive", "legacy", "pickle"],
)
def test_pickled_code_is_refused_and_not_run(tmp_path, write):
    write({**_weights(DDPM), "x": Malicious(tmp_path / "harm")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt': .*pickled code.*never run") as caught:
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists() and "\n" not in str(caught.value)


def test_a_pickled_network_is_refused_by_its_class(tmp_path):
    torch.save(build_unet(DDPM), tmp_path / "whole.pt")
    with pytest.raises(
        ValueError,
        match=r"holds pickled code \(hsivi_fast.nets.ddpm.DDPMUNet\), which is never run; save its tensors alone",
    ):
        read_weights(tmp_path / "whole.pt")


def test_what_is_no_checkpoint_is_named(tmp_path):
    def message(content=None, name="file.pt", part="teacher"):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError) as caught:
            read_weights(tmp_path / name, part)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
        return str(caught.value)

    assert message(name="none.pt").endswith("no such file")
    assert "is neither a safetensors file nor one of torch.save" in message(b"<html>not found</html>")
    assert "of an unknown layout, it holds conv1.weight, fc.bias; readable are ours" in message(
        {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    )
    assert "it holds a, b, c, d, e and 2 more" in message(dict.fromkeys("abcdefg", 1))
    assert "holds a Tensor and no named tensors" in message(torch.ones(3))
    assert "has no student; it is a DDPM UNet's weights and has teacher" in message(_weights(DDPM), part="student")
    whole = (tmp_path / "file.pt").read_bytes()
    assert "not a readable torch file" in message(whole[: len(whole) // 2])
    assert "diffusers' weights without their config.json" in message(
        {"down_blocks.0.resnets.0.norm1.weight": torch.ones(1)}
    )
    (tmp_path / "folder").mkdir()
    assert "a folder without the config.json of a diffusers UNet2DModel, it holds nothing" in message(name="folder")


def test_sizes_that_do_not_fit_are_named_with_the_file(tmp_path):
    torch.save(_weights(DDPM), tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"a.pt': is of another network, it .*embed.0.weight \(\[128, 32\], expected \[256, 64\]\)"
    ):
        load_teacher(_config(tmp_path, {**DDPM, "channels": 64}, tmp_path / "a.pt"), "cpu")


# diffusers


def _unet2d(**changes):
    from diffusers import UNet2DModel

    torch.manual_seed(3)
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }
    model = UNet2DModel(**{**settings, **changes}).eval()
    for (
        parameter
    ) in model.parameters():  # normalisations and projections that start at one or zero would hide a mistake
        parameter.data.normal_(0, 0.15)
    return model


DIFFUSERS = {**DDPM, "res_blocks": 2, "norm_eps": 1e-6}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}


@pytest.mark.parametrize("layout", ["safetensors", "bin", "old names", "old names, convolutions", "pipeline", "file"])
def test_diffusers_unet_predicts_the_same_noise(tmp_path, layout):
    model, folder = _unet2d(), tmp_path / "ddpm-cifar10-32"
    model.save_pretrained(folder / "unet" if layout == "pipeline" else folder, safe_serialization=layout != "bin")
    if layout.startswith("old names"):
        file, stored = folder / "diffusion_pytorch_model.safetensors", {}
        for name, tensor in load_file(file).items():
            for new, old in OLD_NAMES.items():
                if f".{new}." in name:
                    name, tensor = (
                        name.replace(f".{new}.", f".{old}."),
                        tensor[..., None, None] if "conv" in layout and name.endswith("weight") else tensor,
                    )
            stored[name] = tensor
        assert (
            sum(".query." in name for name in stored) == 12
        )  # two layers down, three up and the middle, weight and bias
        save_file(stored, file)
    if layout == "pipeline":
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    source = folder / "diffusion_pytorch_model.safetensors" if layout == "file" else folder
    teacher = load_teacher(_config(tmp_path, DIFFUSERS, source), "cpu")
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 500, 999])
    with torch.no_grad():
        expected = model(x, t).sample
        assert float((teacher(x, t) - expected).norm() / expected.norm()) < 1e-5
    found = read_checkpoint(source)
    assert found.network == {**DIFFUSERS, "middle": True, "norm_groups": 32}
    assert found.settings == ({"teacher": {"betas": "linear", "steps": 1000}} if layout == "pipeline" else {})


def test_the_folder_of_ddpm_cifar10_is_described(tmp_path):
    """Its config.json, from google/ddpm-cifar10-32."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "_class_name": "UNet2DModel",
                "_diffusers_version": "0.0.4",
                "act_fn": "silu",
                "attention_head_dim": None,
                "block_out_channels": [128, 256, 256, 256],
                "center_input_sample": False,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "in_channels": 3,
                "layers_per_block": 2,
                "mid_block_scale_factor": 1,
                "norm_eps": 1e-06,
                "norm_num_groups": 32,
                "out_channels": 3,
                "sample_size": 32,
                "time_embedding_type": "positional",
                "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            }
        )
    )
    save_file({"conv_in.weight": torch.ones(128, 3, 3, 3)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert read_checkpoint(tmp_path).network == {
        "family": "ddpm",
        "image_channels": 3,
        "image_size": 32,
        "channels": 128,
        "multipliers": [1, 2, 2, 2],
        "res_blocks": 2,
        "attention": [False, True, False, False],
        "middle": True,
        "norm_groups": 32,
        "norm_eps": 1e-6,
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"norm_eps": 1e-6},
            "network.norm_eps: 1e-05 is not what the teacher .* was trained with; set network.norm_eps=1e-06",
        ),
        ({"norm_num_groups": 16, "norm_eps": 1e-5}, "network.norm_groups: 32 .* set network.norm_groups=16"),
        ({"sample_size": 16, "norm_eps": 1e-5}, "network.image_size: 8 .* set network.image_size=16"),
    ],
)
def test_what_weights_do_not_show_is_compared_with_the_run(tmp_path, changes, message):
    _unet2d(**changes).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=message):
        load_teacher(_config(tmp_path, {**DIFFUSERS, "norm_eps": 1e-5}, tmp_path / "unet"), "cpu")
    converted = convert_checkpoint(tmp_path / "unet", tmp_path / "ours")[0]  # which carries it along
    with pytest.raises(ValueError, match=message):
        load_teacher(_config(tmp_path, {**DIFFUSERS, "norm_eps": 1e-5}, converted), "cpu")


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "attention_head_dim",
            8,
            "attention_head_dim = 8, which our DDPM UNet cannot be; it needs null, one head over all 64 channels",
        ),
        ("flip_sin_to_cos", True, "flip_sin_to_cos = True"),
        ("freq_shift", 0, "freq_shift = 0"),
        ("downsample_padding", 1, "downsample_padding = 1"),
        ("resnet_time_scale_shift", "scale_shift", "resnet_time_scale_shift = 'scale_shift'"),
        ("num_class_embeds", 10, "num_class_embeds = 10"),
        ("class_embed_type", "timestep", "class_embed_type"),
        ("down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"], "down_block_types"),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"], "attention at the same levels"),
        ("block_out_channels", [32, 48], "multiples of the first"),
        ("out_channels", 6, "as many as in_channels"),
        ("act_fn", "gelu", "act_fn = 'gelu'"),
        ("add_attention", False, "add_attention"),
        ("time_embedding_type", "fourier", "'fourier'"),
        ("_class_name", "UNet2DConditionModel", "is of a UNet2DConditionModel"),
        ("block_out_channels", None, "no list block_out_channels"),
    ],
)
def test_a_unet_that_ours_cannot_be_is_refused(tmp_path, key, value, message):
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [32, 64],
        "layers_per_block": 2,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has a config.json and no weights"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path)


def test_another_noise_than_the_teacher_s_is_refused(tmp_path):
    _unet2d(norm_eps=1e-5).save_pretrained(tmp_path / "unet")
    network = {**DIFFUSERS, "norm_eps": 1e-5}
    for changes, message in (
        ({"beta_schedule": "squaredcos_cap_v2"}, "teacher.betas: 'linear' .* set teacher.betas=cosine"),
        ({"num_train_timesteps": 4000}, "set teacher.steps=4000"),
        ({"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction'"),
        ({"beta_end": 0.01}, "beta_end = 0.01"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid'"),
    ):
        (tmp_path / "unet" / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **changes}))
        with pytest.raises(ValueError, match=message):
            load_teacher(_config(tmp_path, network, tmp_path / "unet"), "cpu")


def test_diffusers_weights_without_a_place_or_incomplete_are_named(tmp_path):
    _unet2d().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file({**whole, "down_blocks.0.downsamplers.0.norm.weight": torch.ones(2)}, file)
    with pytest.raises(
        ValueError, match="has down_blocks.0.downsamplers.0.norm.weight, which our DDPM UNet has no place for"
    ):
        read_weights(tmp_path)
    save_file({name: tensor for name, tensor in whole.items() if name != "mid_block.attentions.0.to_k.bias"}, file)
    with pytest.raises(ValueError, match="has of middle.1.project_in.bias only q and v"):
        read_weights(tmp_path)


# The published HSIVI code's files


def _published(network, log_gamma, averaged=True):
    """As torch_utils/checkpoint.py there writes it after a few steps of warm-up, when the learning rate is a number of numpy's."""
    parts = {
        "target_model": _weights(network, 1),
        "phinet": _weights(network, 2, log_gamma),
        "fnet": _weights(network, 3),
    }
    means = {"phinet": _weights(network, 4, log_gamma), "fnet": _weights(network, 5)}
    content = {
        "whole_model": {
            f"module.{theirs}.{name}": tensor for theirs, weights in parts.items() for name, tensor in weights.items()
        },
        "step": 100,
    }
    for theirs in means:
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in parts[theirs].values()]
        optimizer = torch.optim.Adam(parameters, lr=1e-4, amsgrad=True)
        parameters[0].grad = torch.ones_like(parameters[0])
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1.6e-5 * np.minimum(100 / 2500, 1.0)
        content[f"optimizer_{theirs}"] = optimizer.state_dict()
        shadow = list(means[theirs].values()) if averaged else [torch.ones(2)]
        content[f"ema_{theirs}"] = {"decay": 0.999, "num_updates": 100, "shadow_params": shadow}
    return content, {
        "teacher": parts["target_model"],
        "student": parts["phinet"],
        "score_net": parts["fnet"],
        "student_ema": means["phinet"],
        "score_net_ema": means["fnet"],
    }


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
    content, parts = _published(network, log_gamma)
    torch.save(content, tmp_path / "final_checkpoint.pth")
    assert _teacher_is(tmp_path, network, tmp_path / "final_checkpoint.pth", parts["teacher"])
    written = convert_checkpoint(tmp_path / "final_checkpoint.pth", tmp_path / "ours")
    assert sorted(path.name for path in written) == sorted([*(f"{part}.safetensors" for part in parts), "network.yaml"])
    for part, weights in parts.items():
        for read in (
            read_weights(tmp_path / "final_checkpoint.pth", part),
            read_weights(tmp_path / "ours" / f"{part}.safetensors"),
        ):
            assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)

    unknown = (
        ([] if len(log_gamma) >= 3 else ["network.image_size"])
        + ([] if gamma["per_step"] else ["nfe"])
        + ["spacing", "eta"]
    )
    assert f"# The file does not say {', '.join(unknown)}: add them." in written[-1].read_text()
    size = [] if len(log_gamma) >= 3 else ["network.image_size=8"]
    config = load_config(tmp_path / "ours" / "network.yaml", ["nfe=3", "eta=0.5", "init=.", *size])
    assert dataclasses.asdict(config.gamma) == gamma
    layer, teacher = build_layer(config, "cpu"), load_teacher(config, "cpu")
    student, score_net = build_student(config, teacher, layer), build_score_net(config, teacher)
    assert all(torch.equal(parameter, parts["student"][name]) for name, parameter in student.named_parameters())
    assert all(torch.equal(parameter, parts["score_net"][name]) for name, parameter in score_net.named_parameters())


def test_a_published_file_without_fitting_averages_says_so(tmp_path):
    torch.save(_published(DDPM, (3, 8, 8), averaged=False)[0], tmp_path / "a.pth")
    written = convert_checkpoint(tmp_path / "a.pth", tmp_path / "ours")
    assert [path.name for path in written] == [
        "teacher.safetensors",
        "student.safetensors",
        "score_net.safetensors",
        "network.yaml",
    ]
    assert "# ema_phinet has 1 tensors that do not fit the " in written[-1].read_text()
    content = _published(DDPM, (3, 8, 8))[0]
    torch.save(
        {
            **content,
            "whole_model": {name: tensor for name, tensor in content["whole_model"].items() if "fnet" not in name},
        },
        tmp_path / "b.pth",
    )
    with pytest.raises(
        ValueError, match="its whole_model has no fnet, as the published HSIVI code's has; it has phinet, target_model"
    ):
        convert_checkpoint(tmp_path / "b.pth", tmp_path / "more")


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has two checkpoints, and what the second one holds."""
    torch.save(_weights(DDPM, 1), tmp_path / "teacher.pt")
    config = _config(tmp_path, DDPM, tmp_path / "teacher.pt", "gamma.per_step=true")
    folder = RunFolder.start(tmp_path / "run", config)
    for step in (10, 20):
        tensors = {
            "student": _weights(DDPM, step, (3, 3, 8, 8)),
            "student_ema": _weights(DDPM, step + 1, (3, 3, 8, 8)),
            "score_net": _weights(DDPM, step + 2),
            "score_net_ema": _weights(DDPM, step + 3),
        }
        folder.save_checkpoint(step, tensors, {"metric": None, "student_updates": step // 2, "score_net_updates": step})
    return folder, {**tensors, "teacher": _weights(DDPM, 1)}


def test_a_run_goes_to_the_published_layout_and_back_bit_for_bit(tmp_path, run):
    folder, parts = run
    assert convert_checkpoint(folder, tmp_path / "out" / "hsivi.pth") == [tmp_path / "out" / "hsivi.pth"]
    content = torch.load(tmp_path / "out" / "hsivi.pth", weights_only=True)
    assert {"optimizer_phinet", "optimizer_fnet", "whole_model", "ema_phinet", "ema_fnet", "step"} < set(
        content
    ) and content["step"] == 20
    names = list(content["whole_model"])
    expected = [
        f"module.{theirs}.{name}"
        for part, theirs in (("teacher", "target_model"), ("student", "phinet"), ("score_net", "fnet"))
        for name in parts[part]
    ]
    assert names == expected and "module.phinet.log_scaled_gamma" in names
    for part, theirs in (("student", "phinet"), ("score_net", "fnet")):
        average = content[f"ema_{theirs}"]
        assert (average["decay"], average["num_updates"]) == (0.999, 10 if part == "student" else 20)
        assert all(
            torch.equal(a, b) for a, b in zip(average["shadow_params"], parts[f"{part}_ema"].values(), strict=True)
        )
        optimizer = torch.optim.Adam(
            [torch.nn.Parameter(tensor.clone()) for tensor in parts[part].values()], amsgrad=True
        )
        optimizer.load_state_dict(content[f"optimizer_{theirs}"])

    written = convert_checkpoint(tmp_path / "out" / "hsivi.pth", tmp_path / "back")
    for part, weights in parts.items():
        back = load_file(tmp_path / "back" / f"{part}.safetensors")
        assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    before, after = resolved_dict(folder.config()), resolved_dict(load_config(written[-1]))
    described = {key: value for key, value in after["network"].items() if value is not None}
    assert described == {**DDPM, "middle": True, "norm_groups": 32, "norm_eps": 1e-5}
    assert all(before[key] == after[key] for key in ("nfe", "spacing", "eta", "gamma"))
    assert (
        convert_checkpoint(folder, tmp_path / "early.pt", step=10)
        and torch.load(tmp_path / "early.pt", weights_only=True)["step"] == 10
    )


def test_published_code_s_model_loads_the_file(tmp_path, run):
    """A module with the submodules and the parameter of `SpeedDDPM` in models/ddpm_cifar.py there, wrapped as DistributedDataParallel names it, strictly."""
    folder, parts = run
    convert_checkpoint(folder, tmp_path / "hsivi.pth")
    model = torch.nn.Module()
    model.target_model = build_unet(DDPM).requires_grad_(False)
    model.phinet = attach_log_gamma(build_unet(DDPM), build_layer(folder.config(), "cpu"))
    model.fnet = build_unet(DDPM)
    whole = torch.nn.Module()
    whole.module = model
    whole.load_state_dict(torch.load(tmp_path / "hsivi.pth", weights_only=True)["whole_model"], strict=True)
    assert torch.equal(model.phinet.log_scaled_gamma, parts["student"]["log_scaled_gamma"])
    assert [name for name, _ in whole.named_parameters()] == list(
        torch.load(tmp_path / "hsivi.pth", weights_only=True)["whole_model"]
    )


def test_a_published_network_with_other_normalisations(tmp_path):
    with pytest.raises(
        ValueError, match="network.norm_groups: 16 cannot be published, the published code's cifar10 network has 32"
    ):
        publishable_network(_config(tmp_path, {"name": "cifar10", "norm_groups": 16}, "cifar10.pt"))
    with pytest.raises(
        ValueError, match="network.heads: 8 cannot be published, the published code's imagenet64 network has 4"
    ):
        publishable_network(_config(tmp_path, {"name": "imagenet64", "heads": 8}, "imagenet64.pt"))
    with pytest.warns(
        UserWarning, match="network.norm_eps: the run has 1e-06, the published code runs its cifar10 network with 1e-05"
    ):
        publishable_network(_config(tmp_path, {"name": "cifar10", "norm_eps": 1e-6}, "cifar10.pt"))
    assert (
        publishable_network(load_config("digits"))["norm_groups"] == 8
    )  # which the published code has no network of
    with pytest.raises(ValueError, match="network.family: 'mlp'"):
        publishable_network(load_config("toy2d"))


def test_ddpm_torch_s_own_norm_eps_is_the_guess_for_its_teachers(tmp_path):
    torch.save({"model": _weights(DDPM)}, tmp_path / "a.pt")
    torch.save(_weights(DDPM), tmp_path / "b.pt")
    torch.save(_published(DDPM, (1,))[0], tmp_path / "c.pt")
    with torch.device("meta"):
        torch.save(dict(build_unet("cifar10").named_parameters()), tmp_path / "d.pt")
    assert [read_checkpoint(tmp_path / f"{name}.pt").network["norm_eps"] for name in "abcd"] == [1e-6, 1e-5, 1e-5, 1e-6]


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
    assert "step: 15 has no checkpoint" in message(folder, tmp_path / "x.pt", step=15) and "10, 20" in message(
        folder, tmp_path / "x.pt", step=15
    )
    assert "is no run's folder" in message(tmp_path / "teacher.pt", tmp_path / "x", step=15)
    assert message(tmp_path / "none.pt", tmp_path / "x").endswith("no such file")
    save_file({"layers.0.weight": torch.ones(2, 2)}, tmp_path / "classifier.safetensors")
    assert "its tensors are of none of our UNets (layers.0.weight, ...)" in message(
        tmp_path / "classifier.safetensors", tmp_path / "x"
    )
    save_file(_weights(DDPM), folder.checkpoint_path(20) / "student.safetensors")
    assert "of another network than the run's teacher, they differ in log_scaled_gamma" in message(
        folder, tmp_path / "x.pt"
    )
    (tmp_path / "teacher.pt").unlink()
    assert message(folder, tmp_path / "x.pt").endswith("no such file")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "x"))]


def test_the_snippet_of_a_plain_teacher_is_the_base_of_a_run(tmp_path):
    weights = _weights("digits")
    torch.save(_parallel(weights), tmp_path / "t.pt")
    written = convert_checkpoint(tmp_path / "t.pt", tmp_path / "ours")
    assert [path.name for path in written] == ["teacher.safetensors", "network.yaml"]
    text = written[1].read_text()
    assert "# Its sizes are those of the network digits." in text
    assert (
        "# The file does not say network.image_size, network.norm_groups, network.norm_eps, teacher.betas, teacher.steps: what stands here is usual for digits; check it."
        in text
    )
    config = load_config(written[1], ["nfe=5"])
    assert (config.network.image_size, config.network.norm_groups, config.network.middle) == (8, 8, True)
    teacher = load_teacher(config, "cpu")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in teacher.named_parameters())


# Downloads


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An address of a checkpoint, its file and its sum; the cache is a folder of the test."""
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path / "cache"))
    torch.save(_weights(DDPM), tmp_path / "served.pt")
    return (
        (tmp_path / "served.pt").as_uri(),
        tmp_path / "served.pt",
        hashlib.sha256((tmp_path / "served.pt").read_bytes()).hexdigest(),
    )


def test_an_address_is_a_teacher_and_is_fetched_once(tmp_path, served):
    address, file, found = served
    cached = download.fetch_checkpoint(f"{address}#sha256={found.upper()}")
    assert cached.read_bytes() == file.read_bytes() and cached.parent == tmp_path / "cache"
    file.unlink()
    assert download.fetch_checkpoint(address) == cached and _teacher_is(tmp_path, DDPM, address, _weights(DDPM))
    assert cached.with_name(f"{cached.name}.sha256").read_text().split()[0] == found


def test_a_wrong_sum_leaves_nothing_and_says_both(tmp_path, served):
    address, _, found = served
    with pytest.raises(ValueError, match=f"has the sha256 {found}, expected {'0' * 64}; it was deleted"):
        download.fetch_checkpoint(f"{address}#sha256={'0' * 64}")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(ValueError, match="must be sha256= and 64 hexadecimal digits"):
        download.fetch_checkpoint(f"{address}#md5=00")


def test_a_cached_file_that_changed_is_noticed(served):
    address, _, found = served
    cached = download.fetch_checkpoint(address)
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match=rf"its sha256 is [0-9a-f]+, expected {found} as at its first use; delete it and .*sha256 to have it",
    ):
        download.fetch_checkpoint(address)


def test_a_file_put_there_by_hand_is_used_and_its_sum_noted(tmp_path, monkeypatch, served):
    monkeypatch.setitem(download.PUBLISHED_TEACHERS, "cifar10", "file:///nowhere/cifar10_2040.pt")
    with pytest.raises(
        ValueError,
        match="checkpoint file:///nowhere/cifar10_2040.pt: cannot be downloaded .*No such file.*; put the file at .*/cache/cifar10_2040.pt by hand",
    ) as caught:
        download.fetch_checkpoint("cifar10")
    assert "\n" not in str(caught.value)
    (tmp_path / "cache" / "cifar10_2040.pt").write_bytes(served[1].read_bytes())
    assert _teacher_is(tmp_path, DDPM, "cifar10", _weights(DDPM))
    assert (tmp_path / "cache" / "cifar10_2040.pt.sha256").read_text().split()[0] == served[2]
    with pytest.raises(ValueError, match=r"neither a known name \(cifar10, imagenet64\) nor"):
        download.fetch_checkpoint("cifar11")


def test_a_cut_answer_and_a_missing_page_leave_nothing(tmp_path, served):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing.pt":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * (1000 if self.path == "/whole.pt" else 400))

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(ValueError, match="cut.pt: cannot be downloaded .*400.*; put the file at"):
            download.fetch_checkpoint(f"{base}/cut.pt")
        with pytest.raises(ValueError, match=r"missing.pt: cannot be downloaded \(Not Found\)"):
            download.fetch_checkpoint(f"{base}/missing.pt")
        assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
        assert download.fetch_checkpoint(f"{base}/whole.pt", progress=True).read_bytes() == b"x" * 1000
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match=r"other.pt: cannot be downloaded \(.*Connection refused\)"):
        download.fetch_checkpoint(f"{base}/other.pt")

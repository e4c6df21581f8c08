"""Folders of diffusers' UNet2DModel: they predict the same noise, and those that ours cannot be are refused."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import DDPM, run_config

from hsivi_fast.build import load_teacher
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.diffusers_format import _DISCRETE
from hsivi_fast.checkpoints.formats import read_checkpoint
from hsivi_fast.checkpoints.weights import read_weights
from hsivi_fast.config import load_config
from hsivi_fast.method.schedule import signal_levels


def _unet2d(**changes):
    from diffusers import UNet2DModel  # here: it is an optional package

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
    for parameter in model.parameters():  # those that start at one or zero would hide a mistake
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
                    name = name.replace(f".{new}.", f".{old}.")
                    if "conv" in layout and name.endswith("weight"):
                        tensor = tensor[..., None, None]
            stored[name] = tensor
        # Weight and bias of two layers down, three up and one in the middle.
        assert sum(".query." in name for name in stored) == 12
        save_file(stored, file)
    if layout == "pipeline":
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    source = folder / "diffusion_pytorch_model.safetensors" if layout == "file" else folder
    teacher = load_teacher(run_config(tmp_path, DIFFUSERS, source), "cpu")
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
        load_teacher(run_config(tmp_path, {**DIFFUSERS, "norm_eps": 1e-5}, tmp_path / "unet"), "cpu")
    converted = convert_checkpoint(tmp_path / "unet", tmp_path / "ours")[0]  # it carries these settings along
    with pytest.raises(ValueError, match=message):
        load_teacher(run_config(tmp_path, {**DIFFUSERS, "norm_eps": 1e-5}, converted), "cpu")


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "attention_head_dim",
            24,
            "attention_head_dim = 24, which our DDPM UNet cannot be; it needs null, or a divisor of 64 channels",
        ),
        ("class_embed_type", "timestep", "class_embed_type"),
        ("down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"], "down_block_types"),
        ("up_block_types", ["UpBlock2D", "SkipUpBlock2D"], "up_block_types"),
        ("block_out_channels", [32, 48], "multiples of the first"),
        ("out_channels", 5, "as many as in_channels"),
        ("act_fn", "gelu", "act_fn = 'gelu'"),
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
        ({"prediction_type": "v_prediction"}, "teacher.prediction: 'epsilon' .* set teacher.prediction=v"),
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type = 'flow_prediction', which a teacher here cannot have",
        ),
        ({"beta_end": 0.01}, "teacher.betas: 'linear' .* set teacher.betas={'kind': 'linear', 'start': 0.0001, 'end'"),
        ({"beta_schedule": "sigmoid"}, "teacher.betas: 'linear' .* set teacher.betas={'kind': 'sigmoid'"),
        ({"beta_schedule": "laplace"}, "beta_schedule = 'laplace', which a teacher here cannot have"),
    ):
        (tmp_path / "unet" / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **changes}))
        with pytest.raises(ValueError, match=message):
            load_teacher(run_config(tmp_path, network, tmp_path / "unet"), "cpu")


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


CONFIG = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "layers_per_block",
            "2",
            "layers_per_block = '2', which our DDPM UNet cannot be; it needs a whole number from 1",
        ),
        ("layers_per_block", -1, "layers_per_block = -1"),
        ("layers_per_block", 10**9, "layers_per_block = 1000000000"),
        ("layers_per_block", True, "layers_per_block = True"),
        ("layers_per_block", [1, 2], r"layers_per_block = \[1, 2\]"),
        ("in_channels", 1.5, "in_channels = 1.5"),
        ("norm_num_groups", 0, "norm_num_groups = 0"),
        (
            "norm_num_groups",
            7,
            r"network cannot be built \(network.channels: 32 is not a multiple of norm_groups = 7\)",
        ),
        ("norm_eps", "1e-6", "norm_eps = '1e-6', .* a number between 0 and 1"),
        ("norm_eps", float("nan"), "norm_eps = nan"),
        ("block_out_channels", [32, 10**9], r"block_out_channels = \[32, 1000000000\]"),
        ("block_out_channels", [32, True], "block_out_channels"),
        ("block_out_channels", [], "block_out_channels = .* up to 16 widths"),
        ("down_block_types", [["DownBlock2D"], {}], "down_block_types"),
        ("sample_size", [], r"sample_size = \[\]"),
        ("sample_size", "8", "sample_size = '8'"),
        ("sample_size", 7, r"network cannot be built \(network.image_size: 7"),
        ("act_fn", list(range(5000)), r"act_fn = \[0, 1, .* \.\.\., which our DDPM UNet cannot be"),
        ("_class_name", ["UNet2DModel"] * 1000, r"is of a \['UNet2DModel', .* \.\.\., only UNet2DModel can be read"),
    ],
)
def test_a_value_that_no_unet_has_is_refused_before_a_network_is_built(tmp_path, key, value, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    save_file({"conv_in.weight": torch.ones(32, 3, 3, 3)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        convert_checkpoint(folder, tmp_path / "new" / "ours")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "scheduler, message",
    [
        *(
            ({"_class_name": name}, f"is of the scheduler {name}, whose noise is not given by betas in discrete steps")
            for name in (
                "FlowMatchEulerDiscreteScheduler",
                "FlowMatchHeunDiscreteScheduler",
                "EDMEulerScheduler",
                "EDMDPMSolverMultistepScheduler",
                "ScoreSdeVeScheduler",
                "ScoreSdeVpScheduler",
                "CMStochasticIterativeScheduler",
                "IPNDMScheduler",
                "KarrasVeScheduler",
                "DDPMWuerstchenScheduler",
                "VQDiffusionScheduler",
            )
        ),
        ({"_class_name": ["DDPMScheduler"]}, r"is of the scheduler \['DDPMScheduler'\]"),
        ({"_class_name": None, "num_train_timesteps": 10}, "is of the scheduler None"),
        (
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr = True, which a teacher here cannot have; it needs False",
        ),
        ({"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        ({"trained_betas": [0.1] * 999}, "trained_betas has 999 of them; num_train_timesteps is 1000"),
        (
            {"trained_betas": [0.1, 1.5] * 500},
            r"trained_betas = \[0.1, 1.5, .* \.\.\.; expected numbers between 0 and 1",
        ),
        ({"trained_betas": "0.1"}, r"trained_betas = \[\]; expected numbers"),
        ({"beta_start": 0.0}, r"beta_start, beta_end = \[0.0, 0.02\]; expected numbers between 0 and 1"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps = '1000'; expected a whole number from 2"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps = 1000000000"),
        ({"num_train_timesteps": 1}, "num_train_timesteps = 1;"),
        ({"beta_start": [1e-4]}, "beta_start"),
    ],
)
def test_a_scheduler_without_discrete_betas_is_refused_by_its_class(tmp_path, scheduler, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"conv_in.weight": torch.ones(32, 3, 3, 3)}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", **scheduler}))
    with pytest.raises(ValueError, match=message) as error:
        convert_checkpoint(folder, tmp_path / "new" / "ours")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["{", "[" * 5000, "[1]", "3", '{"a": NaN', b"\xff\xfe", " " * 2**25], ids=range(7))
def test_json_of_another_shape_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"config.json: ") as error:
        read_checkpoint(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_start": 0.0005},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001 + 0.0001 * step for step in range(100)], "num_train_timesteps": 100},
    ],
    ids=str,
)
def test_the_noise_is_diffusers_own(tmp_path, settings):
    """Read, converted and given to a run, the levels are those of diffusers' scheduler."""
    import diffusers  # here: it takes seconds

    scheduler = diffusers.DDPMScheduler(**settings, prediction_type="v_prediction")
    _unet2d().save_pretrained(tmp_path / "model")
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    convert_checkpoint(tmp_path / "model", tmp_path / "ours")
    run = tmp_path / "ours" / "network.yaml"
    run.write_text(run.read_text() + "nfe: 3\neval: {num_samples: 0}\n")
    config = load_config(run)
    assert config.teacher.prediction == "v"
    levels = signal_levels(config.teacher.betas, config.teacher.steps)
    torch.testing.assert_close(torch.from_numpy(levels).float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert load_teacher(config, "cpu").coefficients is not None


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_a_teacher_of_another_prediction_gives_diffusers_noise(tmp_path, prediction):
    """DDIM's step to timestep 0's level, whose noise diffusers computes by itself, is the same from ours."""
    import diffusers  # here: it takes seconds

    model = _unet2d(norm_eps=1e-5)
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    model.save_pretrained(tmp_path / "model")
    scheduler.save_pretrained(tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "ours")
    run = tmp_path / "ours" / "network.yaml"
    run.write_text(run.read_text() + "nfe: 3\n")
    teacher = load_teacher(load_config(run), "cpu")
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 8, 8)
    for t in (900, 500, 100):
        with torch.no_grad():
            output, noise = model(x, t).sample, teacher(x, torch.tensor([t, t]))
        step = scheduler.step(output, t, x)
        now, then = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 100]
        x_0 = (x - (1 - now).sqrt() * noise) / now.sqrt()
        torch.testing.assert_close(
            then.sqrt() * x_0 + (1 - then).sqrt() * noise, step.prev_sample, rtol=1e-3, atol=1e-3
        )


def test_schedulers_that_are_taken_say_their_betas():
    import diffusers  # here: it is an optional package

    for name in _DISCRETE:
        if hasattr(diffusers, name):
            parameters = inspect.signature(getattr(diffusers, name)).parameters
            needs_more_packages = set(parameters) == {"args", "kwargs"}
            assert needs_more_packages or {"beta_start", "beta_schedule", "num_train_timesteps"} <= set(parameters), (
                name
            )


def _saved(folder, model, *renamed):
    """Save a model, and rename its file of weights."""
    model.save_pretrained(folder)
    for name in renamed:
        (folder / "diffusion_pytorch_model.safetensors").rename(folder / name)


def _weights(source):
    return read_checkpoint(source).weights()["in_conv.weight"]


@pytest.mark.parametrize(
    "names, taken, note",
    [
        (["diffusion_pytorch_model.fp16.safetensors"], 0, "Its weights are the variant fp16: diff"),
        (
            ["diffusion_pytorch_model.non_ema.safetensors"],
            0,
            "variant non_ema, the weights that are not averaged: diff",
        ),
        (
            ["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            1,
            "variant fp16",
        ),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"], 1, None),
    ],
)
def test_a_variant_of_the_weights_is_read_and_noted(tmp_path, names, taken, note):
    weights = []
    for number, name in enumerate(names):
        model = _unet2d(norm_eps=1e-5)
        model.conv_in.weight.data.fill_(number)
        _saved(tmp_path / "saved", model, name)
        weights.append(model.conv_in.weight.detach())
    assert torch.equal(_weights(tmp_path / "saved"), weights[taken])
    text = convert_checkpoint(tmp_path / "saved", tmp_path / "ours")[-1].read_text()
    assert (note or "") in text and ("Its weights are" in text) == (note is not None)


def test_the_averaged_weights_of_a_training_go_before_the_raw_ones(tmp_path):
    for number, name in enumerate(("unet", "unet_ema")):
        model = _unet2d()
        model.conv_in.weight.data.fill_(number)
        model.save_pretrained(tmp_path / "checkpoint-500" / name)
    assert (_weights(tmp_path / "checkpoint-500") == 1).all() and (
        _weights(tmp_path / "checkpoint-500" / "unet") == 0
    ).all()
    text = convert_checkpoint(tmp_path / "checkpoint-500", tmp_path / "ours")[-1].read_text()
    assert "# Its unet_ema/ was taken, the averaged weights; give unet/ for the raw ones." in text


def test_shards_are_read_by_their_index(tmp_path):
    model, folder = _unet2d(), tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="100KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    assert index.is_file() and len(shards) > 2
    assert torch.equal(_weights(folder), model.conv_in.weight)
    whole = json.loads(index.read_text())
    first = next(iter(whole["weight_map"]))
    for weight_map, message in (
        (
            {**whole["weight_map"], first: "../other.safetensors"},
            f"{first} is in '../other.safetensors'; expected a file",
        ),
        ({**whole["weight_map"], first: 3}, f"{first} is in 3; expected a file beside it"),
        ({**whole["weight_map"], "more": whole["weight_map"][first]}, "lacks more, which .* says it has"),
        ({first: "diffusion_pytorch_model-9.safetensors"}, "model-9.safetensors': no such file"),
        ([1], "has no weight_map"),
    ):
        index.write_text(json.dumps({**whole, "weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            read_checkpoint(folder)


def test_weights_of_another_kind_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "diffusion_flax_model.msgpack").touch()
    with pytest.raises(
        ValueError, match="has a config.json and no weights; expected .*, it holds diffusion_flax_model"
    ):
        read_checkpoint(tmp_path)

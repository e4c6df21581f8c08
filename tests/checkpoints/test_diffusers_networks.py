"""What UNet2DModel can be: each network predicts what diffusers' own does, from its folder and converted."""

import json

import pytest
import torch
from small_checkpoints import run_config

from hsivi_fast.build import load_teacher
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.formats import read_checkpoint
from hsivi_fast.checkpoints.sizes import describe_network
from hsivi_fast.nets import build_unet

DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
# UNet2DModel's defaults but for the sizes: eight channels a head, freq_shift 0, cosines first, padding 1.
DEFAULTS = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "down_block_types": DOWN,
    "up_block_types": UP,
}
OURS = {"head_channels": 8, "freq_shift": 0, "cos_first": True, "down_padding": 1}  # what we call that
# Of google/ddpm-cifar10-32, with narrower levels.
CIFAR10 = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
# Of examples/unconditional_image_generation/train_unconditional.py, with narrower levels.
TRAIN_UNCONDITIONAL = {
    "sample_size": 32,
    "layers_per_block": 2,
    "block_out_channels": (16, 16, 32, 32, 64, 64),
    "norm_num_groups": 8,
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
# What it is -> the arguments of UNet2DModel, and what our description has besides the sizes.
NETWORKS = {
    "defaults": (DEFAULTS, OURS),
    "default blocks": (
        {"sample_size": 16, "block_out_channels": (32, 64, 96, 128), "norm_num_groups": 8},
        {**OURS, "multipliers": [1, 2, 3, 4], "attention": [False, True, True, True]},
    ),
    "train_unconditional": (
        TRAIN_UNCONDITIONAL,
        {**OURS, "multipliers": [1, 1, 2, 2, 4, 4], "attention": [False, False, False, False, True, False]},
    ),
    "cifar10": (CIFAR10, {}),
    "heads": ({**CIFAR10, "attention_head_dim": 4}, {"head_channels": 4}),
    "one head": ({**DEFAULTS, "attention_head_dim": 64}, {**OURS, "head_channels": None}),
    "classes": ({**DEFAULTS, "num_class_embeds": 10}, {**OURS, "classes": 10}),
    "scale and shift": (
        {**DEFAULTS, "resnet_time_scale_shift": "scale_shift"},
        {**OURS, "scale_shift": True, "middle_norm_groups": 0},
    ),
    "scale and shift, middle normalised": (
        {**DEFAULTS, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
        {**OURS, "scale_shift": True, "middle_norm_groups": 4},
    ),
    "attention at other levels up": (
        {**DEFAULTS, "down_block_types": DOWN[::-1]},
        {**OURS, "attention": [True, False], "attention_up": [False, True]},
    ),
    "no attention in the middle": ({**DEFAULTS, "add_attention": False}, {**OURS, "middle_attention": False}),
    "no attention": (
        {**DEFAULTS, "add_attention": False, "down_block_types": DOWN[:1] * 2, "up_block_types": UP[1:] * 2},
        {**OURS, "middle_attention": False, "attention": [False, False], "head_channels": None},
    ),
    "no middle": ({**DEFAULTS, "mid_block_type": None}, {**OURS, "middle": False}),
    "a scaled middle": ({**DEFAULTS, "mid_block_scale_factor": 1.5}, {**OURS, "middle_scale": 1.5}),
    "input in 0 .. 1": ({**DEFAULTS, "center_input_sample": True}, {**OURS, "center_input": True}),
    "eps": ({**DEFAULTS, "norm_eps": 1e-3}, {**OURS, "norm_eps": 1e-3}),
    "freq_shift 1": ({**DEFAULTS, "freq_shift": 1}, {**OURS, "freq_shift": None}),
    "padding 0": ({**DEFAULTS, "downsample_padding": 0}, {**OURS, "down_padding": None}),
    "sines first": ({**DEFAULTS, "flip_sin_to_cos": False}, {**OURS, "cos_first": None}),
    "a narrow time embedding": ({**DEFAULTS, "time_embedding_dim": 48}, {**OURS, "time_channels": 48}),
    "learned variance": ({**DEFAULTS, "out_channels": 6}, {**OURS, "out_channels": 6}),
    "one channel": ({**DEFAULTS, "in_channels": 1, "out_channels": 1}, {**OURS, "image_channels": 1}),
}


def _model(arguments):
    from diffusers import UNet2DModel  # here: it is an optional package

    torch.manual_seed(3)
    model = UNet2DModel(**arguments).eval()
    for parameter in model.parameters():  # those that start at one or zero would hide a mistake
        parameter.data.normal_(0, 0.15)
    return model


def _built(checkpoint):
    network = build_unet(checkpoint.network)
    network.load_state_dict(checkpoint.weights())
    return network


def _farthest(value, expected):
    """The largest difference over the largest expected value."""
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_is_diffusers_own(tmp_path, kind):
    arguments, described = NETWORKS[kind]
    model = _model(arguments)
    model.save_pretrained(tmp_path / "model")
    found = read_checkpoint(tmp_path / "model")
    assert found.network == {
        "family": "ddpm",
        "image_channels": 3,
        "image_size": arguments["sample_size"],
        "channels": arguments["block_out_channels"][0],
        "multipliers": [width // arguments["block_out_channels"][0] for width in arguments["block_out_channels"]],
        "res_blocks": 2,
        "attention": [name.startswith("Attn") for name in arguments.get("down_block_types", ())],
        "middle": True,
        "norm_groups": 8,
        "norm_eps": arguments.get("norm_eps", 1e-5),
        **{key: value for key, value in described.items() if value is not None},
    }
    network = _built(found)
    x, t = torch.randn(4, *network.event_shape), torch.tensor([0, 1, 500, 999])
    labels = [torch.tensor([0, 3, 9, 9])] if "classes" in found.network else []
    with torch.no_grad():
        expected = model(x, t, *labels).sample[:, : x.shape[1]]
        assert _farthest(network(x, t, *labels), expected) < 1e-5
        if labels:
            assert _farthest(network(x, t), expected) > 1e-3
            model.class_embedding.weight.zero_()  # which is what no class is
            assert _farthest(network(x, t), model(x, t, *labels).sample) < 1e-5
    converted = convert_checkpoint(tmp_path / "model", tmp_path / "ours")[0]
    again = read_checkpoint(converted)
    assert again.network == found.network
    with torch.no_grad():
        assert torch.equal(_built(again)(x, t, *labels), network(x, t, *labels))
    # What tensors show of it is told without the configuration too.
    assert (
        describe_network(again.weights(), {})[0].items()
        >= {
            key: value
            for key, value in found.network.items()
            if key not in ("image_size", "norm_groups", "norm_eps", "head_channels", "middle_scale")
            and key not in ("freq_shift", "cos_first", "down_padding", "center_input")
            and (key, value) != ("middle_norm_groups", 4)
        }.items()
    )


@pytest.mark.parametrize("kind", ["defaults", "classes", "scale and shift"])
def test_gradients_are_those_of_diffusers(tmp_path, kind):
    model = _model(NETWORKS[kind][0])
    model.save_pretrained(tmp_path)
    found = read_checkpoint(tmp_path)
    network, t, weights = _built(found), torch.tensor([3, 900]), torch.randn(2, 3, 16, 16)
    labels = [torch.tensor([4, 7])] if "classes" in found.network else []
    x = torch.randn(2, 3, 16, 16)
    of_x = []
    for predict in (lambda x: network(x, t, *labels), lambda x: model(x, t, *labels).sample):
        leaf = x.clone().requires_grad_()
        (predict(leaf) * weights).sum().backward()
        of_x.append(leaf.grad)
    assert _farthest(*of_x) < 1e-5
    ours, theirs = network.in_conv.weight.grad, model.conv_in.weight.grad
    assert _farthest(ours, theirs) < 1e-5
    if labels:
        assert _farthest(network.class_embed.weight.grad, model.class_embedding.weight.grad) < 1e-5


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "100KB"}], ids=["fp16", "shards"])
def test_a_variant_or_shards_of_such_a_network_are_read(tmp_path, options):
    model = _model(NETWORKS["classes"][0])
    if "variant" in options:
        model = model.half()
    model.save_pretrained(tmp_path, **options)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.tensor([4, 7])
    with torch.no_grad():
        expected = model.float()(x, t, labels).sample
        assert _farthest(_built(read_checkpoint(tmp_path))(x, t, labels), expected) < 1e-5


@pytest.mark.parametrize(
    "key, theirs, message",
    [
        ("freq_shift", {"freq_shift": 1}, "network.freq_shift: 0 is not what .* set network.freq_shift=1$"),
        ("cos_first", {"flip_sin_to_cos": False}, "network.cos_first: True .* set network.cos_first=False$"),
        ("down_padding", {"downsample_padding": 0}, "network.down_padding: 1 .* set network.down_padding=0$"),
        ("head_channels", {"attention_head_dim": 64}, "network.head_channels: 8 .* set network.head_channels=null$"),
        ("head_channels", {"attention_head_dim": 4}, "network.head_channels: 8 .* set network.head_channels=4$"),
        ("center_input", {"center_input_sample": True}, "network.center_input: False .* set network.center_input=True"),
        ("middle_scale", {"mid_block_scale_factor": 2}, "network.middle_scale: 1.0 .* set network.middle_scale=2.0$"),
    ],
)
def test_what_weights_do_not_show_is_compared_with_the_run(tmp_path, key, theirs, message):
    _model(DEFAULTS).save_pretrained(tmp_path / "fitting")
    described = read_checkpoint(tmp_path / "fitting").network
    load_teacher(run_config(tmp_path, described, tmp_path / "fitting"), "cpu")
    _model({**DEFAULTS, **theirs}).save_pretrained(tmp_path / "other")
    for source in (tmp_path / "other", convert_checkpoint(tmp_path / "other", tmp_path / "ours")[0]):
        with pytest.raises(ValueError, match=message):
            load_teacher(run_config(tmp_path, described, source), "cpu")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_head_dim": 7}, "attention_head_dim = 7, .* needs null, or a divisor of 64 channels"),
        ({"attention_head_dim": "8"}, "attention_head_dim = '8'"),
        ({"attention_head_dim": 0}, "attention_head_dim = 0"),
        ({"attention_head_dim": [8, 8]}, r"attention_head_dim = \[8, 8\]"),
        ({"freq_shift": 2}, "freq_shift = 2, which our DDPM UNet cannot be; it needs 0 or 1"),
        ({"flip_sin_to_cos": "yes"}, "flip_sin_to_cos = 'yes'"),
        ({"downsample_padding": 2}, "downsample_padding = 2"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift = 'spatial', .* 'default' or 'scale_shift'"),
        ({"num_class_embeds": 0}, "num_class_embeds = 0, .* needs null, or a whole number from 1"),
        ({"num_class_embeds": True}, "num_class_embeds = True"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type = 'UNetMidBlock2DCrossAttn'"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor = 0, .* needs a number above 0"),
        ({"mid_block_scale_factor": float("nan")}, "mid_block_scale_factor = nan"),
        ({"attn_norm_num_groups": 0}, "attn_norm_num_groups = 0"),
        ({"attn_norm_num_groups": 7}, r"cannot be built \(network.middle_norm_groups: the 64 channels"),
        ({"time_embedding_dim": -4}, "time_embedding_dim = -4"),
        ({"out_channels": 4}, "out_channels = 4, .* needs 3, as many as in_channels, or twice as many"),
        ({"downsample_type": "resnet"}, "downsample_type = 'resnet'"),
        ({"add_attention": None}, "add_attention = None"),
    ],
)
def test_what_ours_cannot_be_is_named_by_its_first_reason(tmp_path, changes, message):
    folder = tmp_path / "model"
    _model(DEFAULTS).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message) as error:
        convert_checkpoint(folder, tmp_path / "new" / "ours")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and not (tmp_path / "new").exists()

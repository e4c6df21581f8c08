"""Teachers that were trained with 4000 rescaled steps: all networks of a run are shown the timesteps that they know."""

import pytest
import torch
from contexts import context_with_teacher
from small_checkpoints import ADM, random_weights, run_config

from hsivi_fast.build import build_score_net, build_student, build_untrained_student
from hsivi_fast.checkpoints import weights as weights_room
from hsivi_fast.checkpoints.checkpoint import Checkpoint
from hsivi_fast.checkpoints.convert import _network_yaml, convert_checkpoint
from hsivi_fast.checkpoints.published_format import publishable_network
from hsivi_fast.checkpoints.sizes import CIFAR10_50M, IMAGENET64_270M, LSUN_100M, describe_network, known_name
from hsivi_fast.config import load_config
from hsivi_fast.nets import NETWORKS, build_unet

CIFAR10 = {**NETWORKS["imagenet64"], "image_size": 32, "multipliers": (1, 2, 2, 2), "attention": (2, 4)}


def test_every_network_of_a_run_is_shown_the_scaled_timesteps(tmp_path):
    torch.save(random_weights(ADM), tmp_path / "a.pt")
    scale = ("teacher.betas=cosine", "teacher.steps=4000", "teacher.timestep_scale=0.25")
    scaled = context_with_teacher(run_config(tmp_path, ADM, tmp_path / "a.pt", *scale))
    plain = context_with_teacher(run_config(tmp_path, ADM, tmp_path / "a.pt"))
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 4, 2000, 3996])
    makers = (lambda context: context.teacher, build_student, build_score_net)
    with torch.no_grad():
        for make in makers:
            assert torch.equal(make(scaled)(x, t), make(plain)(x, t // 4))
        assert not torch.equal(scaled.teacher(x, t + 3), scaled.teacher(x, t))
        sampled = build_untrained_student(scaled)
        sampled.load_state_dict(build_student(scaled).state_dict())
        assert torch.equal(sampled(x, t), plain.teacher(x, t // 4))


def test_a_pipeline_of_diffusers_keeps_the_scale():
    pipeline = pytest.importorskip("hsivi_fast.export.pipeline")
    network = pipeline.HSIVINetwork(ADM, [1], timestep_scale=0.25)
    assert network.student.timestep_scale == 0.25 and network.config.timestep_scale == 0.25


def _known(network):
    """A checkpoint of a known network, without values."""
    with torch.device("meta"):
        tensors = dict(build_unet(network).named_parameters())
    description, assumed = describe_network(tensors, {})
    return Checkpoint("a.pt", "improved-diffusion's", {"teacher": tensors}, description, (), assumed)


@pytest.mark.parametrize("network", [NETWORKS["imagenet64"], CIFAR10], ids=["imagenet64", "cifar10"])
@pytest.mark.parametrize(
    "overrides, message",
    [
        (["betas=cosine"], None),
        (["betas=cosine_4000"], None),
        (["betas=cosine", "steps=4000", "timestep_scale=0.25"], None),
        (
            ["betas=cosine", "steps=4000"],
            r"teacher.timestep_scale: 1 with teacher.steps=4000 shows it timesteps up to 3999, and the teacher 'a.pt' "
            r"was trained with 4000 steps of the cosine schedule, and shown t / 4; set teacher.timestep_scale=0.25",
        ),
        (["betas=cosine", "timestep_scale=0.25"], "up to 249.75, .*; set teacher.timestep_scale=1$"),
        (["betas=linear"], "teacher.betas: 'linear' is not what the teacher 'a.pt' .* set teacher.betas=cosine_4000"),
    ],
)
def test_a_known_teacher_is_shown_what_it_was_trained_on(network, overrides, message):
    config = load_config("imagenet64", [f"teacher.{override}" for override in overrides])
    checkpoint = _known(network)
    if message is None:
        weights_room._check_rescaled_timesteps(checkpoint, config.teacher)
        return
    with pytest.raises(ValueError, match=message):
        weights_room._check_rescaled_timesteps(checkpoint, config.teacher)


def test_the_shipped_config_is_accepted_with_its_known_teacher():
    weights_room._check_rescaled_timesteps(_known(NETWORKS["imagenet64"]), load_config("imagenet64").teacher)


def test_the_converted_cifar10_of_improved_diffusion_says_its_noise(tmp_path):
    assert known_name(CIFAR10) == CIFAR10_50M
    network = build_unet(CIFAR10).half()
    torch.save(dict(network.named_parameters()), tmp_path / "cifar10_uncond_50M_500K.pt")
    text = convert_checkpoint(tmp_path / "cifar10_uncond_50M_500K.pt", tmp_path / "ours")[1].read_text()
    assert f"# Its sizes are those of the network {CIFAR10_50M}." in text
    assert "trained such networks with 4000 steps of the cosine schedule and rescaled timesteps" in text
    assert "0.75 of a step too noisy for such a teacher, sigma at tau_0 is 2.05 times too large" in text
    config = load_config(tmp_path / "ours" / "network.yaml", ["nfe=10"])
    assert (config.teacher.betas, config.teacher.steps, config.network.image_size) == ("cosine_4000", 1000, 32)


LSUN = {
    **NETWORKS["imagenet64"],
    "image_size": 256,
    "multipliers": (1, 1, 2, 2, 4, 4),
    "res_blocks": 2,
    "attention": (16,),
    "heads": 1,
    "scale_shift": False,
}


@pytest.mark.parametrize(
    "network, name, millions, noise",
    [
        ({**NETWORKS["imagenet64"], "channels": 192, "classes": 1000}, IMAGENET64_270M, 273, ("cosine", 4000)),
        (LSUN, LSUN_100M, 114, ("linear", 1000)),
    ],
    ids=["imagenet64_cond", "lsun"],
)
def test_networks_whose_timesteps_were_not_rescaled_are_known_by_their_sizes(tmp_path, network, name, millions, noise):
    checkpoint = _known(network)
    assert checkpoint.network == {**network, "norm_groups": 32, "norm_eps": 1e-5, **_lists(network)}
    assert round(sum(tensor.numel() for tensor in checkpoint.tensors["teacher"].values()) / 1e6) == millions
    text = _network_yaml(checkpoint)
    assert f"# Its sizes are those of the network {name}." in text and "rescaled" not in text
    assert f"what stands here is usual for {name}; check it." in text
    (tmp_path / "network.yaml").write_text(text)
    (tmp_path / "teacher.safetensors").touch()
    config = load_config(tmp_path / "network.yaml", ["nfe=10"])
    assert (config.teacher.betas, config.teacher.steps, config.network.heads) == (*noise, network["heads"])
    weights_room._check_rescaled_timesteps(checkpoint, config.teacher)


def _lists(network):
    return {key: list(value) for key, value in network.items() if isinstance(value, tuple)}


@pytest.mark.parametrize("override", ["teacher.timestep_scale=0.25", "teacher.betas=cosine_4000"])
def test_noise_that_the_published_code_has_not_cannot_be_published(override):
    with pytest.raises(ValueError, match=f"{override.partition('=')[0]}: .* cannot be published"):
        publishable_network(load_config("imagenet64", [override]))

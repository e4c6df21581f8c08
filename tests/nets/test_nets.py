"""The networks against the published implementation's numbers, name by name, and what `build_unet` refuses."""

import numpy as np
import pytest
import torch
from devices import KERNEL_DEVICE
from golden_values import fill_by_name, load_golden, relative_error
from safetensors.torch import save_file

from hsivi_fast import ops
from hsivi_fast.checkpoints.weights import load_weights, read_weights
from hsivi_fast.nets import NETWORKS, build_unet

GOLDEN = {
    "unet_ddpm_tiny": {"name": "cifar10", "image_size": 16, "channels": 32},
    "unet_ddpm_five_level_tiny": {"name": "celeba64", "image_size": 32, "channels": 32},
    "unet_adm_tiny": {"name": "imagenet64", "image_size": 32, "channels": 32, "res_blocks": 1},
    "unet_cifar10_full": "cifar10",
}
TINY = {
    "family": "ddpm",
    "image_channels": 1,
    "image_size": 8,
    "channels": 8,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [False, True],
    "norm_groups": 4,
}


# In the interpreter the full network would take minutes; the tiny ones stand for it there.
CASES = [(name, "torch") for name in GOLDEN] + [(name, "triton") for name in GOLDEN if name != "unet_cifar10_full"]
CASES.append(pytest.param("unet_cifar10_full", "triton", marks=pytest.mark.gpu))


@pytest.mark.parametrize("name, backend", CASES)
def test_unet_is_the_published_one(name, backend, monkeypatch):
    """With the kernels too: they change neither the numbers nor the layout of the checkpoint."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default on a GPU rounds to 10 bits
    device = KERNEL_DEVICE if backend == "triton" else "cpu"
    ops.choose_backend(backend, device)
    golden = load_golden(name)
    network = build_unet(GOLDEN[name])
    assert [key for key, _ in network.named_parameters()] == list(golden["names"])
    assert [",".join(map(str, parameter.shape)) for parameter in network.parameters()] == list(golden["shapes"])
    fill_by_name(network).to(device)
    x = torch.from_numpy(golden["x"]).to(device).requires_grad_()
    y = network(x, torch.from_numpy(golden["t"]).to(device))
    (y * torch.from_numpy(golden["w"]).to(device)).sum().backward()
    assert relative_error(y, golden["y"]) < 1e-4
    assert relative_error(x.grad, golden["grad_x"]) < 1e-4
    norms = np.array([float(parameter.grad.norm()) for parameter in network.parameters()])
    expected = golden["grad_norms"]
    # cuDNN's gradients of weights are 0.3 % off here, with torch's own operators around them too.
    allowed = 1e-3 if device == "cpu" else 5e-3
    assert (np.abs(norms - expected) <= allowed * (expected + 1e-3 * expected.max())).all()


@pytest.mark.parametrize(
    "name, millions", [("cifar10", 35.7), ("celeba64", 78.7), ("imagenet64", 121.1), ("digits", 1.1)]
)
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build_unet(name).parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "imagenet64"])
def test_a_network_maps_its_event_to_its_event(name):
    network = build_unet(name if name in ("digits", "smoke", "toy2d") else {"name": name, "channels": 32})
    x = torch.randn(2, *network.event_shape)
    assert network(x, torch.tensor([3, 900])).shape == x.shape


def test_the_mlp_starts_at_zero_and_depends_on_time_once_trained():
    network = build_unet("toy2d")
    x = torch.randn(3, 2)
    assert torch.equal(network(x, torch.tensor([1, 2, 3])), torch.zeros(3, 2))
    torch.nn.init.normal_(network.layers[-1].weight)
    assert not torch.allclose(network(x, torch.tensor([1, 1, 1])), network(x, torch.tensor([900, 900, 900])))


@pytest.mark.parametrize(
    "network, message",
    [
        ("cifar11", "network: 'cifar11' is unknown"),
        ({"family": "vit"}, "network.family: 'vit'"),
        ({"name": "cifar10", "heads": 4}, "network.heads: the family ddpm has no such setting"),
        ({"family": "ddpm", "channels": 32}, "needs image_channels"),
        ({"name": "cifar10", "channels": 48}, "network.channels: 48"),
        ({"name": "cifar10", "image_size": 20}, "network.image_size: 20"),
        ({"name": "cifar10", "attention": [True]}, "network.attention: 1 entries for 4 levels"),
        (7, "expected a name or a mapping"),
    ],
)
def test_what_cannot_be_built_is_named(network, message):
    with pytest.raises(ValueError, match=message):
        build_unet(network)


def test_weights_go_through_a_file(tmp_path):
    saved, loaded = build_unet(TINY), build_unet(TINY)
    save_file(dict(saved.state_dict()), tmp_path / "a.safetensors")
    load_weights(loaded, read_weights(tmp_path / "a.safetensors"), "a")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters()))


def test_weights_of_another_network_are_named(tmp_path):
    save_file(dict(build_unet({**TINY, "attention": [False, False]}).state_dict()), tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError,
        match=r"of another network, it lacks downsamples.level_1.0.0.norm1.weight, .* and 51 more; "
        r"it has unknown downsamples.level_1.0.conv1.bias, .* and 33 more$",
    ):
        load_weights(build_unet(TINY), read_weights(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"another shape for embed.0.weight \(\[32, 8\], expected \[64, 16\]\)"):
        load_weights(build_unet({**TINY, "channels": 16}), build_unet(TINY).state_dict(), "b")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_weights(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path / "c.safetensors")

"""The UNets of EDM against the numbers that the published code printed, and what they refuse."""

import math
import zlib

import numpy as np
import pytest
import torch
from devices import KERNEL_DEVICE
from golden_values import fill_by_name, load_golden, relative_error

from hsivi_fast import ops
from hsivi_fast.execution import Execution
from hsivi_fast.nets import build_unet
from hsivi_fast.nets.edm_unet import EDM_NETWORKS, denoise, preconditioning

SONG = {
    "family": "song",
    "image_channels": 3,
    "image_size": 16,
    "channels": 16,
    "multipliers": (1, 2),
    "res_blocks": 1,
    "attention": (8,),
}
ADM = {**SONG, "family": "dhariwal", "channels": 32}
GOLDEN = {
    "edm_song_uncond": {**SONG, "augment_dim": 9},
    "edm_song_cond": {**SONG, "multipliers": (2, 2, 2), "res_blocks": 2, "label_dim": 10},
    "edm_song_ncsnpp": {
        **SONG,
        "multipliers": (1, 2, 2),
        "embedding": "fourier",
        "encoder": "residual",
        "noise_multiplier": 2,
        "resample_filter": (1, 3, 3, 1),
    },
    "edm_adm_cond": {**ADM, "multipliers": (1, 2, 4), "attention": (8, 4), "label_dim": 10},
}
# The published networks' number of parameters, and a sum over the names and shapes of their state dicts in order.
LAYOUTS = {
    "cifar10_ddpmpp": (55733891, 3255602773),
    "cifar10_ncsnpp": (56397827, 580643298),
    "ffhq64_ddpmpp": (61805571, 3420102649),
    "ffhq64_ncsnpp": (62761091, 3246550210),
    "imagenet64_adm": (295899267, 1838518769),
}


def _published(name, device="cpu"):
    """(network with the golden file's weights, {key: tensor} of the file)."""
    golden = {key: torch.from_numpy(value) for key, value in load_golden(name).items() if value.dtype.kind == "f"}
    network = fill_by_name(build_unet(GOLDEN[name]))
    if "freqs" in golden:
        network.map_noise.freqs.copy_(golden["freqs"])
    return network.to(device), {key: value.to(device) for key, value in golden.items()}


def _call(network, golden):
    """(denoised, the gradient of sum(w denoised) with respect to x)."""
    x = golden["x"].clone().requires_grad_()
    denoised = denoise(network, x, golden["sigma"], golden.get("class_labels"))
    (grad,) = torch.autograd.grad((denoised * golden["w"]).sum(), x)
    return denoised, grad


@pytest.mark.parametrize("name", GOLDEN)
def test_it_is_the_published_network(name):
    network, golden = _published(name)
    layout = load_golden(name)
    assert list(network.state_dict()) == list(layout["names"])
    assert [",".join(map(str, value.shape)) for value in network.state_dict().values()] == list(layout["shapes"])
    x = golden["x"].requires_grad_()
    denoised = denoise(network, x, golden["sigma"], golden.get("class_labels"))
    (denoised * golden["w"]).sum().backward()
    _check(denoised, x.grad, layout)
    grads = {key: parameter.grad for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert list(grads) == list(layout["grad_names"])
    norms, expected = np.array([float(grad.norm()) for grad in grads.values()]), layout["grad_norms"]
    assert (np.abs(norms - expected) <= 1e-3 * (expected + 1e-3 * expected.max())).all()


@pytest.mark.parametrize("name", GOLDEN)
def test_it_is_the_published_network_with_the_kernels(name):
    """At one noise level alone, where image and noise are as large: an interpreted kernel takes its time."""
    ops.choose_backend("triton", KERNEL_DEVICE)
    network, golden = _published(name, KERNEL_DEVICE)
    layout = load_golden(name)
    denoised, grad = _call(network, {key: value[1:2] for key, value in golden.items() if key != "freqs"})
    _check(denoised, grad, {key: layout[key][1:2] for key in ("denoised", "grad_x")})


def _check(denoised, grad, expected):
    """At each noise level by itself: the network hardly counts at the lowest one.

    The published gradients are float32 themselves, up to 3e-5 from what float64 gives.
    """
    for index in range(len(denoised)):
        assert relative_error(denoised[index], expected["denoised"][index]) < 1e-5
        assert relative_error(grad[index], expected["grad_x"][index]) < 1e-4


@pytest.mark.parametrize("name", GOLDEN)
def test_channels_last_changes_no_number(name):
    network, golden = _published(name)
    denoised, grad = _call(network.in_channels_last(), golden)
    assert denoised.is_contiguous()
    _check(denoised, grad, load_golden(name))


@pytest.mark.parametrize("name", GOLDEN)
def test_it_is_one_graph(name):
    """Traced whole, as `Execution` compiles it, but run without the compiler, which would take minutes."""
    network, golden = _published(name)
    denoised, grad = _call(torch.compile(network, backend="eager", dynamic=False, fullgraph=True), golden)
    _check(denoised, grad, load_golden(name))


def test_compiled_it_is_the_eager_one():
    """A network of few blocks that has every kind of layer, in the layout that compiled networks have."""
    network = build_unet(
        {**GOLDEN["edm_song_ncsnpp"], "multipliers": (1, 1), "res_blocks": 0, "attention": (), "label_dim": 10}
    )
    network = fill_by_name(network).requires_grad_(False).in_channels_last()
    golden = {**_published("edm_song_ncsnpp")[1], "class_labels": torch.eye(10)[:4]}
    expected = [value.detach().numpy() for value in _call(network, golden)]
    denoised, grad = _call(Execution("cpu", compile=True).compiled(network), golden)
    assert relative_error(denoised, expected[0]) < 1e-5
    assert relative_error(grad, expected[1]) < 1e-5


@pytest.mark.parametrize("name", GOLDEN)
def test_in_bfloat16_it_is_near(name):
    network, golden = _published(name)
    network.precision = "bf16"
    denoised, _ = _call(network, golden)
    assert denoised.dtype == torch.float32
    assert relative_error(denoised, load_golden(name)["denoised"]) < 0.05


@pytest.mark.parametrize("name", ["edm_song_cond", "edm_adm_cond"])
def test_class_labels_count(name):
    network, golden = _published(name)
    x, sigma, labels = golden["x"], golden["sigma"], golden["class_labels"]
    denoised = denoise(network, x, sigma, labels)
    others = denoise(network, x, sigma, labels.roll(1, dims=1))
    assert all(relative_error(a, b.detach().numpy()) > 3e-4 for a, b in zip(denoised, others))
    assert torch.equal(denoise(network, x, sigma), denoise(network, x, sigma, torch.zeros(4, 10)))
    assert torch.equal(denoised, denoise(network, x, sigma, labels.long()))
    for wrong in (torch.zeros(4, 9), torch.zeros(3, 10), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"class_labels: of shape \[.*\], expected \[4, 10\], one-hot"):
            denoise(network, x, sigma, wrong)


def test_labels_for_a_network_without_classes_are_refused():
    network, golden = _published("edm_song_uncond")
    with pytest.raises(ValueError, match="class_labels: the network has no classes"):
        denoise(network, golden["x"], golden["sigma"], torch.zeros(4, 10))


def test_augmentation_is_loaded_and_counts_nothing():
    network, golden = _published("edm_song_uncond")
    expected, _ = _call(network, golden)
    assert not network.map_augment.weight.requires_grad
    network.map_augment.weight.zero_()
    assert torch.equal(_call(network, golden)[0], expected)


def test_another_filter_is_refused():
    """A filter of two equal taps is computed without its buffer, so a file with another one must not be loaded."""
    network = build_unet(GOLDEN["edm_song_uncond"])
    weights = network.state_dict()
    weights["enc.8x8_down.skip.resample_filter"] = torch.tensor([[[[0.5, 0.0], [0.0, 0.5]]]])
    with pytest.raises(RuntimeError, match="enc.8x8_down.skip.resample_filter is another filter than the network's"):
        network.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="size mismatch for enc.8x8_down.skip.resample_filter"):
        network.load_state_dict({**weights, "enc.8x8_down.skip.resample_filter": torch.zeros(1, 1, 4, 4)})


@pytest.mark.parametrize("name", EDM_NETWORKS)
def test_full_networks_have_the_published_layout(name):
    with torch.device("meta"):
        network = build_unet(EDM_NETWORKS[name])
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in network.state_dict().items())
    assert (sum(parameter.numel() for parameter in network.parameters()), zlib.crc32(lines.encode())) == LAYOUTS[name]


def test_preconditioning_where_noise_and_image_are_as_large():
    c_skip, c_out, c_in, c_noise = preconditioning(torch.tensor([0.5, 1e-4]))
    assert c_noise.dtype == torch.float32
    expected = torch.tensor([0.5, math.sqrt(0.125), math.sqrt(2), math.log(0.5) / 4])
    torch.testing.assert_close(torch.stack([c_skip[0], c_out[0], c_in[0], c_noise[0]]), expected)
    torch.testing.assert_close(torch.stack([c_skip[1], c_out[1], c_in[1]]), torch.tensor([1, 1e-4, 2.0]))


@pytest.mark.parametrize(
    "network, message",
    [
        ({**SONG, "image_size": 15}, "network.image_size: 15 cannot be halved 1 times; use a multiple of 2"),
        ({**SONG, "attention": (4,)}, "network.attention: 4 is none of the resolutions 16, 8"),
        ({**SONG, "channels": 18}, "network.channels: a width of 18 cannot be cut into 4 groups"),
        ({**SONG, "channels": 132}, "network.channels: a width of 132 cannot be cut into 32 groups"),
        ({**SONG, "channels": 2}, "network.channels: a width of 2 cannot be cut"),
        ({**SONG, "label_dim": -1}, "network.label_dim: -1 is negative"),
        ({**ADM, "augment_dim": -9}, "network.augment_dim: -9 is negative"),
        ({**SONG, "embedding": "sine"}, "network.embedding: 'sine' is unknown; choose positional or fourier"),
        ({**SONG, "encoder": "skip"}, "network.encoder: 'skip' is unknown; choose standard or residual"),
        ({**SONG, "resample_filter": (1, 2, 1)}, r"network.resample_filter: \[1, 2, 1\] needs an even number of taps"),
        ({**ADM, "channels": 112}, "network.channels: a width of 224 cannot be cut into 3 heads"),
        ({**ADM, "encoder": "residual"}, "network.encoder: the family dhariwal has no such setting"),
        ({"family": "song", "channels": 16}, "the family song needs image_channels"),
    ],
)
def test_what_cannot_be_built_is_named(network, message):
    with pytest.raises(ValueError, match=message):
        build_unet(network)

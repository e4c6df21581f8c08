"""The UNets of EDM against the numbers that the published code printed, and what they refuse."""

import numpy as np
import pytest
import torch
from devices import KERNEL_DEVICE
from golden_values import fill_by_name, load_golden, relative_error

from hsivi_fast import ops
from hsivi_fast.execution import Execution
from hsivi_fast.method.parametrisation import noise_coefficients
from hsivi_fast.method.schedule import signal_levels
from hsivi_fast.nets import build_unet

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
NCSNPP = {"embedding": "fourier", "encoder": "residual", "noise_multiplier": 2, "resample_filter": (1, 3, 3, 1)}
NOT_OURS = ("resample_filter", "map_augment.weight")  # the settings say the filter; labels of augmentation
GOLDEN = {
    "edm_song_uncond": SONG,
    "edm_song_cond": {**SONG, "multipliers": (2, 2, 2), "res_blocks": 2, "classes": 10},
    "edm_song_ncsnpp": {**SONG, "multipliers": (1, 2, 2), **NCSNPP},
    "edm_adm_cond": {**ADM, "multipliers": (1, 2, 4), "attention": (8, 4), "classes": 10},
}
# The parameters of the published networks: of all, and of these the ones that count augmentation labels, which ours
# have not. EDM's random frequencies are a buffer there and a parameter here.
PARAMETERS = {
    "edm_cifar10": ({}, 55_733_891, 9 * 128),
    "edm_cifar10_cond": ({}, 55_733_891 + 11 * 128, 9 * 128),
    "edm_cifar10, ncsnpp": (NCSNPP, 56_397_827 + 128, 9 * 256),
    "edm_ffhq64": ({}, 61_805_571, 9 * 128),
    "edm_ffhq64, ncsnpp": (NCSNPP, 62_761_091 + 128, 9 * 256),
    "edm_imagenet64": ({}, 295_899_267, 0),
}


def denoise(network, x, sigma, class_labels=None):
    """EDM's denoiser D(x; sigma), by eq. 7 and table 1."""
    total = (sigma.square() + 0.25).sqrt()
    c_skip, c_out, c_in = (
        factor[:, None, None, None] for factor in (0.25 / total.square(), 0.5 * sigma / total, 1 / total)
    )
    labels = () if class_labels is None else (class_labels,)
    return c_skip * x + c_out * network(c_in * x, sigma.log() / 4, *labels)


def _published(name, device="cpu"):
    """(network with the golden file's weights, {key: tensor} of the file)."""
    golden = {key: torch.from_numpy(value) for key, value in load_golden(name).items() if value.dtype.kind == "f"}
    if "class_labels" in golden:
        golden["class_labels"] = golden["class_labels"].argmax(1)  # one-hot in the file
    network = fill_by_name(build_unet(GOLDEN[name]))
    if "freqs" in golden:
        with torch.no_grad():
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
    ours = {key: ",".join(map(str, value.shape)) for key, value in network.state_dict().items()}
    named = zip(layout["names"], layout["shapes"])
    assert ours == {key: shape for key, shape in named if not key.endswith(NOT_OURS)}
    x = golden["x"].requires_grad_()
    denoised = denoise(network, x, golden["sigma"], golden.get("class_labels"))
    (denoised * golden["w"]).sum().backward()
    _check(denoised, x.grad, layout)
    grads = {key: parameter.grad for key, parameter in network.named_parameters() if parameter.requires_grad}
    frequencies = grads.pop("map_noise.freqs", torch.zeros(1))
    assert not frequencies.any()
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


@pytest.mark.parametrize("name", ["edm_song_uncond", "edm_adm_cond"])
def test_it_is_one_graph(name):
    """Traced whole, as `Execution` compiles it, but run without the compiler, which would take minutes."""
    network, golden = _published(name)
    denoised, grad = _call(torch.compile(network, backend="eager", dynamic=False, fullgraph=True), golden)
    _check(denoised, grad, load_golden(name))


def _small(multipliers):
    """(network, its tensors) of few blocks, in the layout that compiled networks have."""
    settings = {
        **GOLDEN["edm_song_ncsnpp"],
        "multipliers": multipliers,
        "res_blocks": 0,
        "attention": (),
        "classes": 10,
    }
    network = fill_by_name(build_unet(settings)).requires_grad_(False).in_channels_last()
    return network, {**_published("edm_song_ncsnpp")[1], "class_labels": torch.arange(4)}


def test_compiled_it_is_the_eager_one():
    """In bfloat16, which no other test makes code of. One resolution has every kind of layer but those between two."""
    network, golden = _small((1,))
    arguments = [golden[key] for key in ("x", "sigma", "class_labels")]
    with torch.no_grad():
        expected = denoise(network, *arguments).numpy()
        network.precision = "bf16"
        denoised = denoise(Execution("cpu", compile=True).compiled(network), *arguments)
    assert 1e-4 < relative_error(denoised, expected) < 0.05


def test_traced_and_derived_it_is_the_eager_one():
    """What the compiler is given to make code of, for all kinds of layers and for the derivative, run without it."""
    network, golden = _small((1, 1))
    expected = [value.detach().numpy() for value in _call(network, golden)]
    denoised, grad = _call(torch.compile(network, backend="aot_eager", dynamic=False, fullgraph=True), golden)
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
    others = denoise(network, x, sigma, (labels + 1) % 10)
    assert all(relative_error(a, b.detach().numpy()) > 3e-4 for a, b in zip(denoised, others))
    assert torch.equal(denoise(network, x, sigma), denoise(network, x, sigma, torch.full((4,), -1)))


def test_labels_for_a_network_without_classes_are_refused():
    network, golden = _published("edm_song_uncond")
    with pytest.raises(ValueError, match="class_labels: the network has no classes"):
        denoise(network, golden["x"], golden["sigma"], torch.zeros(4))


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_networks_have_the_published_size(name):
    settings, published, for_augmentation = PARAMETERS[name]
    with torch.device("meta"):
        network = build_unet({"name": name.partition(",")[0], **settings})
    assert sum(parameter.numel() for parameter in network.parameters()) == published - for_augmentation


@pytest.mark.parametrize("name", GOLDEN)
def test_a_teacher_gives_the_noise_of_the_denoiser(name):
    """eps = (x_hat - D(x_hat; sigma)) / sigma, of states x_t = sqrt(alpha_bar) x_hat."""
    network, golden = _published(name)
    levels = signal_levels("edm", 50)
    t = torch.tensor([3, 17, 30, 49])
    alpha_bar = torch.from_numpy(levels)[t].reshape(-1, 1, 1, 1)
    sigma = (1 / alpha_bar - 1).sqrt()
    labels = [golden["class_labels"]] if "class_labels" in golden else []
    x = golden["x"] / golden["x"].std((1, 2, 3), keepdim=True)
    with torch.no_grad():
        denoised = denoise(network, (x / alpha_bar.sqrt()).float(), sigma.flatten().float(), *labels)
        eps_hat = network.convert_by(noise_coefficients("denoiser", levels))(x, t, *labels)
    expected = (x / alpha_bar.sqrt() - denoised) / sigma
    for index in range(4):
        assert relative_error(eps_hat[index], expected[index].numpy()) < 1e-4


@pytest.mark.parametrize(
    "network, message",
    [
        ({**SONG, "image_size": 15}, "network.image_size: 15 cannot be halved 1 times; use a multiple of 2"),
        ({**SONG, "attention": (4,)}, "network.attention: 4 is none of the resolutions 16, 8"),
        ({**SONG, "channels": 18}, "network.channels: a width of 18 cannot be cut into 4 groups"),
        ({**SONG, "channels": 132}, "network.channels: a width of 132 cannot be cut into 32 groups"),
        ({**SONG, "channels": 2}, "network.channels: a width of 2 cannot be cut"),
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

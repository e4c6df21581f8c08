"""Classes, heads and the ways of the time embedding: improved-diffusion's numbers, and what both UNets refuse."""

import numpy as np
import pytest
import torch
from golden_values import fill_by_name, load_golden, relative_error

from hsivi_fast.nets import NETWORKS, all_arguments, build_unet

ADM = {
    "family": "adm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 32,
    "multipliers": (1, 2),
    "res_blocks": 1,
    "attention": (2,),
    "out_channels": 6,
}
DDPM = {
    "family": "ddpm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 16,
    "multipliers": (1, 2),
    "res_blocks": 1,
    "attention": (False, True),
    "norm_groups": 8,
}
GOLDEN = {
    "unet_adm_classes_tiny": {**ADM, "classes": 5, "heads": 4, "up_heads": 2},
    "unet_adm_added_tiny": {**ADM, "heads": 1, "scale_shift": False},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_unet_is_improved_diffusion_s(name):
    golden = load_golden(name)
    network = build_unet(GOLDEN[name])
    assert [key for key, _ in network.named_parameters()] == list(golden["names"])
    assert [",".join(map(str, parameter.shape)) for parameter in network.parameters()] == list(golden["shapes"])
    fill_by_name(network)
    labels = [torch.from_numpy(golden["class_labels"])] if "class_labels" in golden else []
    x = torch.from_numpy(golden["x"]).requires_grad_()
    y = network(x, torch.from_numpy(golden["t"]), *labels)
    (y * torch.from_numpy(golden["w"])).sum().backward()
    assert relative_error(y, golden["y"]) < 1e-5
    assert relative_error(x.grad, golden["grad_x"]) < 1e-4
    norms = np.array([float(parameter.grad.norm()) for parameter in network.parameters()])
    expected = golden["grad_norms"]
    assert (np.abs(norms - expected) <= 1e-3 * (expected + 1e-3 * expected.max())).all()


@pytest.mark.parametrize("family", [ADM, DDPM], ids=["adm", "ddpm"])
def test_no_labels_are_no_class(family):
    network = fill_by_name(build_unet({**family, "classes": 5}))
    plain = build_unet(family)
    table = "label_emb.weight" if family is ADM else "class_embed.weight"
    plain.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name != table})
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    assert torch.equal(network(x, t), plain(x, t)) and torch.equal(network(x, t, None), plain(x, t, None))
    labels = torch.tensor([4, 1])
    both = network(x, t, labels)
    assert torch.allclose(both[:1], network(x[:1], t[:1], labels[:1]), atol=1e-5)  # each image has its own
    assert not torch.allclose(both, network(x, t, labels.flip(0)), atol=1e-3)
    assert torch.equal(network(x, t, labels.int()), both)
    for wrong in (torch.tensor([1]), torch.tensor([[1], [2]]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match=r"class_labels: torch\.\w+ of shape .*, expected whole numbers .* \[2\]$"):
            network(x, t, wrong)
    with pytest.raises(ValueError, match="class_labels: the network has no classes; leave them out"):
        plain(x, t, labels)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_labels_reach_a_network_in_every_layout(precision):
    networks = [fill_by_name(build_unet({**DDPM, "classes": 5, "head_channels": 8})) for _ in range(2)]
    networks[1].in_channels_last()
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([4, 1])
    outputs = []
    for network in networks:
        network.precision = precision
        outputs.append(network(x, t, labels))
    assert relative_error(outputs[0], outputs[1].detach().numpy()) < (1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize(
    "network, message",
    [
        ({**DDPM, "attention_up": (True,)}, "network.attention_up: 1 entries for 2 levels"),
        ({**DDPM, "head_channels": 12}, "network.head_channels: a level of 32 channels is no multiple of 12"),
        ({**DDPM, "middle_norm_groups": 5}, "network.middle_norm_groups: the 32 channels of the last level are no"),
        ({**DDPM, "out_channels": 2}, "network.out_channels: 2 is less than image_channels = 3"),
        ({**DDPM, "freq_shift": 2}, "network.freq_shift: 2 must be 0 or 1"),
        ({**DDPM, "down_padding": 2}, "network.down_padding: 2 must be 0 or 1"),
        ({**DDPM, "channels": 2, "norm_groups": 1}, "network.channels: 2 must be even, and more than 2"),
        ({**DDPM, "channels": 5, "norm_groups": 1}, "network.channels: 5 must be even"),
        ({**ADM, "up_heads": 5}, "network.channels: 32 is not a multiple of up_heads = 5"),
        ({**ADM, "freq_shift": 0}, "network.freq_shift: the family adm has no such setting"),
    ],
)
def test_what_cannot_be_built_is_named(network, message):
    with pytest.raises(ValueError, match=message):
        build_unet(network)


def test_all_arguments_have_the_defaults_of_the_family():
    found = all_arguments({"name": "cifar10", "norm_eps": 1e-6})
    assert found.items() >= {**NETWORKS["cifar10"], "norm_eps": 1e-6}.items()
    assert (found["norm_groups"], found["freq_shift"], found["head_channels"]) == (32, 1, None)
    assert "freq_shift" not in all_arguments("imagenet64")

"""EDM's networks from NVlabs' pickles and from plain state dicts, and a run with such a teacher from end to end."""

import nvlabs_pickles
import pytest
import torch
from edm_networks import FOURIER, SONG
from golden_values import fill_by_name
from safetensors.torch import save_file

from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.formats import read_checkpoint
from hsivi_fast.checkpoints.weights import load_weights
from hsivi_fast.nets import build_unet

NETWORKS = {
    "ddpmpp": SONG,
    "classes": {**SONG, "multipliers": [2, 1], "res_blocks": 2, "attention": [8, 4], "classes": 10},
    "ncsnpp": {**SONG, **FOURIER},
    "adm": {**SONG, "family": "dhariwal", "channels": 32, "multipliers": [2, 1], "attention": [8], "classes": 3},
}
DENOISER = {"teacher": {"prediction": "denoiser"}}


def _published(description):
    """(network, {name: tensor} as EDM's state dict has them: a prefix, filters, augmentation labels)."""
    network = fill_by_name(build_unet(description))
    tensors = {f"model.{name}": tensor.clone() for name, tensor in network.state_dict().items()}
    for name, buffer in network.named_buffers():
        if name.endswith("resample_filter"):
            tensors[f"model.{name}"] = buffer.clone()
    width = tensors["model.map_layer0.weight"].shape[1]
    return network, {**tensors, "model.map_augment.weight": torch.randn(width, 9)}


def _as_pickle(file, description, tensors, **arguments):
    model = "SongUNet" if description["family"] == "song" else "DhariwalUNet"
    file.write_bytes(nvlabs_pickles.pickled(nvlabs_pickles.snapshot_of(tensors, model, **arguments)))
    return file


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["pickle", "state dict", "safetensors", "without a prefix"])
def test_every_network_is_read_from_every_file(tmp_path, name, kind):
    expected, tensors = _published(NETWORKS[name])
    file = tmp_path / "network.bin"
    if kind == "pickle":
        _as_pickle(file, NETWORKS[name], tensors, sigma_data=0.5)
    elif kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(
            {key.removeprefix("model.") if "prefix" in kind else key: value for key, value in tensors.items()}, file
        )
    checkpoint = read_checkpoint(file)
    assert checkpoint.network == NETWORKS[name]
    assert checkpoint.settings == DENOISER
    network = build_unet(checkpoint.network)
    load_weights(network, checkpoint.weights(), file)
    assert network.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in network.state_dict().items())


def test_a_pickle_is_converted_and_stays_what_it_is(tmp_path):
    _, tensors = _published(NETWORKS["ncsnpp"])
    file = _as_pickle(tmp_path / "edm.pkl", NETWORKS["ncsnpp"], tensors)
    convert_checkpoint(file, tmp_path / "ours")
    text = (tmp_path / "ours" / "network.yaml").read_text()
    assert "prediction: denoiser" in text and "takes any noise: teacher.betas is a choice" in text
    assert "does not say" not in text
    again = read_checkpoint(tmp_path / "ours" / "teacher.safetensors")
    assert (again.network, again.settings) == (NETWORKS["ncsnpp"], DENOISER)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sigma_data": 1.0}, "has sigma_data = 1.0, which ours cannot be; it needs 0.5"),
        ({"made_with": {"encoder_type": "skip"}}, "has encoder_type = 'skip', .* it needs 'standard' or 'residual'"),
        ({"made_with": {"channel_mult_emb": 2}}, "has channel_mult_emb = 2, which ours cannot be; it needs 4"),
    ],
)
def test_a_pickle_of_another_network_is_refused(tmp_path, arguments, message):
    _, tensors = _published(SONG)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(_as_pickle(tmp_path / "edm.pkl", SONG, tensors, **arguments))


def test_other_preconditionings_are_named(tmp_path):
    class VPPrecond(nvlabs_pickles.EDMPrecond):
        pass

    VPPrecond.__qualname__ = "VPPrecond"
    _, tensors = _published(SONG)
    content = nvlabs_pickles.snapshot_of(tensors)
    content["ema"].__class__ = VPPrecond
    (tmp_path / "vp.pkl").write_bytes(nvlabs_pickles.pickled(content))
    with pytest.raises(ValueError, match="holds VPPrecond; readable is EDM's EDMPrecond alone"):
        read_checkpoint(tmp_path / "vp.pkl")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.enc.8x8_down.aux_skip.weight": torch.ones(1)}, "looks like one of EDM's .* skip connections"),
        ({"model.enc.8x8_conv.weight": None}, "looks like one of EDM's .*no first convolution"),
        ({"model.enc.3x3_block0.conv0.weight": torch.ones(1)}, "looks like one of EDM's .*a level without blocks"),
        ({"model.enc.4x4_down.skip.resample_filter": torch.ones(1, 1, 2, 2)}, "different filters"),
    ],
)
def test_what_is_nearly_one_of_edms_is_refused(tmp_path, change, message):
    _, tensors = _published(SONG)
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    torch.save(changed, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "odd.pt")

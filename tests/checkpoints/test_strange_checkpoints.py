"""Checkpoints that are valid files of something else: one line says what is wrong, and nothing is written.

The table of a kind is a dict: what it is -> how it is made, and what the line has to say.
"""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import ADM, DDPM, published_file, random_weights, run_config

from hsivi_fast.build import load_teacher
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.weights import load_weights, read_weights
from hsivi_fast.config import ASSETS, load_config
from hsivi_fast.nets import build_unet
from hsivi_fast.training.engine import PlainEngine, read_state
from hsivi_fast.training.trainer import train

OURS = random_weights(DDPM)
IMPROVED = random_weights(ADM)


def _without(weights, *starts):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(starts)}


def _reshaped(weights, shapes):
    return {**weights, **{name: torch.zeros(shape) for name, shape in shapes.items()}}


def _fewer_rows(weights):
    """A quarter of the rows in all embeddings of blocks: half are as without scale and shift."""
    return {name: tensor[: len(tensor) // 4] if ".emb_layers." in name else tensor for name, tensor in weights.items()}


def _refused(source, to):
    """The line with which a conversion is refused; nothing may be written."""
    with pytest.raises(ValueError) as error:
        convert_checkpoint(source, to)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600 and text.startswith("checkpoint '") and not to.parent.exists()
    return text


ANOTHER_NETWORK = {
    "classes of another width": (
        {**IMPROVED, "label_emb.weight": torch.zeros(10, 64)},
        "another shape for label_emb.weight ([10, 64], expected [10, 128])",
    ),
    "classes of a bias": ({**IMPROVED, "label_emb.bias": torch.zeros(10)}, "it has unknown label_emb.bias"),
    "super-resolution": (
        _reshaped(IMPROVED, {"input_blocks.0.0.weight": (32, 6, 3, 3)}),
        "input_blocks.0.0.weight takes 6 channels, as of a super-resolution network with a second image",
    ),
    "another number of outputs": (
        _reshaped(IMPROVED, {"out.2.weight": (5, 32, 3, 3), "out.2.bias": (5,)}),
        "out.2.weight has 5 output channels; ours needs 3, or 6",
    ),
    "neither scale and shift nor a shift": (
        _fewer_rows(IMPROVED),
        "input_blocks.1.0.emb_layers.1.weight has 16 rows; ours needs 32, or 64 for scale and shift",
    ),
    "pooling, improved-diffusion": (
        _without(IMPROVED, "input_blocks.2.0.op"),
        "input_blocks.2 has no weights, so it is average pooling; ours needs conv_resample",
    ),
    "another number of outputs, ddpm-torch": (
        _reshaped(OURS, {"out_conv.2.weight": (5, 32, 3, 3), "out_conv.2.bias": (5,)}),
        "out_conv.2.weight has 5 output channels; ours needs 3, or 6",
    ),
    "pooling, ddpm-torch": (
        _without(OURS, "downsamples.level_0.1."),
        "downsamples.level_0 ends without a convolution, so it is average pooling; ours needs resample_with_conv",
    ),
    "a missing key": (
        _without(OURS, "middle.1.norm.bias"),
        "compared with what its sizes say it lacks middle.1.norm.bias",
    ),
    "no embedding of a block": (
        _without(OURS, "upsamples.level_1.0.0.fc.weight"),
        "compared with what its sizes say it lacks upsamples.level_1.0.0.fc.weight",
    ),
    "no output": (
        _without(OURS, "out_conv.2.weight"),
        "compared with what its sizes say it lacks out_conv.2.weight",
    ),
    "a width of nothing": (_reshaped(OURS, {"embed.0.weight": ()}), "another shape for embed.0.weight ([], expected"),
    "no classes": (
        {**OURS, "class_embed.weight": torch.zeros(0, 128)},
        "its tensor class_embed.weight is empty, [0, 128]",
    ),
    "classes of nothing": (
        {**OURS, "class_embed.weight": torch.tensor(1.0)},
        "it has unknown class_embed.weight",
    ),
    "an extra key": ({**OURS, "middle.3.norm1.bias": torch.zeros(64)}, "it has unknown middle.3.norm1.bias"),
    "a name with ..": ({**OURS, "../../middle": torch.zeros(64)}, "it has unknown ../../middle"),
    "a block with ..": ({**IMPROVED, "input_blocks...0.weight": torch.zeros(2)}, "of none of our UNets (time_embed.0"),
    "a far block": ({**IMPROVED, "input_blocks.999999999.0.weight": torch.zeros(2)}, "input_blocks.4 has no weights"),
    "another shape": (
        _reshaped(OURS, {"middle.1.norm.bias": (3,)}),
        "another shape for middle.1.norm.bias ([3], expected",
    ),
    "no base channels": (_reshaped(OURS, {"in_conv.weight": (0, 3, 3, 3)}), "its tensors are of none of our UNets"),
}


@pytest.mark.parametrize("kind", ANOTHER_NETWORK)
def test_a_network_that_ours_cannot_be_is_not_converted(tmp_path, kind):
    weights, message = ANOTHER_NETWORK[kind]
    torch.save(weights, tmp_path / "a.pt")
    assert message in _refused(tmp_path / "a.pt", tmp_path / "new" / "ours")


def _sparse():
    return torch.eye(2).to_sparse()


STRANGE_TENSORS = {
    "sparse": (_sparse, "of the layout torch.sparse_coo"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
    "meta": (lambda: torch.ones(2, device="meta"), "without values, on the meta device"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "of the type torch.complex64"),
    "boolean": (lambda: torch.ones(2, dtype=torch.bool), "of the type torch.bool"),
    "integers": (lambda: torch.ones(2, dtype=torch.int64), "of the type torch.int64"),
    "eight bits": (lambda: torch.ones(2).to(torch.float8_e4m3fn), "of the type torch.float8_e4m3fn"),
    "empty": (lambda: torch.ones(0, 3), "empty, [0, 3]"),
    "not a number": (lambda: torch.tensor([1.0, float("nan")]), "not finite: it holds NaN or infinity"),
    "infinite": (lambda: torch.tensor([1.0, float("-inf")]), "not finite: it holds NaN or infinity"),
    "infinite in float32": (lambda: torch.tensor([1e300], dtype=torch.float64), "not finite"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of making them
@pytest.mark.parametrize("kind", STRANGE_TENSORS)
def test_a_tensor_that_cannot_be_weights_is_named_wherever_it_is_read(tmp_path, kind):
    make, found = STRANGE_TENSORS[kind]
    name, message = "middle.1.norm.bias", f"its tensor middle.1.norm.bias is {found}"
    weights = {**OURS, name: make()}
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ValueError) as error:
        read_weights(tmp_path / "a.pt")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert message in _refused(tmp_path / "a.pt", tmp_path / "new" / "ours")
    with pytest.raises(ValueError, match="a.pt': its tensor"):
        load_teacher(run_config(tmp_path, DDPM, tmp_path / "a.pt"), "cpu")
    if "not finite" in found:  # others have another shape as well
        with pytest.raises(ValueError, match="checkpoint 'here': its tensor middle.1.norm.bias is not finite"):
            load_weights(build_unet(DDPM), {**OURS, name: make()[-1].expand(64)}, "here")


def _state(spoil):
    """read(stem) of a whole checkpoint in which `spoil` has changed something."""
    network = torch.nn.Linear(2, 3)
    engine = PlainEngine(network, 1.0, 0.9)
    engine.backward([network(torch.ones(1, 2))], [torch.ones(1, 3)])
    engine.step(1e-3)
    tensors = {stem: dict(values) for stem, values in engine.state("student")[0].items()}
    spoil(tensors)
    return tensors.__getitem__, dict(network.named_parameters())


def _set(stem, key, value):
    def spoil(tensors):
        tensors[stem][key] = value

    return spoil


STRANGE_STATES = {
    "weights of another shape": (
        _set("student", "bias", torch.ones(4)),
        "student is of another network, first at bias",
    ),
    "an average is missing": (lambda tensors: tensors["student_ema"].pop("bias"), "at bias: missing, expected [3]"),
    "a moment of another shape": (
        _set("student_optimizer", "exp_avg.bias", torch.ones(4)),
        "student_optimizer is of another network, first at exp_avg.bias: of shape [4], expected [3]",
    ),
    "a moment is missing": (
        lambda tensors: tensors["student_optimizer"].pop("max_exp_avg_sq.weight"),
        "student_optimizer is of another network, first at max_exp_avg_sq.weight: missing, expected [3, 2]",
    ),
    "a counter is missing": (lambda tensors: tensors["student_optimizer"].pop("step.bias"), "at step.bias: missing"),
    "many counters": (_set("student_optimizer", "step.bias", torch.ones(3)), "at step.bias: of shape [3], expected []"),
    "a sparse moment": (
        _set("student_optimizer", "exp_avg.bias", torch.ones(3).to_sparse()),
        "student_optimizer: its tensor exp_avg.bias is of the layout torch.sparse_coo",
    ),
    "integers": (
        _set("student", "bias", torch.ones(3, dtype=torch.int32)),
        "its tensor bias is of the type torch.int32",
    ),
}


@pytest.mark.parametrize("kind", STRANGE_STATES)
def test_a_state_that_does_not_fit_its_network_is_named(kind):
    spoil, message = STRANGE_STATES[kind]
    read, parameters = _state(spoil)
    with pytest.raises(ValueError) as error:
        read_state("student", read, parameters)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_state_before_the_first_update_has_no_moments():
    read, parameters = _state(lambda tensors: tensors["student_optimizer"].clear())
    assert read_state("student", read, parameters)[2] == {}


DEEP = "[" * 5000 + "]" * 5000
STRANGE_METADATA = {
    "no JSON": ({"hsivi_network": "{"}, "its metadata are not readable"),
    "deep": ({"hsivi_settings": DEEP}, "its metadata are not readable"),
    "a list": (
        {"hsivi_network": "[1]"},
        "what it says of itself is not readable (expected keys and values, got a list)",
    ),
    "a number": ({"hsivi_settings": "3"}, "expected keys and values, got a int"),
    "nothing": ({"hsivi_settings": "null"}, "expected keys and values, got a NoneType"),
    "an unknown key": ({"hsivi_network": '{"colour": 1}'}, "says of itself colour"),
    "a text": ({"hsivi_network": '{"norm_groups": "32"}'}, "says of itself norm_groups"),
    "not positive": ({"hsivi_network": '{"image_size": -8}'}, "says of itself image_size"),
    "a list in it": ({"hsivi_settings": '{"teacher": [1, 2]}'}, "says of itself teacher"),
    "other betas": ({"hsivi_settings": '{"teacher": {"betas": "x"}}'}, "says of itself teacher.betas"),
    "a size that does not fit": (
        {"hsivi_network": '{"image_size": 7}'},
        "its network cannot be built (network.image_size: 7",
    ),
    "groups that do not fit": ({"hsivi_network": '{"norm_groups": 7}'}, "cannot be built (network.channels: 32 is not"),
}


@pytest.mark.parametrize("kind", STRANGE_METADATA)
def test_metadata_of_another_shape_are_one_line(tmp_path, kind):
    metadata, message = STRANGE_METADATA[kind]
    save_file(OURS, tmp_path / "a.safetensors", metadata)
    assert message in _refused(tmp_path / "a.safetensors", tmp_path / "new" / "ours")


def _published(**changes):
    content = published_file(DDPM, (3, 8, 8))[0]
    whole_model = changes.pop("log_gamma", None)
    if whole_model is not None:
        content["whole_model"]["module.phinet.log_scaled_gamma"] = whole_model
    return {**content, **changes}


STRANGE_CONTENTS = {
    "whole_model a number": (lambda: _published(whole_model=3), "of an unknown layout, it holds"),
    "whole_model a list": (lambda: _published(whole_model=[torch.ones(2)]), "of an unknown layout, it holds"),
    "whole_model of numbers": (lambda: _published(whole_model={"module.phinet.a": 3}), "of an unknown layout"),
    "model a list": (lambda: {"model": [1], "ema": 3}, "of an unknown layout, it holds model, ema; readable are"),
    "shadow a list": (lambda: {"ema": {"shadow": [1]}}, "of an unknown layout, it holds ema"),
    "numbers as names": (lambda: {3: torch.ones(1)}, "of an unknown layout, it holds 3"),
    "a long name": (lambda: {"x" * 10_000: torch.ones(1)}, "xxx ...; readable are"),
    "a list": (lambda: [torch.ones(1)], "holds a list and no named tensors"),
    "nothing": (lambda: None, "holds a NoneType and no named tensors"),
    "log_gamma of two dimensions": (
        lambda: _published(log_gamma=torch.zeros(8, 8)),
        "is of shape [8, 8]; expected [1], [K]",
    ),
    "log_gamma of none": (lambda: _published(log_gamma=torch.zeros(())), "is of shape []; expected [1], [K]"),
    "our network a list": (
        lambda: _published(hsivi_fast={"network": {"channels": [1]}, "settings": {}}),
        "says of itself channels",
    ),
}


@pytest.mark.parametrize("kind", STRANGE_CONTENTS)
def test_contents_of_another_shape_are_one_line(tmp_path, kind):
    make, message = STRANGE_CONTENTS[kind]
    torch.save(make(), tmp_path / "a.pt")
    assert message in _refused(tmp_path / "a.pt", tmp_path / "new" / "ours")


def _of_nvlabs(file):
    """What begins as EDM's files do: protocol 4, a network pickled by a function of theirs."""
    name = b"\x8c\x17torch_utils.persistence\x8c\x1b_reconstruct_persistent_obj\x93"
    file.write_bytes(b"\x80\x04}\x8c\x03ema" + name + b"}\x85R s.")


def _scripted(file):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)


STRANGE_FILES = {
    "a pipe": (os.mkfifo, "is a pipe, socket or device; give a regular file"),
    "an EDM pickle": (_of_nvlabs, "has a persistent object that is none of NVlabs' torch_utils.persistence"),
    "TorchScript": (_scripted, "is a TorchScript program, which is never run; save its tensors alone"),
    "a pickle": (lambda file: file.write_bytes(pickle.dumps({"a": print})), "pickled code"),
    "nothing": (lambda file: file.touch(), "is neither a safetensors file nor one of torch.save"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of making a TorchScript program
@pytest.mark.parametrize("kind", STRANGE_FILES)
def test_files_of_others_are_named_and_no_library_speaks(tmp_path, recwarn, kind):
    write, message = STRANGE_FILES[kind]
    write(tmp_path / "a.pt")
    recwarn.clear()
    assert message in _refused(tmp_path / "a.pt", tmp_path / "new" / "ours")
    with pytest.raises(ValueError, match="a.pt"):
        load_teacher(run_config(tmp_path, DDPM, tmp_path / "a.pt"), "cpu")
    assert not recwarn.list


def test_groups_that_cannot_be_the_usual_ones_are_asked_for(tmp_path):
    network = {**DDPM, "channels": 8, "norm_groups": 4}
    torch.save(random_weights(network), tmp_path / "a.pt")
    text = convert_checkpoint(tmp_path / "a.pt", tmp_path / "ours")[1].read_text()
    assert "The file does not say network.image_size, network.norm_groups: add them." in text
    assert "norm_groups" not in json.dumps([line for line in text.splitlines() if not line.startswith("#")])


def test_a_training_that_cannot_start_leaves_no_folder(tmp_path):
    teacher = load_file(ASSETS / "smoke_teacher.safetensors")
    first = next(iter(teacher))
    save_file({**teacher, first: teacher[first] * float("nan")}, tmp_path / "nan.safetensors")
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    for override, message in (
        (f"teacher.checkpoint={tmp_path}/nan.safetensors", f"its tensor {first} is not finite"),
        (f"eval.reference={tmp_path}/nan.npz", r"nan.npz': mu at \[0\] is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            train(load_config("smoke", [override, "eval.num_samples=20"]), tmp_path / "run")
        assert not (tmp_path / "run").exists()

"""Files that torch.save wrote: ddpm-torch's, improved-diffusion's, and those that are refused."""

import io
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_checkpoints import ADM, DDPM, published_file, random_weights, run_config, teacher_has, with_module_prefix

from hsivi_fast.build import load_teacher
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.formats import read_checkpoint
from hsivi_fast.checkpoints.nesting import is_deeply_nested
from hsivi_fast.checkpoints.weights import read_weights
from hsivi_fast.nets import build_unet


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("layout", ["bare", "model", "ema"])
def test_a_ddpm_torch_file_is_a_teacher_and_its_averages_go_before_its_model(tmp_path, layout, prefixed):
    """As its trainer saves: model, optimizer, ema, scheduler, epoch and results, which are numpy's floats."""
    weights, others = random_weights(DDPM), random_weights(DDPM, seed=1)
    form = with_module_prefix if prefixed else dict
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
    assert teacher_has(tmp_path, DDPM, tmp_path / "cifar10_2040", weights)


def test_old_torch_files_half_precision_and_misleading_names_are_read(tmp_path):
    weights = random_weights(DDPM)
    for archive in (False, True):
        torch.save(weights, tmp_path / "old.safetensors", _use_new_zipfile_serialization=archive)
        assert teacher_has(tmp_path, DDPM, tmp_path / "old.safetensors", weights)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {name: tensor.to(dtype) for name, tensor in weights.items()}
        save_file(rounded, tmp_path / "half.pt")
        expected = {name: tensor.float() for name, tensor in rounded.items()}
        assert teacher_has(tmp_path, DDPM, tmp_path / "half.pt", expected)


def test_improved_diffusion_has_six_outputs_of_which_three_are_used(tmp_path):
    weights = random_weights(ADM)
    torch.save(weights, tmp_path / "imagenet64.pt")
    assert teacher_has(tmp_path, ADM, tmp_path / "imagenet64.pt", weights)
    teacher = load_teacher(run_config(tmp_path, ADM, tmp_path / "imagenet64.pt"), "cpu")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    outputs = []
    teacher.out["2"].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    assert torch.equal(teacher(x, t), outputs[0][:, :3]) and outputs[0].shape == (2, 6, 8, 8)
    found = read_checkpoint(tmp_path / "imagenet64.pt").network
    assert {"image_size": 8, **{key: found[key] for key in ADM if key != "image_size"}} == ADM
    assert "image_size" not in found


@pytest.mark.parametrize(
    "changes", [{"classes": 7}, {"scale_shift": False}, {"classes": 7, "scale_shift": False}], ids=str
)
def test_classes_and_an_added_embedding_are_told_by_improved_diffusion_s_tensors(tmp_path, changes):
    network = {**ADM, **changes}
    weights = random_weights(network)
    torch.save(weights, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt").network
    assert found.items() >= {key: value for key, value in network.items() if key != "image_size"}.items()
    file = convert_checkpoint(tmp_path / "a.pt", tmp_path / "ours")[0]
    again = read_checkpoint(file).weights()
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_ddpm_torch_network_may_have_learned_its_variance_too(tmp_path):
    network = {**DDPM, "out_channels": 6}
    torch.save({"model": random_weights(network)}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").network.items() >= {"out_channels": 6, "norm_eps": 1e-6}.items()
    assert teacher_has(tmp_path, network, tmp_path / "a.pt", random_weights(network))


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
    write({**random_weights(DDPM), "x": Malicious(tmp_path / "harm")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt': .*pickled code.*never run") as caught:
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists() and "\n" not in str(caught.value)


def _with_content(file, pickled, archive):
    """Write a file of torch's with this pickle in the place of its content."""
    torch.save(random_weights(DDPM), file, _use_new_zipfile_serialization=archive)
    whole = file.read_bytes()
    if not archive:
        stream = io.BytesIO(whole)
        for _ in range(3):  # a magic number, a version and the system
            pickle.load(stream)
        file.write_bytes(whole[: stream.tell()] + pickled)
        return
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))


def _nested(depth, key):
    """The opcodes of a dict of this depth: its one key, or its one value, is a tuple in a tuple in a tuple."""
    tuples = b")" + b"\x85" * (depth - 1)
    return b"\x80\x02}" + (tuples + b"K\x01" if key else b"K\x01" + tuples) + b"s."


DEEP = {
    "a key": _nested(200_000, key=True),
    "a value": _nested(200_000, key=False),
    # Each tuple goes into a list and comes back from the memo, so that the stack holds one at most.
    "by the memo": b"\x80\x02])q\x00a" + b"h\x00\x85q\x00a" * 200_000 + b"}h\x00K\x01s.",
    "lists": b"\x80\x02}K\x01" + b"](" * 200_000 + b"e" * 200_000 + b"s.",
}


READ_EACH = """
import sys
from hsivi_fast.checkpoints.weights import read_weights

for file in sys.argv[1:]:
    try:
        read_weights(file)
    except ValueError as error:
        print(error, flush=True)
"""


def test_deep_nesting_is_one_line_and_no_crash(tmp_path):
    """In a process of their own: torch.load ends in a segmentation fault where a deep tuple is a key."""
    files = []
    for kind in DEEP:
        for archive in (True, False):
            files.append(tmp_path / f"{kind} {archive}.pt")
            _with_content(files[-1], DEEP[kind], archive)
    done = subprocess.run([sys.executable, "-c", READ_EACH, *files], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"checkpoint '{file}': nests values more than 100 deep; no checkpoint does" for file in files
    ], done.stderr[-300:]
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_the_depth_of_nesting_has_a_limit_that_no_checkpoint_meets(tmp_path, archive):
    file = tmp_path / "a.pt"
    for depth, deep in ((100, False), (101, True)):
        _with_content(file, _nested(depth, key=True), archive)
        assert is_deeply_nested(file) == deep, depth
    parameters = [torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.Adam(parameters, amsgrad=True)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    many = {f"layer.{index}": torch.ones(1) for index in range(3000)}  # more items than one opcode adds
    content = {"model": many, "optimizer": optimizer.state_dict(), "logs": [[float(i), (i, i)] for i in range(5000)]}
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    assert not is_deeply_nested(file)
    whole = file.read_bytes()
    for length in (0, 1, 3, 1000, len(whole) // 2):
        file.write_bytes(whole[:length])
        assert not is_deeply_nested(file)


def test_a_pickled_network_is_refused_by_its_class(tmp_path):
    torch.save(build_unet(DDPM), tmp_path / "whole.pt")
    with pytest.raises(
        ValueError,
        match=r"holds pickled code \(hsivi_fast.nets.ddpm.DDPMUNet\), which is never run; save its tensors alone",
    ):
        read_weights(tmp_path / "whole.pt")


def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path):
    def message(content=None, name="file.pt", role="teacher"):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError) as caught:
            read_weights(tmp_path / name, role)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
        return str(caught.value)

    assert message(name="none.pt").endswith("no such file")
    assert "is neither a safetensors file nor one of torch.save" in message(b"<html>not found</html>")
    assert "of an unknown layout, it holds conv1.weight, fc.bias; readable are ours" in message(
        {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    )
    assert "it holds a, b, c, d, e and 2 more" in message(dict.fromkeys("abcdefg", 1))
    assert "holds a Tensor and no named tensors" in message(torch.ones(3))
    no_student = "has no student; it is a DDPM UNet's weights and has teacher"
    assert no_student in message(random_weights(DDPM), role="student")
    whole = (tmp_path / "file.pt").read_bytes()
    assert "not a readable torch file" in message(whole[: len(whole) // 2])
    assert "diffusers' weights without their config.json" in message(
        {"down_blocks.0.resnets.0.norm1.weight": torch.ones(1)}
    )
    (tmp_path / "folder").mkdir()
    assert "a folder without the config.json of a diffusers UNet2DModel, it holds nothing" in message(name="folder")


def test_sizes_that_do_not_fit_are_named_with_the_file(tmp_path):
    torch.save(random_weights(DDPM), tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"a.pt': is of another network, it .*embed.0.weight \(\[128, 32\], expected \[256, 64\]\)"
    ):
        load_teacher(run_config(tmp_path, {**DDPM, "channels": 64}, tmp_path / "a.pt"), "cpu")


def test_the_norm_eps_of_ddpm_torch_is_the_guess_for_its_teachers(tmp_path):
    torch.save({"model": random_weights(DDPM)}, tmp_path / "a.pt")
    torch.save(random_weights(DDPM), tmp_path / "b.pt")
    torch.save(published_file(DDPM, (1,))[0], tmp_path / "c.pt")
    with torch.device("meta"):
        torch.save(dict(build_unet("cifar10").named_parameters()), tmp_path / "d.pt")
    assert [read_checkpoint(tmp_path / f"{name}.pt").network["norm_eps"] for name in "abcd"] == [1e-6, 1e-6, 1e-5, 1e-6]

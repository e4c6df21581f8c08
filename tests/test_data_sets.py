"""CIFAR-10 through torchvision, on files in its format, and CelebA's pictures cut as its statistics were."""

import functools
import hashlib
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from commands import hsivi_here
from local_server import LOGIN, Answer, serving
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CIFAR10

from hsivi_fast.config import load_config
from hsivi_fast.data import RECIPES, check_image_size, has_data, load_data, read_pictures, to_uint8
from hsivi_fast.metrics.image_files import prepare_images
from hsivi_fast.metrics.needed_files import fetch_needed

A_BATCH = 3
CIFAR = np.random.default_rng(0).integers(0, 256, (5 * A_BATCH, 3, 32, 32), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 5 * A_BATCH).tolist()


def _files_of_cifar10():
    """{name: bytes} of the batches, each in the layout of the real one, which has 10,000 images."""
    files = {}
    for number in range(5):
        part = slice(number * A_BATCH, (number + 1) * A_BATCH)
        batch = {"batch_label": f"training batch {number + 1} of 5", "labels": LABELS[part]}
        batch |= {"data": CIFAR[part].reshape(A_BATCH, 3072), "filenames": [f"{number}.png"] * A_BATCH}
        files[f"data_batch_{number + 1}"] = pickle.dumps(batch, 2)
    files["test_batch"] = pickle.dumps({"labels": [0], "data": np.zeros((1, 3072), np.uint8)}, 2)
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij"), "num_vis": 3072}, 2)
    return files


def _packed(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


FILES = _files_of_cifar10()
ARCHIVE = _packed(FILES)


def _md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """torchvision's data set, which knows the sums of our files, with a server in the place of Toronto's.

    (answers, paths asked, the folder in the cache).
    """
    answers = {}
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path / "cache"))
    with serving(answers) as (base, asked):
        monkeypatch.setattr(CIFAR10, "url", f"{base}/cifar-10-python.tar.gz")
        monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(ARCHIVE))
        for listed in ("train_list", "test_list"):
            sums = [[name, _md5(FILES[name])] for name, _ in getattr(CIFAR10, listed)]
            monkeypatch.setattr(CIFAR10, listed, sums)
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": _md5(FILES["batches.meta"])})
        yield answers, asked, tmp_path / "cache" / "cifar10"


def _unpack(folder):
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / "cifar-10-batches-py" / name).write_bytes(content)
    return folder


def _is_ours(data):
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(data.images)).numpy(), CIFAR)
    assert data.images.dtype == np.float32 and data.labels.tolist() == LABELS and data.labels.dtype == np.int64
    return data.levels == 256


def _left(folder):
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_cifar10_is_downloaded_once_by_torchvision(cifar10):
    answers, asked, folder = cifar10
    answers["/cifar-10-python.tar.gz"] = Answer(ARCHIVE)
    assert _is_ours(load_data("cifar10"))
    assert asked == ["/cifar-10-python.tar.gz"] * 2  # torchvision looks first whether it is sent elsewhere
    assert _is_ours(load_data("cifar10")) and len(asked) == 2
    assert sorted(_left(folder)) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    assert sorted(_left(folder / "cifar-10-batches-py")) == sorted(FILES)


def test_cifar10_is_read_from_a_folder_of_ones_own(tmp_path, cifar10):
    folder = _unpack(tmp_path / "mine")
    for path in (folder, folder / "cifar-10-batches-py"):
        assert _is_ours(load_data("cifar10", path))
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(FILES["data_batch_3"][:-1])
    for path in (folder, tmp_path):
        with pytest.raises(
            ValueError, match=f"^data_path: '{path}' holds no whole cifar-10-batches-py; give the folder"
        ):
            load_data("cifar10", path)
    assert cifar10[1] == []  # a folder that was named is not written to


def test_an_archive_that_was_put_there_by_hand_is_unpacked(cifar10):
    _, asked, folder = cifar10
    folder.mkdir(parents=True)
    (folder / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    assert _is_ours(load_data("cifar10")) and asked == []


@pytest.mark.parametrize("kind", ["cut", "redirected", "another sum", "not there", "no network"])
def test_a_bad_download_of_cifar10_is_one_line_and_leaves_nothing(cifar10, monkeypatch, kind):
    answers, _, folder = cifar10
    answers["/login"] = LOGIN
    answer = {
        "cut": Answer(ARCHIVE[:1000], length=len(ARCHIVE)),
        "redirected": Answer(moved_to="/login"),
        "another sum": Answer(_packed({**FILES, "data_batch_1": b"other"})),
    }.get(kind)
    if answer:
        answers["/cifar-10-python.tar.gz"] = answer
    if kind == "no network":
        monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    message = (
        r"^data: cifar10 cannot be downloaded from http.* \(.+\); put cifar-10-python.tar.gz into .*cifar10 by hand$"
    )
    with pytest.raises(ValueError, match=message) as error:
        load_data("cifar10")
    assert "\n" not in str(error.value) and _left(folder) == []


def test_a_bad_archive_that_was_put_there_by_hand_stays_without_a_network(cifar10, monkeypatch):
    folder = cifar10[2]
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    folder.mkdir(parents=True)
    (folder / "cifar-10-python.tar.gz").write_bytes(b"mine")
    with pytest.raises(ValueError, match="cifar10 cannot be downloaded"):
        load_data("cifar10")
    assert (folder / "cifar-10-python.tar.gz").read_bytes() == b"mine"


def test_cifar10_is_among_what_a_run_needs_where_it_is_looked_at(tmp_path, cifar10):
    answers, asked, _ = cifar10
    (tmp_path / "weights.pth").touch()
    settings = ["data=cifar10", f"eval.inception={tmp_path}/weights.pth"]
    config = load_config("cifar10", [*settings, "eval.reference=null"])
    assert has_data(config)
    with pytest.raises(ValueError, match="data: cifar10 cannot be downloaded"):
        fetch_needed(config, teacher=False, measured=True)
    answers["/cifar-10-python.tar.gz"] = Answer(ARCHIVE)
    asked.clear()
    for _ in range(2):
        fetch_needed(config, teacher=False, measured=True)
    assert len(asked) == 2
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    answers.clear()
    cifar10[2].rename(tmp_path / "gone")
    fetch_needed(
        load_config("cifar10", [*settings, f"eval.reference={tmp_path}/reference.npz"]), teacher=False, measured=True
    )
    with pytest.raises(ValueError, match="network.image_size: 32 is not that of data=celeba64, whose images are"):
        check_image_size(load_config("cifar10", ["data=celeba64"]), (3, 32, 32))


# CelebA.


@pytest.fixture(scope="module")
def celeba(tmp_path_factory):
    """(folder, uint8 pictures [N, 218, 178, 3]): three of the training part and one behind it."""
    folder = tmp_path_factory.mktemp("img_align_celeba")
    pixels = np.random.default_rng(2).integers(0, 256, (4, 218, 178, 3), dtype=np.uint8)
    for number, picture in zip((1, 2, 162_770, 162_771), pixels, strict=True):
        Image.fromarray(picture).save(folder / f"{number:06d}.png")
    return folder, pixels


# Song's DDIM: cx = 89, cy = 121, rows cy - 64 to cy + 64, columns cx - 64 to cx + 64; ddpm-torch: 148 from (15, 40).
CROPS = {"celeba64": (121 - 64, 89 - 64, 128), "celeba64_ddpm_torch": (40, 15, 148)}


def _cut_by_torchvision(picture, name):
    top, left, side = CROPS[name]
    cut = transforms.functional.crop(Image.fromarray(picture), top, left, side, side)
    return np.asarray(transforms.Resize(64)(cut)).transpose(2, 0, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_celeba_is_cut_as_torchvision_cuts_it_and_its_test_part_is_left_out(celeba, name):
    folder, pixels = celeba
    found = read_pictures(folder, RECIPES[name])
    np.testing.assert_array_equal(found, [_cut_by_torchvision(picture, name) for picture in pixels[:3]])
    assert found.dtype == np.uint8 and found.shape == (3, 3, 64, 64)


def test_the_square_of_ddim_is_cut_out_to_the_pixel(tmp_path):
    """All but the square around (89, 121) is white: nothing of that is in it, and its corners are not missed."""
    corners = [(57, 25), (57, 152), (184, 25), (184, 152)]
    for number, dots in enumerate(([], corners)):
        picture = np.full((218, 178, 3), 255, np.uint8)
        picture[57:185, 25:153] = 0
        for dot in dots:
            picture[dot] = 255
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    black, dotted = read_pictures(tmp_path, RECIPES["celeba64"])
    assert black.max() == 0 and (dotted[:, [0, 0, 63, 63], [0, 63, 0, 63]] > 0).all()


def test_celeba_is_data_from_the_folder_and_from_what_prepare_wrote(celeba, tmp_path):
    folder, pixels = celeba
    expected = np.stack([_cut_by_torchvision(picture, "celeba64") for picture in pixels[:3]])
    assert prepare_images("celeba64", folder, tmp_path / "celeba64.npz") == 3
    with np.load(tmp_path / "celeba64.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], expected.transpose(0, 2, 3, 1))
    for path in (folder, tmp_path / "celeba64.npz"):
        data = load_data("celeba64", path)
        assert data.labels is None and data.levels == 256
        np.testing.assert_array_equal(to_uint8(torch.from_numpy(data.images)).numpy(), expected)


def test_pictures_as_they_are_and_the_first_so_many(celeba, tmp_path):
    folder, pixels = celeba
    assert prepare_images("images", folder, tmp_path / "all.npz") == 4
    np.testing.assert_array_equal(np.load(tmp_path / "all.npz")["arr_0"], pixels)
    assert prepare_images("celeba64", folder, tmp_path / "two.npz", count=2) == 2
    assert np.load(tmp_path / "two.npz")["arr_0"].shape == (2, 64, 64, 3)


def test_a_set_that_memory_cannot_hold_is_refused_after_its_first_picture(celeba, tmp_path, monkeypatch):
    """A byte a value is needed for the file, and five for the data of a run."""
    values = 3 * 3 * 64 * 64
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": values, "SC_PAGE_SIZE": 1}[name])
    assert read_pictures(celeba[0], RECIPES["celeba64"]).size == values
    with pytest.raises(ValueError, match="^data_path: .* needs 0.0 GiB of memory, this machine has 0.0 GiB"):
        load_data("celeba64", celeba[0])


def test_prepare_on_the_command_line(celeba, tmp_path, capsys):
    hsivi = functools.partial(hsivi_here, capsys)
    done = hsivi("prepare", "celeba64", celeba[0], "--to", tmp_path / "new" / "celeba64.npz", "--count", 2)
    assert done.returncode == 0 and done.stdout == f"2 images: {tmp_path}/new/celeba64.npz\n"
    small, damaged, nothing = tmp_path / "small", tmp_path / "damaged", tmp_path / "nothing"
    for folder in (small, damaged, nothing):
        folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(small / "000001.png")
    Image.fromarray(np.zeros((218, 178, 3), np.uint8)).save(damaged / "000001.png")
    (damaged / "000002.jpg").write_bytes(b"\xff\xd8cut")
    before = set(tmp_path.rglob("*"))
    for arguments, message in (
        (
            ["celeba64", small],
            f"folder: '{small}/000001.png' is [3, 64, 64], CelebA's aligned pictures are [3, 218, 178]",
        ),
        (["celeba64", damaged], f"folder: '{damaged}/000002.jpg' is not a readable picture"),
        (["celeba64", nothing], f"folder: '{nothing}' holds no pictures"),
        (["celeba64", tmp_path / "absent"], f"folder '{tmp_path}/absent': is not there, or is no folder"),
        (["celeba64", celeba[0], "--count", 4], f"folder: '{celeba[0]}' holds 3 pictures, and 4 were asked for"),
        (["celeba64", celeba[0], "--count", 0], "0 is not in the range"),
        (["celeba64", celeba[0], "--to", tmp_path / "a.zip"], f"to '{tmp_path}/a.zip': give a name that ends in .npz"),
        (["celeba64", celeba[0], "--to", tmp_path / "new" / "celeba64.npz"], "is there already; choose another name"),
        (["celeba65", celeba[0]], "'celeba65' is not one of 'celeba64', 'celeba64_ddpm_torch', 'images'"),
        (["celeba64"], "Missing argument 'FOLDER'"),
    ):
        words = arguments if "--to" in arguments else [*arguments, "--to", tmp_path / "made.npz"]
        done = hsivi("prepare", *words)
        lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr
    assert set(tmp_path.rglob("*")) == before


def test_celeba_s_bad_inputs_are_one_line(tmp_path):
    np.savez(tmp_path / "small.npz", np.zeros((2, 32, 32, 3), np.uint8))
    for path, message in (
        (
            None,
            "data_path: missing; data=celeba64 is read from the folder of CelebA's aligned pictures, or an npz file",
        ),
        (tmp_path / "absent", "is not there"),
        (tmp_path / "small.npz", r"holds images \[3, 32, 32\], expected \[3, 64, 64\]"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_data("celeba64", path)
        assert str(error.value).startswith("data_path: ") and "\n" not in str(error.value)

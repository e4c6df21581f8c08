"""The digits are the real ones, on their own grey levels."""

import gzip
import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hsivi_fast.data import load_data, to_uint8


def test_digits_are_scikit_learns():
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == np.float32 and data.levels == 17
    assert data.images.min() == -1 and data.images.max() == 1
    np.testing.assert_array_equal((data.images[:, 0] + 1) * 8, load_digits().images)
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(np.unique(to_uint8(torch.from_numpy(data.images), 17))) == 17


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match="data: 'cifar100'"):
        load_data("cifar100")


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


def _idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize(
    "names",
    [
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("train-images-idx3-ubyte", None),
    ],
)
def test_mnist_is_read_from_idx_files_of_any_folder(tmp_path, names):
    for name, array in zip(names, (IMAGES, LABELS)):
        if name:
            (tmp_path / name).write_bytes(gzip.compress(_idx(array)) if name.endswith(".gz") else _idx(array))
    data = load_data("mnist", tmp_path)
    assert data.images.shape == (5, 1, 32, 32) and data.images.dtype == np.float32 and data.levels == 256
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(data.images)).numpy()[:, 0, 2:30, 2:30], IMAGES)
    assert (data.images[:, :, :2] == -1).all() and (data.images[..., 30:] == -1).all()
    assert data.labels is None if names[1] is None else data.labels.tolist() == [3, 1, 4, 1, 5]


def test_the_training_images_come_before_the_test_images(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(_idx(IMAGES))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(_idx(IMAGES[:2]))
    assert len(load_data("mnist", tmp_path).images) == 2


@pytest.mark.parametrize(
    "content, word",
    [
        (_idx(IMAGES)[:-1], "not a whole idx file"),
        (gzip.compress(_idx(IMAGES))[:-30], "not a whole idx file"),
        (b"PNG", "not a whole idx file"),
        (_idx(IMAGES.reshape(-1)), "expected uint8"),
    ],
)
def test_a_damaged_idx_file_is_one_line(tmp_path, content, word):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=word) as error:
        load_data("mnist", tmp_path)
    assert "\n" not in str(error.value) and "t10k-images-idx3-ubyte" in str(error.value)


def test_images_are_read_from_a_folder_and_from_both_npz_layouts(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 6, 4, 3), dtype=np.uint8)  # [N, H, W, C]
    (tmp_path / "pictures" / "inside").mkdir(parents=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "pictures" / "inside" / f"{index}.png")
    np.savez(tmp_path / "last.npz", pixels)
    np.savez(tmp_path / "first.npz", pixels.transpose(0, 3, 1, 2))
    for path in ("pictures", "last.npz", "first.npz"):
        images = load_data("images", tmp_path / path).images
        np.testing.assert_array_equal(to_uint8(torch.from_numpy(images)).numpy(), pixels.transpose(0, 3, 1, 2))


def test_pictures_of_two_sizes_and_missing_paths_are_named(tmp_path):
    for name, shape in (("a", (4, 4)), ("b", (4, 5))):
        Image.fromarray(np.zeros(shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=r"b.png' is \[1, 4, 5\].*one size"):
        load_data("images", tmp_path)
    with pytest.raises(ValueError, match="data_path: missing"):
        load_data("mnist")
    with pytest.raises(ValueError, match="data_path: .*nowhere"):
        load_data("mnist", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds neither train-images"):
        load_data("mnist", tmp_path)


def _npy(shape, dtype):
    """The bytes of an npy header that promises such an array, without the array."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _archive(file, members):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _png_header(width, height):
    """A PNG of that size by its header, with next to no pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


PIXELS = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
PROMISES_4_GB = struct.pack(">HBBIII", 0, 8, 3, 5_000_000, 28, 28)
GZ = gzip.compress(_idx(IMAGES))
RAW_16 = Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16))
SEE_THROUGH = Image.fromarray(np.zeros((8, 8, 4), dtype=np.uint8))
PALETTE = Image.fromarray(PIXELS[0]).quantize(4)


def _mnist(**files):
    """Writes idx files; `labels` beside five images, or `images` in their place."""

    def write(folder):
        for name, content in {"images": _idx(IMAGES), **files}.items():
            (folder / f"t10k-{name}-idx{3 if name == 'images' else 1}-ubyte").write_bytes(content)
        return folder

    return write


def _npz(**arrays):
    def write(folder):
        np.savez(folder / "file.npz", **arrays)
        return folder / "file.npz"

    return write


def _npz_of(members):
    def write(folder):
        _archive(folder / "file.npz", members)
        return folder / "file.npz"

    return write


def _picture(picture, name="a.png", **options):
    def write(folder):
        if isinstance(picture, bytes):
            (folder / name).write_bytes(picture)
        else:
            picture.save(folder / name, format=name[-3:], **options)
        return folder

    return write


def _pipe(name):
    def write(folder):
        os.mkfifo(folder / name)
        return folder

    return write


@pytest.mark.parametrize(
    "data, write, message",
    {
        "gz, flipped byte": ("mnist", _mnist(images=GZ[:60] + bytes([GZ[60] ^ 255]) + GZ[61:]), "not a whole idx file"),
        "gz, wrong sum": ("mnist", _mnist(images=GZ[:-8] + b"\0" * 8), "not a whole idx file .*CRC"),
        "idx, no images": ("mnist", _mnist(images=_idx(IMAGES[:0])), r"holds no images: it is of shape \[0, 28, 28\]"),
        "idx, a promise": ("mnist", _mnist(images=PROMISES_4_GB), r"says \[5000000, 28, 28\], which is more than"),
        "idx, more than said": ("mnist", _mnist(images=gzip.compress(_idx(IMAGES) + b"\0" * 10**7)), "it holds more"),
        "label 17": ("mnist", _mnist(labels=_idx(LABELS + 13)), "labels-idx1-ubyte' holds the label 16; .* 0 to 9"),
        "label -1": ("mnist", _mnist(labels=b"\0\0\x09\x01\0\0\0\x05" + b"\xff" * 5), "holds the label -1"),
        "four labels": ("mnist", _mnist(labels=_idx(LABELS[:4])), r"holds labels \[4\], expected \[5\]"),
        "idx, a pipe": ("mnist", _pipe("t10k-images-idx3-ubyte"), "is a pipe, socket or device; give a regular file"),
        "npz, no images": (
            "images",
            _npz(mu=np.zeros(3)),
            r"holds no array of images \(mu float64 \[3\]\); expected arr_0",
        ),
        "npz, nothing": ("images", _npz_of({}), r"holds no array of images \(nothing\)"),
        "npz, two": ("images", _npz(a=PIXELS, b=PIXELS), r"holds 2 arrays of images \(a uint8 \[3, 8, 8, 3\], b uint8"),
        "npz, none": ("images", _npz(arr_0=PIXELS[:0]), r"holds uint8 \[0, 8, 8, 3\] as arr_0, expected"),
        "npz, floats": ("images", _npz(arr_0=PIXELS / 255), "holds float64 .* as arr_0, expected uint8"),
        "npz, records": ("images", _npz(arr_0=np.zeros((2, 8, 8, 3), [("r", "u1")])), "as arr_0, expected uint8"),
        "npz, objects": ("images", _npz(arr_0=np.array([{}])), r"holds object \[1\] as arr_0, expected uint8"),
        "npz, half": ("images", _npz_of({"arr_0.npy": _npy((9, 8, 8, 3), "|u1") + b"12"}), "not as long as its header"),
        "npz, a text": ("images", _picture(b"no", "file.npz"), "holds no pictures"),
        "16 bits, grey": ("images", _picture(RAW_16), r"more than 8 bits a channel \(mode I;16\); save it with 8"),
        "alpha": ("images", _picture(SEE_THROUGH), "has an alpha channel; lay it over a background"),
        "a transparent colour": ("images", _picture(PALETTE, transparency=0), "has an alpha channel"),
        "a large picture": (
            "images",
            _picture(_png_header(3000, 20)),
            "has 3000 x 20 pixels; use pictures of at most 1024",
        ),
        "a bomb with a warning": ("images", _picture(_png_header(10_000, 10_000)), "has 10000 x 10000 pixels"),
        "a bomb": ("images", _picture(_png_header(30_000, 30_000)), "is not a readable picture .*900000000 pixels"),
        "half a picture": ("images", _picture(_png(PIXELS[0])[:-40]), "is not a readable picture"),
        "another format": ("images", _picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a readable"),
        "a picture, a pipe": ("images", _pipe("a.png"), "a.png': is a pipe, socket or device"),
        "a device": ("images", lambda folder: "/dev/zero", "'/dev/zero': is a pipe, socket or device"),
    }.values(),
)
def test_data_that_cannot_be_right_are_one_line_before_they_are_read(tmp_path, recwarn, data, write, message):
    with pytest.raises(ValueError, match=message) as error:
        load_data(data, write(tmp_path))
    assert str(error.value).startswith("data_path: ") and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not recwarn.list


def test_an_array_that_was_packed_by_a_large_factor_is_a_bomb(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "file.npz", np.zeros((100, 32, 32, 3), np.uint8))
    assert len(load_data("images", tmp_path / "file.npz").images) == 100
    monkeypatch.setattr("hsivi_fast.data.BOMB_BYTES", 100_000)
    with pytest.raises(ValueError, match=r"arr_0.npy has 307328 bytes packed into \d\d\d"):
        load_data("images", tmp_path / "file.npz")


def test_an_archive_s_images_are_arr_0_or_its_one_array_of_that_kind(tmp_path):
    others = {"a": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, np.uint8)}
    np.savez(tmp_path / "named.npz", **others, arr_0=PIXELS)
    np.savez(tmp_path / "one.npz", labels=others["labels"], mu=np.zeros(3), samples=PIXELS)
    for name in ("named", "one"):
        images = load_data("images", tmp_path / f"{name}.npz").images
        np.testing.assert_array_equal(to_uint8(torch.from_numpy(images)).numpy(), PIXELS.transpose(0, 3, 1, 2))


def test_images_that_memory_cannot_hold_are_refused_by_their_header(tmp_path, monkeypatch):
    np.savez(tmp_path / "file.npz", PIXELS)
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    for path in (tmp_path / "file.npz", tmp_path):
        with pytest.raises(ValueError, match="needs 0.0 GiB of memory, this machine has 0.0 GiB"):
            load_data("images", path)

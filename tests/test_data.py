"""The digits are the real ones, on their own grey levels."""

import gzip
import struct

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

"""Data sets: for teachers, feature networks and reference statistics. The distillation itself uses none."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class DataSet:
    """Images in memory.

    images: float32 [N, C, H, W] in -1 .. 1; labels: int64 [N], or None; levels: how many grey levels the images have.
    """

    images: np.ndarray
    labels: np.ndarray
    levels: int


def load_data(name, path=None):
    """Load a data set by name.

    "digits": the 1,797 real 8x8 digits of scikit-learn's load_digits, with 17 grey levels.
    "mnist": the idx files in the folder `path`, packed with gzip or not. Two black pixels around its 28x28 digits make
    them 32x32. These are the training images where they are there, otherwise the test images.
    "images": `path` is a folder of pictures of one size, or an npz file of uint8 [N, H, W, C] or [N, C, H, W].
    Raises ValueError for an unknown name, a missing path or what cannot be read.
    """
    if name == "digits":
        return _digits()
    if name not in ("mnist", "images"):
        raise ValueError(f"data: {name!r} is unknown; choose digits, mnist or images")
    if path is None:
        place = "a folder of idx files" if name == "mnist" else "a folder of pictures or an npz file"
        raise ValueError(f"data_path: missing; data={name} is read from {place}, say data_path=FOLDER")
    if not Path(path).exists():
        raise ValueError(f"data_path: {str(path)!r} is not there")
    if name == "mnist":
        return _mnist(Path(path))
    pixels = _npz(Path(path)) if Path(path).is_file() else _folder(Path(path))
    return DataSet(_scaled(pixels), None, levels=256)


IMAGES_OF = {"digits": (1, 8, 8), "mnist": (1, 32, 32)}  # [C, H, W] of the data sets that have one size


def check_image_size(config, event_shape):
    """ValueError where a run makes other images than those of its data set."""
    known = IMAGES_OF.get(config.data)
    if known is None or tuple(event_shape) == known or len(event_shape) != 3:
        return
    key, place = ("image_channels", 0) if event_shape[0] != known[0] else ("image_size", 1)
    raise ValueError(
        f"network.{key}: {event_shape[place]} is not that of data={config.data}, whose images are {list(known)}; "
        f"set network.{key}={known[place]}"
    )


def has_data(config):
    """Whether a run's data set can be loaded: it comes with the package, or the run says where it is."""
    return config.data == "digits" or config.data_path is not None


def _digits():
    from sklearn.datasets import load_digits  # here: it takes 0.7 s and most runs read no digits

    digits = load_digits()
    images = digits.images.astype(np.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8], grey levels 0 .. 16
    return DataSet(images, digits.target.astype(np.int64), levels=17)


def _mnist(folder):
    if not folder.is_dir():
        raise ValueError(f"data_path: {str(folder)!r} is a file; data=mnist wants the folder that holds the idx files")
    split = "train" if _idx_file(folder, "train-images-idx3") else "t10k"
    images_file, labels_file = _idx_file(folder, f"{split}-images-idx3"), _idx_file(folder, f"{split}-labels-idx1")
    if images_file is None:
        raise ValueError(
            f"data_path: {str(folder)!r} holds neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte, "
            "with or without .gz"
        )
    images = read_idx(images_file)
    if images.ndim != 3 or images.dtype != np.uint8 or max(images.shape[1:]) > 32:
        raise ValueError(
            f"data_path: {str(images_file)!r} holds {images.dtype} {list(images.shape)}, expected uint8 [N, 28, 28]"
        )
    labels = read_idx(labels_file).astype(np.int64) if labels_file else None
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"data_path: {len(images)} images and {labels.shape} labels in {str(folder)!r}")
    top, left = (32 - images.shape[1]) // 2, (32 - images.shape[2]) // 2
    padded = np.pad(images, ((0, 0), (top, 32 - images.shape[1] - top), (left, 32 - images.shape[2] - left)))
    return DataSet(_scaled(padded[:, None]), labels, levels=256)


def _idx_file(folder, stem):
    """The file of MNIST with this stem, "train-images-idx3" and the like, under a name that it goes by, or None."""
    for name in (f"{stem}-ubyte", f"{stem.replace('-idx', '.idx')}-ubyte"):
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file
    return None


def read_idx(path):
    """The array of an idx file, packed with gzip or not. Raises ValueError where it is damaged or of another kind."""
    raw = Path(path).read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        zeros, kind, dimensions = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        if zeros or kind not in IDX_TYPES:
            raise ValueError("no idx header")
        return np.frombuffer(raw, IDX_TYPES[kind], offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise ValueError(f"data_path: {str(path)!r} is not a whole idx file ({error})") from None


def _npz(path):
    """uint8 [N, C, H, W] of the first array of an npz file."""
    try:
        with np.load(path) as file:
            array = file[file.files[0]]
    except Exception as error:  # not a zip, pickled objects: numpy raises many kinds
        raise ValueError(
            f"data_path: {str(path)!r} is no npz file of images ({' '.join(str(error).split())})"
        ) from None
    if array.dtype != np.uint8 or array.ndim != 4 or not {array.shape[1], array.shape[3]} & {1, 3}:
        raise ValueError(
            f"data_path: {str(path)!r} holds {array.dtype} {list(array.shape)}, "
            "expected uint8 [N, H, W, C] or [N, C, H, W]"
        )
    return array.transpose(0, 3, 1, 2) if array.shape[3] in (1, 3) else array


def _folder(folder):
    """uint8 [N, C, H, W] of all pictures under a folder, in the order of their names."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"data_path: {str(folder)!r} holds no pictures ({', '.join(sorted(PICTURES))})")
    images = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
        except OSError as error:
            raise ValueError(f"data_path: {str(file)!r} is not a readable picture ({error})") from None
        images.append(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"data_path: {str(file)!r} is {list(images[-1].shape)}, "
                f"{str(files[0])!r} is {list(images[0].shape)}; all pictures must have one size"
            )
    return np.stack(images)


def _scaled(pixels):
    """uint8 -> float32 in -1 .. 1."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(images, levels=256):
    """Round images [N, C, H, W] in -1 .. 1 to the nearest of `levels` equally spaced grey levels, as uint8 (0 .. 255).

    This is the only place where this project rounds images: samples, reference images and pictures all pass here.
    """
    level = ((images.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return (level * (255 / (levels - 1))).round().to(torch.uint8)

"""Data sets: for teachers, feature networks and reference statistics. The distillation itself uses none.

Files come from anywhere. So only regular files are opened, and what a header promises is held against limits before it
is read. `regular_file`, `brief`, the functions for npz files, and the cache's folder and locks serve the rooms above as
well.
"""

import contextlib
import fcntl
import gzip
import http.client
import math
import os
import shutil
import socket
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # whatever the name says: of others PIL would start programs
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # PIL's names of pictures with 8 bits a channel and no alpha
LARGEST_SIDE = 1024  # pixels of a picture
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
LARGEST_IDX = 2**28  # bytes; MNIST's 60,000 images have 47 million
NPZ_ARRAYS = 1000  # at most in a file
BOMB_BYTES, BOMB_RATIO = 2**28, 100  # an array that is larger, and was packed by more, is no honest one
BYTES_A_PIXEL = 5  # in memory: as it is read, and as float32
CACHE_VARIABLE = "HSIVI_CACHE"
PATIENCE = 30  # seconds without an answer after which a download is given up


@dataclass(frozen=True)
class DataSet:
    """Images in memory.

    images: float32 [N, C, H, W] in -1 .. 1; labels: int64 [N], or None; levels: how many grey levels the images have.
    """

    images: np.ndarray
    labels: np.ndarray
    levels: int


@dataclass(frozen=True)
class Recipe:
    """How the pictures of a data set become its images: a square is cut out of each and made smaller, bilinearly.

    width, height: of the pictures; left, top, side: the square, in pixels; size: the images' side. last: the number of
    the last picture that belongs to the training part; pictures with higher numbers for names are left out.
    """

    width: int
    height: int
    left: int
    top: int
    side: int
    size: int
    last: int


# CelebA's aligned pictures have 178 x 218 pixels, and the first 162,770 are its training part. DDIM (Song et al. 2020)
# takes the 128 x 128 pixels around (89, 121), as do PNDM, U-ViT and Analytic-DPM's statistics, which the published
# HSIVI code names. ddpm-torch cuts out another square.
RECIPES = {
    "celeba64": Recipe(178, 218, left=25, top=57, side=128, size=64, last=162_770),
    "celeba64_ddpm_torch": Recipe(178, 218, left=15, top=40, side=148, size=64, last=162_770),
}


class MissingFile(ValueError):
    """A file that is not there and cannot be had: where it is to be had, where it belongs, and why it is missing.

    address: as it may be shown; file: a path.
    """

    def __init__(self, message, address, file, reason):
        super().__init__(message)
        self.address, self.file, self.reason = address, Path(file), reason


def load_data(name, path=None):
    """Load a data set by name.

    "digits": the 1,797 real 8x8 digits of scikit-learn's load_digits, with 17 grey levels.
    "mnist": the idx files in the folder `path`, packed with gzip or not. Two black pixels around its 28x28 digits make
    them 32x32. These are the training images where they are there, otherwise the test images.
    "cifar10": the 50,000 training images of torchvision's CIFAR10, see `fetch_cifar10`.
    "celeba64": `path` is the folder of CelebA's aligned pictures (img_align_celeba), of which the training part is cut
    as `RECIPES` says, or an npz file that `hsivi prepare` wrote of them.
    "images": `path` is a folder of pictures of one size, or an npz file of uint8 [N, H, W, C] or [N, C, H, W].
    Raises ValueError for an unknown name, a missing path, what cannot be read, and what this machine's memory cannot
    hold.
    """
    if name == "digits":
        return _digits()
    if name not in PLACES:
        raise ValueError(f"data: {name!r} is unknown; choose digits, {', '.join(list(PLACES)[:-1])} or images")
    if path is None and name != "cifar10":
        raise ValueError(f"data_path: missing; data={name} is read from {PLACES[name]}, say data_path=FOLDER")
    if path is not None and not Path(path).exists():
        raise ValueError(f"data_path: {str(path)!r} is not there")
    if name == "mnist":
        return _mnist(Path(path))
    if name == "cifar10":
        pictures = fetch_cifar10(path)
        return DataSet(_scaled(pictures.data.transpose(0, 3, 1, 2)), np.array(pictures.targets, np.int64), levels=256)
    if Path(path).is_dir():
        pixels = read_pictures(path, RECIPES.get(name), bytes_a_pixel=BYTES_A_PIXEL)
    else:
        pixels = npz_images(path, f"data_path: {str(path)!r}", IMAGES_OF.get(name), BYTES_A_PIXEL)
    return DataSet(_scaled(pixels), None, levels=256)


# What each data set but the digits is read from.
PLACES = {
    "mnist": "a folder of idx files",
    "cifar10": "a folder with cifar-10-batches-py in it",
    "celeba64": "the folder of CelebA's aligned pictures, or an npz file that `hsivi prepare celeba64` wrote of them",
    "images": "a folder of pictures or an npz file",
}

# [C, H, W] of the data sets that have one size.
IMAGES_OF = {"digits": (1, 8, 8), "mnist": (1, 32, 32), "cifar10": (3, 32, 32), "celeba64": (3, 64, 64)}


def check_image_size(config, event_shape):
    """ValueError where a run makes other images than those of its data set."""
    known = IMAGES_OF.get(config.data)
    if known is None or tuple(event_shape) == known or len(event_shape) != 3:
        return
    if config.teacher.vae is not None:
        raise ValueError(
            f"teacher.vae: {config.teacher.vae!r} decodes to images {list(event_shape)}, and those of "
            f"data={config.data} are {list(known)}; leave data out, or give data of that size"
        )
    key, place = ("image_channels", 0) if event_shape[0] != known[0] else ("image_size", 1)
    raise ValueError(
        f"network.{key}: {event_shape[place]} is not that of data={config.data}, whose images are {list(known)}; "
        f"set network.{key}={known[place]}"
    )


def has_data(config):
    """Whether a run's data set can be loaded: it comes with the package or by itself, or the run says where it is."""
    return config.data in ("digits", "cifar10") or config.data_path is not None


def fetch_cifar10(path=None):
    """torchvision's CIFAR10 of the training images: `data` is uint8 [50000, 32, 32, 3], `targets` a list of labels.

    path: the folder that holds cifar-10-batches-py, or that folder itself. Without it the set is in the cache, where
    torchvision downloads it to, or unpacks an archive that was put there by hand. It knows the sum of each file, and
    opens none with another one.
    Raises ValueError, in one line, where there is no whole set at `path`, and `MissingFile` where it cannot be
    downloaded: what was not there before is deleted again.
    """
    from torchvision.datasets import CIFAR10  # here: it takes a second, and few runs read CIFAR-10

    if path is not None:
        root = Path(path).parent if Path(path).name == CIFAR10.base_folder else Path(path)
        try:
            return CIFAR10(root)
        except RuntimeError:
            raise ValueError(
                f"data_path: {str(path)!r} holds no whole {CIFAR10.base_folder}; give the folder in which "
                f"{CIFAR10.filename} was unpacked, or leave data_path out"
            ) from None
    folder = cache_folder() / "cifar10"
    archive, unpacked = folder / CIFAR10.filename, folder / CIFAR10.base_folder
    with held_in_cache(archive), _patience():
        new = [place for place in (archive, unpacked) if not place.exists()]
        try:
            pictures = CIFAR10(folder, download=True)
            new = []
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = brief(getattr(error, "reason", error))
            raise MissingFile(
                f"data: cifar10 cannot be downloaded from {CIFAR10.url} ({reason}); "
                f"put {CIFAR10.filename} into {folder} by hand",
                CIFAR10.url,
                archive,
                reason,
            ) from None
        finally:
            for place in new:
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    return pictures


@contextlib.contextmanager
def _patience():
    """Let no connection of the block wait longer than `PATIENCE` for an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def cache_folder(fallback=None):
    """Where files of this machine are kept: $HSIVI_CACHE, or else `fallback`, or torch's own cache of checkpoints."""
    return Path(os.environ.get(CACHE_VARIABLE) or fallback or Path(torch.hub.get_dir()) / "checkpoints")


@contextlib.contextmanager
def held_in_cache(file):
    """Hold a file of the cache for one process; ValueError where the cache cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_name(f"{file.name}.lock"), "w")
    except OSError as error:
        raise ValueError(
            f"cache {str(file.parent)!r}: cannot be written ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to another folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    if images.size == 0:
        raise ValueError(f"data_path: {str(images_file)!r} holds no images: it is of shape {list(images.shape)}")
    labels = _labels(labels_file, len(images)) if labels_file else None
    top, left = (32 - images.shape[1]) // 2, (32 - images.shape[2]) // 2
    padded = np.pad(images, ((0, 0), (top, 32 - images.shape[1] - top), (left, 32 - images.shape[2] - left)))
    return DataSet(_scaled(padded[:, None]), labels, levels=256)


def _labels(file, count):
    """int64 [count], the labels of an idx file."""
    labels = read_idx(file)
    if labels.shape != (count,):
        raise ValueError(f"data_path: {str(file)!r} holds labels {list(labels.shape)}, expected {[count]}")
    wrong = labels[(labels < 0) | (labels > 9) | (labels != np.floor(labels))]
    if len(wrong):
        raise ValueError(f"data_path: {str(file)!r} holds the label {wrong[0]}; a digit's label is 0 to 9")
    return labels.astype(np.int64)


def _idx_file(folder, stem):
    """The file of MNIST with this stem, "train-images-idx3" and the like, under a name that it goes by, or None."""
    for name in (f"{stem}-ubyte", f"{stem.replace('-idx', '.idx')}-ubyte"):
        for file in (folder / name, folder / f"{name}.gz"):
            if file.exists():
                return file
    return None


def read_idx(path):
    """The array of an idx file, packed with gzip or not.

    No more than its header says is ever unpacked. Raises ValueError where it is damaged, of another kind, or larger
    than `LARGEST_IDX`.
    """
    where = f"data_path: {str(path)!r}"
    try:
        with open(regular_file(path, where), "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            shape, kind, data = _idx_content(gzip.GzipFile(fileobj=file) if packed else file)
    except (OSError, EOFError, struct.error, zlib.error, _NoIdx) as error:
        raise ValueError(f"{where} is not a whole idx file ({brief(error)})") from None
    return np.frombuffer(data, kind).reshape(shape)


class _NoIdx(Exception):
    """What is wrong with the content of an idx file."""


def _idx_content(stream):
    """(shape, numpy's name of the type, bytes) of an idx file."""
    zeros, kind, dimensions = struct.unpack(">HBB", stream.read(4))
    if zeros or kind not in IDX_TYPES:
        raise _NoIdx("no idx header")
    shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
    size = math.prod(shape) * np.dtype(IDX_TYPES[kind]).itemsize
    if size > LARGEST_IDX:
        raise _NoIdx(f"its header says {list(shape)}, which is more than {LARGEST_IDX} bytes")
    data = stream.read(size + 1)
    if len(data) != size:
        found = "more" if len(data) > size else str(len(data))
        raise _NoIdx(f"its header says {list(shape)}, which is {size} bytes, and it holds {found}")
    return shape, IDX_TYPES[kind], data


def npz_images(path, where, expected=None, bytes_a_pixel=1):
    """uint8 [N, C, H, W] of an npz file: `arr_0` if it is there, else the one array of that kind.

    where: begins the ValueError for what is none; expected: [C, H, W] that the images must have, or None for any.
    bytes_a_pixel: those that the caller will take of this machine's memory; ValueError where it has not so many.
    """
    arrays = npz_arrays(path, where, "images")
    fitting = [name for name, (shape, dtype) in arrays.items() if dtype == np.uint8 and len(shape) == 4]
    name = "arr_0" if "arr_0" in arrays else fitting[0] if len(fitting) == 1 else None
    if name is None:
        held = ", ".join(f"{name} {dtype} {list(shape)}" for name, (shape, dtype) in list(arrays.items())[:5])
        several = f"{len(fitting)} arrays of images" if fitting else "no array of images"
        raise ValueError(f"{where} holds {several} ({held or 'nothing'}); expected arr_0, or one uint8 [N, H, W, C]")
    shape, dtype = arrays[name]
    if dtype != np.uint8 or len(shape) != 4 or not {shape[1], shape[3]} & {1, 3} or 0 in shape:
        raise ValueError(
            f"{where} holds {dtype} {list(shape)} as {name}, expected uint8 [N, H, W, C] or [N, C, H, W], N at least 1"
        )
    _check_memory(where, bytes_a_pixel * math.prod(shape))
    array = read_npz_array(path, name, where)
    array = array.transpose(0, 3, 1, 2) if array.shape[3] in (1, 3) else array
    if expected is not None and array.shape[1:] != expected:
        raise ValueError(f"{where} holds images {list(array.shape[1:])}, expected {list(expected)}")
    return array


def read_pictures(folder, recipe=None, count=None, progress=False, key="data_path", bytes_a_pixel=1):
    """uint8 [N, C, H, W] of all pictures under a folder, in the order of their names.

    recipe: a `Recipe` by which each is cut; without one they must be of one size. count: the first so many alone.
    progress: shows a bar on stderr. key: begins the errors. bytes_a_pixel: as of `npz_images`.
    Raises ValueError, in one line, where there are none or too few, one is of another size or cannot be read, or this
    machine's memory cannot hold them.
    """
    where = f"{key}: {str(folder)!r}"
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in PICTURES and not file.is_dir())
    if recipe is not None:
        files = [file for file in files if not file.stem.isdecimal() or int(file.stem) <= recipe.last]
    if not files:
        raise ValueError(f"{where} holds no pictures ({', '.join(sorted(PICTURES))})")
    if count is not None and count > len(files):
        raise ValueError(f"{where} holds {len(files)} pictures, and {count} were asked for")
    files, pixels = files[:count], None
    expected, whose = None, f"{str(files[0])!r} is"
    if recipe is not None:
        expected, whose = (3, recipe.height, recipe.width), "CelebA's aligned pictures are"
    for number, file in enumerate(tqdm(files, desc="pictures", disable=not progress, dynamic_ncols=True)):
        image = _picture(file, expected, whose, recipe, key)
        if pixels is None:
            _check_memory(where, bytes_a_pixel * len(files) * image.size)
            pixels = np.empty((len(files), *image.shape), np.uint8)
            expected = expected or image.shape
        pixels[number] = image
    return pixels


def _picture(file, expected, whose, recipe, key):
    """uint8 [C, H, W] of a picture, cut by a recipe if there is one.

    expected: the shape [C, H, W] that it must have, or None for any, and `whose` that is, for the error.
    """
    where = f"{key}: {str(file)!r}"
    regular_file(file, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of what is refused below or does not matter here
            with Image.open(file, formats=PICTURE_FORMATS) as picture:
                _check_picture(picture, where, expected, whose)
                picture = picture if picture.mode == "L" else picture.convert("RGB")
                if recipe is not None:
                    square = (recipe.left, recipe.top, recipe.left + recipe.side, recipe.top + recipe.side)
                    picture = picture.crop(square).resize((recipe.size, recipe.size), Image.Resampling.BILINEAR)
                pixels = np.asarray(picture)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # damaged, of another format, a bomb: PIL raises many kinds
        raise ValueError(f"{where} is not a readable picture ({brief(error)})") from None
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


class _Refused(Exception):
    """Why a picture that can be read is not taken."""


def _check_picture(picture, where, expected, whose):
    """Refuse a picture by its header, before its pixels are read."""
    width, height = picture.size
    shape = (1 if picture.mode == "L" else 3, height, width)
    if max(width, height) > LARGEST_SIDE:
        raise _Refused(f"{where} has {width} x {height} pixels; use pictures of at most {LARGEST_SIDE} a side")
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        raise _Refused(f"{where} has an alpha channel; lay it over a background, and save it without one")
    raw = picture.tile[0][3] if picture.format == "PNG" and picture.tile else ""  # as "RGB;16B", where PIL says RGB
    if picture.mode not in PLAIN_MODES or "16" in str(raw):
        raise _Refused(f"{where} has more than 8 bits a channel (mode {picture.mode}); save it with 8")
    if expected is not None and shape != expected:
        raise _Refused(f"{where} is {list(shape)}, {whose} {list(expected)}; all pictures must have one size")


def _check_memory(where, needed):
    """ValueError where this machine's memory has not so many bytes."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        gib = 2**30
        raise ValueError(f"{where} needs {needed / gib:.1f} GiB of memory, this machine has {there / gib:.1f} GiB")


def _scaled(pixels):
    """uint8 -> float32 in -1 .. 1."""
    scaled = pixels.astype(np.float32)
    scaled /= 127.5
    scaled -= 1
    return scaled


def to_uint8(images, levels=256):
    """Round images [N, C, H, W] in -1 .. 1 to the nearest of `levels` equally spaced grey levels, as uint8 (0 .. 255).

    This is the only place where this project rounds images: samples, reference images and pictures all pass here.
    """
    level = ((images.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return (level * (255 / (levels - 1))).round().to(torch.uint8)


def regular_file(path, where):
    """The path of a regular file, or a link to one: pipes, sockets and devices would hang, or never end.

    where: begins the ValueError for anything else.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{where}: is a folder; give a file")
    if path.exists():
        raise ValueError(f"{where}: is a pipe, socket or device; give a regular file")
    raise ValueError(f"{where}: no such file")


def brief(error, limit=160):
    """What a library says of an error, or the repr of a value, in one line that is not long."""
    text = " ".join(str(error).split()) or (type(error).__name__ if isinstance(error, Exception) else "")
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def npz_arrays(path, where, wanted):
    """{name: (shape, dtype)} of the arrays in an npz file, from their headers alone.

    where, wanted: what begins the ValueError for another file, and what was expected to be in it.
    """
    regular_file(path, where)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            if len(members) > NPZ_ARRAYS:
                raise ValueError(f"{len(members)} arrays")
            return {member.filename[:-4]: _npy_header(archive, member) for member in members}
    except Exception as error:  # not a zip, damaged, another version: zipfile and numpy raise many kinds
        raise ValueError(f"{where}: expected an npz file with {wanted} ({brief(error)})") from None


def _npy_header(archive, member):
    """(shape, dtype) of an array in an npz file; ValueError where its size is not what its header says."""
    with archive.open(member) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of headers that Python 2 wrote
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            file.seek(0)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        if member.file_size > max(BOMB_BYTES, BOMB_RATIO * member.compress_size):
            raise ValueError(f"{member.filename} has {member.file_size} bytes packed into {member.compress_size}")
        if dtype.hasobject:
            return shape, dtype  # pickled: its size is not known, and it is never read
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename} is not as long as its header says")
    return shape, dtype


def read_npz_array(path, name, where):
    """The array of that name, which `npz_arrays` has listed; nothing that is pickled is read.

    Raises ValueError that begins with `where` where it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:
        raise ValueError(f"{where}: its array {name} is damaged ({brief(error)})") from None

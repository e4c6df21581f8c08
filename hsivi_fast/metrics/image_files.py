"""Images as files that other people's tools read: drawn ones, and a data set's.

They are a folder of PNGs, or one npz in the layout of guided-diffusion's evaluator.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..checkpoints.files import as_written, make_folder, write_arrays, written_beside
from ..data import RECIPES, read_pictures
from ..parallel.machine import refuse_beyond_disk


def write_pictures(folder, seeds, pixels):
    """Write uint8 pixels [N, H, W, C], C = 1 or 3, into a folder as PNGs.

    They are called by their seeds [N], six digits. Each is there as a whole or not at all.
    Raises OSError that names the picture that cannot be written.
    """
    for seed, image in zip(seeds, pixels, strict=True):
        with written_beside(Path(folder) / f"{seed:06d}.png") as unfinished, open(unfinished, "wb") as file:
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, format="PNG")


class ImageFiles:
    """Images that arrive in batches, written as PNGs `SEED.png` (six digits), each at once, or as one npz at the end.

    path: a folder, or a name that ends in .npz (`arr_0`, uint8 [N, H, W, C], in the order of the seeds). With several
    processes each writes the PNGs of its own seeds, into a folder of that name on its machine; the npz is gathered, and
    rank 0 writes it.
    Raises ValueError where the folder holds pictures already, which a tool that reads it would count in, or the path is
    of the other kind.
    """

    def __init__(self, path, world):
        self.path, self.world = as_written(path), world
        self.batches = []  # of an npz: arrays [B, H, W, C]
        self.one_file = self.path.suffix.lower() == ".npz"
        world.from_main(self._prepare)  # the others wait: what they write must not be found there
        if not self.one_file:
            make_folder(self.path)

    def _prepare(self):
        if self.one_file and self.path.is_dir():
            raise ValueError(f"save-images {str(self.path)!r}: is a folder; a name that ends in .npz is that of a file")
        if not self.one_file and self.path.exists() and not self.path.is_dir():
            raise ValueError(f"save-images {str(self.path)!r}: is a file; give a folder, or a name that ends in .npz")
        if not self.one_file and any(self.path.glob("*.png")):
            raise ValueError(f"save-images {str(self.path)!r}: holds pictures already; choose another folder")
        make_folder(self.path.parent)

    def add(self, seeds, images):
        """Take in uint8 images [N, C, H, W] of the seeds [N]; ValueError where C is neither 1 nor 3."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        if pixels.shape[3] not in (1, 3):
            raise ValueError(f"save-images: images of {pixels.shape[3]} channels; pictures have 1 or 3")
        if self.one_file:
            self.batches.append(np.ascontiguousarray(pixels))
        else:
            write_pictures(self.path, seeds, pixels)

    def finish(self, count):
        """Write the npz of `count` images, if it is to be one; every rank has to come here, with its whole share.

        Raises OSError that names the file where it cannot be written.
        """
        if not self.one_file:
            return
        share = torch.from_numpy(np.concatenate(self.batches)).to(self.world.device)
        images = self.world.gather_shares(share, count).cpu().numpy()
        if self.world.is_main:
            write_arrays(self.path, arr_0=images)


def prepare_images(name, folder, target, count=None, progress=False):
    """Write the images of a data set, made of a folder of its pictures, to an npz file; returns how many there are.

    name: of `RECIPES`, or "images" for pictures of one size as they are. target: a new file, FILE.npz, that gets
    `arr_0`, uint8 [N, H, W, C], in the order of the pictures' names. count: the first so many alone. progress: shows a
    bar on stderr.
    Raises ValueError, in one line, for a target that is there or is no npz file, and as `read_pictures`; OSError that
    names the file where it cannot be written.
    """
    target = as_written(target)
    if target.suffix.lower() != ".npz":
        raise ValueError(f"to {str(target)!r}: give a name that ends in .npz")
    if target.exists():
        raise ValueError(f"to {str(target)!r}: is there already; choose another name, or delete it")
    if not Path(folder).is_dir():
        raise ValueError(f"folder {str(folder)!r}: is not there, or is no folder")
    pixels = read_pictures(folder, RECIPES.get(name), count, progress, key="folder")
    refuse_beyond_disk(f"folder: {len(pixels)} pictures", pixels.size, target, "choose another disk")
    make_folder(target.parent)
    write_arrays(target, arr_0=pixels.transpose(0, 2, 3, 1))
    return len(pixels)

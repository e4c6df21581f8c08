"""Drawn images as files that other people's tools read: a folder of PNGs, or one npz in the layout of guided-diffusion's evaluator."""

import os
from pathlib import Path

import numpy as np
import torch

from ..checkpoints.files import as_written
from ..parallel.world import ALONE


def write_pictures(folder, seeds, pixels):
    """Write uint8 pixels [N, H, W, C], C = 1 or 3, into a folder as PNGs that are called by their seeds [N], six digits."""
    from PIL import Image

    for seed, image in zip(seeds, pixels, strict=True):
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(Path(folder) / f"{seed:06d}.png")


class ImageFiles:
    """Images that arrive in batches, written as PNGs `SEED.png` (six digits), each at once, or as one npz at the end.

    path: a folder, or a name that ends in .npz (`arr_0`, uint8 [N, H, W, C], in the order of the seeds). With several processes each writes the PNGs of its own
    seeds, into a folder of that name on its machine; the npz is gathered, and rank 0 writes it.
    Raises ValueError where the folder holds pictures already, which a tool that reads it would count in, or the path is of the other kind.
    """

    def __init__(self, path, world):
        self.path, self.world, self.parts = as_written(path), world, []
        self.one_file = self.path.suffix.lower() == ".npz"
        world.from_main(self._prepare)  # the others wait: what they write must not be found there
        if not self.one_file:
            self.path.mkdir(parents=True, exist_ok=True)

    def _prepare(self):
        if self.one_file and self.path.is_dir():
            raise ValueError(f"save-images {str(self.path)!r}: is a folder; a name that ends in .npz is that of a file")
        if not self.one_file and self.path.exists() and not self.path.is_dir():
            raise ValueError(f"save-images {str(self.path)!r}: is a file; give a folder, or a name that ends in .npz")
        if not self.one_file and any(self.path.glob("*.png")):
            raise ValueError(f"save-images {str(self.path)!r}: holds pictures already; choose another folder")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, seeds, images):
        """Take in uint8 images [N, C, H, W] of the seeds [N]; C is 1 or 3."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        if pixels.shape[3] not in (1, 3):
            raise ValueError(f"save-images: images of {pixels.shape[3]} channels; pictures have 1 or 3")
        if self.one_file:
            self.parts.append(np.ascontiguousarray(pixels))
            return
        write_pictures(self.path, seeds, pixels)

    def finish(self, count):
        """Write the npz of `count` images, if it is to be one; every rank has to come here, with its whole share."""
        if not self.one_file:
            return
        images = (
            self.world.gather_shares(torch.from_numpy(np.concatenate(self.parts)).to(self.world.device), count)
            .cpu()
            .numpy()
        )
        if not self.world.is_main:
            return
        beside = self.path.with_name(f".{self.path.name}.unfinished")
        try:
            with open(beside, "wb") as file:
                np.savez(file, images)  # its name is arr_0
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from None


def save_images(images, path, seeds=None):
    """Write uint8 images [N, C, H, W] as PNGs into a folder or as one npz, see `ImageFiles`; seeds: their numbers, 0 .. N-1 by default."""
    files = ImageFiles(path, ALONE)
    files.add(range(len(images)) if seeds is None else seeds, images)
    files.finish(len(images))

"""Drawn images as files that other people's tools read.

They are a folder of PNGs, or one npz in the layout of guided-diffusion's evaluator.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..checkpoints.files import written_beside


def write_pictures(folder, seeds, pixels):
    """Write uint8 pixels [N, H, W, C], C = 1 or 3, into a folder as PNGs.

    They are called by their seeds [N], six digits.
    """
    for seed, image in zip(seeds, pixels, strict=True):
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(Path(folder) / f"{seed:06d}.png")


class ImageFiles:
    """Images that arrive in batches, written as PNGs `SEED.png` (six digits), each at once, or as one npz at the end.

    path: a folder, or a name that ends in .npz (`arr_0`, uint8 [N, H, W, C], in the order of the seeds). With several
    processes each writes the PNGs of its own seeds, into a folder of that name on its machine; the npz is gathered, and
    rank 0 writes it.
    Raises ValueError where the folder holds pictures already, which a tool that reads it would count in, or the path is
    of the other kind.
    """

    def __init__(self, path, world):
        self.path, self.world = Path(path), world
        self.batches = []  # of an npz: arrays [B, H, W, C]
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
        if not self.world.is_main:
            return
        try:
            with written_beside(self.path) as unfinished, open(unfinished, "wb") as file:
                np.savez(file, images)  # its name is arr_0
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from None

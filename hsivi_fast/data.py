"""Data sets: for teachers, feature networks and reference statistics. The distillation itself uses none."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DataSet:
    """images: float32 [N, C, H, W] in -1 .. 1; labels: int64 [N]; levels: how many grey levels the images have."""

    images: np.ndarray
    labels: np.ndarray
    levels: int


def load_data(name):
    """Load a data set by name. "digits": the 1,797 real 8x8 digits of scikit-learn's load_digits, 17 grey levels."""
    if name != "digits":
        raise ValueError(f"data: {name!r} is unknown; choose digits")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8], grey levels 0 .. 16
    return DataSet(images, digits.target.astype(np.int64), levels=17)


def to_uint8(images, levels=256):
    """Round images [N, C, H, W] in -1 .. 1 to the nearest of `levels` equally spaced grey levels, as uint8 (0 .. 255).

    The only place where this project rounds images: samples, reference images and pictures all pass here.
    """
    import torch

    level = ((images.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return (level * (255 / (levels - 1))).round().to(torch.uint8)

"""Numbers that the published implementation printed (see golden/README.md), and the weights they are printed for."""

import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def load_golden(name):
    """All arrays of a golden file, as a dict."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def fill_by_name(network):
    """Fill every parameter from its name and shape alone, as the golden files say; in float64, then cast."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            size = parameter.numel()
            values = np.sin(0.7 * np.arange(size, dtype=np.float64) + zlib.crc32(name.encode()) % 1000).reshape(
                parameter.shape
            )
            if parameter.ndim > 1:
                values *= np.sqrt(parameter.shape[0] / size)
            else:
                values = 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
            parameter.copy_(torch.from_numpy(values))
    return network


def relative_error(value, expected):
    """Norm of the difference over the norm of the expected value."""
    value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))

"""Draws of a run with a target as files: npz, and netCDF for ArviZ where that is installed."""

import numpy as np

from ..checkpoints.files import write_arrays, written_beside
from .density_report import parameter_names


def write_draws(folder, draws, seeds, config):
    """Write draws [N, D] of seeds [N] into a folder; returns the files.

    draws.npz has `draws`, `seeds` and `parameters`, their names. draws.nc is an ArviZ InferenceData with one chain, a
    variable a parameter.
    """
    names = parameter_names(config.target, draws.shape[1])
    files = [folder / "draws.npz"]
    write_arrays(files[0], draws=draws, seeds=np.array(seeds), parameters=np.array(names))
    try:
        import arviz  # here: it is an extra, and takes seconds
    except ImportError:
        return files
    # A slash in a name would be a group of the file.
    posterior = {name.replace("/", "_"): draws[None, :, column] for column, name in enumerate(names)}
    files.append(folder / "draws.nc")
    with written_beside(files[1]) as unfinished:
        arviz.from_dict(posterior=posterior).to_netcdf(str(unfinished))
    return files

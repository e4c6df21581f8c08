"""What samples are compared with, from other people's files: statistics of a data set's features, or its images."""

from pathlib import Path

from ..checkpoints.download import forget_download, locate_reference
from ..checkpoints.network_pickles import read_array_pickle
from ..data import npz_arrays, npz_images, regular_file
from .distances import checked_statistics, load_statistics


def load_reference(source, progress=False):
    """A reference as {"mu": [D], "sigma": [D, D]}, float64, or as {"images": uint8 [N, C, H, W]}.

    source: a file, a name of config.py's `PUBLISHED_REFERENCES` or `REFERENCES_TO_MAKE`, or an address. What it is, is
    told by its content:
    an npz file with mu and sigma, as EDM and guided-diffusion publish them, or as ours, with `features`;
    an npz file of images alone, `arr_0`, as guided-diffusion's batches of samples are;
    a pickle {"fid": {"mu", "sigma"}}, as EDM2 publishes them. Nothing in it is run.
    progress: shows a bar on stderr while it is downloaded.
    Raises ValueError, in one line, where it cannot be had or read, or is none of these. A download that is none leaves
    the cache, so that the next try fetches it again.
    """
    path = locate_reference(source, progress)
    try:
        return _read_reference(path)
    except ValueError as error:
        if path != Path(source) and forget_download(path):
            raise ValueError(f"{error}; it was downloaded, and is deleted: the next try fetches it again") from None
        raise


def _read_reference(path):
    where = f"reference {str(path)!r}"
    with open(regular_file(path, where), "rb") as file:
        is_pickle = file.read(1) == b"\x80"
    if is_pickle:
        return _pickled_statistics(path, where)
    arrays = npz_arrays(path, where, "mu and sigma, or images as arr_0")
    if "arr_0" in arrays and not {"mu", "sigma"} & {*arrays}:
        return {"images": npz_images(path, where)}
    return load_statistics(path)


def _pickled_statistics(path, where):
    """The statistics on Inception of a pickle; there may be others in it, as of DINOv2."""
    content = read_array_pickle(path, where)
    arrays = content.get("fid")
    if not isinstance(arrays, dict) or not {"mu", "sigma"} <= {*arrays}:
        held = ", ".join(map(str, list(content)[:5]))
        raise ValueError(f"{where}: expected a pickle with mu and sigma under fid, it holds {held}")
    return checked_statistics(where, arrays["mu"], arrays["sigma"])

"""Write a run's sampler as files for others: safetensors with a full description, a diffusers pipeline, or a package.

Every export is compared with the run's own sampler before it is there: it is written beside, checked, then renamed.
"""

from ..checkpoints.files import as_written, make_folder, written_beside
from ..checkpoints.run_folder import RunFolder
from ..parallel.world import ALONE
from ..sampling.sampler import load_sampler
from .aoti import refuse_aoti, write_aoti
from .description import describe
from .diffusers_format import refuse_diffusers, write_diffusers
from .model_card import write_model_card
from .safetensors_format import write_safetensors

# (sampler, context, description, folder) -> what the folder's config.json holds, after a check against the sampler
WRITERS = {"safetensors": write_safetensors, "diffusers": write_diffusers, "aoti": write_aoti}
FORMATS = tuple(WRITERS)


def export_run(run, format, outdir, weights="ema", step=None):
    """Write a run's sampler to the folder `outdir` and return its path.

    run: what `train` returned or a folder's path; format: one of `FORMATS`; weights: "ema" or "raw"; step: of which
    checkpoint, the newest by default.
    Compared with the run's own sampler, on the run's device, an export gives the same samples. Those of safetensors and
    diffusers are equal; of an AOTInductor package at most `aoti.PIXELS_OFF` of the pixels are off by one grey level.
    An export is there whole or, after an error, not at all.
    Raises ValueError for an unknown format, an `outdir` that is not empty, a run that the format cannot hold, or what
    `load_sampler` refuses.
    """
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    folder = RunFolder.of(run)
    outdir = _free(outdir)
    if step is not None and step not in folder.checkpoints():
        known = ", ".join(map(str, folder.checkpoints())) or "none"
        raise ValueError(f"step: {step!r} has no checkpoint; the run has {known}")
    if format == "diffusers":
        refuse_diffusers(folder.config())
    if format == "aoti":
        refuse_aoti(folder.config())
    # A package has no kernels of ours in it, so it is made from, and compared with, the plain torch backend.
    changes = {"backend": "torch" if format == "aoti" else None, "compile": False, "cuda_graphs": False}
    sampler, context, step = load_sampler(folder, ALONE, weights, step, changes)
    description = describe(context, sampler, step, weights)

    make_folder(outdir.parent)
    with written_beside(outdir) as unfinished:
        unfinished.mkdir()
        description = WRITERS[format](sampler, context, description, unfinished)
        write_model_card(unfinished, description, format, outdir.name, folder.read_json("results.json"))
    return outdir


def _free(outdir):
    """The absolute path of a folder that is not there yet, or is empty."""
    path = as_written(outdir).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"outdir {str(outdir)!r}: is a file; give a folder")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"outdir {str(outdir)!r}: is not empty; choose another folder")
    return path

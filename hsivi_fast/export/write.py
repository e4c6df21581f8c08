"""A run's sampler as files for others: safetensors with a full description, a diffusers pipeline, or one compiled package that needs torch alone.

Every export is compared with the run's own sampler before it is there: it is written beside, checked, then renamed.
"""

import inspect
import json
import math
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from ..build import build_context, build_untrained_student
from ..checkpoints.download import file_sha256
from ..checkpoints.files import as_written
from ..checkpoints.run_folder import RunFolder
from ..checkpoints.weights import load_weights, read_weights
from ..config import config_from_dict
from ..data import to_uint8
from ..metrics.table import table_lines
from ..parallel.world import ALONE
from ..nets import FAMILIES, network_arguments
from ..ops import reference
from ..sampling.sampler import SMALLEST_CPU_BATCH, Sampler, load_sampler

FORMATS = ("safetensors", "diffusers", "aoti")
KIND = "hsivi_fast sampler, 1"  # config.json's `kind`: what it describes, and the version of the description
CHECKED = 24  # seeds that an export is compared on; where a share of pixels is measured, as many as make the number of pixels below
CHECKED_PIXELS = 2**14
LARGEST_BATCH = 2**16  # of a compiled package

# A compiled package rounds otherwise than the run's sampler: how many pixels may be one grey level off, and how far a coordinate of a 2-D sample.
PIXELS_OFF, COORDINATE_OFF = 1e-3, 1e-4

SEEDS = (
    "A sample is a function of its 64-bit seed. Its normal numbers are Philox4x32-10 and Box-Muller with key = seed (low word first) and counter = (j, k, 0, 0) "
    "for the elements 4j .. 4j + 3 in row-major order; k = 0 draws x_K and k = K .. 2 the noise of layer k; layer 1 gives its mean."
)

USE_IMAGES = '''"""Seeds to a grid of pictures, with torch, numpy and Pillow alone: python use.py [FIRST SEED] [HOW MANY] [FILE]"""
import math
import sys
from pathlib import Path

import torch
import torch._inductor
from PIL import Image

first, count = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 0), (2, 16)))
file = sys.argv[3] if len(sys.argv) > 3 else "grid.png"
sampler = torch._inductor.aoti_load_package(str(Path(__file__).with_name("sampler.pt2")))
seeds = torch.arange(first, first + max(count, {smallest}), device="{device}")  # in small batches a CPU rounds otherwise: fill them up
images = sampler(seeds)[:count].cpu()  # uint8 [count, C, H, W]
columns = math.ceil(math.sqrt(count))
grid = torch.zeros(-(-count // columns) * columns, *images.shape[1:], dtype=torch.uint8)
grid[:count] = images
grid = torch.cat([torch.cat(list(row), dim=2) for row in grid.split(columns)], dim=1)  # [C, rows H, columns W]
Image.fromarray((grid[0] if len(grid) == 1 else grid.permute(1, 2, 0)).numpy()).save(file)
print(f"{{count}} images of the seeds {{first}} to {{first + count - 1}}: {{file}}")
'''

USE_POINTS = '''"""Seeds to points in the plane, with torch alone: python use.py [FIRST SEED] [HOW MANY], one point a line"""
import sys
from pathlib import Path

import torch
import torch._inductor

first, count = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 0), (2, 16)))
sampler = torch._inductor.aoti_load_package(str(Path(__file__).with_name("sampler.pt2")))
seeds = torch.arange(first, first + max(count, {smallest}), device="{device}")  # in small batches a CPU rounds otherwise: fill them up
for x, y in sampler(seeds)[:count].tolist():
    print(x, y)
'''


def export_run(run, format, outdir, weights="ema", step=None):
    """Write a run's sampler to the folder `outdir` and return its path.

    run: what `train` returned or a folder's path; format: one of `FORMATS`; weights: "ema" or "raw"; step: of which checkpoint, the newest by default.
    Compared with the run's own sampler, on the run's device, an export gives the same samples: those of safetensors and diffusers are equal, of an
    AOTInductor package at most `PIXELS_OFF` of the pixels are off by one grey level. An export is there whole or, after an error, not at all.
    Raises ValueError for an unknown format, an `outdir` that is not empty, a run that the format cannot hold, or what `load_sampler` refuses.
    """
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    outdir = _free(outdir)
    if step is not None and step not in folder.checkpoints():
        raise ValueError(
            f"step: {step!r} has no checkpoint; the run has {', '.join(map(str, folder.checkpoints())) or 'none'}"
        )
    config = folder.config()
    if format == "diffusers" and config.teacher.target is not None:
        raise ValueError(
            f"format: 'diffusers' is for image runs only, and this run makes points ({config.teacher.target}); choose safetensors or aoti"
        )
    if format == "aoti":
        _refuse_aoti(config)
    # A package of its own has no kernels of ours in it, so it is made from, and compared with, the plain torch backend.
    changes = {"backend": "torch" if format == "aoti" else None, "compile": False, "cuda_graphs": False}
    sampler, context, step = load_sampler(folder, ALONE, weights, step, changes)
    config = context.config
    description = _description(config, sampler, step, weights)

    outdir.parent.mkdir(parents=True, exist_ok=True)
    beside = outdir.with_name(f".{outdir.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        description = {"safetensors": _write_safetensors, "diffusers": _write_diffusers, "aoti": _write_aoti}[format](
            sampler, config, description, beside
        )
        (beside / "README.md").write_text(_model_card(folder, description, format, outdir.name))
        if outdir.is_dir():
            outdir.rmdir()  # it is empty
        beside.rename(outdir)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return outdir


def load_exported(folder, device="auto", backend="auto"):
    """The `Sampler` of a folder that `export_run` wrote as safetensors: sampler(seeds) -> float32 [N, *event], which `data.to_uint8` makes images of.

    device: "auto", "cpu" or "cuda:N"; backend: "auto", "torch" or "triton". Raises ValueError where the folder holds no such export, it has been
    changed, or the device or backend is not there.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "config.json").read_text())
        if description["kind"] != KIND:
            raise KeyError(description["kind"])
        weights_hash, timesteps, made_with = (description[key] for key in ("sha256", "timesteps", "hsivi_fast"))
        values = {
            key: description[key]
            for key in ("network", "teacher", "nfe", "spacing", "eta", "gamma", "precision", "channels_last")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"export {str(folder)!r}: config.json does not describe a sampler of this version ({' '.join(repr(error).split())}); give the folder of an export"
        ) from None
    file = folder / "model.safetensors"
    tensors = read_weights(file)
    if file_sha256(file) != weights_hash:
        raise ValueError(
            f"export {str(folder)!r}: model.safetensors is not the file that config.json describes (its sha256 differs); export the run again"
        )
    config = config_from_dict(values | {"device": device, "backend": backend})
    context = build_context(config, ALONE)
    layer = context.layers
    if layer.tau.tolist() != timesteps:
        raise ValueError(
            f"export {str(folder)!r}: has timesteps {timesteps}, this version makes {layer.tau.tolist()} of its spacing and nfe; use hsivi_fast {made_with}"
        )
    student = build_untrained_student(context)
    load_weights(student, tensors, file)
    return Sampler(student, layer, student.log_scaled_gamma, context.execution)


def _free(outdir):
    """The absolute path of a folder that is not there yet, or is empty."""
    path = as_written(outdir).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"outdir {str(outdir)!r}: is a file; give a folder")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"outdir {str(outdir)!r}: is not empty; choose another folder")
    return path


def _description(config, sampler, step, weights):
    """All that is needed to build the sampler again, as plain values: what stands in config.json."""
    network, teacher, layer = sampler.network, config.teacher, sampler.layers
    source = {"target": teacher.target} if teacher.target else {"checkpoint": Path(teacher.checkpoint).name}
    return {
        "kind": KIND,
        "hsivi_fast": version("hsivi_fast"),
        "network": _all_arguments(config.network),
        "teacher": {**source, "betas": teacher.betas, "steps": teacher.steps},
        "nfe": layer.nfe,
        "spacing": config.spacing,
        "timesteps": layer.tau.tolist(),  # tau_0 .. tau_K
        "eta": layer.eta,
        "gamma": {"per_step": config.gamma.per_step, "per_pixel": config.gamma.per_pixel},
        "log_scaled_gamma": list(network.log_scaled_gamma.shape),
        "precision": config.precision,
        "channels_last": config.channels_last,
        "sample": {"shape": list(network.event_shape), **_sample_format(config)},
        "seeds": SEEDS,
        "run": {"name": config.name, "step": step, "weights": weights, "data": config.data},
    }


def _all_arguments(network):
    """The description of a network with its family's defaults in it: they may change, an export may not."""
    given = network_arguments(network)
    known = inspect.signature(FAMILIES[given["family"]]).parameters
    return given | {
        name: parameter.default
        for name, parameter in known.items()
        if name not in given and parameter.default not in (parameter.empty, None)
    }


def _sample_format(config):
    """What one sample is: points are floats, images are rounded to grey levels."""
    if _makes_points(config):
        return {"type": "float32", "layout": "xy"}
    return {"type": "uint8", "layout": "CHW", "levels": 256, "rule": "round((clamp(x, -1, 1) + 1) * 127.5)"}


def _makes_points(config):
    return config.teacher.target is not None


def _final(x, config):
    """Samples as `hsivi_fast.sample` gives them."""
    return x if _makes_points(config) else to_uint8(x)


def _write_config(folder, description, weights):
    """Write config.json, with the hash of the file that holds the weights; returns what it holds."""
    description = {**description, "sha256": file_sha256(weights)}
    (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n")
    return description


def _check(got, own, pixels_off=0.0, coordinate_off=0.0):
    """ValueError where an export's samples are not the run's."""
    difference = (
        (got.cpu().float() - own.cpu().float()).abs() if got.shape == own.shape and got.dtype == own.dtype else None
    )
    if difference is None:
        raise ValueError(
            f"export: gives {got.dtype} {list(got.shape)} where the run's own sampler gives {own.dtype} {list(own.shape)}; nothing was written"
        )
    largest, share = float(difference.max()), float((difference > 0).double().mean())
    fits = largest <= coordinate_off if own.is_floating_point() else share <= pixels_off and largest <= 1
    if not fits:  # nor does what is not a number
        raise ValueError(
            f"export: differs from the run's own sampler, by up to {largest:.4g} in {share:.2%} of the values; nothing was written"
        )


# ---- safetensors ------------------------------------------------------------------------------------------------------


def _write_safetensors(sampler, config, description, folder):
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in sampler.network.state_dict().items()},
        file,
        metadata={"format": "pt"},
    )
    description = _write_config(folder, description, file)
    exported = load_exported(folder, str(sampler.layers.tau.device), config.backend)
    _check(_final(exported(range(CHECKED)), config), _final(sampler(range(CHECKED)), config))
    return description


# ---- diffusers --------------------------------------------------------------------------------------------------------


def _write_diffusers(sampler, config, description, folder):
    try:
        from .pipeline import HSIVINetwork, HSIVIPipeline, HSIVIScheduler
    except ImportError as error:
        raise ValueError(str(error)) from None
    network = HSIVINetwork(
        description["network"], description["log_scaled_gamma"], config.precision, config.channels_last
    )
    network.load_student(sampler.network.state_dict())
    scheduler = HSIVIScheduler(
        config.teacher.steps,
        config.teacher.betas,
        config.nfe,
        config.spacing,
        config.eta,
        config.gamma.per_step,
        config.gamma.per_pixel,
    )
    HSIVIPipeline(network, scheduler).save_pretrained(folder)
    pipeline = HSIVIPipeline.from_pretrained(folder).to(sampler.layers.tau.device)
    pipeline.set_progress_bar_config(disable=True)
    got = pipeline(seeds=range(CHECKED), output_type="pt").images
    _check((got * 255).round().to(torch.uint8), to_uint8(sampler(range(CHECKED))))
    return _write_config(folder, description, folder / "unet" / "diffusion_pytorch_model.safetensors")


# ---- AOTInductor ------------------------------------------------------------------------------------------------------


class _Standalone(nn.Module):
    """seeds int64 [B] -> samples: the sampler's layers in plain torch, since operators of ours exist only where hsivi_fast is imported."""

    def __init__(self, sampler, config):
        super().__init__()
        self.network, self.layer, self.config = sampler.network, sampler.layers, config

    def forward(self, seeds):
        layer = self.layer
        rows = layer.rows(self.network.log_scaled_gamma)
        x = reference.draw_noise(seeds, 0, self.network.event_shape)
        for current in range(layer.nfe, 0, -1):
            k = torch.full_like(seeds, current)
            c1 = None if current == 1 else layer.c1  # the last layer gives its mean
            x = reference.affine_noise_step(x, self.network(x, layer.tau[k]), layer.a, layer.b, c1, rows, seeds, k)
        return _final(x, self.config)


def _refuse_aoti(config):
    if config.precision != "fp32":
        raise ValueError(
            f"format: 'aoti' computes in float32 and the run's precision is {config.precision}; choose safetensors or diffusers"
        )
    compiler = os.environ.get("CXX")
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++") if name):
        raise ValueError(
            "format: 'aoti' needs a C++ compiler, and neither g++ nor clang++ nor $CXX is there; install one or choose safetensors or diffusers"
        )


def _write_aoti(sampler, config, description, folder):
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    device = sampler.layers.tau.device
    seeds = torch.arange(SMALLEST_CPU_BATCH, device=device)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        exported = torch.export.export(
            _Standalone(sampler, config), (seeds,), dynamic_shapes=({0: batch},), strict=True
        )
    file = folder / "sampler.pt2"
    # Without it the number of threads of this process would be compiled in.
    aoti_compile_and_package(exported, package_path=str(file), inductor_configs={"cpp.dynamic_threads": True})
    # Another batch size than the one that it was traced with: the check is of the dynamic shape too.
    checked = max(CHECKED, -(-CHECKED_PIXELS // math.prod(sampler.network.event_shape)))
    got = aoti_load_package(str(file))(torch.arange(checked, device=device))
    _check(got, _final(sampler(range(checked), batch_size=checked), config), PIXELS_OFF, COORDINATE_OFF)
    smallest = SMALLEST_CPU_BATCH if device.type == "cpu" else 1
    (folder / "use.py").write_text(
        (USE_POINTS if _makes_points(config) else USE_IMAGES).format(smallest=smallest, device=device.type)
    )
    compiled = {
        "torch": torch.__version__,
        "device": device.type,
        "input": f"seeds int64 [B], B in 1 .. {LARGEST_BATCH}",
        "smallest_batch": smallest,
    }
    return _write_config(folder, {**description, "compiled": compiled}, file)


# ---- the model card ---------------------------------------------------------------------------------------------------

CARD = """---
library_name: {library}
tags: [hsivi, diffusion-distillation, few-step-sampling]
---

# {name}: {what} in {nfe} network evaluations

A few-step sampler distilled from a diffusion model by HSIVI-SM (Yu et al., NeurIPS 2023, arXiv 2310.17153) with hsivi_fast {version}.

| | |
|---|---|
| network evaluations (NFE) | {nfe} |
| teacher | {teacher}, {betas} betas, {steps} steps |
| student | step {step} of the run, {weights} weights |
| sampler | eta {eta}, {spacing} spacing, timesteps {timesteps} |
| samples | {sample} |
{table}
## Use

{use}
"""

USES = {
    "safetensors": """```python
from hsivi_fast.export import load_exported
sampler = load_exported("{folder}")
x = sampler(range(16))  # float32 {shape}{rounding}
```

The samples of the seeds 0 to 15, as `hsivi sample` draws them. `config.json` describes the network, the layers and the noise in full.""",
    "diffusers": """```python
from hsivi_fast.diffusers import HSIVIPipeline
pipeline = HSIVIPipeline.from_pretrained("{folder}")
images = pipeline(seeds=range(16)).images  # those of `hsivi sample`
```

Or with torch generators, as `pipeline(batch_size=16, generator=torch.Generator().manual_seed(0))`. It needs hsivi_fast and `pip install diffusers`.""",
    "aoti": """```python
import torch, torch._inductor
sampler = torch._inductor.aoti_load_package("{folder}/sampler.pt2")
{result} = sampler(torch.arange(16, device="{device}"))
```

Or `python {folder}/use.py 0 16`. It needs torch {torch} and nothing of hsivi_fast, on a {device} device like the one that it was made on: the package is machine code.
A batch may have any size from 1 to 65536; one below {smallest} is better filled up, so that a sample is rounded the same in every batch.""",
}


def _model_card(folder, description, format, name):
    """README.md of an export."""
    points = description["sample"]["layout"] == "xy"
    rows = folder.read_json("results.json")
    table = ""
    if rows:
        head, *body = table_lines(rows)
        table = (
            "\nThe run's own table (every row on the same seeds):\n\n"
            + "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])
            + "\n"
        )
    run, sample, teacher = description["run"], description["sample"], description["teacher"]
    source = f"the exact score of {teacher['target']}" if points else teacher["checkpoint"]
    compiled = description.get("compiled", {})
    use = USES[format].format(
        folder=name,
        result="points" if points else "images",
        shape=[16, *sample["shape"]],
        rounding="" if points else " in -1 .. 1; hsivi_fast.data.to_uint8(x) rounds it to pixels",
        torch=compiled.get("torch"),
        device=compiled.get("device"),
        smallest=compiled.get("smallest_batch"),
    )
    return CARD.format(
        library="diffusers" if format == "diffusers" else "hsivi_fast" if format == "safetensors" else "pytorch",
        name=run["name"],
        what="points" if points else "images",
        nfe=description["nfe"],
        version=description["hsivi_fast"],
        teacher=source,
        betas=teacher["betas"],
        steps=teacher["steps"],
        step=run["step"],
        weights=run["weights"],
        eta=description["eta"],
        spacing=description["spacing"],
        timesteps=", ".join(map(str, description["timesteps"][:0:-1])),
        sample=f"{sample['type']} {sample['shape']}" + ("" if points else f", {sample['levels']} levels"),
        table=table,
        use=use,
    )

"""README.md of an export: where the sampler comes from, what it measures, and how it is used."""

from ..config import LICENCES
from ..metrics.table import table_lines
from .aoti import LARGEST_BATCH

LIBRARIES = {"safetensors": "hsivi_fast", "diffusers": "diffusers", "aoti": "pytorch"}  # as model hubs call them

# In these texts a backslash at the end of a line joins it with the next.
CARD = """\
---
library_name: {library}
tags: [hsivi, diffusion-distillation, few-step-sampling]
---

# {name}: {what} in {nfe} network evaluations

A few-step sampler distilled from a diffusion model by HSIVI-SM (Yu et al., NeurIPS 2023, arXiv 2310.17153) with \
hsivi_fast {version}.

| | |
|---|---|
| network evaluations (NFE) | {nfe} |
| teacher | {teacher}, {betas} betas, {steps} steps{licence} |
| student | step {step} of the run, {weights} weights |
| sampler | eta {eta}, {spacing} spacing, timesteps {timesteps} |
| samples | {sample} |
{table}
## Use

{use}
"""

CARD_OF_TARGET = """\
---
library_name: {library}
tags: [hsivi, variational-inference, semi-implicit]
---

# {name}: {what} in {nfe} network evaluations

A hierarchical semi-implicit approximation of a density, trained by HSIVI-SM (Yu et al., NeurIPS 2023, \
arXiv 2310.17153) with hsivi_fast {version}. Drawing needs nothing of the density itself.

| | |
|---|---|
| network evaluations (NFE) | {nfe}, none of the density |
| density | {target}, {dim} unconstrained coordinates, constraints: {constraints} |
| student | step {step} of the run, {weights} weights |
| samples | {sample} |
{table}
## Use

{use}
"""

USES = {
    "safetensors": """\
```python
from hsivi_fast.export import load_exported
sampler = load_exported("{folder}")
x = sampler(range(16))  # float32 {shape}{rounding}
```

The samples of the seeds 0 to 15, as `hsivi sample` draws them. \
{labels}`config.json` describes the network, the layers and the noise in full.""",
    "diffusers": """\
```python
from hsivi_fast.diffusers import HSIVIPipeline
pipeline = HSIVIPipeline.from_pretrained("{folder}")
images = pipeline(seeds=range(16)).images  # those of `hsivi sample`
```

Or with torch generators, as `pipeline(batch_size=16, generator=torch.Generator().manual_seed(0))`. \
`DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)` is the same pipeline: \
it runs `pipeline.py`, which imports the class.
{labels}It needs hsivi_fast and diffusers.""",
    "aoti": """\
```python
import torch, torch._inductor
sampler = torch._inductor.aoti_load_package("{folder}/sampler.pt2")
{result} = sampler({inputs})
```

Or `python {folder}/use.py 0 16`. It needs torch {torch} and nothing of hsivi_fast, on a {device} device like the one \
that it was made on: the package is machine code.
A batch may have any size from 1 to {largest}; one below {smallest} is better filled up, so that a sample is rounded \
the same in every batch.""",
}


# How an image of a wanted class is asked for.
LABELS = {
    "safetensors": "Each seed has its own class; `sampler(range(16), labels=3)` draws all of one. ",
    "diffusers": "Each seed has its own class; `pipeline(seeds=range(16), class_labels=3)` draws all of one. ",
}


def write_model_card(folder, description, format, name, results):
    """Write README.md into a folder.

    description: what config.json holds; format: of the export; name: the folder's at the end; results: the rows of the
    run's results.json, or None.
    """
    points = description["sample"]["layout"] != "CHW"
    run, sample, teacher = description["run"], description["sample"], description["teacher"]
    card = (CARD_OF_TARGET if "target" in description else CARD).format(
        library=LIBRARIES[format],
        name=run["name"],
        what="draws" if "target" in description else "points" if points else "images",
        nfe=description["nfe"],
        version=description["hsivi_fast"],
        **_origin(description),
        licence=f"; its licence is {LICENCES[teacher['checkpoint']]}" if teacher.get("checkpoint") in LICENCES else "",
        step=run["step"],
        weights=run["weights"],
        eta=description["eta"],
        spacing=description["spacing"],
        timesteps=", ".join(map(str, description["timesteps"][:0:-1])),
        sample=_sample(sample, format),
        table=_table(results) if results else "",
        use=_use(description, format, name),
    )
    (folder / "README.md").write_text(card)


def _origin(description):
    """What a card says of the target, or of the teacher."""
    teacher, target = description["teacher"], description.get("target")
    if target is not None:
        return {"target": target["log_density"], "dim": target["dim"], "constraints": target["constraints"] or "none"}
    exact = f"the exact score of {teacher['target']}" if "target" in teacher else teacher["checkpoint"]
    return {"teacher": exact, "betas": _title_of(teacher["betas"]), "steps": teacher["steps"]}


def _sample(sample, format):
    """What a sample is, in words; a pipeline decodes latents itself."""
    latents = sample.get("latents")
    if latents and format == "safetensors":
        by = f"{latents['class']} {latents['vae']}, scaling_factor {latents['scaling_factor']:g}"
        return f"latents, {sample['type']} {sample['shape']}, of the {by}; `config.json` says how they are decoded"
    image = latents["image"] if latents else sample
    return f"{image['type']} {image['shape']}" + (f", {image['levels']} levels" if "levels" in image else "")


def _title_of(betas):
    """The kind of betas, in a word."""
    if isinstance(betas, str):
        return betas
    return "its own" if isinstance(betas, list) else f"{betas['kind']} ({betas['start']:g} to {betas['end']:g})"


def _table(results):
    heading, *body = table_lines(results)
    lines = [f"| {' | '.join(cells)} |" for cells in [heading, ["---"] * len(heading), *body]]
    return "\nThe run's own table (every row on the same seeds):\n\n" + "\n".join(lines) + "\n"


def _use(description, format, name):
    """The lines that use an export in a folder of this name."""
    points = description["sample"]["layout"] != "CHW"
    compiled, has_classes = description.get("compiled", {}), "classes" in description
    inputs = [f'torch.arange(16, device="{compiled.get("device")}")']
    if has_classes:
        inputs.append(f'torch.full((16,), {description["classes"][0]}, device="{compiled.get("device")}")')
    return USES[format].format(
        folder=name,
        result="points" if points else "images",
        inputs=", ".join(inputs),
        labels=LABELS.get(format, "") if has_classes else "",
        shape=[16, *description["sample"]["shape"]],
        rounding=_rounding(description["sample"]),
        torch=compiled.get("torch"),
        device=compiled.get("device"),
        smallest=compiled.get("smallest_batch"),
        largest=LARGEST_BATCH,
    )


def _rounding(sample):
    """What has to be done with a sampler's floats, in a comment's words."""
    if "latents" in sample:
        return ", latents, which the VAE decodes"
    return "" if sample["layout"] != "CHW" else " in -1 .. 1; hsivi_fast.data.to_uint8(x) rounds it to pixels"

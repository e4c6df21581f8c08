"""What stands on the page of one run and on that of several: samples, the learned noise scale, the GPU."""

import statistics

from ..data import to_uint8
from ..parallel.world import ALONE
from ..sampling.sampler import load_sampler
from . import figures, page

PLANE_POINTS = 20000
CLASSES_SHOWN = 10
ENOUGH = 50  # evaluations of DDIM, after which more change little
GPU = (("power (W)", "gpu_power_watts"), ("utilisation (%)", "gpu_utilisation_percent"))
NOISE_SCALE = (
    "The learned factor exp(log_gamma) on the noise of each layer, in the averaged student: 1 is where training "
    "starts, below it a layer adds less noise than DDIM with the run's eta."
)


def load_sampler_to_draw(folder, backend):
    """(Sampler, Context, step) of a run's newest checkpoint; errors as of `load_sampler`."""
    # A few pictures are done by eager calls before a compiler is.
    changes = {"backend": backend, "compile": False, "cuda_graphs": False}
    # ALONE on purpose, whatever the world of the run: rank 0 alone draws a report, and no other comes here to answer.
    return load_sampler(folder, ALONE, changes=changes)


def draw_samples(context, sampler):
    """What is shown of a sampler, on the CPU: uint8 images [64, C, H, W] as an array, or points [N, 2]."""
    if len(sampler.network.event_shape) == 1:
        return sampler(range(PLANE_POINTS), PLANE_POINTS).cpu()
    return to_uint8(context.images(sampler(range(figures.GRID**2)))).cpu().numpy()


def draw_classes(context, sampler):
    """(labels, images) of the first classes of a sampler that has some: a row of a grid each, all of the same seeds."""
    shown = sampler.class_labels.chosen.tolist()[:CLASSES_SHOWN]
    labels = [label for label in shown for _ in range(figures.GRID)]
    samples = sampler([*range(figures.GRID)] * len(shown), labels=labels)
    return shown, to_uint8(context.images(samples)).cpu().numpy()


def ddim_title(nfe):
    """What DDIM with the evaluations of a student is called."""
    return f"DDIM, {nfe} evaluations"


def teacher_evaluations(configs):
    """DDIM's evaluations that stand for the teacher in the pictures of runs: enough, whatever their tables have."""
    most = max([ENOUGH, *(nfe for config in configs for nfe in config.eval.ddim_nfe)])
    return min([most, *(config.teacher.steps - 1 for config in configs)])


def teacher_title(nfe):
    """What DDIM with many evaluations is called: "the teacher" beside a few-step sampler."""
    return f"teacher (DDIM, {nfe} evaluations)"


def noise_scale_picture(config, log_gamma):
    """The noise scale of a student of this configuration: PNG bytes."""
    return figures.log_gamma_picture(log_gamma.detach().cpu().numpy(), config.gamma.per_step, config.gamma.per_pixel)


def gpu_section(metrics, colors=None):
    """Power and utilisation over the steps of {label: records}; colors: {label: color}."""
    measured = {label: [record for record in records if _is_of_gpu(record)] for label, records in metrics.items()}
    measured = {label: records for label, records in measured.items() if records}
    if not measured:
        return page.paragraph("no GPU: there are no records of one")
    content = page.chart(
        figures.curves(measured, GPU, colors=colors),
        f"power and utilisation of the GPU of rank 0 in {', '.join(measured)}",
    )
    for label, records in measured.items():
        content += _memory_and_energy(label, records)
    return content


def _is_of_gpu(record):
    return any(key in record for _, key in GPU)


def _memory_and_energy(label, records):
    """A paragraph on one run; "" where nothing of it is known."""
    memory = [record["gpu_memory_bytes"] for record in records if record.get("gpu_memory_bytes") is not None]
    energy = [record["joules_per_image"] for record in records if record.get("joules_per_image") is not None]
    known = []
    if memory:
        known.append(f"{max(memory) / 1e9:.1f} GB of memory")
    if energy:
        known.append(f"{statistics.median(energy):.3g} J per training image (median)")
    return page.paragraph(f"{label}: {', '.join(known)}") if known else ""

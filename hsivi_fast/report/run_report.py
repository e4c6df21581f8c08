"""The report of one run: its pictures in samples/ and its page, report.html."""

import datetime

from tqdm import tqdm

from ..config import phases_of, without_password
from ..metrics.features import network_of
from ..metrics.table import table_lines
from ..sampling.sampler import ddim_sampler
from . import figures, page
from .density_report import write_density_report
from .sections import (
    NOISE_SCALE,
    PLANE_POINTS,
    ddim_title,
    draw_classes,
    draw_samples,
    gpu_section,
    load_sampler_to_draw,
    noise_scale_picture,
    teacher_evaluations,
    teacher_title,
)

STEMS = ("teacher", "ddim", "hsivi")  # of the pictures with the samples of these three


def write_report(folder, teacher=None, backend=None, beside_teacher=True, progress=False):
    """Draw a run's pictures into its samples/ folder and write report.html. Returns the page's path.

    folder: `RunFolder`, with a checkpoint; teacher: the run's, if it is loaded already; backend: as of `load_sampler`.
    beside_teacher: draw the teacher's samples beside the run's, which takes many more evaluations.
    progress: show a bar on stderr where drawing takes more than 5 seconds.
    The table and its picture are left out where the run was not measured. Raises ValueError as `load_sampler`.
    """
    config = folder.config()
    if config.target is not None:
        return write_density_report(folder, backend)
    student, context, step = load_sampler_to_draw(folder, backend)
    context = context.with_teacher(teacher)
    results, metrics = folder.read_json("results.json", []), folder.metrics()
    samples = _drawn(context, _samplers(context, student, beside_teacher), progress)
    pictures, content = _sample_pictures(context, samples)  # {stem of a file: PNG bytes}, HTML
    sections = {"Samples": page.paragraph("The same seeds for every sampler.") + content}
    if student.class_labels.classes is not None:
        labels, images = draw_classes(context, student)
        pictures["classes"] = figures.image_grid(images)
        rows = f"A row a class, from the top: {', '.join(map(str, labels))}. The same seeds in every row."
        sections["By class"] = page.paragraph(rows) + page.chart(pictures["classes"], "samples of each class")
    if results:
        pictures["distance_vs_nfe"] = figures.distance_against_nfe(results)
        if config.teacher.target is None and network_of(config) == "inception":
            pictures["fid_vs_nfe"] = pictures["distance_vs_nfe"]
        sections["Table"] = page.html_table(table_lines(results))
        sections["Distance against network evaluations"] = page.chart(
            pictures["distance_vs_nfe"], "distance against network evaluations"
        )
    if metrics:
        pictures["losses"] = figures.loss_curves(metrics)
        sections["Training"] = page.chart(pictures["losses"], "loss curves")
    pictures["log_gamma"] = noise_scale_picture(config, student.log_gamma)
    sections["Noise scale"] = page.paragraph(NOISE_SCALE) + page.chart(pictures["log_gamma"], "exp(log_gamma)")
    sections["GPU"] = gpu_section({config.name: metrics})
    sections["Where and when"] = page.paragraph(_circumstances(folder, metrics))
    text = page.preformatted(without_password((folder.path / "config.yaml").read_text()))
    sections["Configuration"] = page.folded("config.yaml, every key", text)

    for stem, png in pictures.items():
        folder.write(f"samples/{stem}.png", png)
    summary = f"{config.nfe} network evaluations per sample; {_updates(config, step)}."
    folder.write("report.html", page.html_page(f"hsivi_fast: {config.name}", summary, sections))
    return folder.path / "report.html"


def _updates(config, step):
    """What a run has done until a step, in words."""
    phases, cycle = phases_of(config), config.train.f_learning_times
    start = f"{min(step, phases.start)} updates of the student on the teacher's paths, then " if phases.start else ""
    step = max(step - phases.start, 0)
    of_student = step // cycle - min(step, phases.head) // cycle
    return f"{start}{step} updates of the score network, {of_student} of the student"


def _circumstances(folder, metrics):
    """The machine, how long training took, and the day of this page."""
    environment = folder.read_json("environment.json", {})
    told = []
    if environment:
        known = {
            key: environment.get(key) or "?" for key in ("threads", "world_size", "device_name", "backend", "precision")
        }
        told.append("Trained on {device_name} ({threads} CPU threads, {world_size} processes)".format(**known))
        told.append("backend {backend}, precision {precision}".format(**known))
        told.append(f"torch {(environment.get('versions') or {}).get('torch') or '?'}")
    seconds = [record["seconds"] for record in metrics if record.get("seconds") is not None]
    if seconds:
        told.append(f"{max(seconds):.0f} seconds of training")
    return "; ".join([*told, f"this page is of {datetime.date.today().isoformat()}"]) + "."


def _samplers(context, student, beside_teacher):
    """{title: sampler}: the teacher at its best and DDIM with the student's evaluations, if asked for; the student."""
    config = context.config
    samplers = {}
    if beside_teacher:
        most = teacher_evaluations([config])
        samplers[teacher_title(most)] = ddim_sampler(context, most, 0.0)
        samplers[ddim_title(config.nfe)] = ddim_sampler(context, config.nfe, 0.0)
    return {**samplers, f"HSIVI, {config.nfe} evaluations": student}


def _drawn(context, samplers, progress):
    """{title: what is shown of a sampler}, with a bar where that takes more than 5 seconds."""
    samples, total = {}, sum(sampler.nfe for sampler in samplers.values())
    with tqdm(total=total, desc="report", disable=not progress, delay=5, leave=False, dynamic_ncols=True) as bar:
        for title, sampler in samplers.items():
            samples[title] = draw_samples(context, sampler)
            bar.update(sampler.nfe)
    return samples


def _sample_pictures(context, samples):
    """The pictures of the samples, {stem: PNG bytes}, and how the page shows them."""
    if context.config.teacher.target is not None:
        target = context.teacher.samples(PLANE_POINTS)
        density = figures.densities({"target": target, **samples})
        return {"density": density}, page.chart(density, "density of the target and of each sampler")
    grids = {title: figures.image_grid(images) for title, images in samples.items()}
    pictures = dict(zip(STEMS[-len(grids) :], grids.values(), strict=True))
    if len(grids) > 1:
        pictures["comparison"] = figures.side_by_side(samples)
    return pictures, page.gallery(grids)

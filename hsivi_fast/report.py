"""Pictures of a run: sample grids, distance against NFE, loss curves, and one self-contained HTML page with all of them."""

import base64
import html
import io

import numpy as np

from .data import to_uint8
from .evaluation import sampler_title, table_lines
from .models import load_teacher
from .sampler import ddim_sampler, load_sampler

GRID = 8  # rows and columns of a sample grid
PLANE_POINTS = 20000

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1d2430; --back: #fff; --line: #d7dce3; --card: #f5f7fa; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e4e8ee; --back: #14181e; --line: #384150; --card: #1d232c; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }} th:first-child, td:first-child {{ text-align: left; }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 1rem; }} figure {{ margin: 0; flex: 1 1 16rem; }}
img {{ max-width: 100%; height: auto; background: #fff; border-radius: 4px; }} .pictures img {{ width: 100%; image-rendering: pixelated; }}
figcaption {{ font-size: .9rem; }} pre {{ background: var(--card); padding: .8rem; overflow-x: auto; font-size: .85rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
{sections}
</body></html>
"""


def write_report(folder, teacher=None, backend=None):
    """Draw a run's pictures into its samples/ folder and write report.html. Returns the page's path.

    backend: as of `load_sampler`. The run needs a checkpoint; the table and its picture are left out where it was not measured.
    """
    config = folder.config()
    student, _, step = load_sampler(folder, "ema", backend=backend, compile=False, cuda_graphs=False)  # a few images: eager calls are done before a compiler is
    teacher = teacher or load_teacher(config, student.layer.tau.device)
    results, metrics = folder.read_json("results.json", []), folder.metrics()
    teacher_nfe = max(config.eval.ddim_nfe)  # what "teacher" means beside a few-step sampler: DDIM with the most evaluations of the table
    samplers = {
        f"teacher (DDIM, {teacher_nfe} evaluations)": ddim_sampler(config, teacher, teacher_nfe, 0.0),
        f"DDIM, {config.nfe} evaluations": ddim_sampler(config, teacher, config.nfe, 0.0),
        f"HSIVI, {config.nfe} evaluations": student,
    }
    if config.teacher.target is not None:
        pictures = {"density": _densities(teacher, samplers)}
    else:
        images = {title: to_uint8(sampler(range(GRID**2))).cpu().numpy() for title, sampler in samplers.items()}
        pictures = dict(zip(("teacher", "ddim", "hsivi"), map(image_grid, images.values())))
        folder.write("samples/comparison.png", _comparison(images))
    titles = samplers if len(pictures) > 1 else ["density of the target and of each sampler"]
    sections = ["<h2>Samples</h2><p>The same seeds for every sampler.</p>" + _figures(dict(zip(titles, pictures.values())))]
    if results:
        pictures["distance_vs_nfe"] = _distance_against_nfe(results)
        sections.append(f"<h2>Table</h2>{_html_table(results)}")
        sections.append(f"<h2>Distance against network evaluations</h2>{_image(pictures['distance_vs_nfe'], 'distance against NFE')}")
    if metrics:
        pictures["losses"] = _loss_curves(metrics)
        sections.append(f"<h2>Training</h2>{_image(pictures['losses'], 'loss curves')}")
    for stem, png in pictures.items():
        folder.write(f"samples/{stem}.png", png)
    sections.append(f"<h2>Configuration</h2><pre>{html.escape((folder.path / 'config.yaml').read_text())}</pre>")
    summary = f"{config.nfe} network evaluations per sample; {step} updates of the score network, {step // config.train.f_learning_times} of the student."
    folder.write("report.html", PAGE.format(title=html.escape(f"hsivi_fast: {config.name}"), summary=summary, sections="\n".join(sections)).encode())
    return folder.path / "report.html"


def image_grid(images, columns=GRID):
    """PNG bytes of uint8 images [N, C, H, W] in a grid, pixels enlarged so that an image is at least 48 wide."""
    from PIL import Image

    canvas = _tiled(images, columns)
    scale = max(1, 48 // images.shape[3])
    picture = Image.fromarray(canvas[:, :, 0] if canvas.shape[2] == 1 else canvas)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return _png(lambda file: picture.save(file, format="PNG"))


def _tiled(images, columns):
    """uint8 images [N, C, H, W] on one canvas [rows (H + 1) + 1, columns (W + 1) + 1, C], grey lines between them."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 96, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        canvas[top:top + height, left:left + width] = image.transpose(1, 2, 0)
    return canvas


def _comparison(images):
    """The first images of every sampler beside each other, with titles: one picture to show."""
    figure, axes = _figure(1, len(images), width=3.4 * len(images), height=3.7)
    for axis, (title, values) in zip(axes.flat, images.items()):
        canvas = _tiled(values, GRID)
        axis.imshow(canvas[:, :, 0] if canvas.shape[2] == 1 else canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    return _png(lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))


def _densities(target, samplers):
    """Density of the exact target and of every sampler, side by side."""
    plots = {"target": target.samples(PLANE_POINTS)}
    plots.update({title: sampler(range(PLANE_POINTS), PLANE_POINTS).cpu() for title, sampler in samplers.items()})
    figure, axes = _figure(1, len(plots), width=3.2 * len(plots), height=3.4)
    for axis, (title, points) in zip(axes.flat, plots.items()):
        counts, _, _ = np.histogram2d(*points.T.numpy(), bins=120, range=[[-2.7, 2.7]] * 2)
        axis.imshow(np.sqrt(counts.T), origin="lower", cmap="magma", extent=[-2.7, 2.7] * 2)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    return _png(lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))


def _distance_against_nfe(rows):
    column = "frechet_distance" if "frechet_distance" in rows[0] else "js_divergence"
    figure, axes = _figure(1, 1, width=6, height=3.8)
    axis = axes.flat[0]
    ddim = sorted((row["nfe"], row[column]) for row in rows if row["sampler"] == "ddim")
    axis.plot(*zip(*ddim), "o-", color="0.45", label="DDIM (teacher)")
    for row, marker, color in zip((row for row in rows if row["sampler"] != "ddim"), "sD^", ("tab:blue", "tab:red", "tab:orange")):
        axis.plot(row["nfe"], row[column], marker, color=color, markersize=9, label=sampler_title(row["sampler"]))
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    ticks = sorted({row["nfe"] for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("network evaluations per sample")
    axis.set_ylabel(column.replace("_", " "))
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    return _png(lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))


def _loss_curves(metrics):
    measured = [(record["step"], record["metric"]) for record in metrics if record.get("metric") is not None]
    panels = [("loss_score_net", "score network's loss"), ("loss_student", "student's loss")]
    figure, axes = _figure(1, len(panels) + bool(measured), width=4.2 * (len(panels) + bool(measured)), height=3.2)
    for axis, (key, title) in zip(axes.flat, panels):
        points = [(record["step"], record[key]) for record in metrics if record.get(key) is not None]
        if points:
            axis.plot(*zip(*points), color="tab:blue")
        axis.set_title(title, fontsize=10)
    if measured:
        axes.flat[-1].plot(*zip(*measured), "o-", color="tab:red")
        axes.flat[-1].set_title("distance during training", fontsize=10)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return _png(lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))


def _figure(rows, columns, width, height):
    """A figure without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns))


def _png(save):
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def _image(png, description):
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _figures(pictures):
    if len(pictures) == 1:
        return "".join(_image(png, title) for title, png in pictures.items())
    return '<div class="pictures">' + "".join(
        f"<figure>{_image(png, title)}<figcaption>{html.escape(title)}</figcaption></figure>" for title, png in pictures.items()) + "</div>"


def _html_table(rows):
    head, *body = table_lines(rows)
    cells = lambda line, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
    return '<div class="scroll"><table>' + cells(head, "th") + "".join(cells(line, "td") for line in body) + "</table></div>"

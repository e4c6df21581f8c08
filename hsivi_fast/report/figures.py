"""Pictures as PNG bytes: grids of samples, densities, and the curves of one run or of several. On white, so that they can be read on a page of any colour."""

import io

import numpy as np

from ..metrics.table import TITLES, sampler_title

GRID = 8  # columns of a grid of samples
MARKERS = {"ddim": "o", "ddim_eta": "v", "ddpm": "^", "dpmpp_2m": "s", "unipc": "P", "hsivi_ema": "D", "hsivi_raw": "d"}
DISTANCES = ("frechet_distance", "js_divergence")  # what pictures show of a row
STUDENTS = ("ddim_eta", "hsivi_ema", "hsivi_raw")  # a run's own samplers: its student and what that starts as


def image_grid(images, columns=GRID):
    """uint8 images [N, C, H, W] in a grid, pixels enlarged so that an image is at least 48 wide."""
    from PIL import Image

    canvas = _tiled(images, columns)
    scale = max(1, 48 // images.shape[3])
    picture = Image.fromarray(canvas[:, :, 0] if canvas.shape[2] == 1 else canvas)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def comparison(images):
    """{title: uint8 images [N, C, H, W]}, a grid each, side by side: one picture to show."""
    figure, axes = _figure(1, len(images), width=3.4 * len(images), height=3.7)
    for axis, (title, values) in zip(axes.flat, images.items()):
        canvas = _tiled(values, GRID)
        axis.imshow(
            canvas[:, :, 0] if canvas.shape[2] == 1 else canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest"
        )
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    return _png(figure)


def densities(points):
    """{title: points [N, 2], a tensor on the CPU}: their densities, three in a row."""
    columns = min(len(points), 3)
    rows = -(-len(points) // columns)
    figure, axes = _figure(rows, columns, width=3.2 * columns, height=3.4 * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes.flat, points.items()):
        counts, _, _ = np.histogram2d(*values.T.numpy(), bins=120, range=[[-2.7, 2.7]] * 2)
        axis.imshow(np.sqrt(counts.T), origin="lower", cmap="magma", extent=[-2.7, 2.7] * 2)
        axis.set_title(title, fontsize=9)
    return _png(figure)


def distance_against_nfe(rows):
    """The distance of one run's samplers (rows of results.json) against their evaluations."""
    return distances({"": rows}, "nfe")


def distances(results, key, colors={}):
    """Distances of samplers against "nfe" or "images_per_second": results is {label: rows of results.json, all of one metric}; colors: {label: color}.

    A sampler with several rows (the teacher's) is a line, one with a single row (a student) a point. What is the teacher's alone is grey.
    """
    column = next(column for column in DISTANCES if column in next(iter(results.values()))[0])
    spread = column.removesuffix("_distance").removesuffix("_divergence") + "_std"
    figure, axes = _figure(1, 1, width=6.4, height=4)
    axis, drawn, greys = axes.flat[0], 0, 0
    for label, rows in results.items():
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            own = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row[key])
            if sampler in STUDENTS:
                color = colors.get(label, f"C{drawn % 10}")
            else:
                color, greys = str(0.2 + 0.15 * (greys % 4)), greys + 1
            axis.errorbar(
                [row[key] for row in own],
                [row[column] for row in own],
                yerr=[row.get(spread) or 0 for row in own],
                capsize=3,
                color=color,
                marker=MARKERS.get(sampler, "o"),
                markersize=7,
                markerfacecolor="white" if sampler in ("ddim_eta", "hsivi_raw") else color,
                linestyle="-" if len(own) > 1 else "none",
                linewidth=1.4,
                label=f"{label}: {sampler_title(sampler)}" if label else sampler_title(sampler),
            )
            drawn += 1
    axis.set_xscale("log")
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    if key == "nfe":
        ticks = sorted({row["nfe"] for rows in results.values() for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axis.set_xlabel(
        {"nfe": "network evaluations per sample", "images_per_second": "samples per second, each on its run's device"}[
            key
        ]
    )
    axis.set_ylabel(TITLES[column])
    axis.grid(alpha=0.3, which="both")
    if drawn > 5:
        figure.set_size_inches(6.4, 3.8 + 0.2 * -(-drawn // 2))
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    else:
        axis.legend(frameon=False, fontsize=9)
    return _png(figure)


def loss_curves(metrics):
    """Both losses of one run, and the distance where it was measured; metrics: records of metrics.jsonl."""
    panels = [
        ("score network's loss", "loss_score_net"),
        ("student's loss", "loss_student"),
        ("distance during training", "metric"),
    ]
    return curves(
        {"": metrics},
        [
            panel
            for panel in panels
            if panel[1] != "metric" or any(record.get("metric") is not None for record in metrics)
        ],
    )


def curves(runs, panels, x="step", x_title="step", colors={}):
    """Values of {label: records} against the records' `x`, in a panel each; panels: [(title, key of a record)]; colors: {label: color}.

    Records without the key are passed over.
    """
    figure, axes = _figure(
        1, len(panels), width=max(4.2 * len(panels), 5), height=3.3 + 0.22 * (len(runs) if len(runs) > 1 else 0)
    )
    for axis, (title, key) in zip(axes.flat, panels):
        for number, (label, records) in enumerate(runs.items()):
            points = [(record[x], record[key]) for record in records if record.get(key) is not None]
            if points:
                axis.plot(
                    *zip(*points),
                    marker="o" if len(points) < 30 else None,
                    markersize=3.5,
                    color=colors.get(label, f"C{number % 10}"),
                    linestyle=("-", "--", ":")[number // 10 % 3],
                    label=label,
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x_title)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=3 if len(panels) > 1 else 2,
            frameon=False,
            fontsize=9,
        )
    return _png(figure)


def log_gamma_picture(log_gamma, per_step, per_pixel):
    """The learned noise scale exp(log_gamma) as factors on DDIM's noise: 1 is where training starts.

    log_gamma: an array [1], [K], [*event] or [K, *event], as `per_step` and `per_pixel` say. With events [C, H, W] a heat map for each layer and channel
    under one colour scale; otherwise bars, one a layer.
    """
    scale = np.exp(np.asarray(log_gamma, dtype=np.float64))
    scale = scale if per_step else scale[None]
    return (
        _scale_maps(scale, per_step)
        if per_pixel and scale.ndim == 4
        else _scale_bars(scale.reshape(len(scale), -1), per_step)
    )


def _scale_maps(scale, per_step):
    layers, channels = scale.shape[:2]
    columns = channels if channels > 1 else min(layers, 5)
    rows = -(-layers * channels // columns)
    reach = max(float(np.nanmax(np.abs(scale - 1))), 1e-6)  # the colours' middle is 1
    figure, axes = _figure(rows, columns, width=max(2.1 * columns, 3) + 0.9, height=2.2 * rows + 0.3)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, axis in zip(range(layers * channels), axes.flat):
        layer, channel = divmod(number, channels)
        image = axis.imshow(
            scale[layer, channel], cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, interpolation="nearest"
        )
        names = [f"layer {layer + 1}"] if per_step else ["all layers"]
        names += (
            [("red", "green", "blue")[channel] if channels == 3 else f"channel {channel + 1}"] if channels > 1 else []
        )
        axis.set_title(", ".join(names), fontsize=9)
    bar = figure.colorbar(
        image, ax=axes, label="exp(log_gamma)", shrink=0.9 if rows == 1 else min(0.9, 3.2 / (2.2 * rows))
    )
    bar.formatter.set_useOffset(False)  # 1.0001, not a 0.0001 with a + 1 somewhere
    return _png(figure)


def _scale_bars(scale, per_step):
    layers, values = scale.shape
    figure, axes = _figure(1, 1, width=max(3, min(0.5 * layers * values + 2, 9)), height=3)
    axis, width = axes.flat[0], 0.8 / values
    for value in range(values):
        axis.bar(
            np.arange(1, layers + 1) + (value - (values - 1) / 2) * width,
            scale[:, value] - 1,
            width,
            bottom=1,
            color=f"C{value % 10}",
            label=f"coordinate {value + 1}",
        )
    axis.axhline(1, color="0.4", linewidth=1)
    axis.set_xticks(range(1, layers + 1), range(1, layers + 1) if per_step else ["all layers"])
    axis.set_xlim(0.3, layers + 0.7)
    axis.set_xlabel("layer k" if per_step else "")
    axis.set_ylabel("exp(log_gamma)")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3, axis="y")
    if values > 1:
        axis.legend(frameon=False, fontsize=9)
    return _png(figure)


def _tiled(images, columns):
    """uint8 images [N, C, H, W] on one canvas [rows (H + 1) + 1, columns (W + 1) + 1, C], grey lines between them."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 96, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas


def _figure(rows, columns, width, height):
    """A figure without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns))


def _png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return file.getvalue()

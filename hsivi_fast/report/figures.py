"""Pictures as PNG bytes: grids of samples, densities, and the curves of one run or of several.

They are drawn on white, so that they can be read on a page of any colour.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..metrics.table import TITLES, sampler_title, spread_key

GRID = 8  # columns of a grid of samples
PLANE = [[-2.7, 2.7], [-2.7, 2.7]]  # what is shown of it
# The columns of results.json that are drawn: the first that a row has.
DISTANCES = ("frechet_distance", "js_divergence", "sliced_wasserstein", "stein_discrepancy")
LOSSES = (("score network's loss", "loss_score_net"), ("student's loss", "loss_student"))
AXES = {"nfe": "network evaluations per sample", "images_per_second": "samples per second, each on its run's device"}
RGB = ("red", "green", "blue")


class Style(NamedTuple):
    """How a sampler of results.json is drawn."""

    marker: str
    filled: bool = True
    of_student: bool = False  # of the student or of what it starts as; the others are the teacher's


STYLES = {
    "ddim": Style("o"),
    "ddim_eta": Style("v", filled=False, of_student=True),
    "start": Style("<", filled=False, of_student=True),
    "ddpm": Style("^"),
    "dpmpp_2m": Style("s"),
    "dpmpp_3m": Style("h"),
    "unipc": Style("P"),
    "unipc_3": Style("X"),
    "deis": Style("<"),
    "deis_3": Style(">"),
    "ipndm": Style("p"),
    "base": Style("o"),
    "mean_field": Style("v"),
    "full_rank": Style("^"),
    "langevin": Style("s"),
    "particles": Style("P"),
    "single_layer": Style("d", of_student=True),
    "best": Style("*"),
    "hsivi_ema": Style("D", of_student=True),
    "hsivi_raw": Style("d", filled=False, of_student=True),
}


def is_of_student(row):
    """Whether a row of results.json is of the run's student, or of what that starts as, and not of its teacher."""
    return STYLES[row["sampler"]].of_student


def distance_column(row):
    """The key of the distance that is drawn of a row of results.json."""
    return next(column for column in DISTANCES if row.get(column) is not None)


# ---- samples ---------------------------------------------------------------------------------------------------------


def image_grid(images, columns=GRID):
    """uint8 images [N, C, H, W] in a grid, pixels enlarged so that an image is at least 48 wide."""
    scale = max(1, 48 // images.shape[3])
    picture = Image.fromarray(_tiled(images, columns))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def side_by_side(images):
    """{title: uint8 images [N, C, H, W]}, a grid each, side by side: one picture to show."""
    figure, axes = _figure(1, len(images), width=3.4 * len(images), height=3.7)
    for axis, (title, values) in zip(axes.flat, images.items()):
        axis.imshow(_tiled(values, GRID), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
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
        x, y = values.T.numpy()
        counts, _, _ = np.histogram2d(x, y, bins=120, range=PLANE)
        axis.imshow(np.sqrt(counts.T), origin="lower", cmap="magma", extent=[*PLANE[0], *PLANE[1]])
        axis.set_title(title, fontsize=9)
    return _png(figure)


def marginals(draws, names):
    """Densities of single parameters; draws: {title: array [N, D]}; names: of the first columns, which are shown."""
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure, axes = _figure(rows, columns, width=2.6 * columns + 0.8, height=2.1 * rows + 0.4)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for column, (axis, name) in enumerate(zip(axes.flat, names)):
        low, high = _range_of([values[:, column] for values in draws.values()])
        for number, (title, values) in enumerate(draws.items()):
            style = {"histtype": "stepfilled", "color": "0.8"} if title == "reference" else {"histtype": "step"}
            axis.hist(values[:, column], bins=60, range=(low, high), density=True, label=title, zorder=number, **style)
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    if len(draws) > 1:
        axes.flat[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def pair_densities(draws, names):
    """Densities of all pairs of parameters, a row a sampler; arguments as of `marginals`."""
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    if not pairs:  # a single parameter has none
        return marginals(draws, names)
    figure, axes = _figure(len(draws), len(pairs), width=2.3 * len(pairs) + 0.5, height=2.4 * len(draws) + 0.2)
    for column, (i, j) in enumerate(pairs):
        ranges = [_range_of([values[:, index] for values in draws.values()]) for index in (j, i)]
        for row, (title, values) in enumerate(draws.items()):
            axis = axes[row, column] if axes.ndim == 2 else axes.flat[row * len(pairs) + column]
            _show_density(axis, values[:, [j, i]], ranges, f"{title}: {names[j]}, {names[i]}")
    return _png(figure)


def bridge_layers(states):
    """The states of a sampler in the plane, x_K first; states: [x_0, ..., x_K], each an array [N, 2]."""
    if states[0].shape[1] < 2:
        named = {f"x_{k}": points for k, points in reversed([*enumerate(states)])}
        return marginals(named, ["x"])
    figure, axes = _figure(1, len(states), width=2.1 * len(states), height=2.4)
    ranges = [_range_of([points[:, index] for points in states]) for index in (0, 1)]
    for axis, (k, points) in zip(axes.flat, reversed([*enumerate(states)])):
        _show_density(axis, points, ranges, f"x_{k}")
    return _png(figure)


def _show_density(axis, points, ranges, title):
    counts, _, _ = np.histogram2d(*points.T, bins=80, range=ranges)
    extent = [value for limits in ranges for value in limits]
    axis.imshow(np.sqrt(counts.T), origin="lower", cmap="magma", extent=extent, aspect="auto")
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _range_of(columns):
    """Where nearly all values of some arrays [N] are, with a little room."""
    low, high = np.quantile(np.concatenate(columns), [0.002, 0.998])
    room = 0.1 * (high - low) or 1.0
    return low - room, high + room


def _tiled(images, columns):
    """uint8 images [N, C, H, W] on one canvas [rows (H + 1) + 1, columns (W + 1) + 1, C], grey lines between them.

    Where C = 1 the canvas is without it.
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 96, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + 1) + 1, column * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas[:, :, 0] if channels == 1 else canvas


# ---- distances -------------------------------------------------------------------------------------------------------


def distance_against_nfe(rows):
    """The distance of one run's samplers (rows of results.json) against their evaluations."""
    return distance_curves({"": rows}, "nfe")


def distance_curves(results, key, colors=None):
    """Distances of samplers against `key`, "nfe" or "images_per_second".

    results: {label: rows of results.json, all of one metric}; colors: {label: color}.
    A sampler with several rows (the teacher's) is a line, one with a single row (a student) a point. What is the
    teacher's alone is grey.
    """
    column = distance_column(next(iter(results.values()))[0])
    figure, axes = _figure(1, 1, width=6.4, height=4)
    axis = axes.flat[0]
    drawn, greys = 0, 0
    for label, rows in results.items():
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            if STYLES[sampler].of_student:
                color = (colors or {}).get(label, f"C{drawn % 10}")
            else:
                color = str(0.2 + 0.15 * (greys % 4))
                greys += 1
            name = sampler_title(sampler)
            _draw_sampler(
                axis,
                [row for row in rows if row["sampler"] == sampler],
                key,
                column,
                color=color,
                label=f"{label}: {name}" if label else name,
            )
            drawn += 1
    axis.set_xscale("log")
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    if key == "nfe":
        ticks = sorted({row["nfe"] for rows in results.values() for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axis.set_xlabel(AXES[key])
    axis.set_ylabel(TITLES[column])
    axis.grid(alpha=0.3, which="both")
    if drawn > 5:
        figure.set_size_inches(6.4, 3.8 + 0.2 * -(-drawn // 2))
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    else:
        axis.legend(frameon=False, fontsize=9)
    return _png(figure)


def _draw_sampler(axis, rows, key, column, color, label):
    """The rows of one sampler, with their standard deviations."""
    style = STYLES[rows[0]["sampler"]]
    rows = sorted(rows, key=lambda row: row[key])
    axis.errorbar(
        [row[key] for row in rows],
        [row[column] for row in rows],
        yerr=[row.get(spread_key(column)) or 0 for row in rows],
        capsize=3,
        color=color,
        marker=style.marker,
        markersize=7,
        markerfacecolor=color if style.filled else "white",
        linestyle="-" if len(rows) > 1 else "none",
        linewidth=1.4,
        label=label,
    )


# ---- training --------------------------------------------------------------------------------------------------------


def loss_curves(metrics):
    """The losses of one run, and the distance where it was measured; metrics: records of metrics.jsonl."""
    panels = list(LOSSES)
    if any(record.get("loss_start") is not None for record in metrics):
        panels.insert(0, ("start's loss", "loss_start"))
    if any(record.get("metric") is not None for record in metrics):
        panels.append(("distance during training", "metric"))
    return curves({"": metrics}, panels)


def curves(runs, panels, x="step", x_title="step", colors=None):
    """Values of {label: records} against the records' `x`, in a panel each.

    panels: [(title, key of a record)]; colors: {label: color}. Records without the key are passed over.
    """
    legend_height = 0.22 * len(runs) if len(runs) > 1 else 0
    figure, axes = _figure(1, len(panels), width=max(4.2 * len(panels), 5), height=3.3 + legend_height)
    for axis, (title, key) in zip(axes.flat, panels):
        for number, (label, records) in enumerate(runs.items()):
            points = [(record[x], record[key]) for record in records if None not in (record.get(x), record.get(key))]
            if points:
                axis.plot(
                    *zip(*points),
                    marker="o" if len(points) < 30 else None,
                    markersize=3.5,
                    color=(colors or {}).get(label, f"C{number % 10}"),
                    linestyle=("-", "--", ":")[number // 10 % 3],
                    label=label,
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x_title)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        _add_legend_below(figure, axes)
    return _png(figure)


def _add_legend_below(figure, axes):
    """One legend for all panels, each label once."""
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles[label] = handle
    columns = 3 if axes.size > 1 else 2
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


# ---- the noise scale -------------------------------------------------------------------------------------------------


def log_gamma_picture(log_gamma, per_step, per_pixel, bottom=1):
    """The learned noise scale exp(log_gamma) as factors on DDIM's noise: 1 is where training starts.

    bottom: what bars begin at, 0 for scales that are no factors.

    log_gamma: an array [1], [K], [*event] or [K, *event], as `per_step` and `per_pixel` say.
    With events [C, H, W] it is a heat map for each layer and channel under one colour scale; otherwise bars, one a
    layer.
    """
    scale = np.exp(np.asarray(log_gamma, dtype=np.float64))
    if not per_step:
        scale = scale[None]
    if per_pixel and scale.ndim == 4:
        return _scale_maps(scale, per_step)
    return _scale_bars(scale.reshape(len(scale), -1), per_step, bottom)


def _scale_maps(scale, per_step):
    """Heat maps of [K or 1, C, H, W]."""
    layers, channels = scale.shape[:2]
    columns = channels if channels > 1 else min(layers, 5)
    rows = -(-layers * channels // columns)
    reach = max(float(np.nanmax(np.abs(scale - 1))), 1e-6)  # the colours' middle is 1
    figure, axes = _figure(rows, columns, width=max(2.1 * columns, 3) + 0.9, height=2.2 * rows + 0.3)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, axis in zip(range(layers * channels), axes.flat):
        layer, channel = divmod(number, channels)
        values = scale[layer, channel]
        image = axis.imshow(values, cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, interpolation="nearest")
        title = f"layer {layer + 1}" if per_step else "all layers"
        if channels > 1:
            title += f", {_channel_name(channel, channels)}"
        axis.set_title(title, fontsize=9)
    shrink = 0.9 if rows == 1 else min(0.9, 3.2 / (2.2 * rows))
    bar = figure.colorbar(image, ax=axes, label="exp(log_gamma)", shrink=shrink)
    bar.formatter.set_useOffset(False)  # 1.0001, not a 0.0001 with a + 1 somewhere
    return _png(figure)


def _channel_name(channel, channels):
    return RGB[channel] if channels == 3 else f"channel {channel + 1}"


def _scale_bars(scale, per_step, bottom):
    """Bars of [K or 1, values of a layer]."""
    layers, values = scale.shape
    figure, axes = _figure(1, 1, width=max(3, min(0.5 * layers * values + 2, 9)), height=3)
    axis, width = axes.flat[0], 0.8 / values
    for value in range(values):
        axis.bar(
            np.arange(1, layers + 1) + (value - (values - 1) / 2) * width,
            scale[:, value] - bottom,
            width,
            bottom=bottom,
            color=f"C{value % 10}",
            label=f"coordinate {value + 1}",
        )
    axis.axhline(bottom, color="0.4", linewidth=1)
    axis.set_xticks(range(1, layers + 1), range(1, layers + 1) if per_step else ["all layers"])
    axis.set_xlim(0.3, layers + 0.7)
    axis.set_xlabel("layer k" if per_step else "")
    axis.set_ylabel("exp(log_gamma)")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3, axis="y")
    if values > 1:
        axis.legend(frameon=False, fontsize=9)
    return _png(figure)


# ---- matplotlib ------------------------------------------------------------------------------------------------------


def _figure(rows, columns, width, height):
    """A figure without pyplot's global state, and its axes [rows, columns]."""
    from matplotlib.figure import Figure  # late: it takes half a second, and grids of images do without it

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns))


def _png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)  # the layout leaves no margins, and a tight box would draw twice
    return file.getvalue()

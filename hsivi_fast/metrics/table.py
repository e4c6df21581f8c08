"""The table of a run: what its columns and samplers are called, and its rows as text."""

TITLES = {
    "frechet_distance": "Frechet distance",
    "kernel_inception_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "f_score": "F-score",
    "js_divergence": "JS divergence",
    "sliced_wasserstein": "sliced Wasserstein",
    "mean_error": "means",
    "std_error": "deviations",
    "correlation_error": "correlations",
    "energy_distance": "energy distance",
    "stein_discrepancy": "Stein discrepancy",
}
SAMPLERS = {
    "ddim": "DDIM",
    "ddim_eta": "start (DDIM, run's eta)",
    "start": "start (teacher's paths)",
    "ddpm": "DDPM (ancestral)",
    "dpmpp_2m": "DPM-Solver++(2M)",
    "dpmpp_3m": "DPM-Solver++(3M)",
    "unipc": "UniPC",
    "unipc_3": "UniPC-3",
    "deis": "DEIS",
    "deis_3": "DEIS-3",
    "ipndm": "iPNDM",
    "best": "best solver",
    "base": "Gaussian base",
    "mean_field": "mean-field Gaussian",
    "full_rank": "full-rank Gaussian",
    "langevin": "Langevin chains",
    "single_layer": "one layer (SIVI-SM)",
    "particles": "particles (SMC)",
    "hsivi_ema": "HSIVI (EMA)",
    "hsivi_raw": "HSIVI (raw)",
}
SPACINGS = {"linspace": "even spacing", "karras": "Karras", "logsnr": "log-SNR", "run": "run's spacing"}


def sampler_title(name):
    """What a sampler of results.json is called in tables and pictures."""
    return SAMPLERS.get(name, name)


def row_title(row):
    """What the sampler of a row is called: with the solver and the spacing, where these are not the usual ones."""
    parts = [sampler_title(row[key]) for key in ("sampler", "solver") if row.get(key) is not None]
    title = ": ".join(parts)
    if row["sampler"] == "start" and "gradient_evaluations" in row:  # a run with a target has no teacher
        title = "start (bridge's paths)"
    return title if row.get("spacing") is None else f"{title}, {SPACINGS.get(row['spacing'], row['spacing'])}"


def spread_key(column):
    """The key of a column's standard deviation over seed sets: frechet_distance -> frechet_std, and so on."""
    return column.removesuffix("_distance").removesuffix("_divergence") + "_std"


def table_lines(rows):
    """Rows of results.json as lists of cells, the heading first: it says on how many samples a set was measured."""
    columns = [column for column in TITLES if rows[0].get(column) is not None]
    counts = sorted({row["num_samples"] for row in rows})
    counts = " and ".join(f"{count:,}" for count in counts)
    drawn = "points" if "js_divergence" in columns else "draws" if "stein_discrepancy" in columns else "images"
    of_target = ["gradients"] if any("gradient_evaluations" in row for row in rows) else []
    rate = "draws/s" if drawn == "draws" else "images/s"
    lines = [[f"sampler, on {counts} {drawn}", "NFE", *of_target, *[TITLES[column] for column in columns], rate]]
    for row in rows:
        gradients = [_thousands(row.get("gradient_evaluations"))] if of_target else []
        nfe = f"{row['nfe']} ({row['evaluations']} distinct)" if row.get("evaluations") is not None else str(row["nfe"])
        cells = [_cell(row, column) for column in columns]
        lines.append([row_title(row), nfe, *gradients, *cells, f"{row['images_per_second']:.0f}"])
    return lines


def _thousands(count):
    return "" if count is None else f"{count / 1000:,.0f} k"


def _cell(row, column):
    spread, digits = row.get(spread_key(column)), 2 if column == "frechet_distance" else 4
    return f"{row[column]:.{digits}f}" + (f" +- {spread:.{digits}f}" if spread is not None else "")


def format_table(rows):
    """Rows as aligned text for a terminal."""
    lines = table_lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for name, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        text.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(text)

"""The tables and the picture of bench/README.md, from the results files.

    python -m bench.report            writes the tables into bench/README.md and draws two pictures into bench/results
    python -m bench.report --print    prints the tables; of other files too, as in --print runs/h100/*.jsonl

A table stands in bench/README.md between `<!-- table NAME -->` and `<!-- end -->`, where NAME is the stem of a file in
bench/results: of rows (NAME.jsonl), or of a run's own table (NAME.json). What kind of table it is says the word before
the device. The page is held to the files by tests/bench/test_bench_figures.py.
"""

import io
import json
import math
import sys
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from matplotlib.figure import Figure

from bench import breakdown, density, error_sources, quality, recipe, scaling, solvers, time_to_quality, trace
from bench.breakdown import REST
from bench.measure import read_records
from bench.options import command_line
from bench.tables import Column, filled, markdown, markdown_table, peak_megabytes, table_names
from hsivi_fast.metrics.table import sampler_title, table_lines
from hsivi_fast.report.figures import distance_against_nfe

README = Path(__file__).resolve().parent / "README.md"
RESULTS = README.parent / "results"


def decimals(value):
    """How many decimals tell seconds apart: three digits of them, and at least one decimal."""
    return 2 if value <= 0 else min(5, max(1, 2 - math.floor(math.log10(value))))


def seconds(row, side, spread):
    """A side's seconds with their spread, as "27.2 (26.9 to 28.2)"."""
    low, high = row[f"{side}_{spread}"]
    digits = decimals(row[side])
    return f"{row[side]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def our_quartiles(row):
    """Our seconds with their quartiles."""
    return seconds(row, "ours", "quartiles")


def published_quartiles(row):
    """The published side's seconds with their quartiles."""
    return seconds(row, "published", "quartiles")


def our_range(row):
    """Our seconds with their range."""
    return seconds(row, "ours", "range")


def published_range(row):
    """The published side's seconds with their range."""
    return seconds(row, "published", "range")


def compiling(row):
    """Seconds of compiling and recording, if there were any."""
    return f"{row['preparing_seconds']:.0f}" if row["preparing_seconds"] else "-"


def memory_and_energy(rows):
    """Peak memory of both sides and, where a row has it, joules."""
    columns = [Column("MB at most, ours / published", peak_megabytes)]
    if any(row["joules_per_image"] is not None for row in rows):
        columns.append(Column("joules an image", "{joules_per_image:.2f}", needs="joules_per_image"))
    return columns


def shares(rows):
    """Our rate as a share of a product's and, where the rows have it, of a copy's."""
    columns = [Column("of a matrix product's rate", "{utilisation:.0%}")]
    if all("share_of_copy" in row for row in rows):
        columns.append(Column("of a copy's rate", "{share_of_copy:.0%}"))
    return columns


def train_step_columns(rows):
    """The columns of a table of training cycles."""
    return [
        Column("case", "`{case}`"),
        *([Column("batch", "{batch}")] if len({row["batch"] for row in rows}) > 1 else []),
        Column("seconds a cycle (quartiles)", our_quartiles),
        Column("published", published_quartiles),
        Column("ratio", "**{ratio:.2f}**"),
        Column("counted", "{counted_ratio:.2f}"),
        Column("network calls", "{ours_network_calls:.0f} / {published_network_calls:.0f}"),
        *shares(rows),
        Column("compiling, s", compiling),
        *memory_and_energy(rows),
    ]


def sampling_columns(rows):
    """The columns of a table of sampling."""
    return [
        Column("case", "`{case}`"),
        Column("our batch", "{batch}"),
        Column("seconds (range)", our_range),
        Column("published", published_range),
        Column("ratio", "**{ratio:.2f}**"),
        Column("images/s", "{ours_images_per_second:.1f}"),
        Column("largest difference", "{difference:.1e}"),
        *shares(rows),
        Column("compiling, s", compiling),
        *memory_and_energy(rows),
    ]


def fid_columns(rows):
    """The columns of a table of distances."""
    return [
        Column("features", "{features}"),
        Column("seconds without features (range)", our_range),
        Column("published", published_range),
        Column("ratio", "**{ratio:.1f}**"),
        Column("of ours, the distance itself", "{ours_distance_seconds:.2g}"),
    ]


def ablation_columns(rows):
    """The columns of a table of techniques."""
    return [
        Column("technique", "{case}"),
        Column("seconds", lambda row: f"{row['ours']:.{decimals(row['ours'])}f}"),
        Column("added to", "{against}", needs="against"),
        Column("against that", "{ratio_against:.2f}", needs="ratio_against"),
        Column("against published", "{ratio:.2f}"),
        Column("counted", "{counted_ratio:.2f}", needs="counted_ratio"),
        Column("compiling, s", compiling),
    ]


def start_columns(rows):
    """The columns of a table of starts."""
    return [
        Column("command", "`{case}`"),
        Column("seconds (range)", "{ours:.2f} ({ours_range[0]:.2f} to {ours_range[1]:.2f})"),
    ]


def breakdown_columns(rows):
    """The columns of a table of shares."""
    return [
        Column("part", "{case}"),
        Column("seconds", "{seconds:.2f}"),
        *breakdown.share_columns(rows[0]["shares"]),
    ]


def scaling_columns(rows):
    """The columns of a table of ranks on one machine."""
    return scaling.COLUMNS


def ops_columns(rows):
    """The columns of a table of operations; with rates, where they were set against a copy's."""
    columns = [
        Column("operation", "{case}"),
        Column("ours", "{ours:.0f}"),
        Column("eager", "{published:.0f}"),
        Column("torch.compile", "{compiled:.0f}", needs="compiled"),
    ]
    if any(row["share_of_copy"] is not None for row in rows):
        columns.append(Column("GB/s", "{gigabytes_per_second:.0f}"))
        columns.append(Column("of a copy", "{share_of_copy:.0%}", needs="share_of_copy"))
    return columns


def trace_columns(rows):
    """The columns of a table of a GPU's kernels: milliseconds of each kind, and those of the model in brackets."""

    def of_kind(*kinds):
        def cell(row):
            found = [kind for kind in row["kinds"] if kind["kind"] in kinds]
            return f"{sum(kind['ms'] for kind in found):.2f} ({sum(kind['model_ms'] for kind in found):.2f})"

        return cell

    shown = {  # title -> kinds; rows of the first day have convolutions and products apart
        trace.PRODUCTS: ("convolution", "matrix product", trace.PRODUCTS),
        "normalisation, SiLU": ("normalisation, SiLU",),
        "attention": ("attention",),
        trace.ELEMENTWISE: (trace.ELEMENTWISE, REST),
        "optimizer": (trace.OPTIMIZER,),
        trace.GAPS: (trace.GAPS,),
    }
    whole = Column("ms (model)", lambda row: f"{1e3 * row['seconds']:.2f} ({1e3 * row['model_seconds']:.2f})")
    return [Column("part, batch", "{case}"), whole, *(Column(title, of_kind(*kinds)) for title, kinds in shown.items())]


KINDS = {  # how the stem of a results file begins -> the columns of its rows
    "train_step": train_step_columns,
    "sampling": sampling_columns,
    "fid": fid_columns,
    "ablation": ablation_columns,
    "start": start_columns,
    "breakdown": breakdown_columns,
    "scaling": scaling_columns,
    "ops": ops_columns,
    "trace": trace_columns,
}


STUDIES = {  # the stem of a results file -> how its rows are summed up, and the columns of that
    "quality": (quality.summary, lambda rows: quality.COLUMNS),
    "recipe": (recipe.summary, lambda rows: recipe.COLUMNS),
    "density": (density.summary, lambda rows: density.COLUMNS),
    "time_to_quality": (time_to_quality.summary, lambda rows: time_to_quality.COLUMNS),
    "error_sources": (error_sources.summary, lambda rows: error_sources.COLUMNS),
    "solvers": (solvers.summary, solvers.columns),
    "solvers_mnist": (solvers.summary, solvers.columns),
}


def table(name, rows):
    """The table of a results file with this stem, as Markdown. Raises ValueError for a stem of no kind."""
    if name in STUDIES:
        summary, columns = STUDIES[name]
        return markdown_table(summary(rows), columns(rows))
    for kind, columns in KINDS.items():
        if name.startswith(kind):
            rows = [row for row in rows if "failed" not in row]
            return markdown_table(rows, columns(rows))
    raise ValueError(
        f"{name}: no kind of table; its name must begin with one of {', '.join(KINDS)}, {', '.join(STUDIES)}"
    )


def run_table(rows):
    """The table that a run ends with (its results.json), as Markdown."""
    titles, *lines = table_lines(rows)
    return markdown(titles, [_shown(row["sampler"], line) for row, line in zip(rows, lines)])


def mnist_table(rows):
    """The distances of two runs on MNIST, a line a sampler and a column a number of evaluations."""
    cells = {}
    for row in rows:
        cells[row["sampler"], row["nfe"]] = f"{row['frechet_distance']:.1f} +- {row['frechet_std']:.1f}"
    counts = sorted({nfe for _, nfe in cells})
    lines = []
    for name in dict.fromkeys(name for name, _ in cells):
        lines.append(_shown(name, [sampler_title(name), *(cells.get((name, nfe), "") for nfe in counts)]))
    return markdown(["sampler", *(f"{nfe} evaluations" for nfe in counts)], lines)


def _shown(sampler, cells):
    """A line of a run's table: bold where it is the sampler that a run is for."""
    return [f"**{cell}**" if cell and sampler == "hsivi_ema" else cell for cell in cells]


def table_of_results(name):
    """The table of the file of this stem in bench/results."""
    if name == "evaluations":
        return markdown(*recipe.by_evaluations(_good_rows("recipe"), _good_rows("solvers")))
    if name == "mnist":
        return mnist_table(_mnist_rows())
    if (RESULTS / f"{name}.json").is_file():
        return run_table(run_rows(name))
    return table(name, read_records(RESULTS / f"{name}.jsonl"))


def _mnist_rows():
    """Those of both runs on MNIST, a sampler and number of evaluations once."""
    rows = {(row["sampler"], row["nfe"]): row for name in ("mnist_nfe5", "mnist") for row in run_rows(name)}
    return sorted(rows.values(), key=lambda row: row["nfe"])


def run_rows(name):
    """The rows of a run's own table in bench/results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def picture(device):
    """PNG bytes: how many times as fast as published, measured beside counted; and what each technique adds."""
    techniques = [row for row in _good_rows(f"ablation_{device}") if row["against"]]
    figure = Figure(figsize=(14, max(4.6, 1 + 0.2 * len(techniques))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_ratios(left, [*_good_rows(f"train_step_{device}"), *_good_rows(f"sampling_{device}")][::-1])
    _draw_techniques(right, techniques[::-1])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _good_rows(name):
    """The rows of a results file whose checks held; none where there is no such file."""
    file = RESULTS / f"{name}.jsonl"
    return [row for row in read_records(file) if "failed" not in row] if file.is_file() else []


def _draw_ratios(axes, rows):
    axes.barh([row["case"] for row in rows], [row["ratio"] for row in rows], color="tab:blue", label="measured")
    counted = [row["counted_ratio"] for row in rows]
    mark = {"color": "black", "markersize": 16, "markeredgewidth": 2}
    axes.plot(counted, range(len(rows)), "|", **mark, label="counted work")
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_xlabel("times as fast as the published step or sampler")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _draw_techniques(axes, rows):
    names = [f"{row['case']}, added to {row['against']}" for row in rows]
    colors = ["tab:green" if row["ratio_against"] >= 1 else "tab:red" for row in rows]
    axes.barh(names, [row["ratio_against"] for row in rows], color=colors)
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_xlabel("times as fast as without it")
    axes.tick_params(axis="y", labelsize=8)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--print", action="store_true", help="print the tables of the files instead")
    text = "whose results the picture shows: train_step_DEVICE.jsonl and so on"
    parser.add_argument("--device", default="cpu", help=text)
    text = "results files to print; all tables of bench/README.md by default"
    parser.add_argument("files", nargs="*", type=Path, help=text)
    arguments = parser.parse_args()
    if arguments.print:
        for name in [] if arguments.files else table_names(README.read_text()):
            print(f"{name}\n\n{table_of_results(name)}")
        for file in arguments.files:
            print(f"{file.stem}\n\n{table(file.stem, read_records(file))}")
        return 0
    README.write_text(filled(README.read_text(), table_of_results))
    (RESULTS / "speed.png").write_bytes(picture(arguments.device))
    (RESULTS / "mnist_distance_vs_nfe.png").write_bytes(distance_against_nfe(_mnist_rows()))
    courses = _good_rows("time_to_quality")
    if courses:
        (RESULTS / "time_to_quality.png").write_bytes(time_to_quality.picture(courses, _good_rows("solvers")))
    return 0


if __name__ == "__main__":
    sys.exit(main())

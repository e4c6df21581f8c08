"""The README's tables and its picture, from the results files.

    python -m bench.report            writes the tables into README.md and draws bench/results/speed.png
    python -m bench.report --print    prints the tables, of other files too: python -m bench.report --print runs/h100/*.jsonl

A table stands in the README between `<!-- table NAME -->` and `<!-- end -->`, where NAME is the stem of a file in bench/results; what kind of table it is says the word before
the device. tests/test_bench.py holds the README to the files.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from . import quality
from . import scaling as scaling_of_ranks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PLACE = re.compile(r"<!-- table ([a-z0-9_]+) -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)


def seconds(row, spread):
    """ "27.2 (26.9 to 28.2)"."""
    digits = 2 if row["ours"] < 10 else 1
    return f"{row[spread.partition('_')[0]]:.{digits}f} ({row[spread][0]:.{digits}f} to {row[spread][1]:.{digits}f})"


def train_step(rows):
    return {
        "case": lambda r: f"`{r['case']}`",
        "seconds a cycle (quartiles)": lambda r: seconds(r, "ours_quartiles"),
        "published": lambda r: seconds(r, "published_quartiles"),
        "ratio": lambda r: f"**{r['ratio']:.2f}**",
        "counted": lambda r: f"{r['counted_ratio']:.2f}",
        "network calls": lambda r: f"{r['ours_network_calls']:.0f} / {r['published_network_calls']:.0f}",
        "of a matrix product's rate": lambda r: f"{r['utilisation']:.0%}",
        "compiling, s": lambda r: f"{r['preparing_seconds']:.0f}" if r["preparing_seconds"] else "-",
        **_memory_and_energy(rows),
    }


def sampling(rows):
    return {
        "case": lambda r: f"`{r['case']}`",
        "our batch": lambda r: r["batch"],
        "seconds (range)": lambda r: seconds(r, "ours_range"),
        "published": lambda r: seconds(r, "published_range"),
        "ratio": lambda r: f"**{r['ratio']:.2f}**",
        "images/s": lambda r: f"{r['ours_images_per_second']:.1f}",
        "largest difference": lambda r: f"{r['difference']:.1e}",
        "of a matrix product's rate": lambda r: f"{r['utilisation']:.0%}",
        "compiling, s": lambda r: f"{r['preparing_seconds']:.0f}" if r["preparing_seconds"] else "-",
        **_memory_and_energy(rows),
    }


def fid(rows):
    return {
        "features": lambda r: r["features"],
        "seconds without features (range)": lambda r: seconds(r, "ours_range"),
        "published": lambda r: seconds(r, "published_range"),
        "ratio": lambda r: f"**{r['ratio']:.1f}**",
        "of ours, the distance itself": lambda r: f"{r['ours_distance_seconds']:.2f}",
    }


def ablation(rows):
    return {
        "technique": lambda r: r["case"],
        "seconds": lambda r: f"{r['ours']:.2f}",
        "added to": lambda r: r["against"] or "-",
        "against that": lambda r: f"{r['ratio_against']:.2f}" if r["against"] else "-",
        "against published": lambda r: f"{r['ratio']:.2f}",
        "counted": lambda r: f"{r['counted_ratio']:.2f}",
        "compiling, s": lambda r: f"{r['preparing_seconds']:.0f}" if r["preparing_seconds"] else "-",
    }


def start(rows):
    return {
        "command": lambda r: f"`{r['case']}`",
        "seconds (range)": lambda r: f"{r['ours']:.2f} ({r['ours_range'][0]:.2f} to {r['ours_range'][1]:.2f})",
    }


def breakdown(rows):
    return {
        "part": lambda r: r["case"],
        "seconds": lambda r: f"{r['seconds']:.2f}",
        **{kind: lambda r, kind=kind: f"{r['shares'][kind]:.1%}" for kind in rows[0]["shares"]},
    }


def scaling(rows):
    return scaling_of_ranks.COLUMNS


def _memory_and_energy(rows):
    """Peak memory of both sides and, on a GPU, joules."""
    columns = {
        "MB at most, ours / published": lambda r: (
            f"{r['ours_peak_bytes'] / 1e6:.0f} / {r['published_peak_bytes'] / 1e6:.0f}"
        )
    }
    if any(row["joules_per_image"] is not None for row in rows):
        columns["joules an image"] = lambda r: "-" if r["joules_per_image"] is None else f"{r['joules_per_image']:.2f}"
    return columns


def markdown(name, rows):
    """The table of a results file with this stem, as markdown."""
    kind = (
        next(
            kind
            for kind in (train_step, sampling, fid, ablation, start, breakdown, scaling)
            if name.startswith(kind.__name__)
        )
        if name != "quality"
        else None
    )
    if kind is None:
        rows, columns = quality.summary(rows), quality.COLUMNS
    else:
        rows = [row for row in rows if "failed" not in row]
        columns = kind(rows)
    lines = [list(columns), ["---"] * len(columns), *[[str(cell(row)) for cell in columns.values()] for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_rows(file):
    """The rows of a results file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def filled(readme):
    """The README with every table as its file has it."""
    return PLACE.sub(
        lambda match: (
            f"<!-- table {match[1]} -->\n{markdown(match[1], read_rows(RESULTS / f'{match[1]}.jsonl'))}<!-- end -->"
        ),
        readme,
    )


def picture(device):
    """PNG bytes: how many times as fast as published, measured beside counted; and what each technique adds."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [
        row
        for stem in ("train_step", "sampling")
        if (RESULTS / f"{stem}_{device}.jsonl").is_file()
        for row in read_rows(RESULTS / f"{stem}_{device}.jsonl")
        if "failed" not in row
    ][::-1]
    left.barh([row["case"] for row in rows], [row["ratio"] for row in rows], color="tab:blue", label="measured")
    left.plot(
        [row["counted_ratio"] for row in rows],
        range(len(rows)),
        "|",
        color="black",
        markersize=16,
        markeredgewidth=2,
        label="counted work",
    )
    left.axvline(1, color="0.5", linewidth=0.8)
    left.set_xlabel("times as fast as the published step or sampler")
    left.legend(frameon=False, loc="lower right")
    rows = [row for row in read_rows(RESULTS / f"ablation_{device}.jsonl") if row["against"]][::-1]
    colors = ["tab:green" if row["ratio_against"] >= 1 else "tab:red" for row in rows]
    right.barh(
        [f"{row['case']}\nto {row['against']}" for row in rows], [row["ratio_against"] for row in rows], color=colors
    )
    right.axvline(1, color="0.3", linewidth=0.8)
    right.set_xlabel("times as fast as without it")
    right.tick_params(axis="y", labelsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the tables of the files instead")
    parser.add_argument(
        "--device", default="cpu", help="whose results the picture shows: train_step_DEVICE.jsonl and so on"
    )
    parser.add_argument(
        "files", nargs="*", type=Path, help="results files to print; all tables of the README by default"
    )
    arguments = parser.parse_args()
    if arguments.print:
        for file in arguments.files or [
            RESULTS / f"{name}.jsonl" for name in PLACE.findall((ROOT / "README.md").read_text())
        ]:
            print(f"{file.stem}\n\n{markdown(file.stem, read_rows(file))}")
        return 0
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    (RESULTS / "speed.png").write_bytes(picture(arguments.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())

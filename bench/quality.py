"""Does the faster way train as well? Runs that differ in one technique alone, at equal updates, over several seeds.

    python -m bench.quality --json bench/results/quality.jsonl --processes 2     about half an hour on 2 cores
    python -m bench.quality --json bench/results/quality.jsonl --table           the table of the rows that are there

`fresh`, `pooled` and `pooled` with redraw 4 on the three targets in the plane (5 seeds) and on digits (3 seeds, half the quick start's run); `pooled` in bfloat16 against
float32 on digits. One thread a run, so that a result does not depend on what else runs. The command can be stopped and given again: finished runs are not repeated,
and one that was interrupted goes on from its checkpoint.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import statistics
import sys
from pathlib import Path

import torch

from hsivi_fast import load_config, train

from .measure import describe, table, write_rows

PLANE = [
    "train.steps=4000",
    "train.f_learning_times=20",
    "eval.every=1000",
    "eval.num_samples=20000",
    "eval.seeds=3",
    "eval.ddim_nfe=[5]",
]
DIGITS = [
    "train.steps=250",
    "eval.every=50",
    "eval.num_samples=2000",
    "eval.seeds=1",
    "eval.ddim_nfe=[5]",
    "save_every=50",
]
STUDIES = {  # name -> (config, overrides, seeds, metric)
    "checkerboard": ("toy2d", [*PLANE, "teacher.target=checkerboard"], 5, "js_divergence"),
    "ring": ("toy2d", [*PLANE, "teacher.target=ring"], 5, "js_divergence"),
    "swiss_roll": ("toy2d", [*PLANE, "teacher.target=swiss_roll"], 5, "js_divergence"),
    "digits": ("digits", DIGITS, 3, "frechet_distance"),
}
VARIANTS = {  # name -> (what it is compared with, overrides)
    "fresh": (None, ["rollout.mode=fresh", "rollout.redraw=1"]),
    "pooled": ("fresh", ["rollout.mode=pooled", "rollout.redraw=1"]),
    "pooled, redraw 4": ("fresh", ["rollout.mode=pooled", "rollout.redraw=4"]),
    "pooled, bf16": ("pooled", ["rollout.mode=pooled", "rollout.redraw=1", "precision=bf16"]),
}


def all_runs():
    """(study, variant, seed) of every run, a seed of everything before the next seed."""
    most = max(seeds for _, _, seeds, _ in STUDIES.values())
    return [
        (study, variant, seed)
        for seed in range(most)
        for study, (_, _, seeds, _) in STUDIES.items()
        if seed < seeds
        for variant in VARIANTS
        if study == "digits" or "bf16" not in variant
    ]


def one_run(study, variant, seed, outdir):
    """Train, or finish, one run and return its row."""
    torch.set_num_threads(1)
    config, overrides, _, metric = STUDIES[study]
    settings = load_config(config, [*overrides, *VARIANTS[variant][1], f"seed={seed}", "device=cpu"])
    folder = train(settings, Path(outdir) / f"{study}_{variant.replace(', ', '_').replace(' ', '')}_{seed}")
    rows = {row["sampler"]: row for row in folder.read_json("results.json")}
    records = folder.metrics()
    return {
        "study": study,
        "variant": variant,
        "seed": seed,
        "metric": metric,
        "steps": settings.train.steps,
        "value": rows["hsivi_ema"][metric],
        "raw": rows["hsivi_raw"][metric],
        "start": rows["ddim_eta"][metric],
        "ddim": rows["ddim"][metric],
        "seconds": records[-1]["seconds"],
        "course": [[record["step"], record["metric"]] for record in records if record.get("metric") is not None],
        **describe(torch.device("cpu")),
    }


def summary(rows):
    """One dict a study and variant: mean and standard error over the seeds, and of the differences, seed by seed, from what it is compared with, in percent."""
    lines = []
    for study in STUDIES:
        for variant, (reference, _) in VARIANTS.items():
            values = {row["seed"]: row for row in rows if row["study"] == study and row["variant"] == variant}
            if not values:
                continue
            base = {row["seed"]: row["value"] for row in rows if row["study"] == study and row["variant"] == reference}
            paired = [100 * (row["value"] / base[seed] - 1) for seed, row in values.items() if seed in base]
            first = next(iter(values.values()))
            lines.append(
                {
                    "study": study,
                    "variant": variant,
                    "metric": first["metric"],
                    "seeds": len(values),
                    "steps": first["steps"],
                    "start": first["start"],
                    "reference": reference,
                    "value": _mean_and_error([row["value"] for row in values.values()]),
                    "difference": _mean_and_error(paired) if paired else None,
                }
            )
    return lines


def _mean_and_error(values):
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


COLUMNS = {
    "on": lambda r: r["study"],
    "rollout": lambda r: r["variant"],
    "seeds": lambda r: r["seeds"],
    "start": lambda r: f"{r['start']:.4f}",
    "end": lambda r: "{:.4f} +- {:.4f}".format(*r["value"]),
    "difference": lambda r: (
        "{:+.1f} % +- {:.1f} to {}".format(*r["difference"], r["reference"]) if r["difference"] else "-"
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json",
        type=Path,
        required=True,
        help="the rows, one JSON object a line; runs that are in it are not repeated",
    )
    parser.add_argument("--outdir", type=Path, default=Path("runs/quality"), help="where the runs themselves go")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--table", action="store_true", help="print the table of the rows that are there, and run nothing"
    )
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.json.read_text().splitlines()] if arguments.json.is_file() else []
    done = {(row["study"], row["variant"], row["seed"]) for row in rows}
    wanted = [] if arguments.table else [run for run in all_runs() if run not in done]
    with concurrent.futures.ProcessPoolExecutor(
        arguments.processes, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for future in concurrent.futures.as_completed([pool.submit(one_run, *run, arguments.outdir) for run in wanted]):
            rows.append(future.result())
            rows.sort(key=lambda row: all_runs().index((row["study"], row["variant"], row["seed"])))
            write_rows(arguments.json, rows)
            print(f"{len(rows)} of {len(all_runs())}: {rows[-1]['study']}", file=sys.stderr, flush=True)
    print(table(summary(rows), COLUMNS))


if __name__ == "__main__":
    sys.exit(main())

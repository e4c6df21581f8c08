"""Does the faster way train as well? Runs that differ in one technique alone, at equal updates, over several seeds.

    python -m bench.quality --json bench/results/quality.jsonl --processes 2     about half an hour on 2 cores
    python -m bench.quality --json bench/results/quality.jsonl --table           the table of the rows that are there

`fresh`, `pooled` and `pooled` with redraw 4 on the three targets in the plane (5 seeds) and on digits (3 seeds, half
the quick start's run); `pooled` in bfloat16 against float32 on digits. One thread a run, so that a result does not
depend on what else runs. The command can be stopped and given again: finished runs are not repeated, and one that was
interrupted goes on from its checkpoint.
"""

import concurrent.futures
import multiprocessing
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import describe, read_records, write_records
from bench.options import command_line
from bench.tables import Column, text_table
from hsivi_fast import load_config, train

# Both studies are of the recipe that was shipped before there was a start.
PLANE = [
    *("start.kind=ddim", "start.score_net_updates=0", "objective.match=knots", "eta=1.0", "train.student_lr=1e-3"),
    *("train.score_net_lr=1e-3", "save_every=1000"),
    "train.steps=4000",
    "train.f_learning_times=20",
    "eval.every=1000",
    "eval.num_samples=20000",
    "eval.seeds=3",
    "eval.ddim_nfe=[5]",
]
DIGITS = [
    *("start.kind=ddim", "start.score_net_updates=0", "objective.match=knots", "spacing=quad", "eta=0.6"),
    *("train.f_learning_times=5", "train.student_lr=5e-5", "train.score_net_lr=4e-4", "train.warmup=30"),
    *("log_every=10", "channels_last=false"),
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


@dataclass(frozen=True)
class Outcome:
    """What one run ended with: a line of the results file.

    value, raw: the averaged and the raw student's metric; start: that of the student as it starts; ddim: DDIM's.
    course: [[step, metric]] of the whole run; commit, device, versions: see `measure.describe`.
    """

    study: str
    variant: str
    seed: int
    metric: str
    steps: int
    value: float
    raw: float
    start: float
    ddim: float
    seconds: float
    course: list
    commit: str | None
    device: str
    versions: dict


def all_runs():
    """(study, variant, seed) of every run, a seed of everything before the next seed."""
    runs = []
    for seed in range(max(seeds for _, _, seeds, _ in STUDIES.values())):
        for study, (_, _, seeds, _) in STUDIES.items():
            if seed < seeds:
                variants = [variant for variant in VARIANTS if study == "digits" or "bf16" not in variant]
                runs += [(study, variant, seed) for variant in variants]
    return runs


def one_run(study, variant, seed, outdir):
    """Train, or finish, one run and return its outcome as a dict."""
    torch.set_num_threads(1)
    config, overrides, _, metric = STUDIES[study]
    settings = load_config(config, [*overrides, *VARIANTS[variant][1], f"seed={seed}", "device=cpu"])
    folder = train(settings, Path(outdir) / f"{study}_{variant.replace(', ', '_').replace(' ', '')}_{seed}")
    rows = {row["sampler"]: row for row in folder.read_json("results.json")}
    records = folder.metrics()
    outcome = Outcome(
        study,
        variant,
        seed,
        metric,
        steps=settings.train.steps,
        value=rows["hsivi_ema"][metric],
        raw=rows["hsivi_raw"][metric],
        start=rows["ddim_eta"][metric],
        ddim=rows["ddim"][metric],
        seconds=records[-1]["seconds"],
        course=[[record["step"], record["metric"]] for record in records if record.get("metric") is not None],
        **describe(torch.device("cpu")),
    )
    return asdict(outcome)


def summary(rows):
    """One dict a study and variant: mean and standard error over the seeds.

    The same of the differences, seed by seed, from what it is compared with, in percent.
    """
    lines = []
    for study in STUDIES:
        for variant, (reference, _) in VARIANTS.items():
            values = _by_seed(rows, study, variant)
            if values:
                lines.append(_summary_line(study, variant, reference, values, _by_seed(rows, study, reference)))
    return lines


def _by_seed(rows, study, variant):
    return {row["seed"]: row for row in rows if row["study"] == study and row["variant"] == variant}


def _summary_line(study, variant, reference, values, base):
    paired = [100 * (row["value"] / base[seed]["value"] - 1) for seed, row in values.items() if seed in base]
    first = next(iter(values.values()))
    return {
        "study": study,
        "variant": variant,
        "metric": first["metric"],
        "seeds": len(values),
        "steps": first["steps"],
        "start": first["start"],
        "reference": reference,
        "value": mean_and_error([row["value"] for row in values.values()]),
        "difference": mean_and_error(paired) if paired else None,
    }


def run_path(outdir, study, variant, seed):
    """The folder of one run of a study, under `outdir`."""
    name = "".join(letter if letter.isalnum() else "_" for letter in variant)
    return Path(outdir) / f"{study}_{name}_{seed}"


class MeanAndError(NamedTuple):
    """A mean over run seeds and its standard error, None of one seed. Its format is that of both numbers."""

    mean: float
    error: float | None

    def __format__(self, spec):
        mean = format(self.mean, spec)
        return mean if self.error is None else f"{mean} +- {format(self.error, spec.lstrip('+'))}"


def mean_and_error(values):
    """`MeanAndError` of a list of numbers."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return MeanAndError(statistics.mean(values), error)


COLUMNS = [
    Column("on", "{study}"),
    Column("rollout", "{variant}"),
    Column("seeds", "{seeds}"),
    Column("start", "{start:.4f}"),
    Column("end", "{value:.4f}"),
    Column("difference", "{difference:+.1f} % to {reference}", needs="difference"),
]


def main():
    run_study(__doc__, Path("runs/quality"), all_runs(), one_run, lambda rows: text_table(summary(rows), COLUMNS))


def run_study(description, outdir, order, one_run, table):
    """The command of a study: make the runs that are missing in its file of rows, and print its table.

    outdir: where the runs themselves go unless it is said; order: the keys of all runs, (study, variant, seed);
    one_run(*key, outdir) gives a row with these three; table(rows): the text.
    """
    parser = command_line(description)
    text = "the rows, one JSON object a line; runs that are in it are not repeated"
    parser.add_argument("--json", type=Path, required=True, help=text)
    parser.add_argument("--outdir", type=Path, default=outdir, help="where the runs themselves go")
    parser.add_argument("--processes", type=int, default=1)
    text = "print the table of the rows that are there, and run nothing"
    parser.add_argument("--table", action="store_true", help=text)
    arguments = parser.parse_args()
    rows = read_records(arguments.json) if arguments.json.is_file() else []
    done = {_key(row) for row in rows}
    wanted = [] if arguments.table else [run for run in order if run not in done]
    spawning = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, mp_context=spawning) as pool:
        futures = [pool.submit(one_run, *run, arguments.outdir) for run in wanted]
        for future in concurrent.futures.as_completed(futures):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)  # tell it now, and not after all the others
            row = future.result()
            rows = sorted([*rows, row], key=lambda row: order.index(_key(row)))
            write_records(arguments.json, rows)
            print(f"{len(rows)} of {len(order)}: {', '.join(map(str, _key(row)))}", file=sys.stderr, flush=True)
    print(table(rows))


def _key(row):
    return row["study"], row["variant"], row["seed"]


if __name__ == "__main__":
    sys.exit(main())

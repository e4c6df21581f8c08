"""Which recipe for few evaluations? Runs that differ in how a student starts and what follows, over several seeds.

    python -m bench.recipe --json bench/results/recipe.jsonl       about an hour on 1 core
    python -m bench.recipe --json bench/results/recipe.jsonl --table         the table of the rows that are there

On digits, with five evaluations, each measured on 4,000 images. The work is counted, not timed: calls of a
network with one image, of which a backward pass is two. One thread a run, so that a result does not depend on what else
runs. The command can be stopped and given again: finished runs are not repeated, and one that was interrupted goes on
from its checkpoint.
"""

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import describe
from bench.quality import mean_and_error, run_study
from bench.tables import Column, text_table
from hsivi_fast import load_config, train
from hsivi_fast.training.estimate import estimate_run

SEEDS = 3
MEASURED = ["eval.every=0", "eval.num_samples=4000", "eval.seeds=1", "eval.baselines=[]", "channels_last=true"]
# As shipped before there was a start.
OLD = [
    *("start.kind=ddim", "start.score_net_updates=0", "objective.match=knots", "objective.anchor=0", "spacing=quad"),
    *("eta=0.6", "train.steps=500", "train.f_learning_times=5", "train.student_lr=5e-5", "train.score_net_lr=4e-4"),
    *("train.warmup=30", "train.beta1=0.9"),
]
# One update of the score network, which no sample depends on: the start alone.
PATHS = [*OLD, "start.kind=trajectory", "eta=0.01", "train.steps=1", "start.updates=600", "start.trajectories=2400"]
BY_HAND = [*PATHS, "spacing=[0,135,235,350,510,800]"]
WINDOWS = [*BY_HAND, "objective.match=windows", "train.f_learning_times=10", "train.steps=400"]
VARIANTS = {  # name -> overrides of configs/digits.yaml
    "from DDIM: 500 updates at the knots": OLD,
    "paths: 600 updates, quad": PATHS,
    "paths: 600 updates, knots by hand": BY_HAND,
    "then windows: rates as from DDIM": [*WINDOWS, "start.score_net_updates=300"],
    "then windows: rates 1e-5 and 5e-5": [
        *WINDOWS,
        *("start.score_net_updates=300", "train.student_lr=1e-5", "train.score_net_lr=5e-5"),
    ],
}


@dataclass(frozen=True)
class Outcome:
    """What one run ended with: a line of the results file.

    value, raw: the averaged and the raw student's distance; start: that of the student as it starts. ahead: how far the
    score network's loss was below the teacher's at the end of its head start, in percent; None without one.
    evaluations: the counted work of the training. commit, device, versions: see `measure.describe`.
    """

    study: str
    variant: str
    seed: int
    value: float
    raw: float
    start: float
    ahead: float | None
    evaluations: int
    seconds: float
    commit: str | None
    device: str
    versions: dict


def all_runs():
    """(study, variant, seed) of every run, a seed of everything before the next seed."""
    return [("digits", variant, seed) for seed in range(SEEDS) for variant in VARIANTS]


def one_run(study, variant, seed, outdir):
    """Train, or finish, one run and return its outcome as a dict."""
    torch.set_num_threads(1)
    overrides = [*VARIANTS[variant], *MEASURED, f"seed={seed}", "device=cpu"]
    config = load_config(study, overrides)
    name = "".join(letter if letter.isalnum() else "_" for letter in variant)
    folder = train(config, Path(outdir) / f"{study}_{name}_{seed}")
    rows = {row["sampler"]: row for row in folder.read_json("results.json")}
    estimate = estimate_run(config)
    outcome = Outcome(
        study,
        variant,
        seed,
        value=rows["hsivi_ema"]["frechet_distance"],
        raw=rows["hsivi_raw"]["frechet_distance"],
        start=rows.get("start", rows["ddim_eta"])["frechet_distance"],
        ahead=_ahead(folder.metrics()),
        evaluations=round(estimate["training_flops"] / estimate["forward_flops"]),
        seconds=folder.metrics()[-1]["seconds"],
        **describe(torch.device("cpu")),
    )
    return asdict(outcome)


def _ahead(records):
    """In percent, of the last record of the head start."""
    known = [record for record in records if record.get("loss_teacher") is not None]
    return 100 * (1 - known[-1]["loss_score_net"] / known[-1]["loss_teacher"]) if known else None


def summary(rows):
    """One dict a variant: mean and standard error over the seeds."""
    lines = []
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        if own:
            lines.append(
                {
                    "variant": variant,
                    "seeds": len(own),
                    "work": own[0]["evaluations"] / 1000,
                    "start": statistics.mean(row["start"] for row in own),
                    "value": mean_and_error([row["value"] for row in own]),
                    "ahead": None if own[0]["ahead"] is None else statistics.mean(row["ahead"] for row in own),
                }
            )
    return lines


COLUMNS = [
    Column("recipe", "{variant}"),
    Column("seeds", "{seeds}"),
    Column("thousand evaluations", "{work:.0f}"),
    Column("start", "{start:.3f}"),
    Column("end", "{value[0]:.3f} +- {value[1]:.3f}"),
    Column("f ahead of the teacher", "{ahead:+.2f} %", needs="ahead"),
]


def main():
    run_study(__doc__, Path("runs/recipe"), all_runs(), one_run, lambda rows: text_table(summary(rows), COLUMNS))


if __name__ == "__main__":
    sys.exit(main())

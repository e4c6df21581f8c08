"""Which recipe for few evaluations? Runs that differ in how a student starts and what follows, over several seeds.

    python -m bench.recipe --json bench/results/recipe.jsonl       about an hour on 1 core
    python -m bench.recipe --json bench/results/recipe.jsonl --table         the table of the rows that are there

On digits, with five evaluations, each measured on 2 sets of 4,000 images. The work is counted, not timed: calls of a
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
MEASURED = ["eval.every=0", "eval.num_samples=4000", "eval.seeds=2", "eval.ddim_nfe=[5]", "eval.baselines=[ddim]"]
# As shipped before there was a start.
OLD = [
    *("start.kind=ddim", "start.score_net_updates=0", "objective.match=knots", "objective.anchor=0", "spacing=quad"),
    *("eta=0.6", "train.steps=500", "train.f_learning_times=5", "train.student_lr=5e-5", "train.beta1=0.9"),
]
# One update of the score network, which no sample depends on: the start alone.
PATHS = ["start.kind=trajectory", "eta=0.01", "train.steps=1"]
KNOTS = "spacing=[0,120,220,340,500,800]"
VARIANTS = {  # name -> overrides of configs/digits.yaml
    "from DDIM, 500 updates": OLD,
    "paths, 300 updates": [*OLD, *PATHS, "start.updates=300"],
    "paths, 300 updates, knots by hand": [*OLD, *PATHS, "start.updates=300", KNOTS],
}


@dataclass(frozen=True)
class Outcome:
    """What one run ended with: a line of the results file.

    value, raw: the averaged and the raw student's distance; start: that of the student as it starts; spread: of the
    sets that `value` was measured on. evaluations: the counted work of the training. commit, device, versions: see
    `measure.describe`.
    """

    study: str
    variant: str
    seed: int
    value: float
    raw: float
    start: float
    spread: float
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
        spread=rows["hsivi_ema"]["frechet_std"],
        evaluations=round(estimate["training_flops"] / estimate["forward_flops"]),
        seconds=folder.metrics()[-1]["seconds"],
        **describe(torch.device("cpu")),
    )
    return asdict(outcome)


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
                }
            )
    return lines


COLUMNS = [
    Column("recipe", "{variant}"),
    Column("seeds", "{seeds}"),
    Column("thousand evaluations", "{work:.0f}"),
    Column("start", "{start:.3f}"),
    Column("end", "{value[0]:.3f} +- {value[1]:.3f}"),
]


def main():
    run_study(__doc__, Path("runs/recipe"), all_runs(), one_run, lambda rows: text_table(summary(rows), COLUMNS))


if __name__ == "__main__":
    sys.exit(main())

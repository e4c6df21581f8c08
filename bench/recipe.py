"""Which recipe for few evaluations? Runs that differ in how a student starts and what follows, over several seeds.

    python -m bench.recipe --json bench/results/recipe.jsonl       seven hours on 1 core
    python -m bench.recipe --json bench/results/recipe.jsonl --table         the table of the rows that are there

With five evaluations: on digits, by the Frechet distance of 4,000 images, and in the plane, by the Jensen-Shannon
divergence of 20,000 points. The work is counted, not timed: calls of a network with one image, of which a backward pass
is two. One thread a run, so that a result does not depend on what else runs. The command can be stopped and given
again: finished runs are not repeated, and one that was interrupted goes on from its checkpoint.
"""

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import describe
from bench.quality import mean_and_error, run_path, run_study
from bench.solvers import OTHER_SETS, SEARCHED_SETS, distance_cell
from bench.tables import Column, text_table
from hsivi_fast import load_config, train
from hsivi_fast.metrics.evaluation import build_metric, measure_row
from hsivi_fast.metrics.table import sampler_title
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.sampling.sampler import load_sampler
from hsivi_fast.training.estimate import estimate_run

SEEDS = 3
KNOTS = ["start.kind=ddim", "start.score_net_updates=0", "objective.match=knots", "objective.anchor=0", "spacing=quad"]
# One update of the score network, which no sample depends on: the start alone.
PATHS = ["start.kind=trajectory", "start.score_net_updates=0", "eta=0.01", "train.steps=1"]

# As the configs were before there was a start.
OLD_DIGITS = [
    *(*KNOTS, "eta=0.6", "train.steps=500", "train.f_learning_times=5", "train.student_lr=5e-5"),
    *("train.score_net_lr=4e-4", "train.warmup=30", "train.ema=0.95", "train.beta1=0.9"),
]
OLD_PLANE = [
    *(*KNOTS, "eta=1.0", "train.steps=6000", "train.f_learning_times=5", "train.student_lr=1e-3"),
    *("train.score_net_lr=1e-3", "train.warmup=100", "train.ema=0.99"),
]
QUAD = [*OLD_DIGITS, *PATHS, "start.updates=600", "start.trajectories=2400"]
BY_HAND = [*QUAD, "spacing=[0,135,235,350,510,800]"]
# After the paths, 40 updates of the student: in windows where gamma is at least 1/2, 20 updates of f to one.
WINDOWS = [
    *(*BY_HAND, "objective.match=windows", "objective.gamma_min=0.5", "train.steps=800", "train.f_learning_times=20"),
    *("train.student_lr=5e-5", "train.score_net_lr=4e-4"),
]
OF_DIGITS = {  # name -> overrides of configs/digits.yaml
    "from DDIM: 500 updates at the knots": OLD_DIGITS,
    "paths: 600 updates, quad": QUAD,
    "paths: 600 updates, knots by hand": BY_HAND,
    "paths by hand, then windows": WINDOWS,
    "windows, alpha 1": [*WINDOWS, "objective.alpha=1"],
    "windows, anchor 0.1": [*WINDOWS, "objective.anchor=0.1"],
    "windows, head start of 200": [*WINDOWS, "start.score_net_updates=200"],
    "windows, f updated 5 to 1": [*WINDOWS, "train.steps=200", "train.f_learning_times=5"],
}
OF_PLANE = {  # name -> overrides of configs/toy2d.yaml
    "from DDIM: 6,000 updates at the knots": OLD_PLANE,
    "paths: 4,000 updates": PATHS,
    "paths, then windows": [
        *("start.score_net_updates=500", "train.steps=1000", "train.f_learning_times=10", "train.student_lr=1e-4"),
        *("train.score_net_lr=5e-4", "train.warmup=100", "train.ema=0.99"),
    ],
}
DIGITS = ["eval.num_samples=4000", "eval.ddim_nfe=[5,10,20,50]", "eval.solver_spacing=linspace", "channels_last=true"]
MNIST = ["eval.num_samples=2000", "eval.ddim_nfe=[5]", "precision=bf16"]
OF_MNIST = {  # name -> overrides of configs/mnist_nfe5.yaml
    "paths, then windows": [
        *("spacing=[0,135,235,350,510,800]", "start.updates=700", "start.trajectories=1500", "rollout.chunk=4096"),
        *("train.steps=200", "train.student_lr=3e-5", "train.score_net_lr=1e-4"),
    ],
    "even knots, 2,000 updates": [],
}
START = {"paths": ["start.score_net_updates=0", "train.steps=1"]}  # the start of the config itself, alone
FEWER = {  # evaluations -> (study, variant) of what is best there
    **{nfe: (f"digits_nfe{nfe}", "paths") for nfe in (1, 2, 3)},
    5: ("digits", "paths: 600 updates, knots by hand"),
    10: ("digits_nfe10", "paths"),
}
STUDIES = {  # name -> (config, overrides, variants, metric)
    "digits": ("digits", DIGITS, OF_DIGITS, "frechet_distance"),
    **{study: (study, DIGITS, START, "frechet_distance") for study, _ in FEWER.values() if study != "digits"},
    "mnist_nfe5": ("mnist_nfe5", MNIST, OF_MNIST, "frechet_distance"),
    **{
        target: ("toy2d", ["eval.num_samples=20000", f"teacher.target={target}"], OF_PLANE, "js_divergence")
        for target in ("checkerboard", "ring", "swiss_roll")
    },
}
MEASURED = ["eval.every=0", "eval.seeds=1", "eval.baselines=[]"]


@dataclass(frozen=True)
class Outcome:
    """What one run ended with: a line of the results file.

    value, raw: the averaged and the raw student's distance; start: that of the student as it starts. others: of the
    averaged student, on the three sets of images that the best solvers are measured on, see bench.solvers; None in the
    plane. ahead: how far the score network's loss was below the teacher's at the end of its head start, in percent;
    None without one.
    evaluations: the counted work of the training. commit, device, versions: see `measure.describe`.
    """

    study: str
    variant: str
    seed: int
    value: float
    raw: float
    start: float
    others: float | None
    ahead: float | None
    evaluations: int
    seconds: float
    commit: str | None
    device: str
    versions: dict


def all_runs():
    """(study, variant, seed) of every run, a seed of everything before the next seed."""
    return [
        (study, variant, seed)
        for seed in range(SEEDS)
        for study, (_, _, variants, _) in STUDIES.items()
        for variant in variants
    ]


def one_run(study, variant, seed, outdir):
    """Train, or finish, one run and return its outcome as a dict."""
    torch.set_num_threads(1)
    config, overrides, variants, metric = STUDIES[study]
    config = load_config(config, [*overrides, *variants[variant], *MEASURED, f"seed={seed}", "device=cpu"])
    folder = train(config, run_path(outdir, study, variant, seed))
    rows = {row["sampler"]: row for row in folder.read_json("results.json")}
    estimate = estimate_run(config)
    outcome = Outcome(
        study,
        variant,
        seed,
        value=rows["hsivi_ema"][metric],
        raw=rows["hsivi_raw"][metric],
        start=rows.get("start", rows["ddim_eta"])[metric],
        others=on_other_sets(folder) if metric == "frechet_distance" else None,
        ahead=_ahead(folder.metrics()),
        evaluations=round(estimate["training_flops"] / estimate["forward_flops"]),
        seconds=folder.metrics()[-1]["seconds"],
        **describe(torch.device("cpu")),
    )
    return asdict(outcome)


def on_other_sets(folder):
    """The distance of a run's averaged student on the sets of images that the best solvers are measured on."""
    sampler, context, _ = load_sampler(folder, ALONE)
    metric, images = build_metric(context, network=sampler.network), context.config.eval.num_samples
    row = measure_row("hsivi_ema", sampler, metric, images, OTHER_SETS, ALONE, first_set=SEARCHED_SETS)
    return row["frechet_distance"]


def _ahead(records):
    """In percent, of the last record of the head start."""
    known = [record for record in records if record.get("loss_teacher") is not None]
    return 100 * (1 - known[-1]["loss_score_net"] / known[-1]["loss_teacher"]) if known else None


def summary(rows):
    """One dict a study and variant: mean and standard error over the seeds."""
    lines = []
    for study, (_, _, variants, _) in STUDIES.items():
        for variant in variants:
            own = [row for row in rows if (row["study"], row["variant"]) == (study, variant)]
            if own:
                lines.append(
                    {
                        "study": study,
                        "variant": variant,
                        "seeds": len(own),
                        "work": own[0]["evaluations"] / 1000,
                        "start": mean_and_error([row["start"] for row in own]),
                        "value": mean_and_error([row["value"] for row in own]),
                        "others": mean_and_error([row["others"] for row in own]) if _have_others(own) else None,
                        "ahead": None if own[0]["ahead"] is None else statistics.mean(row["ahead"] for row in own),
                    }
                )
    return lines


def _have_others(rows):
    return all(row.get("others") is not None for row in rows)


def by_evaluations(rows, solver_rows):
    """(titles, lines) of a table: samplers of digits by their number of evaluations.

    rows: of this study; solver_rows: of bench.solvers.
    """
    lines = []
    for name in ("ddim", "ddpm", "best"):
        cells = {row["nfe"]: distance_cell(row) for row in solver_rows if row["sampler"] == name}
        if cells:
            lines.append([sampler_title(name), *(cells.get(nfe, "") for nfe in FEWER)])
    own = {(line["study"], line["variant"]): line["others"] for line in summary(rows) if line["others"]}
    students = [format(own[key], ".3f") if key in own else "" for key in FEWER.values()]
    lines.append(["**HSIVI, paths alone**", *students])
    return ["sampler", *(f"{nfe} evaluation{'s' * (nfe > 1)}" for nfe in FEWER)], lines


COLUMNS = [
    Column("on", "{study}"),
    Column("recipe", "{variant}"),
    Column("seeds", "{seeds}"),
    Column("thousand evaluations", "{work:.0f}"),
    Column("start", "{start:.3f}"),
    Column("end", "{value:.3f}"),
    Column("end, other sets", "{others:.3f}", needs="others"),
    Column("f ahead of the teacher", "{ahead:+.2f} %", needs="ahead"),
]


def main():
    run_study(__doc__, Path("runs/recipe"), all_runs(), one_run, lambda rows: text_table(summary(rows), COLUMNS))


if __name__ == "__main__":
    sys.exit(main())

"""How soon is it good? Distance against the work so far, for recipes from the published one to the shipped one.

    python -m bench.time_to_quality --json bench/results/time_to_quality.jsonl
    python -m bench.time_to_quality --json bench/results/time_to_quality.jsonl --table       the table of what is there

Five evaluations on digits, by the Frechet distance of 4,000 images of the averaged student. Work is counted, not timed:
calls of a network with one image, of which a backward pass is two; the start's paths and all rollouts are in it. The
seconds are those of training alone, on one thread: measuring is left out. `python -m bench.report` draws the picture,
with the best solvers of bench.solvers as lines. The command can be stopped and given again, as bench.recipe.
"""

import io
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from matplotlib.figure import Figure

from bench.measure import describe
from bench.quality import mean_and_error, run_path, run_study
from bench.recipe import KNOTS, OLD_DIGITS
from bench.tables import Column, text_table
from hsivi_fast import load_config, train
from hsivi_fast.training.estimate import evaluations_until

SEEDS = 3
# Fresh rollouts, eta 0.2, 20 updates to 1, and the rates of the published runs on CIFAR-10. Their warm-up of 2,500
# steps would be most of so short a run, so it is 100 here, in their favour.
PUBLISHED = [
    *(*KNOTS, "eta=0.2", "rollout.mode=fresh", "rollout.redraw=1", "train.batch_size=128", "train.beta1=0.9"),
    *("train.f_learning_times=20", "train.student_lr=1.6e-5", "train.score_net_lr=8e-5", "train.warmup=100"),
    *("train.lr_rule=decay", "train.ema=0.999"),
]
VARIANTS = {  # name -> (overrides of configs/digits.yaml, every how many steps it is measured)
    "shipped before there was a start": (OLD_DIGITS, 100),
    "shipped": ([], 100),
    "published": ([*PUBLISHED, "train.steps=600"], 300),
    # Ten times the work of "shipped".
    "published, longer": ([*PUBLISHED, "train.steps=3600"], 600),
}
SOLVERS_AT = (5, 10)  # evaluations, of the lines
MEASURED = ["eval.num_samples=4000", "eval.seeds=1", "eval.baselines=[]", "device=cpu"]


@dataclass(frozen=True)
class Course:
    """What one run went through: a line of the results file.

    course: [evaluations, seconds of training, distance] of every measurement.
    commit, device, versions: see `measure.describe`.
    """

    study: str
    variant: str
    seed: int
    course: list
    commit: str | None
    device: str
    versions: dict


def all_runs():
    """(study, variant, seed) of every run, the longest last."""
    return [("digits", variant, seed) for variant in VARIANTS for seed in range(SEEDS)]


def one_run(study, variant, seed, outdir):
    """Train, or finish, one run and return its course as a dict."""
    torch.set_num_threads(1)
    overrides, every = VARIANTS[variant]
    measured = [*MEASURED, f"eval.every={every}", f"log_every={every}", f"save_every={every}"]
    config = load_config(study, [*overrides, *measured, f"seed={seed}"])
    folder = train(config, run_path(outdir, study, variant, seed))
    course, measuring = [], 0.0
    for record in folder.metrics():
        measuring += record.get("measuring_seconds", 0.0)
        if record.get("metric") is not None:
            evaluations = evaluations_until(config, record["step"])
            course.append([evaluations, record["seconds"] - measuring, record["metric"]])
    return asdict(Course(study, variant, seed, course, **describe(torch.device("cpu"))))


def summary(rows):
    """One dict a variant: what its end took and is worth, and how soon it was as good as the others end."""
    courses = {variant: _courses(rows, variant) for variant in VARIANTS}
    ends = {name: statistics.mean(course[-1][2] for course in own) for name, own in courses.items() if own}
    return [
        {
            "variant": variant,
            "seeds": len(own),
            "work": own[0][-1][0] / 1000,
            "seconds": statistics.median(course[-1][1] for course in own),
            "value": mean_and_error([course[-1][2] for course in own]),
            **{f"to {name}": _work_to(own, ends.get(name)) for name in VARIANTS},
        }
        for variant, own in courses.items()
        if own
    ]


def _courses(rows, variant):
    return [row["course"] for row in rows if row["variant"] == variant]


def _work_to(courses, distance):
    """Thousands of evaluations after which the mean over the seeds is at or under a distance for good; None: never."""
    if distance is None:
        return None
    found = None
    for points in zip(*courses):
        if statistics.mean(point[2] for point in points) > distance:
            found = None
        elif found is None:
            found = points[0][0] / 1000
    return found


COLUMNS = [
    Column("recipe", "{variant}"),
    Column("seeds", "{seeds}"),
    Column("thousand evaluations", "{work:.0f}"),
    Column("seconds", "{seconds:.0f}"),
    Column("distance at the end", "{value:.3f}"),
    *(
        Column(f"thousand evaluations to where `{name}` ends", f"{{to {name}:.0f}}", needs=f"to {name}")
        for name in VARIANTS
    ),
]


def picture(rows, solvers):
    """PNG bytes: distance against counted work, and against seconds, mean and range over the seeds.

    solvers: rows of bench.solvers; the best one at each number of evaluations is a line.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for column, (ax, title) in enumerate(zip(axes, ("thousand network evaluations", "seconds of one core"))):
        for number, variant in enumerate(VARIANTS):
            points = list(zip(*_courses(rows, variant)))
            at = [statistics.mean(point[column] for point in group) / (1, 1000)[column == 0] for group in points]
            distances = [[point[2] for point in group] for group in points]
            color = f"C{number}"
            ax.plot(at, [statistics.mean(values) for values in distances], ".-", color=color, label=variant)
            ax.fill_between(at, list(map(min, distances)), list(map(max, distances)), color=color, alpha=0.2)
        for row in solvers:
            if row["sampler"] == "best" and row["nfe"] in SOLVERS_AT:
                best, text = row["frechet_distance"], f"best solver, {row['nfe']} evaluations "
                ax.axhline(best, color="0.4", linewidth=0.8, linestyle="--")
                ax.text(0.99, best, text, transform=ax.get_yaxis_transform(), ha="right", va="bottom")
        ax.set(xscale="log", yscale="log", xlabel=title)
    axes[0].set_ylabel("Frechet distance")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def main():
    outdir = Path("runs/time_to_quality")
    run_study(__doc__, outdir, all_runs(), one_run, lambda rows: text_table(summary(rows), COLUMNS))


if __name__ == "__main__":
    sys.exit(main())

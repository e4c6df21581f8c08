"""How good are runs with a target? Shipped targets, five layers and one, over three run seeds.

    python -m bench.density --json bench/results/density.jsonl
    python -m bench.density --json bench/results/density.jsonl --table    the table of what is there

Draws are compared with exact ones, or with those of NUTS: errors of means (in deviations), of deviations and of
correlations, and sliced Wasserstein. The full-rank Gaussian of ADVI and Langevin chains have as many gradient
evaluations as the run, and are measured in its first seed. One thread a run. The command can be stopped and given
again, as bench.recipe.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import describe
from bench.quality import mean_and_error, run_path, run_study
from bench.tables import Column, text_table
from hsivi_fast import load_config, train

SEEDS = 3
TARGETS = {
    "banana": 2,
    "x_shape": 2,
    "multimodal": 2,
    "funnel": 10,
    "mixture_10": 10,
    "mixture_50": 50,
    "logistic": 31,
}
MULTIMODAL = ("x_shape", "multimodal", "mixture_10", "mixture_50")  # those that one layer is tried on
RIVALS = ("base", "particles")
OF_FIRST_SEED = ("full_rank", "langevin")  # they do not depend on what a run learns, and take as long as that
COLUMNS_KEPT = {  # key of a row -> title
    "sliced_wasserstein": "sliced Wasserstein",
    "mean_error": "means",
    "std_error": "deviations",
    "correlation_error": "correlations",
    "stein_discrepancy": "Stein discrepancy",
}
NAMES = {"hsivi_ema": "HSIVI", "start": "start", "base": "Gaussian base", "full_rank": "full-rank Gaussian"}
NAMES |= {"langevin": "Langevin chains", "particles": "particles (SMC)"}


@dataclass(frozen=True)
class Outcome:
    """What came out of one run: a line of the results file.

    rows: {sampler: {column: value, gradient_evaluations}} of its table. divergences: of `fisher.json`.
    seconds: of the whole command, its table included. commit, device, versions: see `measure.describe`.
    """

    study: str
    variant: str
    seed: int
    rows: dict
    divergences: list
    seconds: float
    commit: str | None
    device: str
    versions: dict


def all_runs():
    """(study, variant, seed) of every run, a seed of everything before the next."""
    runs = []
    for seed in range(SEEDS):
        for target in TARGETS:
            runs.append((target, "K = 5", seed))
            if target in MULTIMODAL:
                runs.append((target, "K = 1", seed))
    return runs


def one_run(study, variant, seed, outdir):
    """Train, or finish, one run and return its outcome as a dict."""
    torch.set_num_threads(1)
    layers = int(variant.removeprefix("K = "))
    rivals = (*RIVALS, *OF_FIRST_SEED * (seed == 0)) if layers > 1 else ()
    settings = [f"target.log_density={study}", f"target.dim={TARGETS[study]}", f"nfe={layers}", f"seed={seed}"]
    settings += ["device=cpu", "eval.seeds=1", "eval.num_samples=10000", f"eval.baselines=[{','.join(rivals)}]"]
    began = time.perf_counter()
    folder = train(load_config("density", settings), run_path(outdir, study, variant, seed))
    seconds = time.perf_counter() - began
    rows = {
        row["sampler"]: {key: row[key] for key in (*COLUMNS_KEPT, "gradient_evaluations")}
        for row in folder.read_json("results.json")
    }
    divergences = folder.read_json("fisher.json")
    return asdict(Outcome(study, variant, seed, rows, divergences, seconds, **describe(torch.device("cpu"))))


def summary(rows):
    """One dict a target, number of layers and sampler: means and standard errors over the run seeds."""
    lines = []
    for target in TARGETS:
        for variant in ("K = 5", "K = 1"):
            of_variant = [row for row in rows if (row["study"], row["variant"]) == (target, variant)]
            for name in NAMES:
                own = [row for row in of_variant if name in row["rows"]]
                if own:
                    lines.append({"target": target, "sampler": _title(name, variant), "seeds": len(own)})
                    values = [row["rows"][name] for row in own]
                    lines[-1] |= {key: mean_and_error([value[key] for value in values]) for key in COLUMNS_KEPT}
                    gradients = [value["gradient_evaluations"] for value in values]
                    lines[-1]["gradients"] = None if None in gradients else sum(gradients) / len(gradients) / 1000
    return lines


def _title(name, variant):
    return f"{NAMES[name]}, {variant}" if name in ("hsivi_ema", "start") else NAMES[name]


COLUMNS = [
    Column("target", "{target}"),
    Column("sampler", "{sampler}"),
    Column("seeds", "{seeds}"),
    Column("thousand gradients", "{gradients:.0f}", needs="gradients"),
    *(Column(title, f"{{{key}:.3f}}") for key, title in COLUMNS_KEPT.items()),
]


def main():
    run_study(__doc__, Path("runs/density"), all_runs(), one_run, lambda rows: text_table(summary(rows), COLUMNS))


if __name__ == "__main__":
    main()

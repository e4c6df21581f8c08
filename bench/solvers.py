"""A teacher through every solver with every spacing, that of digits by default, and the best of them on other images.

    python -m bench.solvers --nfe 1 2 3 5 10 --json bench/results/solvers.jsonl
    python -m bench.solvers --nfe 5 --only unipc3 dpmpp3 --spacings run --sets 3 --json FILE      some of them

A row is of `--sets` sets of `--images` images, the seeds of a run's table. The best one, as eval.baselines=[best] has
it: what had the lowest distance there, on three other sets. The command can be stopped and given again, with more
solvers too: rows that are in the file are not measured again. One core makes about 1,000 evaluations a second.
"""

import math
import sys
from functools import partial
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.measure import describe, read_records, write_records
from bench.options import command_line
from bench.tables import Column, text_table
from hsivi_fast import load_config
from hsivi_fast.build import build_context
from hsivi_fast.metrics.evaluation import build_metric, measure_row
from hsivi_fast.metrics.table import SPACINGS as SPACING_TITLES
from hsivi_fast.metrics.table import sampler_title
from hsivi_fast.parallel.world import connect
from hsivi_fast.sampling.solvers import COMBINATIONS, NAMES, SOLVERS, baseline_sampler, check_baselines, solver_sampler

SPACING_NAMES = list(SPACING_TITLES)
SEARCHED_SETS = 1  # of images, on which the best solver is looked for
OTHER_SETS = 3  # on which it is measured then


def summary(rows):
    """One dict a sampler and spacing, with its distance at every number of evaluations; the best ones are in one."""
    lines = {}
    for row in rows:
        key = row["sampler"], None if row["sampler"] == "best" else row["spacing"]
        lines.setdefault(key, {"sampler": key[0], "spacing": key[1]})[row["nfe"]] = row
    return list(lines.values())


def columns(rows):
    """The columns of a table of `summary`: one a number of evaluations."""
    counts = sorted({row["nfe"] for row in rows})
    return [
        Column("sampler", lambda line: sampler_title(line["sampler"])),
        Column("spacing", lambda line: SPACING_TITLES.get(line["spacing"], "the best")),
        *map(_column, counts),
    ]


def _column(count):
    return Column(f"{count} evaluations", lambda line: distance_cell(line[count]) if count in line else "")


def distance_cell(row):
    """The distance of a row, with its deviation over sets and, of the best, the solver."""
    text = f"{row['frechet_distance']:.3f}"
    if row["frechet_std"] is not None:
        text += f" +- {row['frechet_std']:.3f}"
    return f"{text} ({sampler_title(row['solver'])}, {SPACING_TITLES[row['spacing']]})" if row.get("solver") else text


class Measured:
    """Rows of a file that grows: what it has is not measured again.

    Its rows are of as many images: another number of them is refused.
    """

    def __init__(self, file, context, images, sets):
        self.file, self.context, self.images, self.sets = file, context, images, sets
        self.metric, self.described = build_metric(context), describe(context.device)
        self.rows = read_records(file) if file and file.is_file() else []
        if any(row["num_samples"] != images for row in self.rows):
            raise ValueError(
                f"{file}: its rows are of {self.rows[0]['num_samples']} images; give it --images of as many"
            )

    def row(self, nfe, name, spacing, build, **named):
        """The row of a sampler, which build() makes if it is not there; named: of "best", what it is."""
        for row in self.rows:
            known = (row["nfe"], row["sampler"], row["spacing"], row.get("solver"))
            if known == (nfe, name, spacing, named.get("solver")):
                return row
        first, sets = (self.sets, OTHER_SETS) if named else (0, self.sets)
        world = self.context.world
        row = measure_row(name, build(), self.metric, self.images, sets, world, nfe=nfe, first_set=first)
        row |= {"spacing": spacing, **named, **self.described}
        # The best of more solvers takes the place of that of some.
        self.rows = [other for other in self.rows if not named or (other["nfe"], other["sampler"]) != (nfe, name)]
        self.rows = sorted([*self.rows, row], key=lambda row: row["nfe"])
        if self.file:
            write_records(self.file, self.rows)
        return row

    def measure(self, nfe, combinations):
        """DDIM, DDPM, these (solver, spacing), and the best of all that the file has on other sets."""
        for name in ("ddim", "ddpm"):
            self.row(nfe, name, "run", partial(baseline_sampler, self.context, name, nfe))
        for name, spacing in combinations:
            self.row(nfe, NAMES[name], spacing, partial(solver_sampler, self.context, name, nfe, spacing))
        solvers = {NAMES[name]: name for name in SOLVERS}
        found = [row for row in self.rows if row["nfe"] == nfe and row["sampler"] in solvers]
        best = min(found, key=_or_infinite)
        name, spacing = best["sampler"], best["spacing"]
        build = partial(solver_sampler, self.context, solvers[name], nfe, spacing)
        self.row(nfe, "best", spacing, build, solver=name)


def _or_infinite(row):
    distance = row["frechet_distance"]
    return distance if math.isfinite(distance) else math.inf


def main():
    """Measure, write the file, print the table."""
    parser = command_line(__doc__, images=4000, json=None)
    parser.add_argument("--config", default="digits", help="the run whose teacher it is")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5], help="network evaluations")
    parser.add_argument("--sets", type=int, default=SEARCHED_SETS, help="sets of images")
    parser.add_argument("--only", nargs="+", default=list(SOLVERS), choices=SOLVERS, help="solvers")
    parser.add_argument("--spacings", nargs="+", default=SPACING_NAMES, choices=SPACING_NAMES, help="their spacings")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the run")
    arguments = parser.parse_args()
    wanted = ["spacing=quad", "eval.baselines=[best]", "eval.seeds=2"]
    wanted += [f"eval.ddim_nfe=[{','.join(map(str, arguments.nfe))}]"]
    config = load_config(arguments.config, [*wanted, *arguments.set])
    check_baselines(config)
    context = build_context(config, connect(config), teacher=True)
    chosen = [pair for pair in COMBINATIONS if pair[0] in arguments.only and pair[1] in arguments.spacings]
    measured = Measured(arguments.json, context, arguments.images, arguments.sets)
    for nfe in arguments.nfe:
        measured.measure(nfe, chosen)
    print(text_table(summary(measured.rows), columns(measured.rows)))


if __name__ == "__main__":
    main()

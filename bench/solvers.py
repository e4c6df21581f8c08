"""The digits teacher through every solver with every spacing: the Frechet distances that `best` is chosen by.

    python -m bench.solvers --nfe 5 --images 4000 --json FILE
    python -m bench.solvers --nfe 5 10 --only unipc3 dpmpp3 --spacings run --json FILE      some of them

A row is the mean over `--sets` sets of `--images` images, the seeds of a run's table. The rows come in the order of the
search, DDIM and DDPM first, and a file grows by each as it comes. Needs diffusers. One core makes about 1,000
evaluations a second, and there are 30 rows.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.measure import describe, write_records
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
COLUMNS = [
    Column("sampler", lambda row: sampler_title(row["sampler"])),
    Column("spacing", lambda row: SPACING_TITLES[row["spacing"]]),
    Column("NFE", lambda row: row.get("evaluations") or row["nfe"]),
    Column("Frechet distance", "{frechet_distance:.2f}"),
    Column("+-", "{frechet_std:.2f}", needs="frechet_std"),
]


def measured_rows(context, nfe, images, sets, combinations):
    """The rows of DDIM, DDPM and these (solver, spacing), with their spacing, one after the other."""
    metric, sampler = build_metric(context), None
    for name in ("ddim", "ddpm"):
        row = measure_row(name, baseline_sampler(context, name, nfe), metric, images, sets, context.world, nfe=nfe)
        yield {**row, "spacing": "run"}
    for name, spacing in combinations:
        sampler = solver_sampler(context, name, nfe, spacing, like=sampler)
        row = measure_row(NAMES[name], sampler, metric, images, sets, context.world, nfe=nfe)
        yield {**row, "spacing": spacing}


def main():
    """Measure, write the file, print the table."""
    parser = command_line(__doc__, images=4000, json=None)
    parser.add_argument("--nfe", type=int, nargs="+", default=[5], help="network evaluations")
    parser.add_argument("--sets", type=int, default=3, help="sets of images")
    parser.add_argument("--only", nargs="+", default=list(SOLVERS), choices=SOLVERS, help="solvers")
    parser.add_argument("--spacings", nargs="+", default=SPACING_NAMES, choices=SPACING_NAMES, help="their spacings")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the run")
    arguments = parser.parse_args()
    wanted = ["spacing=quad", "eval.baselines=[best]", "eval.seeds=2"]
    wanted += [f"eval.ddim_nfe=[{','.join(map(str, arguments.nfe))}]"]
    config = load_config("digits", [*wanted, *arguments.set])
    check_baselines(config)
    context = build_context(config, connect(config), teacher=True)
    chosen = [pair for pair in COMBINATIONS if pair[0] in arguments.only and pair[1] in arguments.spacings]
    rows, described = [], describe(context.device)
    for nfe in arguments.nfe:
        for row in measured_rows(context, nfe, arguments.images, arguments.sets, chosen):
            rows.append({**row, **described})
            if arguments.json:
                write_records(arguments.json, rows)
    print(text_table(rows, COLUMNS))


if __name__ == "__main__":
    main()

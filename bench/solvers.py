"""The digits teacher through every solver with every spacing: the Frechet distances that `best` is chosen by.

    python -m bench.solvers --nfe 5 --images 4000 --json FILE

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
from hsivi_fast.metrics.table import SPACINGS, sampler_title
from hsivi_fast.parallel.world import connect
from hsivi_fast.sampling.solvers import COMBINATIONS, NAMES, baseline_sampler, check_baselines, solver_sampler

COLUMNS = [
    Column("sampler", lambda row: sampler_title(row["sampler"])),
    Column("spacing", lambda row: SPACINGS[row["spacing"]]),
    Column("NFE", lambda row: row.get("evaluations") or row["nfe"]),
    Column("Frechet distance", "{frechet_distance:.2f}"),
    Column("+-", "{frechet_std:.2f}", needs="frechet_std"),
]


def measured_rows(context, nfe, images, sets):
    """The rows of DDIM, DDPM and all combinations, with their spacing, one after the other."""
    metric, sampler = build_metric(context), None
    for name in ("ddim", "ddpm"):
        row = measure_row(name, baseline_sampler(context, name, nfe), metric, images, sets, context.world, nfe=nfe)
        yield {**row, "spacing": "run"}
    for name, spacing in COMBINATIONS:
        sampler = solver_sampler(context, name, nfe, spacing, like=sampler)
        row = measure_row(NAMES[name], sampler, metric, images, sets, context.world, nfe=nfe)
        yield {**row, "spacing": spacing}


def main():
    """Measure, write the file, print the table."""
    parser = command_line(__doc__, nfe=5, images=4000, json=None)
    parser.add_argument("--sets", type=int, default=3, help="sets of images")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the run, as channels_last=true")
    arguments = parser.parse_args()
    wanted = ["spacing=quad", "eval.baselines=[best]", "eval.seeds=2", f"eval.ddim_nfe=[{arguments.nfe}]"]
    config = load_config("digits", [*wanted, *arguments.overrides])
    check_baselines(config)
    context = build_context(config, connect(config), teacher=True)
    rows, described = [], describe(context.device)
    for row in measured_rows(context, arguments.nfe, arguments.images, arguments.sets):
        rows.append({**row, **described})
        if arguments.json:
            write_records(arguments.json, rows)
    print(text_table(rows, COLUMNS))


if __name__ == "__main__":
    main()

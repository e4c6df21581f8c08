"""A teacher through every solver with every spacing, that of digits by default, and the best of them on other images.

    python -m bench.solvers --nfe 1 2 3 5 10 --json bench/results/solvers.jsonl      an hour on 1 core
    python -m bench.solvers --nfe 5 --only unipc3 dpmpp3 --spacings run --sets 3 --json FILE      some of them

A row is of `--sets` sets of `--images` images, the seeds of a run's table. The best one, as eval.baselines=[best] has
it: what had the lowest distance there, on three other sets. A file grows by each row as it comes. One core makes about
1,000 evaluations a second.
"""

import math
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
OTHER_SETS = 3


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
        *(Column(f"{count} evaluations", lambda line, count=count: _cell(line.get(count))) for count in counts),
    ]


def _cell(row):
    if row is None:
        return ""
    text = f"{row['frechet_distance']:.3f}"
    if row["frechet_std"] is not None:
        text += f" +- {row['frechet_std']:.3f}"
    return f"{text} ({sampler_title(row['solver'])}, {SPACING_TITLES[row['spacing']]})" if row.get("solver") else text


def measured_rows(context, nfe, images, sets, combinations):
    """The rows of DDIM, DDPM, these (solver, spacing) with their spacing, and the best of these on other sets."""
    metric, world, sampler, found = build_metric(context), context.world, None, []
    for name in ("ddim", "ddpm"):
        row = measure_row(name, baseline_sampler(context, name, nfe), metric, images, sets, world, nfe=nfe)
        yield {**row, "spacing": "run"}
    for name, spacing in combinations:
        sampler = solver_sampler(context, name, nfe, spacing, like=sampler)
        row = measure_row(NAMES[name], sampler, metric, images, sets, world, nfe=nfe)
        distance = row["frechet_distance"]
        found.append((distance if math.isfinite(distance) else math.inf, name, spacing))
        yield {**row, "spacing": spacing}
    _, name, spacing = min(found)
    sampler = solver_sampler(context, name, nfe, spacing, like=sampler)
    row = measure_row("best", sampler, metric, images, OTHER_SETS, world, nfe=nfe, first_set=sets)
    yield {**row, "solver": NAMES[name], "spacing": spacing}


def main():
    """Measure, write the file, print the table."""
    parser = command_line(__doc__, images=4000, json=None)
    parser.add_argument("--config", default="digits", help="the run whose teacher it is")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5], help="network evaluations")
    parser.add_argument("--sets", type=int, default=1, help="sets of images")
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
    rows, described = [], describe(context.device)
    for nfe in arguments.nfe:
        for row in measured_rows(context, nfe, arguments.images, arguments.sets, chosen):
            rows.append({**row, **described})
            if arguments.json:
                write_records(arguments.json, rows)
    print(text_table(summary(rows), columns(rows)))


if __name__ == "__main__":
    main()

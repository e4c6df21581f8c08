"""Is a teacher good, and does it repeat what it has seen? Its samples beside images that it was not trained on.

    python -m bench.neighbours mnist --data-path FOLDER --held-out 1000 --picture neighbours.png

The teacher of CONFIG was trained on all but the last `--held-out` images of its data. The Frechet distance of the
held-out images is a floor: what as many real ones have. The others are distances to the nearest trained image,
Euclidean, in pixels of -1 .. 1. A teacher that repeats what it has seen draws samples much nearer to trained images
than held-out images are. One that has learned the data draws samples about as near. The picture has samples, each above
its nearest trained image, the nearest pairs first.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import write_records
from bench.options import command_line
from bench.tables import Column, text_table
from hsivi_fast import load_config
from hsivi_fast.build import build_context
from hsivi_fast.data import load_data, to_uint8
from hsivi_fast.metrics.evaluation import build_metric
from hsivi_fast.parallel.world import connect
from hsivi_fast.report.figures import image_grid
from hsivi_fast.sampling.solvers import SOLVERS, baseline_sampler

EVALUATIONS = 50  # a sample
SHOWN = 32  # pairs in the picture
COLUMNS = [
    Column("images", "{images}"),
    Column("how many", "{count}"),
    Column("Frechet distance", "{frechet_distance:.2f}"),
    Column("nearest of all", "{least:.2f}"),
    Column("10 %", "{tenth:.2f}"),
    Column("median", "{median:.2f}"),
]


def nearest(images, trained):
    """(distances [N], which [N]) of the nearest trained image to each of `images`, both [N, C, H, W]."""
    trained = trained.flatten(1)
    found = [torch.cdist(part.flatten(1), trained).min(1) for part in images.split(250)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def row_of(name, distances, frechet_distance):
    """A line of the table: quantiles of the distances of some images to their nearest trained ones, and their own."""
    tenth, median = distances.quantile(torch.tensor([0.1, 0.5], dtype=distances.dtype)).tolist()
    least = float(distances.min())
    quantiles = {"least": least, "tenth": tenth, "median": median}
    return {"images": name, "count": len(distances), "frechet_distance": frechet_distance, **quantiles}


def picture(samples, trained, distances, which):
    """PNG bytes: rows of samples, each row above that of their nearest trained images."""
    order = distances.argsort()[:SHOWN].split(SHOWN // 4)
    rows = [image for part in order for image in (samples[part], trained[which[part]])]
    return image_grid(to_uint8(torch.cat(rows)).numpy())


def main():
    parser = command_line(__doc__, images=1000, json=None)
    parser.add_argument("config", help="a name in configs/ or a YAML file")
    parser.add_argument("--data-path", help="the folder of the data's files")
    parser.add_argument("--held-out", type=int, required=True, help="how many images at the end were not trained on")
    parser.add_argument("--picture", type=Path, help="a PNG of the nearest pairs")
    parser.add_argument("--sampler", default="dpmpp", choices=[*SOLVERS, "ddim", "ddpm"], help="of the teacher")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the run")
    arguments = parser.parse_args()
    config = load_config(arguments.config, ["eval.solver_spacing=run", *arguments.set])
    data = torch.from_numpy(load_data(config.data, arguments.data_path).images)
    trained, held_out = data[: -arguments.held_out], data[-arguments.held_out :]
    context = build_context(config, connect(config), teacher=True)
    metric = build_metric(context)
    samples = baseline_sampler(context, arguments.sampler, EVALUATIONS)(range(arguments.images)).cpu().clamp(-1, 1)
    distances, which = nearest(samples, trained)
    rows = []
    for name, images, found in (
        ("held out", held_out, nearest(held_out, trained)[0]),
        (f"{arguments.sampler}, {EVALUATIONS} evaluations", samples, distances),
    ):
        rows.append(row_of(name, found, metric.measure(images, len(images))["frechet_distance"]))
    print(text_table(rows, COLUMNS))
    if arguments.picture:
        arguments.picture.write_bytes(picture(samples, trained, distances, which))
    if arguments.json:
        write_records(arguments.json, rows)


if __name__ == "__main__":
    main()

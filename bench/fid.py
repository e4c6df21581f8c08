"""From images to their Frechet distance, the features' own time left out: ours in memory against the published way through PNG files.

    python -m bench.fid                     2,000 images [3, 32, 32], 2048 features: two minutes on 2 cores
    python -m bench.fid --images 50000      a full FID's worth

Inception's weights are not needed: the features are one random layer, 2048 wide, on both sides, and its time is measured and taken off both. The distances must agree before
they are timed: the published side on rounded images in the place of truncated ones, so that both see the same. What is left of each side is listed part by part.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from hsivi_fast.data import to_uint8
from hsivi_fast.metrics.evaluation import StreamingMoments, frechet_distance

from .measure import describe, print_rows, run_cases, span, timed_rounds
from .published import published_frechet_distance

CASES = ("fid_2048", "fid_64")  # features: Inception's number, and the digits network's
EQUAL = 1e-5  # relative


class RandomFeatures:
    """uint8 images [N, *event] -> [N, width]; `seconds` adds up its own time."""

    def __init__(self, pixels, width, device):
        self.weight = torch.randn(pixels, width, generator=torch.Generator().manual_seed(0)).to(device) / pixels**0.5
        self.seconds = 0.0

    def __call__(self, images):
        start = time.perf_counter()
        features = ((images.to(self.weight.device).flatten(1).float() / 127.5 - 1) @ self.weight).relu()
        if features.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return features


def our_distance(images, features, reference):
    """The way of `evaluation.ImageMetric`: rounded in memory, statistics as the features come, torch-fidelity's distance."""
    moments = StreamingMoments()
    for part in images.split(250):
        moments.add(features(to_uint8(part)))
    return frechet_distance(moments.statistics(), reference)


def measure(case, images, rounds, facts):
    """The row of one case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(1)
    draw = lambda spread: (torch.randn(images, 3, 32, 32, generator=generator) * spread).clamp(-1, 1).to(device)
    generated, real = draw(0.5), draw(0.6)
    # Row by row as in memory, or [H, W, C] as in a file: one order of pixels for the features of both.
    network = RandomFeatures(3 * 32 * 32, int(case.removeprefix("fid_")), device)
    rows_first = lambda values: network(values.permute(0, 3, 1, 2))
    moments = StreamingMoments()
    moments.add(network(to_uint8(real)))
    reference = moments.statistics()
    rounded = to_uint8(generated).float() / 127.5 - 1 + 1e-4  # what truncation turns into the same levels
    expected, got = (
        published_frechet_distance(rounded, rows_first, reference),
        our_distance(generated, network, reference),
    )
    if not abs(got - expected) <= EQUAL * abs(expected):
        return {"case": case, "failed": f"distances differ: ours {got}, published {expected}", **facts}

    own = {"ours": [], "published": []}

    def side(name, function):
        def run():
            network.seconds = 0.0
            function()
            own[name].append(network.seconds)

        return run

    sides = {
        "ours": side("ours", lambda: our_distance(generated, network, reference)),
        "published": side("published", lambda: published_frechet_distance(generated, rows_first, reference)),
    }
    seconds = timed_rounds({name: (function, 1) for name, function in sides.items()}, device, rounds)
    net = {name: [total - features for total, features in zip(values, own[name])] for name, values in seconds.items()}
    statistics_now = StreamingMoments()
    statistics_now.add(network(to_uint8(generated)))
    ready = statistics_now.statistics()
    distance = min(timed_rounds({"distance": (lambda: frechet_distance(ready, reference), 1)}, device, 2)["distance"])
    medians = {name: statistics.median(values) for name, values in net.items()}
    return {
        "case": case,
        "ours": medians["ours"],
        "published": medians["published"],
        "ratio": medians["published"] / medians["ours"],
        "unit": "s without features",
        "counted_ratio": None,
        "ours_range": [min(net["ours"]), max(net["ours"])],
        "published_range": [min(net["published"]), max(net["published"])],
        "feature_seconds": {name: statistics.median(values) for name, values in own.items()},
        "ours_distance_seconds": distance,
        "distance": got,
        "published_distance": expected,
        "images": images,
        "features": int(case.removeprefix("fid_")),
        "baseline": "bench/published.py",
        **facts,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="one case; may be repeated; all by default")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    arguments = parser.parse_args()
    facts = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = run_cases(
        arguments.case or CASES, lambda case: measure(case, arguments.images, arguments.rounds, facts), arguments.json
    )
    print(f"{arguments.images} images 3x32x32, on {facts['device']}")
    return print_rows(
        rows,
        {
            "case": lambda r: r["case"],
            "ours s": lambda r: f"{r['ours']:.2f}",
            "range": lambda r: span(r["ours_range"]),
            "published s": lambda r: f"{r['published']:.2f}",
            "range ": lambda r: span(r["published_range"]),
            "ratio": lambda r: f"{r['ratio']:.2f}",
            "of which our distance": lambda r: f"{r['ours_distance_seconds']:.2f}",
        },
    )


if __name__ == "__main__":
    sys.exit(main())

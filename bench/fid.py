"""From images to their Frechet distance, the features' own time left out: in memory against through PNG files.

    python -m bench.fid                     2,000 images [3, 32, 32], 2048 features: two minutes on 2 cores
    python -m bench.fid --images 50000      a full FID's worth

Ours stays in memory, the published way goes through files. Inception's weights are not needed: the features are one
random layer, 2048 wide, on both sides, and its time is measured and taken off both. The distances must agree before
they are timed: the published side on rounded images in the place of truncated ones, so that both see the same. What is
left of each side is listed part by part.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import Row, describe, print_rows, run_cases, timed_rounds
from bench.options import add_cases, command_line
from bench.published import published_frechet_distance
from bench.tables import Column
from hsivi_fast.build import choose_device
from hsivi_fast.data import to_uint8
from hsivi_fast.metrics.distances import StreamingMoments, frechet_distance

CASES = ("fid_2048", "fid_64")  # features: Inception's number, and the digits network's
EQUAL = 1e-5  # relative
COLUMNS = [
    Column("case", "{case}"),
    Column("ours s", "{ours:.2f}"),
    Column("range", "{ours_range[0]:.2f} to {ours_range[1]:.2f}"),
    Column("published s", "{published:.2f}"),
    Column("range", "{published_range[0]:.2f} to {published_range[1]:.2f}"),
    Column("ratio", "{ratio:.2f}"),
    Column("of which our distance", "{ours_distance_seconds:.2f}"),
]


class RandomFeatures:
    """uint8 images [N, *event] -> [N, width]; `seconds` adds up its own time."""

    def __init__(self, pixels, width, device):
        weight = torch.randn(pixels, width, generator=torch.Generator().manual_seed(0))
        self.weight = weight.to(device) / pixels**0.5
        self.seconds = 0.0

    def __call__(self, images):
        start = time.perf_counter()
        features = ((images.to(self.weight.device).flatten(1).float() / 127.5 - 1) @ self.weight).relu()
        if features.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return features

    def rows_first(self, images):
        """Features of images [N, H, W, C] as in a file: one order of pixels for both sides."""
        return self(images.permute(0, 3, 1, 2))


def our_statistics(images, features):
    """Statistics of images as `ImageMetric` takes them: rounded in memory, features as they come."""
    moments = StreamingMoments()
    for batch in images.split(250):
        moments.add(features(to_uint8(batch)))
    return moments.statistics()


def our_distance(images, features, reference):
    """The way of `ImageMetric`, with torch-fidelity's distance."""
    return frechet_distance(our_statistics(images, features), reference)


def measure(case, images, rounds, facts):
    """The row of one case."""
    device, width = choose_device("auto"), int(case.removeprefix("fid_"))
    generator = torch.Generator().manual_seed(1)
    generated, real = (_random_images(images, spread, generator).to(device) for spread in (0.5, 0.6))
    features = RandomFeatures(3 * 32 * 32, width, device)
    reference = _statistics_at_once(real, features)
    rounded = to_uint8(generated).float() / 127.5 - 1 + 1e-4  # what truncation turns into the same levels
    expected = published_frechet_distance(rounded, features.rows_first, reference)
    got = our_distance(generated, features, reference)
    if not abs(got - expected) <= EQUAL * abs(expected):
        return Row(case, failed=f"distances differ: ours {got}, published {expected}", **facts)

    sides = {
        "ours": functools.partial(our_distance, generated, features, reference),
        "published": functools.partial(published_frechet_distance, generated, features.rows_first, reference),
    }
    net, own = _seconds_without_features(sides, features, device, rounds)
    ready = _statistics_at_once(generated, features)
    only_distance = {"distance": (lambda: frechet_distance(ready, reference), 1)}
    medians = {name: statistics.median(values) for name, values in net.items()}
    extras = {
        "ours_range": [min(net["ours"]), max(net["ours"])],
        "published_range": [min(net["published"]), max(net["published"])],
        "feature_seconds": {name: statistics.median(values) for name, values in own.items()},
        "ours_distance_seconds": min(timed_rounds(only_distance, device, 2)["distance"]),
        "distance": got,
        "published_distance": expected,
        "images": images,
        "features": width,
        "baseline": "bench/published.py",
    }
    return Row(
        case,
        ours=medians["ours"],
        published=medians["published"],
        ratio=medians["published"] / medians["ours"],
        unit="s without features",
        extras=extras,
        **facts,
    )


def _random_images(count, spread, generator):
    """Images [N, 3, 32, 32] in [-1, 1]."""
    return (torch.randn(count, 3, 32, 32, generator=generator) * spread).clamp(-1, 1)


def _statistics_at_once(images, features):
    moments = StreamingMoments()
    moments.add(features(to_uint8(images)))
    return moments.statistics()


def _seconds_without_features(sides, features, device, rounds):
    """({name: seconds of every call without features}, {name: seconds of the features in it}) of interleaved calls."""
    own = {name: [] for name in sides}

    def noted(name, function):
        features.seconds = 0.0
        function()
        own[name].append(features.seconds)

    calls = {name: (functools.partial(noted, name, function), 1) for name, function in sides.items()}
    seconds = timed_rounds(calls, device, rounds)
    net = {name: [whole - part for whole, part in zip(seconds[name], own[name])] for name in sides}
    return net, own


def main(given=None):
    parser = command_line(__doc__, images=2000, rounds=3, json=None)
    add_cases(parser, CASES)
    arguments = parser.parse_args(given)
    facts = describe(choose_device("auto"))
    measure_case = functools.partial(measure, images=arguments.images, rounds=arguments.rounds, facts=facts)
    advice = f"--images {arguments.images}; use fewer"
    rows = run_cases(arguments.case or CASES, measure_case, arguments.json, facts, advice)
    print(f"{arguments.images} images 3x32x32, on {facts['device']}")
    return print_rows(rows, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())

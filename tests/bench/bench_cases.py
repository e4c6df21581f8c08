"""What the tests of the benchmarks share: a network that is timed in a moment, and the committed rows."""

from pathlib import Path

from bench.measure import read_records

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = {
    "family": "ddpm",
    "image_channels": 3,
    "image_size": 8,
    "channels": 8,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [False, True],
    "norm_groups": 4,
}


def committed(name):
    """The rows of a results file in bench/results."""
    return read_records(ROOT / "bench" / "results" / f"{name}.jsonl")

"""The command-line options that the benchmarks share."""

import argparse
from pathlib import Path

SHARED = {
    "network": {"help": "cifar10, or another network of images that hsivi_fast has"},
    "width": {"type": int, "help": "base channels of the network; 128 is CIFAR-10's full width"},
    "batch": {"type": int, "help": "samples of an update"},
    "images": {"type": int, "help": "how many images are drawn or measured"},
    "nfe": {"type": int, "help": "K, the number of layers"},
    "f_learning_times": {"type": int, "help": "updates of the score network in a cycle"},
    "rounds": {"type": int, "help": "how often every side is called in turn"},
    "upstream": {
        "type": Path,
        "help": "a clone of github.com/longinYu/HSIVI, to be timed in the place of bench/published.py",
    },
    "json": {"type": Path, "help": "write one JSON object a line"},
}


def command_line(doc, **defaults):
    """The parser of a script: its docstring's first line, and the shared options that `defaults` names.

    What is None by default may be left out: command_line(__doc__, rounds=4, json=None).
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **SHARED[name])
    return parser


def add_cases(parser, cases, by_default="all"):
    """The option --case, which may be repeated; `by_default`: in words, what is taken without it."""
    text = f"one case; may be repeated; {by_default} by default"
    parser.add_argument("--case", action="append", choices=cases, help=text)

"""How long a user waits before anything happens: import and the command's first answers, in new processes.

Four commands, `--rounds` times each, in some seconds:

    python -m bench.start
"""

import functools
import statistics
import subprocess
import sys
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import Row, describe, print_rows, synchronized_seconds, write_rows
from bench.options import command_line
from bench.tables import Column

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # what a user types -> what is run
    "import hsivi_fast": [sys.executable, "-c", "import hsivi_fast"],
    "from hsivi_fast import train": [sys.executable, "-c", "from hsivi_fast import train"],
    "hsivi --help": [sys.executable, "-m", "hsivi_fast.cli", "--help"],
    "hsivi train no_such_config": [sys.executable, "-m", "hsivi_fast.cli", "train", "no_such_config"],
}
COLUMNS = [
    Column("case", "{case}"),
    Column("s", "{ours:.2f}"),
    Column("range", "{ours_range[0]:.2f} to {ours_range[1]:.2f}"),
]


def measure(case, rounds, facts):
    """The row of one case."""
    run = functools.partial(subprocess.run, CASES[case], cwd=ROOT, capture_output=True)
    run()  # once, so that the files are in memory
    seconds = [synchronized_seconds(run, torch.device("cpu")) for _ in range(rounds)]
    extras = {"ours_range": [min(seconds), max(seconds)]}
    return Row(case, ours=statistics.median(seconds), unit="s", extras=extras, **facts)


def main():
    arguments = command_line(__doc__, rounds=5, json=None).parse_args()
    facts = describe(torch.device("cpu"))
    rows = [measure(case, arguments.rounds, facts) for case in CASES]
    write_rows(arguments.json, rows)
    return print_rows(rows, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())

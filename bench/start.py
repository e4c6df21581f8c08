"""How long a user waits before anything happens: import and the command's first answers, in new processes.

python -m bench.start
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from .measure import describe, synchronized_seconds, table, write_rows

CASES = {  # what a user types -> what is run
    "import hsivi_fast": [sys.executable, "-c", "import hsivi_fast"],
    "from hsivi_fast import train": [sys.executable, "-c", "from hsivi_fast import train"],
    "hsivi --help": [sys.executable, "-m", "hsivi_fast.cli", "--help"],
    "hsivi train no_such_config": [sys.executable, "-m", "hsivi_fast.cli", "train", "no_such_config"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    arguments = parser.parse_args()
    rows, facts = [], describe(torch.device("cpu"))
    for case, command in CASES.items():
        run = lambda: subprocess.run(command, capture_output=True)
        run()  # once, so that the files are in memory
        seconds = [synchronized_seconds(run, torch.device("cpu")) for _ in range(arguments.rounds)]
        rows.append(
            {
                "case": case,
                "ours": statistics.median(seconds),
                "published": None,
                "ratio": None,
                "counted_ratio": None,
                "unit": "s",
                "ours_range": [min(seconds), max(seconds)],
                **facts,
            }
        )
    if arguments.json:
        write_rows(arguments.json, rows)
    print(
        table(
            rows,
            {
                "case": lambda r: r["case"],
                "s": lambda r: f"{r['ours']:.2f}",
                "range": lambda r: f"{r['ours_range'][0]:.2f} to {r['ours_range'][1]:.2f}",
            },
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

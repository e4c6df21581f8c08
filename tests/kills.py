"""Trainings that are killed at random moments and go on: they end with the files of one that went through at once.

python -m tests.kills --runs 40 --seed 0         # SIGKILL, and SIGTERM in every third run; 10 minutes on 2 cores
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy is imported: a process with threads is not to be forked

from . import hostile, hostile_inputs  # noqa: E402
from .support.run_files import files_without_times  # noqa: E402

# Cycles of 4 steps; records, saves, measurements and pictures at steps of their own.
RUN = (
    *("train.steps=40", "train.f_learning_times=4", "log_every=3", "save_every=5", "log.images_every=2"),
    *("eval.every=4", "eval.num_samples=4", "eval.seeds=1", "eval.ddim_nfe=[3]", "device=cpu"),
)
LEFT_OUT = ("tensorboard/", "report.html")  # which tell times


def _train(scratch, kill_after=None, number=signal.SIGKILL):
    """Train in `scratch`/work/run; returns the exit code, or minus the signal."""
    (scratch / "work").mkdir(parents=True, exist_ok=True)
    given = hostile_inputs.Input("kill", ["train", "smoke", *RUN, "--outdir", "run"])
    process = hostile.start(given, scratch)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, number)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(arguments=None):
    """Kill runs and compare; exit code 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    hostile.prepare()
    rng, differing = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory(prefix="kills_") as scratch:
        scratch = Path(scratch)
        began = time.monotonic()
        assert _train(scratch / "straight") == 0, (scratch / "straight" / "stderr").read_text()
        whole = time.monotonic() - began
        expected = files_without_times(scratch / "straight" / "work" / "run", LEFT_OUT)
        for number in range(given.runs):
            place, codes = scratch / f"run_{number}", []
            for _ in range(rng.choice((1, 1, 2))):
                how = signal.SIGTERM if number % 3 == 2 else signal.SIGKILL
                codes.append(_train(place, rng.uniform(0, whole), how))
            codes.append(_train(place))
            found = files_without_times(place / "work" / "run", LEFT_OUT)
            wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            differing += bool(wrong)
            print(f"{number}: exit codes {codes}, {'differs: ' + ', '.join(wrong[:6]) if wrong else 'the same files'}")
    print(f"{given.runs} runs, {differing} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

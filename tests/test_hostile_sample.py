"""A sample of hostile.py's inputs: the command ends as it should, in its folder, within limits. All: see there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_sixty_bad_inputs():
    # A process that has imported torch once, and has no threads that forking would break.
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", "--seed", "0", "--inputs", "60", "--limit", "30"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "\nall              60     60       0\n" in done.stdout

"""`hsivi` as a user calls it: in this process, or in one of its own where that is what is tested."""

import os
import subprocess
import sys
from subprocess import CompletedProcess

from hsivi_fast import cli


def hsivi_here(capsys, *arguments):
    """The command in this process; an error that is not told in a line raises. Returns what `subprocess.run` does."""
    arguments = [str(argument) for argument in arguments]
    capsys.readouterr()
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    return CompletedProcess(arguments, code, *capsys.readouterr())


def hsivi_process(*arguments, cwd=None, **variables):
    """The command in a process of its own, in which kernels are not interpreted."""
    return subprocess.run(
        [sys.executable, "-m", "hsivi_fast.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **variables},
    )

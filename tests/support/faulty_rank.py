"""`hsivi train` on a rank that fails at a step as it is told: FAULT=what:rank:step.

`what` is one of the functions below.

Run as a script by a launcher, or given to `command_on_ranks` of ranks.py.
"""

import os
import signal
import time

from hsivi_fast.parallel import agreement
from hsivi_fast.training.updates import Updates


def kill(updates, batch):
    print("\nKILLED", time.time(), flush=True)  # on a line of its own, behind a bar
    os.kill(os.getpid(), signal.SIGKILL)


def hang(updates, batch):
    time.sleep(1e6)


def nan(updates, batch):
    batch.x.fill_(float("nan"))


def error(updates, batch):
    raise KeyError("a bug")


def term(updates, batch):
    os.kill(os.getpid(), signal.SIGTERM)


def install(fault):
    """Make this process fail in the middle of a step, if it is the rank that `fault` names."""
    what, rank, step = fault.split(":")
    if os.environ["RANK"] != rank:
        return
    if what == "code":
        agreement.code_hash = lambda: "other code"
        return
    update = Updates.score_net

    def failing(updates, batch, lr):
        failing.step += 1
        if failing.step == int(step):
            globals()[what](updates, batch)
        return update(updates, batch, lr)

    failing.step = 0
    Updates.score_net = failing


if __name__ == "__main__":
    from hsivi_fast.cli import launched

    install(os.environ["FAULT"])
    launched("train")

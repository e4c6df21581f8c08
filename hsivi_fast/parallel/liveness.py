"""Signs of life: how the ranks of a run find out which of them is lost or hangs, and end.

A collective waits for all ranks, so one that is lost or stuck would leave the others waiting. Each process therefore
has a thread that writes a sign of life into rank 0's key-value store, with a count of what its main thread has done.
Rank 0 reads them all. A rank without signs of life, or whose main thread does not move for `distributed.timeout`
seconds, ends the run: rank 0 says which one it was, and every process exits.
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

BEAT = 1.0  # seconds between two signs of life
SILENT = 20.0  # seconds without one after which a rank is lost: a busy interpreter can be late by some
# The same once a collective has failed somewhere, or the launcher has asked a rank to end: then somebody is lost.
SILENT_IN_TROUBLE = 5.0
LOST = 2  # exit code


class Beat(NamedTuple):
    """A sign of life, as it stands in the store."""

    sent: float  # when, by the sender's clock
    marks: int  # how much its main thread has done
    doing: str
    trouble: bool
    host: str


class Seen(NamedTuple):
    """What rank 0 has seen of a rank: its last sign of life, when it came, and when its count of marks last changed."""

    beat: Beat
    came: float
    moved: float


class Liveness:
    """The thread of `World.watched`."""

    def __init__(self, world, timeout):
        self.world, self.timeout = world, timeout
        self.number = Liveness.number = getattr(Liveness, "number", 0) + 1  # keys of another `watched` are not ours
        # A connection of its own: a store serves one call at a time, and the main thread may wait in one.
        host, port = world.address.rsplit(":", 1)
        patience = datetime.timedelta(seconds=30)
        connection = dist.TCPStore(host, int(port), None, False, patience, wait_for_workers=False)
        self.store = dist.PrefixStore(f"watched/{self.number}", connection)
        self.stopped, self.asked_to_end = threading.Event(), None
        self.seen = {}  # rank -> Seen
        self._beat()
        try:
            self.handler_before = signal.signal(signal.SIGTERM, self._on_signal)
        except ValueError:  # not the main thread
            self.handler_before = None
        self.thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self.thread.start()

    def stop(self):
        """End the watch; what the main thread says from here on counts."""
        self.stopped.set()
        if threading.current_thread() is not self.thread:
            self.thread.join(10 * BEAT)
        if self.handler_before is not None:
            signal.signal(signal.SIGTERM, self.handler_before)

    def end_by(self, error):
        """Tell the others that this rank's main thread has raised an error; returns when it may go on raising."""
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            # Most likely a collective that failed since somebody is lost. Let the watch find out whom, and end this
            # process.
            self.world.trouble = True
            self.stopped.wait(SILENT_IN_TROUBLE + 4 * BEAT)
        if self.world.is_main:
            self.stop()  # so that it is said once, by whoever catches the error
        else:
            self.stopped.wait(2 * BEAT)  # what all ranks have found is rank 0's to say
        with contextlib.suppress(RuntimeError):
            expected = isinstance(error, (ValueError, OSError, FloatingPointError))
            text = ("" if expected else f"{type(error).__name__}: ") + " ".join(str(error).split())
            self.store.compare_set("verdict", "", f"rank {self.world.rank} ({socket.gethostname()}): {text}")
        if self.world.is_main:
            time.sleep(2 * BEAT)  # the store lives in this process: let the others read
        else:
            self.stopped.wait(10 * BEAT)  # until the watch has seen it taken up

    def _on_signal(self, number, frame):
        """SIGTERM where nothing better handles it.

        The launcher ends the others when it has lost one rank: say first which one that was.
        """
        self.world.trouble, self.asked_to_end = True, time.monotonic()

    def _beat(self):
        world = self.world
        beat = Beat(time.time(), world.marks, world.doing + world.detail, world.trouble, socket.gethostname())
        self.store.set(f"beat/{world.rank}", json.dumps(beat))

    def _run(self):
        while not self.stopped.wait(BEAT):
            try:
                self._beat()
                verdict = self._verdict()
            except RuntimeError:  # the store went with its process
                if self.stopped.is_set():
                    return
                self._end_without_rank_0()
            if verdict and not self.stopped.is_set():
                self._end_all(verdict)
            if self.asked_to_end and time.monotonic() > self.asked_to_end + SILENT_IN_TROUBLE + 4 * BEAT:
                os._exit(128 + signal.SIGTERM)

    def _verdict(self):
        """What is wrong with the run, in a line, or None; rank 0 is the one that judges."""
        if self.store.check(["verdict"]):
            return self.store.get("verdict").decode()
        verdict = self._judge() if self.world.is_main else None
        if verdict:
            self.store.compare_set("verdict", "", verdict)
        return verdict

    def _end_without_rank_0(self):
        world = self.world
        if world.rank == 1 or world.local_rank == 0:  # one a machine speaks for it
            self._say(f"rank 0 (master {world.address}) is lost; last here: {world.doing}{world.detail}")
        os._exit(LOST)

    def _end_all(self, verdict):
        if self.world.is_main:
            self._say(verdict)
            time.sleep(3 * BEAT)  # the others have to read it, and the store lives here
        else:
            # The launcher ends rank 0 as soon as another one has ended, and it may be about to speak.
            time.sleep(5 * BEAT)
        os._exit(LOST)

    def _judge(self):
        """Rank 0's look at all signs of life: what is wrong, in a line, or None."""
        now = time.monotonic()
        for rank, beat in enumerate(self._beats()):
            before = self.seen.get(rank)
            came = before.came if before and before.beat.sent == beat.sent else now
            moved = before.moved if before and before.beat.marks == beat.marks else now
            self.seen[rank] = Seen(beat, came, moved)
        limit = SILENT_IN_TROUBLE if any(seen.beat.trouble for seen in self.seen.values()) else SILENT
        rank, seen = min(self.seen.items(), key=lambda item: item[1].came)
        if now - seen.came > limit:
            silence = f"no sign of life for {now - seen.came:.0f} s"
            return f"rank {rank} ({seen.beat.host}) is lost: {silence}, last seen at {seen.beat.doing}"
        if min(now - seen.moved for seen in self.seen.values()) > self.timeout:
            return self._stuck()
        return None

    def _beats(self):
        """The newest sign of life of each rank."""
        keys = [f"beat/{rank}" for rank in range(self.world.size)]
        if self.store.check(keys):  # nearly always; two calls, however many ranks there are
            return [Beat(*json.loads(text)) for text in self.store.multi_get(keys)]
        return [self._beat_of(key) for key in keys]

    def _beat_of(self, key):
        if self.store.check([key]):
            return Beat(*json.loads(self.store.get(key)))
        return Beat(0, 0, "starting", False, "not here yet")

    def _stuck(self):
        """Nobody has moved: the others wait for whoever has got least far."""
        behind = min(seen.beat.marks for seen in self.seen.values())
        slowest = {rank: seen.beat for rank, seen in self.seen.items() if seen.beat.marks == behind}
        names = ", ".join(f"{rank} ({beat.host})" for rank, beat in slowest.items())
        if len(slowest) == 1:
            who = f"rank {names} hangs"
        elif len(slowest) < len(self.seen):
            who = f"ranks {names} hang, one of them or all"
        else:
            who = "all ranks hang"
        doing = next(iter(slowest.values())).doing
        return f"{who}: nothing done for {self.timeout:g} s (distributed.timeout), last at {doing}"

    @staticmethod
    def _say(verdict):
        line = f"hsivi: {verdict}; the run goes on from its newest checkpoint with the same command"
        print(f"\n{line}", file=sys.stderr, flush=True)

"""Signs of life: how the ranks of a run find out which of them is lost or hangs, and end.

A collective waits for all ranks, so one that is lost or stuck would leave the others waiting. Each process therefore has a thread that
writes a sign of life into rank 0's key-value store, with a count of what its main thread has got done; rank 0 reads them all. A rank without
signs of life, or whose main thread does not move for `distributed.timeout` seconds, ends the run: rank 0 says which one it was, and every process exits.
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

import torch
import torch.distributed as dist

BEAT = 1.0  # seconds between two signs of life
SILENT = 20.0  # seconds without one after which a rank is lost: a busy interpreter can be late by some
SILENT_IN_TROUBLE = 5.0  # the same once a collective has failed somewhere, or the launcher has asked a rank to end: then somebody is lost
LOST = 2  # exit code


class Liveness:
    """The thread of `World.watched`."""

    def __init__(self, world, timeout):
        self.world, self.timeout = world, timeout
        self.number = Liveness.number = getattr(Liveness, "number", 0) + 1  # keys of another `watched` are not ours
        # Of its own: a store serves one call at a time, and the main thread may wait in one.
        host, port = world.address.rsplit(":", 1)
        self.store = dist.PrefixStore(
            f"watched/{self.number}",
            dist.TCPStore(host, int(port), None, False, datetime.timedelta(seconds=30), wait_for_workers=False),
        )
        self.stopped, self.asked_to_end = threading.Event(), None
        self.seen = {}  # rank -> (its last sign of life, when it came, its last count of marks, when that changed)
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
            # Most likely a collective that failed since somebody is lost: let the watch find out whom, and end this process.
            self.world.trouble = True
            self.stopped.wait(SILENT_IN_TROUBLE + 4 * BEAT)
        if self.world.is_main:
            self.stop()  # so that it is said once, by whoever catches the error
        else:
            self.stopped.wait(2 * BEAT)  # what all ranks have found is rank 0's to say
        with contextlib.suppress(RuntimeError):
            kind = "" if isinstance(error, (ValueError, OSError, FloatingPointError)) else f"{type(error).__name__}: "
            self.store.compare_set(
                "verdict", "", f"rank {self.world.rank} ({socket.gethostname()}): {kind}{' '.join(str(error).split())}"
            )
        if self.world.is_main:
            time.sleep(2 * BEAT)  # the store lives in this process: let the others read
        else:
            self.stopped.wait(10 * BEAT)  # until the watch has seen it taken up

    def _on_signal(self, number, frame):
        """SIGTERM where nothing better handles it: the launcher ends the others when it has lost one, so say first which one that was."""
        self.world.trouble, self.asked_to_end = True, time.monotonic()

    def _beat(self):
        world = self.world
        self.store.set(
            f"beat/{world.rank}",
            json.dumps([time.time(), world.marks, world.doing + world.detail, world.trouble, socket.gethostname()]),
        )

    def _run(self):
        while not self.stopped.wait(BEAT):
            try:
                self._beat()
                verdict = self.store.get("verdict").decode() if self.store.check(["verdict"]) else None
                if verdict is None and self.world.is_main:
                    verdict = self._judge()
                    if verdict:
                        self.store.compare_set("verdict", "", verdict)
            except RuntimeError:  # the store went with its process
                if self.stopped.is_set():
                    return
                verdict = f"rank 0 (master {self.world.address}) is lost; last here: {self.world.doing}{self.world.detail}"
                if self.world.rank == 1 or self.world.local_rank == 0:  # one a machine speaks for it
                    self._say(verdict)
                os._exit(LOST)
            if verdict and not self.stopped.is_set():
                if self.world.is_main:
                    self._say(verdict)
                    time.sleep(3 * BEAT)  # the others have to read it, and the store lives here
                else:
                    time.sleep(
                        5 * BEAT
                    )  # the launcher ends rank 0 as soon as another one has ended, and it may be about to speak
                os._exit(LOST)
            if self.asked_to_end and time.monotonic() > self.asked_to_end + SILENT_IN_TROUBLE + 4 * BEAT:
                os._exit(128 + signal.SIGTERM)

    def _judge(self):
        """Rank 0's look at all signs of life: what is wrong, in a line, or None."""
        now, states = time.monotonic(), []
        for rank, text in enumerate(self._beats()):
            beat, marks, *rest = json.loads(text)
            old_beat, came, old_marks, moved = self.seen.get(rank, (None, now, None, now))
            self.seen[rank] = beat, now if beat != old_beat else came, marks, now if marks != old_marks else moved
            states.append((rank, marks, *rest, now - self.seen[rank][1], now - self.seen[rank][3]))
        limit = SILENT_IN_TROUBLE if any(trouble for _, _, _, trouble, *_ in states) else SILENT
        silent = [state for state in states if state[5] > limit]
        if silent:
            rank, _, doing, _, host, silence, _ = max(silent, key=lambda state: state[5])
            return f"rank {rank} ({host}) is lost: no sign of life for {silence:.0f} s, last seen at {doing}"
        if min(state[6] for state in states) > self.timeout:
            return self._stuck(states)
        return None

    def _beats(self):
        """The newest sign of life of each rank."""
        keys = [f"beat/{rank}" for rank in range(self.world.size)]
        if self.store.check(keys):  # nearly always; two calls, however many ranks there are
            return [text.decode() for text in self.store.multi_get(keys)]
        return [
            self.store.get(key).decode() if self.store.check([key]) else '[0, 0, "starting", false, "not here yet"]'
            for key in keys
        ]

    def _stuck(self, states):
        """Nobody has moved: the others wait for whoever has got least far."""
        behind = min(marks for _, marks, *_ in states)
        slowest = [state for state in states if state[1] == behind]
        names = ", ".join(f"{rank} ({host})" for rank, _, _, _, host, _, _ in slowest)
        who = (
            f"rank {names} hangs"
            if len(slowest) == 1
            else f"ranks {names} hang, one of them or all"
            if len(slowest) < len(states)
            else "all ranks hang"
        )
        return f"{who}: nothing done for {self.timeout:g} s (distributed.timeout), last at {slowest[0][2]}"

    @staticmethod
    def _say(verdict):
        print(
            f"\nhsivi: {verdict}; the run goes on from its newest checkpoint with the same command",
            file=sys.stderr,
            flush=True,
        )

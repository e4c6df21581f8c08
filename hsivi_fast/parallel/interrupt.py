"""SIGINT, SIGTERM and SIGHUP as a wish that a training loop reads, so that a run saves itself before it ends."""

import signal


class Interrupted(Exception):
    """A run was asked to stop and was saved first; `signal_number` says by what."""

    def __init__(self, message, signal_number):
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Within `with StopRequest() as stop`, `stop.requested` becomes the signal's number.

    The same signal a second time ends the process at once. Not so another one: on Ctrl-C a launcher sends SIGTERM after
    the terminal's SIGINT, and it means the same.
    """

    def __init__(self):
        self.requested = None
        self._before = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run outlives its terminal
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the signals belong to whoever called us there
                break
        return self

    def _note(self, number, frame):
        self.requested = self.requested or number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

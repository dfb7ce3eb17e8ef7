"""SIGTERM and SIGINT: the first asks the run to commit and leave, the second leaves at once.

A signal only sets a number here; whoever works looks at it between two pieces of work.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT)
LEASH = "POTSTILL_LEASH"
"""Set to 1 for a process that leaves when its standard input ends, which is when whoever started it is gone."""


def follow_leash() -> None:
    """Where LEASH is set, asks this process to leave (SIGTERM) as soon as its standard input ends. Its own children are not held."""
    if os.environ.pop(LEASH, "") != "1":
        return

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="leash", daemon=True).start()


class SignalWatch:
    """A context in which `received` is the number of the first signal, or 0. Outside the main thread it watches nothing.

    `doing` is what the first signal starts, for the message.
    """

    def __init__(self, doing: str = "committing a checkpoint"):
        self.received, self._since = 0, 0.0
        self._doing = doing
        self._former: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received, self._since = number, time.monotonic()
        name = signal.Signals(number).name
        sys.stderr.write(f"\n{name}: {self._doing}, then leaving; again to leave at once\n")

    @property
    def seconds(self) -> float:
        """How long ago the first signal came; 0 while there was none."""
        return time.monotonic() - self._since if self.received else 0.0

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

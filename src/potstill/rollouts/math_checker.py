"""What stands behind the checker `math`: math-verify, in a process of its own.

A model may write anything, and what it wrote must neither stop whoever checks it nor touch the verdict on the next answer: the process
(math_worker.py) is ended where a text keeps it busy, and started anew. Knows pipes, and no mathematics.
"""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec

from potstill.errors import ConfigError

# For two readings and four comparisons of at most three seconds; the first pair also waits for sympy to be imported.
_SECONDS, _SECONDS_TO_START = 20.0, 120.0
# Nothing else of the environment is known where a model's text is parsed.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT", "TMPDIR")


def require_math_verify(key: str) -> None:
    """Raises ConfigError naming `key` where math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ConfigError(f"{key}: math needs math-verify, which is not installed: pip install 'potstill[eval]'")


def are_equal(answer: str, reference: str) -> bool:
    """Whether math-verify takes both texts for the same mathematical object. What does not parse, or takes too long, is not."""
    return _WORKER.compare(answer, reference)


class _Worker:
    """One process at a time for this one; a fork starts its own."""

    def __init__(self):
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def compare(self, answer: str, reference: str) -> bool:
        line = json.dumps([answer, reference]).encode() + b"\n"
        with self._lock:
            fresh = self._process is None or self._owner != os.getpid() or self._process.poll() is not None
            process = self._start() if fresh else self._process
            assert process is not None
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                said = self._read(process, _SECONDS_TO_START if fresh else _SECONDS)
            except BrokenPipeError:
                said = None
            except BaseException:
                self.stop()  # an interrupted question must not be answered to the next one
                raise
            if said is None:
                self.stop()
        return said == b"true"

    def _start(self) -> subprocess.Popen[bytes]:
        self.stop()
        known = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            # -P: nothing is imported from the folder that a user happens to stand in.
            [sys.executable, "-P", "-m", "potstill.rollouts.math_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=known, start_new_session=True, bufsize=0,
        )  # fmt: skip
        self._owner = os.getpid()
        return self._process

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line of the process, or None where it ended or took longer."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        line = process.stdout.readline()
        return line.strip() or None

    def stop(self) -> None:
        """Ends the process, if there is one and it is this one's."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner == os.getpid():
            with suppress(OSError):
                process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


_WORKER = _Worker()
atexit.register(_WORKER.stop)

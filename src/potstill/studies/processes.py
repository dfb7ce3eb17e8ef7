"""One command of Potstill as a process of its own: started on its part of the machine, looked at, asked to leave, its failure in a line.

A child that loses its study leaves as if it had been asked to: its standard input ends, and it commits what it has.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from potstill import storage
from potstill.interruption import LEASH
from potstill.recipes.words import printable

_TAIL_BYTES = 16384
_LONGEST_LINE = 500


class Child:
    """A running command. Its output goes to the end of `log`."""

    def __init__(self, arguments: list[str], log: Path, environment: Mapping[str, str]):
        self._log, self._asked = log, False
        output = storage.OPERATIONS.append(log)
        try:
            self._begins = os.fstat(output).st_size
            # Its own session: an interrupt at the terminal reaches the study alone, which then asks each child once.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "potstill", *arguments], stdin=subprocess.PIPE, stdout=output, stderr=output,
                env={**os.environ, **environment, LEASH: "1"}, start_new_session=True,
            )  # fmt: skip
        finally:
            storage.OPERATIONS.close(output)

    def poll(self) -> int | None:
        """The exit status once it has ended, else None."""
        return self._process.poll()

    def ask_to_leave(self) -> None:
        """SIGTERM, once: a second one would make it leave without committing."""
        if not self._asked and self.poll() is None:
            self._asked = True
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Lets go of a child; one that still runs leaves by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def failure(self) -> str:
        """Why it ended badly: the last line that it said, or how it died."""
        code = self.poll()
        if code is not None and code < 0:
            return f"killed by signal {-code}{' (was memory short?)' if -code == signal.SIGKILL else ''}"
        return last_line(self._log, self._begins) or f"exit code {code}, without a word"


def last_line(log: Path, begins: int = 0) -> str:
    """The last line of a log that says anything, from byte `begins` on."""
    with log.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(begins, size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return printable(said.removeprefix("potstill: "))[:_LONGEST_LINE]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES gives them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if len(named) >= count else [str(number) for number in range(count)]


def environment_of(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """The part of the machine that the `slot`-th of `jobs` processes gets: a GPU of its own, or its share of the cores."""
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))}

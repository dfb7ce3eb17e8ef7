"""Time and memory of contenders in this process: processor seconds in turns, and the kernel's own high-water mark."""

import ctypes
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def status(key: str) -> float:
    """MiB of a line of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def peak(run: Callable[[], object]) -> float:
    """MiB above what stood before the second of two runs. Ask it in a fresh process for each contender."""
    run()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def times(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contender in each round, all in turn; a round before the first warms up and does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:
                found[name].append(time.process_time() - start)
    return found

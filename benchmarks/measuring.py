"""Time and memory of contenders in this process: processor seconds in turns, and the kernel's own high-water mark."""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
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


def child(*arguments: str) -> str:
    """The last line that this script prints when it is run again with these arguments."""
    done = subprocess.run([sys.executable, "-W", "ignore", sys.argv[0], *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.splitlines()[-1]


def print_ratios(
    about: str | None, shapes: Mapping[str, tuple], default_shapes: Sequence[str], names: Callable[[list[str] | None], list[str]],
    make: Callable[[str, Sequence[str]], Mapping[str, Callable[[], object]]],
) -> None:  # fmt: skip
    """The command line of a comparison: for each shape a table of CPU time over the contender "floor" and of peak memory.

    `names` says which contenders are measured, given those that were asked for; `make(shape, names)` makes them.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(default_shapes), choices=list(shapes))
    parser.add_argument("--contender", nargs="+", help="by name, as in the table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.worker == "times":
        print(json.dumps(times(make(options.shape[0], options.contender), options.rounds)))
        return
    if options.worker == "peak":
        print(peak(make(options.shape[0], options.contender)[options.contender[0]]))
        return
    for shape in options.shape:
        wanted = ["floor", *names(options.contender)]
        measured = json.loads(child("--worker", "times", "--shape", shape, "--rounds", str(options.rounds), "--contender", *wanted))
        print(f"\n{shape}: {shapes[shape]}, CPU time / floor and MiB beyond the inputs; floor {statistics.median(measured['floor']):.2f} s")
        for name in wanted:
            ratios = [mine / floor for mine, floor in zip(measured[name], measured["floor"], strict=True)]
            most = float(child("--worker", "peak", "--shape", shape, "--contender", name))
            print(f"{name:28s} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})  {most:6.0f} MiB", flush=True)

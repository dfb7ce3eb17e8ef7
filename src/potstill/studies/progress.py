"""How far a study is: a table that is drawn anew on a terminal, lines elsewhere, nothing where it must be quiet."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from potstill.recipes.words import printable
from potstill.run_folder import METRICS, SUMMARY
from potstill.studies.plan import Job
from potstill.studies.schedule import State

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LINES = 60.0
_TAIL_BYTES = 16384
_STYLES = {"finished": "green", "failed": "bold red", "running": "cyan", "interrupted": "yellow", "waiting": "dim"}


def steps_done(job: Job) -> tuple[int, float]:
    """The last step that a run has logged, and how much of the run that is, from 0 to 1."""
    path = job.folder / METRICS
    if not path.is_file():
        return 0, 0.0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # what follows the last line end is not whole
    for line in reversed(lines):
        try:
            last = json.loads(line)
            step, epoch = int(last["step"]), float(last.get("epoch") or 0.0)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        training = job.values["training"]
        share = step / training["steps"] if training.get("steps") else epoch / (training.get("epochs") or 1.0)
        return step, min(share, 1.0)
    return 0, 0.0


def seconds_taken(job: Job) -> float | None:
    """The seconds that a finished run says it trained; None for others."""
    path = job.folder / SUMMARY
    try:
        said: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return None
    seconds = said.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


class Pace:
    """How long runs take, learned from those that are finished: of the same cell, else of the same command, else of any."""

    def __init__(self, jobs: Sequence[Job]):
        self._known = {job.name: (job, seconds) for job in jobs if (seconds := seconds_taken(job)) is not None}

    def learn(self, job: Job) -> None:
        if (seconds := seconds_taken(job)) is not None:
            self._known[job.name] = job, seconds

    def measured(self, job: Job) -> float | None:
        """The seconds that this very run took."""
        return self._known[job.name][1] if job.name in self._known else None

    def of_cell(self, job: Job) -> float | None:
        """The mean over runs of the same cell; None where none is finished."""
        seconds = [seconds for other, seconds in self._known.values() if (other.kind, other.cell) == (job.kind, job.cell)]
        return fmean(seconds) if seconds else None

    def expected(self, job: Job) -> float | None:
        """Seconds of a whole run like this one; None where nothing is known yet."""
        known = [(other, seconds) for other, seconds in self._known.values() if other.kind == job.kind]
        alike: list[Callable[[Job], bool]] = [lambda other: other.cell == job.cell, lambda other: other.command == job.command]
        for is_like in (*alike, lambda other: True):
            if seconds := [seconds for other, seconds in known if is_like(other)]:
                return fmean(seconds)
        return None


def time_left(states: Sequence[State], pace: Pace, side_by_side: int) -> float | None:
    """Seconds until all `states` are done, from measured runs; None while a run's length is unknown."""
    total = 0.0
    for state in states:
        if state.status in ("finished", "failed"):
            continue
        _, share = steps_done(state.job)
        whole = pace.expected(state.job)
        if whole is None and state.status == "running" and state.began is not None and share > 0:
            whole = (time.monotonic() - state.began) / share
        if whole is None:
            return None
        total += whole * (1 - share)
    return total / side_by_side


def in_time(seconds: float) -> str:
    """1 h 05 min, 4 min, 30 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressView:
    """A context that shows the jobs of a study: `changed` and `tick` are called by whoever runs them."""

    def __init__(
        self, states: Mapping[str, State], *, side_by_side: int, quiet: bool, console: Console | None = None,
        on_change: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self._states, self._side_by_side, self._on_change = states, side_by_side, on_change
        self._console = console or Console(stderr=True)
        self._quiet, self._lines = quiet, not quiet and not self._console.is_terminal
        self._live = None if quiet or self._lines else Live(console=self._console, auto_refresh=False)
        self._pace = Pace([state.job for state in states.values()])
        self._looked = self._said = time.monotonic()

    def __enter__(self) -> "ProgressView":
        if self._live is not None:
            self._live.start()
            self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._draw()
            self._live.stop()

    def changed(self, state: State) -> None:
        if state.status == "finished":
            self._pace.learn(state.job)
        self._on_change()
        if self._lines:
            done = sum(other.status == "finished" for other in self._states.values())
            why = f": {state.failure}" if state.failure else ""
            self._say(f"[{done}/{len(self._states)}] {state.job.name}: {state.status}{why}{self._left_words()}")
        elif self._live is not None:
            self._draw()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        if self._live is not None:
            self._draw()
        elif self._lines and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._say("; ".join(f"{state.job.name} {self._words(state)}" for state in self._running()) + self._left_words())

    def _running(self) -> list[State]:
        return [state for state in self._states.values() if state.status == "running"]

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        sys.stderr.write(printable(text) + "\n")

    def _left_words(self) -> str:
        open_states = [state for state in self._states.values() if state.status not in ("finished", "failed")]
        left = time_left(open_states, self._pace, self._side_by_side)
        return f"; about {in_time(left)} left" if open_states and left is not None else ""

    def _words(self, state: State) -> str:
        if state.status != "running" or state.job.kind == "capture":
            return state.status
        step, share = steps_done(state.job)
        return f"step {step:,} ({share:.0%})"

    def _draw(self) -> None:
        assert self._live is not None
        rows: dict[str, list[State]] = {}
        for state in self._states.values():
            rows.setdefault(state.job.cell or f"{state.job.kind} {state.job.name}", []).append(state)
        table = Table(box=None, pad_edge=False)
        table.add_column("cell", overflow="fold")
        for state in max(rows.values(), key=len, default=[]):
            table.add_column(f"seed {state.job.seed}" if state.job.kind == "run" else "", justify="right")
        for name, states in rows.items():
            table.add_row(printable(name), *(Text(self._words(state), style=_STYLES[state.status]) for state in states))
        failed = [Text(printable(f"{state.job.name}: {state.failure}"), style="red") for state in self._states.values() if state.failure]
        done = sum(state.status == "finished" for state in self._states.values())
        last = Text(f"{done} of {len(self._states)} done{self._left_words()}", style="bold")
        self._live.update(Group(table, *failed, last), refresh=True)

"""How far a long command is: a bar on a terminal, a line now and then elsewhere, nothing where it must be quiet."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class CountingProgress:
    """A context that counts `unit`s ("tokens", "answers") of `total`, under the name of what is being `doing` ("Capturing") and will be
    `done` ("captured"). The speed is in tokens, whatever is counted."""

    def __init__(self, total: int, *, doing: str, done: str, unit: str, quiet: bool, console: Console | None = None):
        self._total, self._done, self._unit = total, done, unit
        self._count, self._tokens = 0, 0
        self._began = self._said = time.monotonic()
        console = console or Console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        columns = (
            TextColumn(doing), BarColumn(), TaskProgressColumn(), TextColumn("{task.completed:,.0f} " + unit),
            TextColumn("{task.fields[speed]}"), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=quiet or self._lines)
        self._task = self._bar.add_task("", total=total, speed="")

    def __enter__(self) -> "CountingProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, count: int, tokens: int | None = None) -> None:
        """`count` more are done; `tokens` of them, where it is not tokens that are counted."""
        self._count += count
        self._tokens += count if tokens is None else tokens
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        speed = f"{self._tokens / seconds:,.0f} {'' if tokens is None else 'tokens '}a second"
        self._bar.update(self._task, advance=count, speed=speed)
        if self._lines and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            left = (self._total - self._count) * seconds / max(self._count, 1)
            sys.stderr.write(f"{self._done} {self._count:,} of {self._total:,} {self._unit}, {speed}, about {left:,.0f} s left\n")

"""How far a generation is: a bar on a terminal, a line now and then elsewhere, nothing where it must be quiet."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class WritingProgress:
    """A context that counts answers, and the tokens in them."""

    def __init__(self, total: int, *, quiet: bool, console: Console | None = None):
        self._total, self._answers, self._tokens = total, 0, 0
        self._began = self._said = time.monotonic()
        console = console or Console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        columns = (
            TextColumn("Writing"), BarColumn(), TaskProgressColumn(), TextColumn("{task.completed:,.0f} answers"),
            TextColumn("{task.fields[speed]}"), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=quiet or self._lines)
        self._task = self._bar.add_task("", total=total, speed="")

    def __enter__(self) -> "WritingProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, answers: int, tokens: int) -> None:
        self._answers += answers
        self._tokens += tokens
        now = time.monotonic()
        speed = self._tokens / max(now - self._began, 1e-9)
        self._bar.update(self._task, advance=answers, speed=f"{speed:,.0f} tokens a second")
        if self._lines and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            left = (self._total - self._answers) * (now - self._began) / self._answers
            sys.stderr.write(
                f"wrote {self._answers:,} of {self._total:,} answers, {speed:,.0f} tokens a second, about {left:,.0f} s left\n"
            )

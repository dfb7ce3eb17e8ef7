"""`potstill watch`: runs that are under way in a terminal, from their folders alone. It writes nothing and locks nothing."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from potstill.data.lines import printable
from potstill.environment import redact_text
from potstill.errors import RunFolderError
from potstill.reporting.live import FINISHED, UNDER_WAY, Now, RunReader
from potstill.reporting.pipeline import duration
from potstill.reporting.terminal import curves_picture
from potstill.reporting.wording import UNKNOWN, number
from potstill.run_folder import RECIPE

_STYLES = {FINISHED: "green", UNDER_WAY: "cyan"}
_LOSSES = {"loss": "total", "loss/ce": "cross-entropy", "loss/kd": "divergence"}
_VALIDATION = {
    "eval_loss": "total", "eval_loss/ce": "cross-entropy", "eval_loss/kd": "divergence",
    "eval_top1_agreement": "agreement with the teacher", "eval_entropy": "entropy", "eval_teacher_entropy": "the teacher's",
}  # fmt: skip
_POINTS = 400
_SHOWN_TEXTS, _LONGEST_TEXT = 2, 600
_BAR = 30
_DEPTH = 4  # how far below a folder its runs may lie


class Watched:
    """The runs in some folders, found anew at each look: a study adds runs while it goes on."""

    def __init__(self, paths: Sequence[Path | str]):
        self._paths = [Path(path).expanduser() for path in paths]
        self._readers: dict[Path, RunReader] = {}

    def look(self) -> list[Now]:
        """One look at each run. Raises RunFolderError for a path where there is no run."""
        found: dict[Path, str] = {}
        for path in self._paths:
            runs = _runs(path)
            if not runs:
                raise RunFolderError(f"{path}: neither a run folder ({RECIPE} is missing) nor a folder that holds runs")
            found |= runs
        self._readers = {path: self._readers.get(path) or RunReader(path, name) for path, name in found.items()}
        return [reader.look() for reader in self._readers.values()]


def _runs(path: Path) -> dict[Path, str]:
    """The runs in a folder, by their names."""
    if (path / RECIPE).is_file():
        return {path: path.absolute().name}
    inside = sorted(recipe.parent.relative_to(path) for depth in range(1, _DEPTH + 1) for recipe in path.glob("*/" * depth + RECIPE))
    shown = [run for run in inside if not any(part.startswith(".") or part in ("checkpoints", "student", "adapter") for part in run.parts)]
    return {path / run: run.as_posix() for run in shown}


def watch(paths: Sequence[Path | str], *, once: bool = False, seconds: float = 1.0, console: Console | None = None) -> None:
    """Shows the runs until all are finished. One frame with `once`, and where nobody looks on.

    Raises RunFolderError where there is no run.
    """
    console, watched = console or Console(), Watched(paths)
    looks = watched.look()
    if once or not console.is_terminal:
        console.print(frame(looks, width=console.width))
        return
    with Live(frame(looks, width=console.width), console=console, auto_refresh=False) as live:
        while any(look.status != FINISHED for look in looks):
            time.sleep(seconds)
            looks = watched.look()
            live.update(frame(looks, width=console.width), refresh=True)


def frame(looks: Sequence[Now], *, width: int = 80) -> RenderableType:
    """One run in full, or several as a table."""
    return _in_full(looks[0], width) if len(looks) == 1 else _table(looks, width)


# ---------------------------------------------------------------- one run


def _in_full(now: Now, width: int) -> RenderableType:
    title = Text.assemble((_safe(now.name), "bold"), "  ", (now.status, _STYLES.get(now.status, "yellow")))
    title.append(f"  {_safe(now.words)}" if now.words else "", style="dim")
    parts: list[RenderableType] = [title, Text(_models(now), style="dim"), _progress(now)]
    if now.curves:
        losses = {label: now.curves[name].thinned(_POINTS) for name, label in _LOSSES.items() if name in now.curves}
        parts.append(curves_picture(losses, title="loss (nats per target)", width=max(min(width - 16, 62), 20), height=5))
        parts.append(_numbers(now))
    else:
        parts.append(Text("no step is logged yet", style="dim"))
    return Group(*parts, *_texts(now), *(Text(f"warning: {_safe(warning)}", style="yellow") for warning in now.warnings))


def _models(now: Now) -> str:
    student = _last(now.recipe.get("student.path", "a student"))
    kind, path = now.recipe.get("teacher.kind", "local"), now.recipe.get("teacher.path") or now.recipe.get("teacher.model")
    if not any(key.startswith("teacher.") for key in now.recipe):
        return f"{student}, learning from text"
    if not path:
        return f"{student} from {_safe(str(kind))}"
    return f"{student} from {_last(path)}" + ("" if kind == "local" else f" ({_safe(str(kind))})")


def _last(path: Any) -> str:
    """The last parts of a path or of a name on the hub: enough to tell which."""
    return _safe("/".join(str(path).rstrip("/").split("/")[-2:]))


def _progress(now: Now) -> Text:
    share = min(now.step / now.total, 1.0) if now.total else 0.0
    full = round(share * _BAR)
    bar = Text("━" * full, style="cyan") + Text("━" * (_BAR - full), style="dim")
    return bar + Text("  " + ", ".join([_steps(now), *([f"{share:.0%}"] if now.total else []), _time(now)]))


def _steps(now: Now) -> str:
    return f"step {now.step:,} of {now.total:,}" if now.total else f"step {now.step:,}"


def _time(now: Now) -> str:
    if now.status == FINISHED:
        seconds = now.finished.get("seconds")
        return f"took {duration(seconds)}" if isinstance(seconds, int | float) else "done"
    return "time left not known yet" if now.seconds_left is None else f"{duration(now.seconds_left)} left"


def _numbers(now: Now) -> Text:
    line, validation = now.training, now.validation
    said = [Text(f"loss:       {_said(line, _LOSSES)}")]
    speed, memory = _value(line, "tokens_per_second"), number(_value(line, "peak_gib"))
    said.append(Text(f"speed:      {UNKNOWN if speed is None else f'{speed:,.0f}'} tokens/s, peak memory {memory} GiB"))
    said.append(Text(f"optimizer:  {_said(line, {'learning_rate': 'learning rate', 'grad_norm': 'gradient norm'})}"))
    if validation:
        said.append(Text(f"validation: {_said(validation, _VALIDATION)} (step {int(validation['step']):,})"))
    return Text("\n").join(said)


def _said(line: Any, labels: Mapping[str, str]) -> str:
    return ", ".join(f"{label} {number(_value(line, name))}" for name, label in labels.items() if name in line)


def _value(line: Any, name: str) -> float | None:
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else None


def _texts(now: Now) -> list[Text]:
    shown = []
    for text in list(now.texts)[-_SHOWN_TEXTS:]:
        head = f"written by the {text.get('by', 'student')} for step {text['step']:,}, {text.get('tokens', UNKNOWN)} tokens"
        shown.append(Text(_safe(head) + ("" if text.get("ended", True) else ", cut"), style="dim"))
        shown.append(Text.assemble(("  ‹ ", "dim"), _line(text.get("prompt", ""), tail=True)))
        shown.append(Text.assemble(("  › ", "dim"), (_line(text.get("answer", "")), "cyan")))
    return shown


def _line(text: Any, *, tail: bool = False) -> str:
    """On one line, the end of a prompt and the beginning of an answer; with nothing in it that could command a terminal."""
    text = str(text)
    cut = text[-_LONGEST_TEXT:] if tail else text[:_LONGEST_TEXT]
    marks = ("…" if tail and len(text) > len(cut) else "", "" if tail or len(text) == len(cut) else "…")
    return marks[0] + _safe(cut.replace("\n", " ⏎ ").replace("\t", " ")) + marks[1]


def _safe(text: str) -> str:
    return printable(redact_text(text)).replace("\n", " ")


# ---------------------------------------------------------------- several runs


_WIDE = 110


def _table(looks: Sequence[Now], width: int) -> Table:
    """The parts of the loss stand in it where there is room."""
    done = sum(look.status == FINISHED for look in looks)
    left = [look.seconds_left for look in looks if look.status == UNDER_WAY and look.seconds_left is not None]
    caption = f"{done} of {len(looks)} finished" + (f"; the longest under way has {duration(max(left))} left" if left else "")
    losses = _LOSSES if width >= _WIDE else {"loss": "loss"}
    table = Table(caption=Text(caption), caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("run", "", "step", "time", *losses.values(), "validation", "tokens/s", ""):
        table.add_column(heading, justify="left" if heading in ("run", "") else "right", no_wrap=heading != "run", overflow="fold")
    for look in looks:
        values = [number(_value(look.training, name)) for name in losses]
        steps = f"{look.step:,}/{look.total:,}" if look.total else f"{look.step:,}"
        speed = _value(look.training, "tokens_per_second")
        warnings = f"{len(look.warnings)} ⚠" if look.warnings else ""
        table.add_row(
            Text(_safe(look.name)), Text(look.status, style=_STYLES.get(look.status, "yellow")), steps,
            _time(look) if look.status == FINISHED or look.seconds_left is not None else UNKNOWN, *values,
            number(_value(look.validation, "eval_loss")), UNKNOWN if speed is None else f"{speed:,.0f}", Text(warnings, style="yellow"),
        )  # fmt: skip
    return table

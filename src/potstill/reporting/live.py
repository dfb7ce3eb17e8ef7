"""What a run that may be under way says now, read from its folder alone: how far it is, how long it needs, its last numbers and texts.

A reader keeps its place in every log, so that a look costs what was added since the last one. Imports no torch.
"""

import json
import math
import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from potstill.recipe_changes import flatten
from potstill.reporting.summary import Curve, read_curves
from potstill.reporting.torn import json_object, yaml_object
from potstill.rollouts.config import WatchConfig
from potstill.rollouts.watch import signs
from potstill.run_folder import LOCK, METRICS, NON_FINITE, RECIPE, ROLLOUTS, SUMMARY

_RATED_LINES = 20
_KEPT_TEXTS = 8
_SIGNS = ("length", "entropy", "repeated", "cut")
FINISHED, UNDER_WAY, BROKEN_OFF = "finished", "under way", "not running"


@dataclass(frozen=True)
class Now:
    """A look at one run. `total` steps and `seconds_left` are None where they cannot be known yet; `words` follow the status."""

    name: str
    status: str
    words: str
    recipe: Mapping[str, Any]
    step: int = 0
    total: int | None = None
    seconds_left: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    texts: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    finished: Mapping[str, Any] = field(default_factory=dict)


class Lines:
    """The whole lines of a .jsonl file that grows, or is cut back and written anew; what does not read is passed over."""

    def __init__(self, path: Path, keep: int | None = None):
        self._path = path
        self.values: deque[dict[str, Any]] = deque(maxlen=keep)
        self._file, self._place = -1, 0

    def read(self) -> Sequence[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._place:
                    self.values.clear()
                    self._file, self._place = status.st_ino, 0
                file.seek(self._place)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            self.values.clear()
            self._file, self._place = -1, 0
            return []
        self._place += len(whole) + len(end)
        for line in whole.split(b"\n") if whole else ():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and _is_number(value.get("step")):
                self.values.append(value)
        return list(self.values)


class RunReader:
    """Looks at one run folder again and again."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self._metrics, self._texts = Lines(path / METRICS), Lines(path / ROLLOUTS, keep=_KEPT_TEXTS)

    def look(self) -> Now:
        recipe, warnings = yaml_object(self.path / RECIPE)
        flat = flatten(recipe)
        finished, unread = json_object(self.path / SUMMARY)
        status, words = (FINISHED, "") if finished else _owner(self.path)
        lines = self._metrics.read()
        training = [line for line in lines if "learning_rate" in line]
        validation = [line for line in lines if "eval_loss" in line]
        step = max([int(line["step"]) for line in lines], default=0)
        total = int(finished["steps"]) if _is_number(finished.get("steps")) else _total(flat, training)
        return Now(
            self.name, status, words, flat, step, total,
            0.0 if finished else _seconds_left(flat, step, total, training, validation),
            read_curves(lines), training[-1] if training else {}, validation[-1] if validation else {}, self._texts.read(),
            [*warnings, *unread, *self._refused(training), *_collapse(flat, lines)], finished,
        )  # fmt: skip

    def _refused(self, training: Sequence[Mapping[str, Any]]) -> list[str]:
        refused = [int(line["non_finite_steps"]) for line in training if _is_number(line.get("non_finite_steps"))]
        if not refused and not (self.path / NON_FINITE).exists():
            return []
        return [f"{max(refused, default=1)} steps were not taken, because their loss or gradient was not finite; {NON_FINITE} names them"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _owner(path: Path) -> tuple[str, str]:
    """Whether somebody holds the folder: read, never locked, for a lock would turn away a run that begins just now."""
    owner, _ = json_object(path / LOCK)
    if not owner:
        return BROKEN_OFF, "the same command goes on with it"
    if owner.get("host") != socket.gethostname():
        return UNDER_WAY, f"on {owner.get('host')}"
    try:
        os.kill(int(owner["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return BROKEN_OFF, "it was killed; the same command goes on with it"
    except OSError:
        pass  # somebody else's process
    return UNDER_WAY, ""


def _steps_per_epoch(training: Sequence[Mapping[str, Any]]) -> float | None:
    for line in reversed(training):
        if _is_number(line.get("epoch")) and line["epoch"] > 0:
            return line["step"] / line["epoch"]
    return None


def _total(recipe: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> int | None:
    if _is_number(recipe.get("training.steps")):
        return int(recipe["training.steps"])
    an_epoch, epochs = _steps_per_epoch(training), recipe.get("training.epochs", 0)
    return max(1, math.ceil(round(epochs * an_epoch, 3))) if an_epoch and _is_number(epochs) and epochs > 0 else None


def _seconds_left(
    recipe: Mapping[str, Any], step: int, total: int | None, training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]
) -> float | None:
    """From the typical step of the last lines, in which pauses do not count, and the evaluations that are still to come."""
    rates = [line["seconds_per_step"] for line in training[-_RATED_LINES:] if _is_number(line.get("seconds_per_step"))]
    if total is None or not rates:
        return None
    left = max(total - step, 0) * median(rates)
    every = recipe.get("training.eval_steps") or _steps_per_epoch(training)
    if every is not None and _is_number(every) and validation and _is_number(validation[-1].get("eval_seconds")):
        left += (total // every - step // every) * validation[-1]["eval_seconds"]
    return left


def _collapse(recipe: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The signs that the student's text collapses, as the run itself warns of them."""
    means = [{name: line.get(f"rollouts/{name}") for name in _SIGNS} for line in lines]
    written: list[dict[str, Any]] = [line for line in means if all(map(_is_number, line.values()))]
    if not written:
        return []
    keys = {name: recipe[f"rollouts.watch.{name}"] for name in WatchConfig.model_fields if f"rollouts.watch.{name}" in recipe}
    try:
        config = WatchConfig(**keys)
    except ValueError:  # a recipe that was edited
        config = WatchConfig()
    return [f"the student's text may be collapsing: {words}" for words in signs(config, written[0], written[-1]).values()]

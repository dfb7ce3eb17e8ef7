"""What a study says of itself in study.json: its axes, its cells, and how far each of them came."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from potstill.reporting.torn import json_object

STUDY = "study.json"
# A numeric axis that spans this ratio is drawn in logarithms.
_WIDE = 30


@dataclass(frozen=True)
class Axis:
    """What is varied: a label for each point, and numbers where the points are numbers."""

    name: str
    labels: tuple[str, ...]
    values: tuple[float, ...] | None = None

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def kind(self) -> str:
        """How it is drawn: category, linear or log."""
        if self.values is None:
            return "category"
        return "log" if min(self.values) > 0 and max(self.values) >= _WIDE * min(self.values) else "linear"


@dataclass(frozen=True)
class StudyCell:
    """One cell: the grid points that it stands for (axis to label), and each seed's state. A twin may stand for no point."""

    name: str
    is_sft: bool = False
    points: tuple[Mapping[str, str], ...] = ()
    states: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Study:
    title: str
    published: str = ""
    axes: tuple[Axis, ...] = ()
    cells: tuple[StudyCell, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def unfinished(self) -> list[tuple[str, str, str, str]]:
        """Cell, seed, state and failure of each run that is not finished."""
        return [(cell.name, *state) for cell in self.cells for state in cell.states if state[1] != "finished"]


def read_study(folder: Path) -> tuple[Study | None, list[str]]:
    """The study in `folder`, None where there is none; a line names a study.json that does not read."""
    value, warnings = json_object(folder / STUDY)
    if not value:
        return None, warnings
    if value.get("kind") != "study" or value.get("version") != 1:
        return None, [f"{STUDY}: no study of a version that this Potstill reads; its cells and axes are left out"]
    axes = tuple(_axis(axis) for axis in _objects(value.get("axes")))
    cells = tuple(_cell(cell) for cell in _objects(value.get("cells")))
    stated = value.get("warnings")
    said = tuple(map(str, stated)) if isinstance(stated, list) else ()
    return Study(str(value.get("title") or folder.name), str(value.get("published") or ""), axes, cells, said), []


def _axis(value: Mapping[str, Any]) -> Axis:
    labels, values = value.get("labels"), value.get("values")
    labels = tuple(map(str, labels)) if isinstance(labels, list) else ()
    numeric = isinstance(values, list) and len(values) == len(labels) and all(_is_number(one) for one in values)
    return Axis(str(value.get("name", "")), labels, tuple(map(float, values)) if numeric and values else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _cell(value: Mapping[str, Any]) -> StudyCell:
    points = tuple({str(axis): str(label) for axis, label in point.items()} for point in _objects(value.get("points")))
    runs = _objects(value.get("runs"))
    states = tuple((str(run.get("seed", "")), str(run.get("status", "")), str(run.get("failure") or "")) for run in runs)
    return StudyCell(str(value.get("name", "")), bool(value.get("is_sft")), points, states)


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []

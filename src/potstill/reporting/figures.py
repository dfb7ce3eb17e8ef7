"""Pictures as plain data: lines with names, places and titles, which the page's script draws with plotly, or tables where it is missing.

What is said here is independent of the theme; colours are chosen by position, so that a run keeps its own through all pictures.
"""

import html
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from potstill.reporting.pipeline import Cell
from potstill.reporting.summary import EVALUATION_PREFIX, Curve, RunSummary, label_of, quantities, quantity_of

MOST_POINTS = 1000      # of one curve
ALL_POINTS = 100_000    # of all curves of a page together, about 20 bytes each
LEAST_POINTS = 8
MOST_TABLE_ROWS = 12
MOST_SERIES = 60


def has_plotly() -> bool:
    """Whether curves can be drawn; plotly comes with the extra `report`."""
    return importlib.util.find_spec("plotly") is not None


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn. `colour` is a position in the palette; `kind` is training, validation or other.

    `is_faint`: one seed of several, beside their mean.
    """

    legend: str
    colour: int
    kind: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    is_faint: bool = False
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    style: str = "line"

    def to_json(self) -> dict[str, Any]:
        """For the page's script; the name is escaped, because plotly reads a little HTML in it."""
        entry: dict[str, Any] = {"name": html.escape(self.legend), "colour": self.colour, "kind": self.kind}
        entry |= {"x": _short(self.x), "y": _short(self.y)}
        entry |= {"faint": True} if self.is_faint else {}
        entry |= {"style": self.style} if self.style != "line" else {}
        return entry | ({"low": _short(self.low), "high": _short(self.high)} if self.low else {})


@dataclass(frozen=True)
class Figure:
    """A picture: its lines, and what stands beside it. `x_kind` is linear, log or category."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    group: str = "curves"
    x_kind: str = "linear"
    left_out: int = 0
    has_diagonal: bool = False
    categories: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group, "x_label": html.escape(self.x_label), "y_label": html.escape(self.y_label), "x_kind": self.x_kind,
            "diagonal": self.has_diagonal, "categories": [html.escape(name) for name in self.categories],
            "lines": [line.to_json() for line in self.lines],
        }  # fmt: skip

    def table(self) -> dict[str, Any]:
        """Rows of evenly chosen places, one column a line; a line without a value at a place leaves its cell empty."""
        lines = [line for line in self.lines if not line.is_faint]
        places = sorted({x for line in lines for x in line.x})
        stride = max(1, -(-len(places) // MOST_TABLE_ROWS))
        chosen = sorted({*places[::stride], *places[-1:]})
        columns = [dict(zip(line.x, line.y, strict=True)) for line in lines]
        names = [self.categories[int(x)] if self.categories else x for x in chosen]
        rows = [(name, [column.get(x) for column in columns]) for name, x in zip(names, chosen, strict=True)]
        return {"x_label": self.x_label, "columns": [_legend(line) for line in lines], "rows": rows}


def _legend(line: Line) -> str:
    return f"{line.legend}, {line.kind}" if line.kind in ("training", "validation") else line.legend


def curve_figures(summaries: Sequence[RunSummary], cells: Sequence[Cell], *, all_points: int = ALL_POINTS) -> list[Figure]:
    """One picture a logged quantity; runs that differ in their seed alone are drawn faint under their mean."""
    drawn = [(quantity, [line for place, cell in enumerate(cells) for line in _lines(summaries, cell, place, quantity)])
             for quantity in quantities(summaries)]  # fmt: skip
    num_lines = sum(len(lines) for _, lines in drawn)
    most = max(LEAST_POINTS, min(MOST_POINTS, all_points // max(num_lines, 1)))
    figures = []
    for quantity, lines in drawn:
        thin = tuple(_thinned(line, most) for line in lines)
        left_out = sum(len(line.x) for line in lines) - sum(len(line.x) for line in thin)
        figures.append(Figure(label_of(quantity), "optimizer step", label_of(quantity), thin, left_out=left_out))
    return figures


def _lines(summaries: Sequence[RunSummary], cell: Cell, place: int, quantity: str) -> list[Line]:
    found: dict[str, list[Curve]] = {}
    for member in cell.members:
        for name, curve in summaries[member].curves.items():
            if quantity_of(name) == quantity and curve.steps:
                found.setdefault("validation" if name.startswith(EVALUATION_PREFIX) else "training", []).append(curve)
    lines = []
    for kind, curves in found.items():
        mean = mean_curve(curves) if len(curves) > 1 else None
        lines += [Line(cell.name, place, kind, curve.steps, curve.values, is_faint=mean is not None) for curve in curves]
        lines += [Line(cell.name, place, kind, mean.steps, mean.values)] if mean is not None else []
    return lines


def mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """The mean over seeds at the steps that every one of them logged; None where they share no two."""
    shared = set(curves[0].steps).intersection(*(curve.steps for curve in curves[1:]))
    if len(shared) < 2:
        return None
    values = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    steps = tuple(sorted(shared))
    return Curve(steps, tuple(sum(by_step[step] for by_step in values) / len(values) for step in steps))


def _thinned(line: Line, most: int) -> Line:
    curve = Curve(line.x, line.y).thinned(most)  # type: ignore[arg-type]  # curves hold no gaps
    return replace(line, x=curve.steps, y=curve.values)


def series_figures(records: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The pictures that evaluations brought along: calibration beside its diagonal, lengths, anything else as lines; a colour a model."""
    names = list(dict.fromkeys(series["model"] for record in records for series in record["series"]))
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        for series in record["series"]:
            key = tuple(series[part] for part in ("task", "kind", "label", "x_label", "y_label"))
            groups.setdefault(key, []).append(series)
    several_tasks = len({task for task, *_ in groups}) > 1
    figures = []
    for (task, kind, label, x_label, y_label), found in list(groups.items())[:MOST_SERIES]:
        lines = []
        for series in found:
            points = [(x, y) for x, y in zip(series["x"], series["y"], strict=True) if x is not None]
            xs, ys = tuple(x for x, _ in points), tuple(y for _, y in points)
            line = Line(series["model"], names.index(series["model"]), "other", xs, ys)
            lines.append(_evenly(line, MOST_POINTS // 4))
        title = label or kind.replace("_", " ")
        figures.append(Figure(f"{title} · {task}" if several_tasks and task else title, x_label, y_label, tuple(lines), "series",
                              has_diagonal=kind == "calibration"))  # fmt: skip
    return figures


def _evenly(line: Line, most: int) -> Line:
    stride = -(-len(line.x) // most) if line.x else 1
    return replace(line, x=line.x[::stride], y=line.y[::stride])


def _short(values: Sequence[float | None]) -> list[float | int | None]:
    """Six digits: more cannot be seen."""
    return [None if value is None else value if isinstance(value, int) else float(f"{value:.6g}") for value in values]

"""A study's results drawn along each of its axes, with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from potstill.reporting.figures import Figure, Line
from potstill.reporting.study import Axis, Study
from potstill.reporting.wording import with_unit

MOST_FIGURES = 24


def study_figures(study: Study, records: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Each task's own metric along each axis, with 95 % intervals; cells that share everything else are joined, twins are level lines."""
    figures = []
    for record in records:
        models = {model["name"]: model for model in record["models"]}
        for task in record["tasks"]:
            for axis in study.axes:
                figure = _figure(study, axis, models, task)
                figures += [figure] if figure is not None else []
    return figures[:MOST_FIGURES]


def _figure(study: Study, axis: Axis, models: Mapping[str, Any], task: Mapping[str, Any]) -> Figure | None:
    groups: dict[str, dict[float, Mapping[str, Any]]] = {}
    described, twins = None, []
    for cell in study.cells:
        metric = models.get(cell.name, {}).get("metrics", {}).get(task["primary"])
        if metric is None or metric["value"] is None:
            continue
        described = metric
        places = [point for point in cell.points if point.get(axis.name) in axis.labels]
        for point in places:
            place = axis.labels.index(point[axis.name])
            others = ", ".join(label for name, label in point.items() if name != axis.name)
            groups.setdefault(others, {})[axis.values[place] if axis.values else float(place)] = metric
        twins += [(cell.name, metric)] if cell.is_sft and not places else []
    if described is None or len({x for group in groups.values() for x in group}) < 2:
        return None
    lines = [_line(name or "cells", place, dict(sorted(group.items()))) for place, (name, group) in enumerate(groups.items())]
    ends = axis.values or tuple(map(float, range(len(axis.labels))))
    lines += [Line(name, len(groups) + place, "other", (min(ends), max(ends)), (metric["value"],) * 2, style="level")
              for place, (name, metric) in enumerate(twins)]  # fmt: skip
    title = f"{described['label']} · {task['name']} along {axis.short}"
    return Figure(
        title, axis.short, with_unit(described["label"], described["unit"]), tuple(lines), "study", axis.kind,
        categories=axis.labels if axis.values is None else (),
    )  # fmt: skip


def _line(name: str, colour: int, group: Mapping[float, Mapping[str, Any]]) -> Line:
    values = list(group.values())
    known = all(metric["low"] is not None and metric["high"] is not None for metric in values)
    return Line(
        name, colour, "other", tuple(group), tuple(metric["value"] for metric in values), style="points",
        low=tuple(metric["value"] - metric["low"] for metric in values) if known else (),
        high=tuple(metric["high"] - metric["value"] for metric in values) if known else (),
    )  # fmt: skip

"""`study.json`: cells, what differs between them, their runs and what those took. Reporting reads nothing else of a study.

What differs from one execution to the next stands under `costs` alone, so that a study that was broken off and finished says the same
as one that was not.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill import storage
from potstill.recipe_changes import flatten
from potstill.run_folder import METRICS, SUMMARY
from potstill.studies.cells import Cell, comparable
from potstill.studies.plan import Job, Plan
from potstill.studies.schedule import State

VERSION = 1
FILE = "study.json"


def snapshot(
    plan: Plan, states: Mapping[str, State], *, seeds_compared: Sequence[int] = (), warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """The study as JSON values, at this moment."""
    config = plan.study.config
    differences = _differences(plan.cells)
    return {
        "kind": "study", "version": VERSION, "title": config.title, "published": config.published, "baseline": config.baseline,
        "seeds": list(config.seeds), "seeds_compared": list(seeds_compared) or None,
        "axes": [
            {"name": axis.name, "labels": list(axis.values), "values": None if axis.plain is None else list(axis.plain)}
            for axis in plan.axes
        ],
        "cells": [_cell(plan, cell, differences[cell.name], states) for cell in plan.cells],
        "before": [_job(plan, states[name]) for name in plan.before],
        "captures": [_job(plan, state) for state in states.values() if state.job.kind == "capture"],
        "warnings": [*budget_warnings(plan.cells), *warnings],
    }  # fmt: skip


def write(plan: Plan, states: Mapping[str, State], **more: Any) -> None:
    """Writes `study.json`, atomically."""
    storage.write_json(plan.folder / FILE, snapshot(plan, states, **more))


def _cell(plan: Plan, cell: Cell, differences: Mapping[str, Any], states: Mapping[str, State]) -> dict[str, Any]:
    recipe = cell.built.recipe
    answers = "none" if not recipe.uses_teacher else "recorded" if cell.name in plan.recordings else "live"
    runs = [states[plan.run_of(cell.name, seed).name] for seed in plan.study.config.seeds]
    return {
        "name": cell.name, "is_sft": cell.is_sft, "against": cell.against, "points": [dict(point) for point in cell.points],
        "differences": dict(differences), "teacher_answers": answers, "budget": budget(cell),
        "runs": [{"seed": state.job.seed, **_job(plan, state)} for state in runs],
    }  # fmt: skip


def _job(plan: Plan, state: State) -> dict[str, Any]:
    said = {
        "name": state.job.name, "folder": _inside(plan.folder, state.job.folder), "status": state.status, "failure": state.failure,
    }  # fmt: skip
    if state.job.kind == "capture":
        return said
    summary = _read(state.job.folder / SUMMARY) if state.status == "finished" else {}
    numbers = {key: summary.get(key) for key in ("steps", "target_tokens", "parameters")}
    costs = {key: summary.get(key) for key in ("seconds", "peak_gib")} | {"tokens_per_second": _speed(state.job, summary)}
    return said | numbers | {"costs": costs}


def _inside(root: Path, folder: Path) -> str:
    return str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)


def _speed(job: Job, summary: Mapping[str, Any]) -> float | None:
    if not summary or not (job.folder / METRICS).is_file():
        return None
    lines, _ = storage.read_lines(job.folder / METRICS)
    speeds = [line["tokens_per_second"] for line in lines if isinstance(line.get("tokens_per_second"), float)]
    return sum(speeds) / len(speeds) if speeds else None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def budget(cell: Cell) -> dict[str, Any]:
    """What a cell may use up, as its recipe says it."""
    training = cell.built.recipe.training
    return {"steps": training.steps, "epochs": training.epochs, "global_batch": training.global_batch}


def budget_warnings(cells: Sequence[Cell]) -> list[str]:
    """What is not the same for all cells of what they may use up, in words."""
    warnings = []
    for key, words in {"steps": "steps", "epochs": "epochs", "global_batch": "rows of a step"}.items():
        values: dict[Any, list[str]] = {}
        for cell in cells:
            values.setdefault(budget(cell)[key], []).append(cell.name)
        if len(values) > 1:
            shown = "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
            warnings.append(f"the cells differ in their {words} ({shown}), so not every difference is one of method")
    return warnings


def _differences(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Of each cell, the keys of its recipe whose value is not the same in all cells; null where it has none, or none that is used."""
    flat = {cell.name: flatten(comparable(cell.built.recipe)) for cell in cells}
    for cell in cells:
        if cell.is_sft:  # what stands in its objective by default weighs a teacher that it does not have
            flat[cell.name] = {key: value for key, value in flat[cell.name].items() if not key.startswith("objective.") or key in _OF_TEXT}
    keys = sorted({key for values in flat.values() for key in values})
    differing = [key for key in keys if len({json.dumps(values.get(key), sort_keys=True) for values in flat.values()}) > 1]
    return {name: {key: values.get(key) for key in differing} for name, values in flat.items()}


_OF_TEXT = ("objective.divergence", "objective.reduction")

"""Measures the students of a study when they are trained, each cell against its twin, on the seeds that all cells have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from potstill.errors import ConfigError, PotstillError
from potstill.evaluation.config import EvaluationConfig, MeasuringConfig
from potstill.evaluation.harness_config import HarnessTaskConfig
from potstill.recipes.mistakes import build
from potstill.recipes.precheck import check_model, check_tasks
from potstill.recipes.text import Document
from potstill.studies.plan import Plan
from potstill.studies.references import real_paths, resolve, stand_ins
from potstill.studies.schedule import State

RECORD = "evaluation/study.json"
BEFORE = "before training"
"""The row of the student from which every cell begins, where that is one trained model: what was forgotten is measured from it."""
_OF_THE_TRAINING = ("lora", "activation_checkpointing")


@dataclass(frozen=True)
class Comparable:
    """The cells that can be compared, the seeds that all of them have, and what is left out, in words."""

    cells: Sequence[str]
    seeds: Sequence[int]
    warnings: Sequence[str]


def comparable(plan: Plan, states: Mapping[str, State]) -> Comparable:
    """Seeds are paired: a comparison rests on those that every cell has. A cell that has none is left out."""
    have = {
        cell.name: [seed for seed in plan.study.config.seeds if states[plan.run_of(cell.name, seed).name].status == "finished"]
        for cell in plan.cells
    }  # fmt: skip
    cells = [name for name, seeds in have.items() if seeds]
    shared = [seed for seed in plan.study.config.seeds if cells and all(seed in have[name] for name in cells)]
    warnings = [f"{name}: no seed is finished, so it is left out of the table" for name, seeds in have.items() if not seeds]
    all_seeds = plan.study.config.seeds
    missing = {name: [seed for seed in all_seeds if seed not in seeds] for name, seeds in have.items() if 0 < len(seeds) < len(all_seeds)}
    on = f"every cell is compared on {_seeds(shared)} alone" if shared else "no seed is left that every cell has, so nothing is compared"
    warnings += [f"{name}: {_seeds(seeds)} missing; {on}" for name, seeds in missing.items()]
    return Comparable(cells if shared else [], shared, warnings)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def precheck_measuring(plan: Plan) -> None:
    """Raises ConfigError, ModelError or DataError for what cannot be measured, as far as that shows before anything runs."""
    config = _asked(plan)
    if config is None:
        return
    try:
        if config.teacher is not None:
            check_model("teacher", config.teacher)
        check_tasks(config)
    except PotstillError as error:
        raise type(error)(f"evaluation: {error}") from None


def precheck_questions(plan: Plan) -> None:
    """Has the harness render the questions of its tasks, which takes seconds and no model. Raises UsageError and its kinds for a task that
    it does not know, or rows that it cannot ask."""
    config = _asked(plan)
    tasks = [] if config is None else [task for task in config.tasks if isinstance(task, HarnessTaskConfig)]
    for task in tasks:
        from potstill.evaluation.harness.building import build_questions

        try:
            build_questions(task)
        except PotstillError as error:
            raise type(error)(f"evaluation: {error}") from None


def _asked(plan: Plan) -> MeasuringConfig | None:
    """What is to be measured, with other models in place of those that the study trains first."""
    if plan.study.config.evaluation is None:
        return None
    document = _document(plan)
    resolve(document, plan.before, stand_ins({name: built.checked.student.path for name, built in plan.before.items()}))
    return build(MeasuringConfig, document, plan.study.source)


def measuring(plan: Plan, found: Comparable) -> EvaluationConfig:
    """What is measured of the cells that can be compared. Raises ConfigError."""
    document = _document(plan)
    resolve(document, plan.before, real_paths(plan.folder))
    students = {
        name: [{"path": str(plan.run_of(name, seed).folder / "student")} for seed in found.seeds] for name in found.cells
    }  # fmt: skip
    against = {cell.name: cell.against for cell in plan.cells if cell.name in found.cells and cell.against in found.cells}
    values: dict[str, Any] = {**document.values, "models": students, "store": str(plan.folder / "evaluation" / "store")}
    start = _start(plan, found)
    if start is not None:
        values["models"] = {BEFORE: [start], **students}
        values["before"] = BEFORE
    baselines = set(against.values())
    # One baseline for all means all: a cell whose own twin is missing is compared with none.
    if len(baselines) == 1 and baselines | set(against) == set(found.cells):
        values["baseline"] = baselines.pop()
    else:
        values["against"] = against
    document.values = values
    return build(EvaluationConfig, document, plan.study.source)


def _start(plan: Plan, found: Comparable) -> dict[str, Any] | None:
    """The student before training, if all cells begin from one that has learned something, and from none that the study itself trains."""
    begun = [plan.run_of(name, found.seeds[0]).values["student"] for name in found.cells]
    models = [{key: value for key, value in student.items() if key not in _OF_THE_TRAINING} for student in begun]
    made_here = str(plan.folder)
    same = bool(models) and all(model == models[0] for model in models) and not str(models[0]["path"]).startswith(made_here)
    return models[0] if same and models[0].get("weights", "pretrained") == "pretrained" else None


def measure(plan: Plan, found: Comparable, *, console: Console | None = None, quiet: bool = False) -> None:
    """Writes the record. Results that are there are not measured again. Raises PotstillError."""
    from transformers.utils import logging

    from potstill.evaluation.evaluate import evaluate

    logging.disable_progress_bar()  # weights are read while our own bar is drawn
    evaluate(measuring(plan, found), output=record_path(plan.folder), console=console, quiet=quiet)


def record_path(folder: Path) -> Path:
    """Where the record of a study's evaluation lies."""
    return folder / RECORD


def _document(plan: Plan) -> Document:
    document = plan.study.part(("evaluation",))
    if not isinstance(document.values, dict):
        raise ConfigError(f"{plan.study.source}: evaluation: must be a mapping (key: value)")
    return document

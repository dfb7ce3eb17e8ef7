"""Reads run folders and nothing else: curves, recipe, evaluations, sessions, and what should worry a reader. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from potstill.errors import RunFolderError
from potstill.recipe_changes import flatten
from potstill.reporting.records import read_evaluations, read_record
from potstill.reporting.study import Study, read_study
from potstill.reporting.torn import json_lines, json_object, yaml_object
from potstill.run_folder import ENVIRONMENT, METRICS, RECIPE, SUMMARY, RunFolder

EVALUATION_PREFIX = "eval_"
# What training logs, in the order in which a reader looks for it, and in words. Any other quantity follows under its own name.
LABELS = {
    "loss/ce": "cross-entropy (nats per target)",
    "loss/kd": "divergence from the teacher (nats per target)",
    "loss": "loss (nats per target)",
    "top1_agreement": "top-1 agreement with the teacher",
    "student_entropy": "entropy of the student (nats)",
    "teacher_entropy": "entropy of the teacher (nats)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens per second",
    "peak_gib": "peak memory (GiB)",
}
# Logged beside the curves and no curve of their own.
_NOT_CURVES = frozenset({"step", "epoch", "target_tokens", "non_finite_steps", "eval_seconds", "seconds_per_step"})


@dataclass(frozen=True)
class Curve:
    """One logged quantity over optimizer steps; `missing` counts the lines where it was null, which stands for not finite."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    missing: int = 0

    def thinned(self, most: int) -> "Curve":
        """At most `most` points, the smallest and the largest of each stretch kept, so that a spike is not smoothed away."""
        count = len(self.steps)
        if count <= most:
            return self
        kept = {0, count - 1}
        num_stretches = max((most - 2) // 2, 1)
        for stretch in range(num_stretches):
            inside = range(stretch * count // num_stretches, (stretch + 1) * count // num_stretches)
            kept |= {min(inside, key=self.values.__getitem__), max(inside, key=self.values.__getitem__)}
        order = sorted(kept)
        return Curve(tuple(self.steps[i] for i in order), tuple(self.values[i] for i in order), self.missing)


@dataclass(frozen=True)
class RunSummary:
    """What one run folder says. `curves` by logged name; `recipe` flattened to `a.b` keys; `finished` is the run's own summary.

    `evaluations` have the shape that `records.normalise` gives. `is_run` is false for a folder that only holds evaluations or runs,
    which may be those of a `study`.
    """

    name: str
    path: Path
    status: str
    recipe: Mapping[str, Any]
    curves: Mapping[str, Curve]
    evaluations: Mapping[str, Mapping[str, Any]]
    sessions: Sequence[Mapping[str, Any]] = ()
    finished: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    is_run: bool = True
    study: Study | None = None


def summarise_all(paths: Sequence[Path | str]) -> list[RunSummary]:
    """One summary a run. A folder that is no run but holds runs stands for them, and its own evaluations come first; an evaluation's
    file stands for itself. A path among several that holds nothing becomes a warning.

    Raises RunFolderError where there is nothing at all to report on.
    """
    summaries: list[RunSummary] = []
    missing = []
    for path in map(Path, paths):
        found = _summaries(path)
        summaries += found
        missing += [] if found else [f"{path}: neither a run folder ({RECIPE} is missing) nor a folder that holds runs or evaluations"]
    if not summaries:
        raise RunFolderError(missing[0])
    if missing:
        summaries[0] = replace(summaries[0], warnings=[*missing, *summaries[0].warnings])
    return summaries


def _summaries(path: Path) -> list[RunSummary]:
    if (path / RECIPE).is_file():
        return [summarise(path)]
    if path.is_file():
        record, warnings = read_record(path)
        records = {} if record is None else {path.stem: record}
        return [_no_run(path.stem, path, records, warnings)] if records else []
    runs = sorted(entry.parent for depth in range(1, 5) for entry in path.glob("*/" * depth + RECIPE) if _is_shown(entry, path))
    study, warnings = read_study(path)
    evaluations, unread = read_evaluations(path)
    warnings = [*warnings, *unread, *(study.warnings if study is not None else ())]
    own = [_no_run(path.absolute().name, path, evaluations, warnings, study)] if evaluations or warnings or study is not None else []
    return own + [summarise(run, name=run.relative_to(path).as_posix().removeprefix("runs/")) for run in runs]


def _is_shown(recipe: Path, folder: Path) -> bool:
    """Not what a run keeps inside itself, such as its checkpoints, and nothing hidden."""
    return not any(part.startswith(".") or part in ("checkpoints", "student", "adapter") for part in recipe.relative_to(folder).parts)


def _no_run(
    name: str, path: Path, evaluations: Mapping[str, Mapping[str, Any]], warnings: Sequence[str], study: Study | None = None
) -> RunSummary:
    warnings = [*warnings, *_evaluation_warnings(evaluations)]
    return RunSummary(name, path, "", {}, {}, evaluations, warnings=warnings, is_run=False, study=study)


def summarise(path: Path | str, *, name: str | None = None) -> RunSummary:
    """Reads one run folder, which may be under way or damaged: what does not read is a warning. Raises RunFolderError where there is
    none."""
    folder = RunFolder.read(path)
    lines, torn = json_lines(folder.path / METRICS)
    recipe, bad_recipe = yaml_object(folder.path / RECIPE)
    environment, bad_environment = json_object(folder.path / ENVIRONMENT)
    finished, bad_summary = json_object(folder.path / SUMMARY)
    evaluations, bad_evaluations = read_evaluations(folder.path)
    sessions = environment.get("sessions", [])
    sessions = [session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else []
    curves = read_curves(lines)
    return RunSummary(
        name or folder.path.name, folder.path, folder.status, flatten(recipe), curves, evaluations, sessions, finished,
        [*bad_recipe, *bad_environment, *bad_summary, *_run_warnings(folder.status, curves, sessions), *torn, *_refused_steps(lines),
         *bad_evaluations, *_evaluation_warnings(evaluations)],
    )  # fmt: skip


def read_curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Every numeric quantity of metrics.jsonl; of several lines of one step (a run that redid it) the last one counts."""
    points: dict[str, dict[int, float | None]] = {}
    for line in lines:
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int | float):
            continue
        for name, value in line.items():
            if name in _NOT_CURVES or isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
                continue
            points.setdefault(name, {})[int(step)] = value
    curves = {}
    for name, by_step in points.items():
        finite = {step: float(value) for step, value in sorted(by_step.items()) if value is not None and math.isfinite(value)}
        curves[name] = Curve(tuple(finite), tuple(finite.values()), missing=len(by_step) - len(finite))
    return curves


def quantity_of(name: str) -> str:
    """The quantity that a logged name measures: training and validation of one quantity belong in one picture."""
    return name.removeprefix(EVALUATION_PREFIX)


def quantities(summaries: Sequence[RunSummary]) -> list[str]:
    """The quantities that any run logged with at least two points, the losses first."""
    found = {quantity_of(name) for summary in summaries for name, curve in summary.curves.items() if len(curve.steps) > 1}
    return [name for name in LABELS if name in found] + sorted(found - LABELS.keys())


def label_of(quantity: str) -> str:
    """A quantity in words, with its unit."""
    return LABELS.get(quantity, quantity.replace("_", " "))


def _evaluation_warnings(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{name}: {warning}" for name, record in evaluations.items() for warning in record.get("warnings", ())]


def _refused_steps(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    refused = max((int(count) for line in lines if isinstance(count := line.get("non_finite_steps"), int | float)), default=0)
    return [f"{refused} steps were not taken, because their loss or gradient was not finite"] if refused else []


def _run_warnings(status: str, curves: Mapping[str, Curve], sessions: Sequence[Mapping[str, Any]]) -> list[str]:
    warnings = []
    if status != "finished":
        warnings.append("the run is not finished: its numbers are those of an interrupted run or of one that is under way")
    warnings += [f"{name}: not finite in {curve.missing} logged steps" for name, curve in curves.items() if curve.missing]
    for session in sessions[1:]:
        warnings.append(f"resumed {session.get('started', 'at an unknown time')}")
        warnings += [f"changed at that resume: {change}" for change in session.get("recipe_changes", ())]
    return warnings

"""Reads run folders and nothing else: curves, recipe, evaluations, sessions, and what should worry a reader. Imports no torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill import storage
from potstill.errors import RunFolderError
from potstill.recipe_changes import flatten
from potstill.run_folder import METRICS, RECIPE, RunFolder

EVALUATION_PREFIX = "eval_"
# What training logs, in the order in which a reader looks for it, and in words. Any other quantity follows under its own name.
LABELS = {
    "loss/ce": "cross-entropy (nats per target)",
    "loss/kd": "divergence from the teacher (nats per target)",
    "loss": "loss (nats per target)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens per second",
    "peak_gib": "peak memory (GiB)",
}
# Logged beside the curves and no curve of their own.
_NOT_CURVES = frozenset({"step", "epoch", "target_tokens", "non_finite_steps", "eval_seconds"})


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
    """What one run folder says. `curves` by logged name; `recipe` flattened to `a.b` keys; `finished` is the run's own summary."""

    name: str
    path: Path
    status: str
    recipe: Mapping[str, Any]
    curves: Mapping[str, Curve]
    evaluations: Mapping[str, Mapping[str, Any]]
    sessions: Sequence[Mapping[str, Any]] = ()
    finished: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def summarise_all(paths: Sequence[Path | str]) -> list[RunSummary]:
    """One summary a run. A folder that is no run but holds runs stands for them, and its own evaluations come first.

    Raises RunFolderError for a path where there is nothing to report on.
    """
    summaries: list[RunSummary] = []
    for path in map(Path, paths):
        if (path / RECIPE).is_file():
            summaries.append(summarise(path))
            continue
        runs = sorted(entry.parent for pattern in (f"*/{RECIPE}", f"*/*/{RECIPE}") for entry in path.glob(pattern))
        if not runs:
            raise RunFolderError(f"{path}: neither a run folder ({RECIPE} is missing) nor a folder that holds runs")
        own = _read_evaluations(path)
        if own:
            summaries.append(RunSummary(path.name, path, "finished", {}, {}, own, warnings=_evaluation_warnings(own)))
        summaries += [summarise(run, name=str(run.relative_to(path))) for run in runs]
    return summaries


def summarise(path: Path | str, *, name: str | None = None) -> RunSummary:
    """Reads one run folder, which may be under way. Raises RunFolderError where there is none."""
    folder = RunFolder.read(path)
    lines, torn = storage.read_lines(folder.path / METRICS)
    curves = read_curves(lines)
    evaluations = _read_evaluations(folder.path)
    sessions = folder.read_sessions()
    return RunSummary(
        name or folder.path.name, folder.path, folder.status, flatten(folder.read_recipe()), curves, evaluations, sessions,
        folder.read_summary(),
        [*_run_warnings(folder.status, curves, sessions, bool(torn)), *_refused_steps(lines), *_evaluation_warnings(evaluations)],
    )  # fmt: skip


def read_curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Every numeric quantity of metrics.jsonl; of several lines of one step (a run that redid it) the last one counts."""
    points: dict[str, dict[int, float | None]] = {}
    for line in lines:
        for name, value in line.items():
            if name in _NOT_CURVES or isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
                continue
            points.setdefault(name, {})[int(line["step"])] = value
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


def _read_evaluations(path: Path) -> dict[str, Mapping[str, Any]]:
    found = {}
    for file in sorted((path / "evaluation").glob("*.json")):
        try:
            record = json.loads(file.read_bytes())
        except ValueError as error:
            raise RunFolderError(f"{file}: not JSON ({error}); was it edited or damaged? Remove it or evaluate again") from error
        if isinstance(record, dict) and record.get("kind") == "evaluation":
            found[file.stem] = record
    return found


def _evaluation_warnings(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{name}: {warning}" for name, record in evaluations.items() for warning in record.get("warnings", ())]


def _refused_steps(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    refused = max((int(line["non_finite_steps"]) for line in lines if line.get("non_finite_steps")), default=0)
    return [f"{refused} steps were not taken, because their loss or gradient was not finite"] if refused else []


def _run_warnings(status: str, curves: Mapping[str, Curve], sessions: Sequence[Mapping[str, Any]], torn: bool) -> list[str]:
    warnings = []
    if status != "finished":
        warnings.append("the run is not finished: its numbers are those of an interrupted run or of one that is under way")
    warnings += [f"{name}: not finite in {curve.missing} logged steps" for name, curve in curves.items() if curve.missing]
    if torn:
        warnings.append(f"{METRICS} ends in a torn line, which is left out")
    for session in sessions[1:]:
        warnings.append(f"resumed {session.get('started', 'at an unknown time')}")
        warnings += [f"changed at that resume: {change}" for change in session.get("recipe_changes", ())]
    return warnings

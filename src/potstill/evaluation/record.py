"""What an evaluation leaves: JSON that says of every number its task, name, unit, direction, error and count.

Reporting reads nothing but this, so a record explains itself; it knows no model and no file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from potstill.evaluation.comparison import Comparison, holm, verdict
from potstill.evaluation.recovered import gap_recovered
from potstill.evaluation.scores import Metric, Scores, compare_scores, estimate_over_seeds
from potstill.evaluation.statistics import Estimate
from potstill.evaluation.task import Outcome
from potstill.evaluation.task_config import Role

VERSION = 2
SINCE_BEFORE = ", since before"


def key_of(task: str, metric: str) -> str:
    """How a record names a metric of a task."""
    return f"{task}/{metric}"


@dataclass(frozen=True)
class TaskRecord:
    """A task: what it was measured on, in words and counts, and the metric by which it is judged."""

    name: str
    kind: str
    primary: str
    role: Role = "target"
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"primary": key_of(self.name, self.primary), "data": dict(self.data)}


@dataclass(frozen=True)
class ModelRecord:
    """One row of the table: a model, or the mean of several seeds; for each task its outcomes, one a seed."""

    name: str
    outcomes: Mapping[str, Sequence[Outcome]]
    num_parameters: int | None = None
    is_teacher: bool = False

    @property
    def num_seeds(self) -> int:
        return max((len(outcomes) for outcomes in self.outcomes.values()), default=1)

    def scores(self, task: str) -> list[Scores]:
        return [outcome.scores for outcome in self.outcomes.get(task, ())]


@dataclass(frozen=True)
class PairRecord:
    """One comparison: `first` minus `second`, names of two rows of the table, in a metric of a task.

    `p_adjusted` is Holm's over the comparisons of its family: the tasks' own metrics are one ("primary"), all others of the record another
    ("secondary"), and those with the student before training two more.
    """

    task: str
    name: str
    metric: Metric
    first: str
    second: str
    comparison: Comparison
    family: str = "primary"
    p_adjusted: float | None = None
    family_size: int = 1

    def to_json(self) -> dict[str, Any]:
        comparison = self.comparison.adjusted(self.p_adjusted)
        return {
            "task": self.task, "metric": key_of(self.task, self.name), "label": self.metric.label, "unit": self.metric.unit,
            "higher_is_better": self.metric.higher_is_better, "first": self.first, "second": self.second,
            "difference": _number(comparison.difference.value), "standard_error": _number(comparison.difference.standard_error),
            "low": _number(comparison.low), "high": _number(comparison.high), "p_value": _number(self.comparison.p_value),
            "p_adjusted": _number(comparison.p_value), "family": self.family, "family_size": self.family_size,
            "smallest_visible": _number(comparison.smallest_visible), "is_significant": comparison.is_significant,
            "method": comparison.method,
            "verdict": verdict(
                comparison, first=self.first, second=self.second, metric=self.metric.label,
                higher_is_better=self.metric.higher_is_better, family_size=self.family_size,
            ),
        }  # fmt: skip


@dataclass(frozen=True)
class EvaluationRecord:
    """A table of models by tasks with comparisons of them; `data` says what holds for all of it."""

    title: str
    tasks: Sequence[TaskRecord]
    models: Sequence[ModelRecord]
    comparisons: Sequence[PairRecord] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    baseline: str | None = None
    before: str | None = None
    shown_samples: int = 30
    with_items: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON values; a standard error that is not known is null, and so is a value that is not finite."""
        record: dict[str, Any] = {
            "kind": "evaluation", "version": VERSION, "title": self.title, "data": dict(self.data),
            "warnings": list(dict.fromkeys([*self.warnings, *self._warnings()])), "baseline": self.baseline, "before": self.before,
            "tasks": [task.to_json() for task in self.tasks],
            "models": [self._model(model) for model in self.models],
            "comparisons": [pair.to_json() for pair in self.comparisons],
            "recovered": self._recovered(),
            "samples": self._samples(), "series": self._series(),
        }  # fmt: skip
        return record | ({"items": self._items()} if self.with_items else {})

    def _model(self, model: ModelRecord) -> dict[str, Any]:
        metrics = {}
        for task in model.outcomes:
            scores = model.scores(task)
            for name, metric in scores[0].metrics.items():
                estimate = estimate_over_seeds(name, scores)
                metrics[key_of(task, name)] = {"task": task, "metric": name} | estimate_record(metric, estimate)
        return {
            "name": model.name, "num_parameters": model.num_parameters, "num_seeds": model.num_seeds, "is_teacher": model.is_teacher,
            "metrics": metrics,
        }  # fmt: skip

    def _recovered(self) -> list[dict[str, Any]]:
        """For each task the share of the way to the teacher that a student went, from `before` or else from what it is compared with."""
        by_name = {model.name: model for model in self.models}
        starts = {pair.first: pair.second for pair in reversed(self.comparisons)}
        found = []
        for teacher in (model for model in self.models if model.is_teacher):
            for task in self.tasks:
                for model in self.models:
                    start = by_name.get(self.before or starts.get(model.name, ""))
                    if start is None or model is start or model is teacher:
                        continue
                    tables = [one.scores(task.name) for one in (model, start, teacher)]
                    if all(runs and task.primary in runs[0].metrics for runs in tables):
                        share = gap_recovered(task.primary, *tables)
                        names = {"task": task.name, "metric": key_of(task.name, task.primary), "model": model.name}
                        found.append(names | {"start": start.name, "teacher": teacher.name} | asdict(share))
        return found

    def _warnings(self) -> list[str]:
        several = len(self.tasks) > 1
        return [
            f"{task}: {warning}" if several else warning
            for model in self.models for task, outcomes in model.outcomes.items() for outcome in outcomes for warning in outcome.warnings
        ]  # fmt: skip

    def _samples(self) -> list[dict[str, Any]]:
        """The same items of every model side by side, those that every model answered first; of several seeds the first one's."""
        shown = []
        for task in self.tasks:
            by_item: dict[str, dict[str, Any]] = {}
            for model in self.models:
                for outcome in model.outcomes.get(task.name, ())[:1]:
                    for sample in outcome.samples:
                        entry = by_item.setdefault(
                            sample.item, {"task": task.name, "item": sample.item, "prompt": sample.prompt, "reference": sample.reference,
                                          "answers": []},
                        )  # fmt: skip
                        entry["answers"].append({"model": model.name, "text": sample.answer, "right": sample.right})
            shown += sorted(by_item.values(), key=lambda entry: -len(entry["answers"]))[: self.shown_samples]
        return shown

    def _series(self) -> list[dict[str, Any]]:
        return [
            {"task": task, "model": model.name, **asdict(series), "x": list(series.x), "y": list(series.y)}
            for model in self.models for task, outcomes in model.outcomes.items() for outcome in outcomes[:1] for series in outcome.series
        ]  # fmt: skip

    def _items(self) -> list[dict[str, Any]]:
        return [
            {"task": task, "model": model.name, "seed": seed, **item}
            for model in self.models for task in model.outcomes
            for seed, scores in enumerate(model.scores(task)) for item in scores.by_item()
        ]  # fmt: skip


def compare_models(
    tasks: Iterable[TaskRecord], pairs: Iterable[tuple[ModelRecord, ModelRecord]], *, before: str | None = None
) -> list[PairRecord]:
    """Every metric that both of a pair have, each family corrected by Holm.

    What is compared with the row `before` asks another question, what training changed, and makes families of its own. Raises ValueError
    where two models answered other items of one task.
    """
    found = []
    for first, second in pairs:
        for task in tasks:
            ours, theirs = first.scores(task.name), second.scores(task.name)
            if not ours or not theirs:
                continue
            if len(ours) != len(theirs):
                # One model against several seeds of another: it is the same model in each pair.
                ours, theirs = (ours * len(theirs), theirs) if len(ours) == 1 else (ours, theirs * len(ours))
            for name, metric in ours[0].metrics.items():
                if name not in theirs[0].metrics or not metric.compared:
                    continue
                if not all(run.is_measured(name) for run in (*ours, *theirs) if name in run.metrics):
                    continue
                family = ("primary" if name == task.primary else "secondary") + (SINCE_BEFORE if second.name == before else "")
                comparison = compare_scores(name, _same_columns(ours, name), _same_columns(theirs, name))
                found.append(PairRecord(task.name, name, metric, first.name, second.name, comparison, family))
    return corrected(found)


def _same_columns(runs: Sequence[Scores], name: str) -> list[Scores]:
    """The tables with one metric and its columns alone: a table with a teacher has more columns than one without."""
    metric = runs[0].metrics[name]
    columns = tuple(dict.fromkeys([*metric.formula.columns, metric.counted]))
    return [
        Scores(run.items, columns, run.totals[:, [run.columns.index(column) for column in columns]], {name: metric}, name) for run in runs
    ]


def corrected(pairs: Sequence[PairRecord]) -> list[PairRecord]:
    """The same comparisons with the p-values of each family corrected by Holm."""
    adjusted: dict[int, tuple[float, int]] = {}
    for family in dict.fromkeys(pair.family for pair in pairs):
        places = [place for place, pair in enumerate(pairs) if pair.family == family]
        for place, p_value in zip(places, holm([pairs[place].comparison.p_value for place in places]), strict=True):
            adjusted[place] = p_value, len(places)
    return [
        PairRecord(pair.task, pair.name, pair.metric, pair.first, pair.second, pair.comparison, pair.family, *adjusted[place])
        for place, pair in enumerate(pairs)
    ]


def estimate_record(metric: Metric, estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval() or (None, None)
    return {
        "label": metric.label, "unit": metric.unit, "higher_is_better": metric.higher_is_better,
        "value": _number(estimate.value), "standard_error": _number(estimate.standard_error), "low": _number(low), "high": _number(high),
        "count": estimate.count, "counted": metric.counted, "num_clusters": estimate.num_clusters,
    }  # fmt: skip


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None

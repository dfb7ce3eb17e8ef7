"""What an evaluation leaves in a run folder: JSON that says of every number its name, unit, direction, error and count.

Reporting reads nothing but this, so a record explains itself; it knows no model and no file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from potstill.evaluation.comparison import Comparison, verdict
from potstill.evaluation.metrics import METRICS, Metric
from potstill.evaluation.statistics import Estimate, ratio

VERSION = 1
EXACT_MATCH = "exact_match"
NAMES: dict[str, Metric] = {EXACT_MATCH: Metric("exact-match accuracy", "", ratio(), True)} | METRICS


@dataclass(frozen=True)
class ModelRecord:
    """One row of the table: a model (or the mean of several seeds), its parameters and its estimates by metric name."""

    name: str
    estimates: Mapping[str, Estimate]
    num_parameters: int | None = None
    num_seeds: int = 1


@dataclass(frozen=True)
class PairRecord:
    """One comparison: `first` minus `second` in `metric`, names of two rows of the table."""

    metric: str
    first: str
    second: str
    comparison: Comparison

    @property
    def verdict(self) -> str:
        metric = NAMES[self.metric]
        return verdict(
            self.comparison, first=self.first, second=self.second, metric=metric.label, higher_is_better=metric.higher_is_better
        )


@dataclass(frozen=True)
class EvaluationRecord:
    """A table of models with comparisons of them; `data` says in words and counts what they were measured on."""

    title: str
    models: Sequence[ModelRecord]
    comparisons: Sequence[PairRecord] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    documents: Sequence[Mapping[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values; a standard error that is not known is null, and so is a value that is not finite."""
        record: dict[str, Any] = {
            "kind": "evaluation", "version": VERSION, "title": self.title, "data": dict(self.data), "warnings": list(self.warnings),
            "models": [
                {"name": model.name, "num_parameters": model.num_parameters, "num_seeds": model.num_seeds}
                | {"metrics": {name: _estimate_record(name, estimate) for name, estimate in model.estimates.items()}}
                for model in self.models
            ],
            "comparisons": [_pair_record(pair) for pair in self.comparisons],
        }  # fmt: skip
        return record | ({"documents": [dict(document) for document in self.documents]} if self.documents else {})


def _estimate_record(name: str, estimate: Estimate) -> dict[str, Any]:
    metric = NAMES[name]
    low, high = estimate.interval() or (None, None)
    return {
        "label": metric.label, "unit": metric.unit, "higher_is_better": metric.higher_is_better,
        "value": _number(estimate.value), "standard_error": _number(estimate.standard_error), "low": _number(low), "high": _number(high),
        "count": estimate.count, "counted": metric.counted if name in METRICS else "questions", "num_clusters": estimate.num_clusters,
    }  # fmt: skip


def _pair_record(pair: PairRecord) -> dict[str, Any]:
    comparison, metric = pair.comparison, NAMES[pair.metric]
    return {
        "metric": pair.metric, "label": metric.label, "unit": metric.unit, "higher_is_better": metric.higher_is_better,
        "first": pair.first, "second": pair.second,
        "difference": _number(comparison.difference.value), "standard_error": _number(comparison.difference.standard_error),
        "low": _number(comparison.low), "high": _number(comparison.high), "p_value": _number(comparison.p_value),
        "smallest_visible": _number(comparison.smallest_visible), "is_significant": comparison.is_significant,
        "method": comparison.method, "verdict": pair.verdict,
    }  # fmt: skip


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None

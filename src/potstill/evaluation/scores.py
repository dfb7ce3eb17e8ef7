"""One model on one task: sums by item, and the metrics that can be read off them. What is stored, compared and averaged over seeds.

A metric is a formula over column totals (see `statistics`), so that its value, its standard error, its comparison and its mean over
seeds need no further code, and so that a table read back from disk means what it meant. Knows no model and no file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from potstill.evaluation.comparison import Comparison, compare, compare_correct
from potstill.evaluation.row_quantiles import quantile
from potstill.evaluation.statistics import Estimate, Statistic, across_seeds, estimate, proportion_across_seeds

VERSION = 1
Kind = Literal["ratio", "perplexity", "bits", "complement", "gap", "quotient", "calibration", "median", "p99", "drafting"]


def _ratio(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


def _drafting(totals: np.ndarray) -> np.ndarray:
    accepted, drafts = totals[..., 0] / totals[..., 2], totals[..., 1] / totals[..., 2]
    return np.where(accepted == 1, drafts + 1, (1 - accepted ** (drafts + 1)) / (1 - accepted))


# From the totals of a formula's own columns, in its order, [..., k] to values [...].
_FORMULAS: dict[Kind, Callable[[np.ndarray], np.ndarray]] = {
    "ratio": _ratio,
    "perplexity": lambda totals: np.exp(_ratio(totals)),
    "bits": lambda totals: _ratio(totals) / np.log(2),
    "complement": lambda totals: 1 - _ratio(totals),
    "gap": lambda totals: (totals[..., 0] - totals[..., 1]) / totals[..., 2],
    "quotient": lambda totals: (totals[..., 0] / totals[..., 1]) / (totals[..., 2] / totals[..., 3]),
    "calibration": lambda totals: np.abs(totals[..., 1:]).sum(axis=-1) / totals[..., 0],
    "median": lambda totals: quantile(totals, 0.5),
    "p99": lambda totals: quantile(totals, 0.99),
    "drafting": _drafting,
}


@dataclass(frozen=True)
class Formula:
    """`kind` of the totals of `columns`: ratio a/b; perplexity exp(a/b); bits a/(b ln 2); complement 1 - a/b; gap (a - b)/c;
    quotient (a/b)/(c/d); calibration sum(|b_i|)/a over all columns behind the first; median and p99 of rows counted in the bins of
    `row_quantiles`; drafting (1 - r^(g+1))/(1 - r) with r = a/c accepted and g = b/c drafted tokens (Leviathan et al. 2023)."""

    kind: Kind
    columns: tuple[str, ...]

    def statistic(self, columns: Sequence[str]) -> Statistic:
        """The formula as a function of totals whose columns are `columns`."""
        places = [columns.index(name) for name in self.columns]
        calculate = _FORMULAS[self.kind]

        def statistic(totals: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return calculate(totals[..., places])

        return statistic


@dataclass(frozen=True)
class Metric:
    """What a metric is called, in which unit, how it is computed, which direction is good (None: neither).

    `counted` is the column that says how many units the value averages, and in which word; by default the formula's second. Students
    are not `compared` in what is the teacher's alone.
    """

    label: str
    unit: str
    formula: Formula
    higher_is_better: bool | None = False
    counted: str = ""
    compared: bool = True

    def __post_init__(self):
        if not self.counted:
            object.__setattr__(self, "counted", self.formula.columns[1])


def mean(label: str, column: str, *, counted: str = "questions", unit: str = "", higher_is_better: bool | None = True) -> Metric:
    """The metric that is a mean over units: `column` holds each item's sum, `counted` how many units it has."""
    return Metric(label, unit, Formula("ratio", (column, counted)), higher_is_better, counted)


@dataclass(frozen=True)
class Scores:
    """Totals by item [I, K]. Items of one name are the same item in every table, whoever answered; that is what pairs two models.

    `metrics` are named as a table names them; `primary` is the one by which the task is judged, the others explain it.
    """

    items: tuple[str, ...]
    columns: tuple[str, ...]
    totals: np.ndarray
    metrics: Mapping[str, Metric] = field(repr=False)
    primary: str = ""

    def __post_init__(self):
        totals = np.asarray(self.totals, dtype=np.float64)
        if totals.shape != (len(self.items), len(self.columns)):
            raise ValueError(f"totals {totals.shape} of {len(self.items)} items and {len(self.columns)} columns")
        if len(set(self.items)) != len(self.items):
            raise ValueError("two items have one name, so that none could be paired with another model's")
        object.__setattr__(self, "totals", totals)
        object.__setattr__(self, "primary", self.primary or next(iter(self.metrics), ""))
        for name in [*self.metrics, self.primary] if self.metrics else []:
            missing = set(self.metrics[name].formula.columns) - set(self.columns)
            if missing:
                raise ValueError(f"{name}: its formula needs the column {min(missing)}, which was not counted")

    def column(self, name: str) -> np.ndarray:
        """One column by item [I]."""
        return self.totals[:, self.columns.index(name)]

    def count(self, name: str) -> int:
        """How many units a metric averages."""
        return int(self.column(self.metrics[name].counted).sum())

    def is_yes_or_no(self, name: str) -> bool:
        """Whether a metric is a share of items that are each right or wrong, once: then exact tests exist."""
        formula = self.metrics[name].formula
        if formula.kind != "ratio":
            return False
        right, asked = (self.column(column) for column in formula.columns)
        return bool(np.all(asked == 1) and np.all((right == 0) | (right == 1)))

    def is_measured(self, name: str) -> bool:
        """Whether a metric is a number, and would be one without any single item: what comparing it takes."""
        statistic, totals = self.metrics[name].formula.statistic(self.columns), self.totals.sum(axis=0)
        return bool(np.isfinite(statistic(totals)) and np.isfinite(statistic(totals - self.totals)).all())

    def estimate(self, name: str) -> Estimate:
        """One metric with its standard error, items being the clusters."""
        return estimate_over_seeds(name, [self])

    def estimates(self) -> dict[str, Estimate]:
        return {name: self.estimate(name) for name in self.metrics}

    def by_item(self) -> list[dict[str, Any]]:
        """Every metric of every item alone, with the item's name and what it counts."""
        counted = dict.fromkeys(metric.counted for metric in self.metrics.values())
        values = {name: metric.formula.statistic(self.columns)(self.totals) for name, metric in self.metrics.items()}
        return [
            {"item": item, **{name: int(self.column(name)[row]) for name in counted}}
            | {name: float(column[row]) for name, column in values.items() if np.isfinite(column[row])}
            for row, item in enumerate(self.items)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION, "primary": self.primary, "columns": list(self.columns), "items": list(self.items),
            "totals": self.totals.tolist(), "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Scores":
        """Raises ValueError, KeyError or TypeError where `value` is not what `to_json` wrote."""
        if value["version"] != VERSION:
            raise ValueError(f"version {value['version']}, where {VERSION} is read")
        metrics = {}
        for name, metric in value["metrics"].items():
            kind, columns = metric["formula"]["kind"], tuple(metric["formula"]["columns"])
            if kind not in _FORMULAS:
                raise ValueError(f"{name}: no formula is called {kind!r}")
            metrics[name] = Metric(**{**metric, "formula": Formula(kind, columns)})
        columns = tuple(value["columns"])
        totals = np.asarray(value["totals"], dtype=np.float64).reshape(len(value["items"]), len(columns))
        return cls(tuple(value["items"]), columns, totals, metrics, value["primary"])


def estimate_over_seeds(name: str, runs: Sequence[Scores]) -> Estimate:
    """A metric's mean over runs with other seeds on the same items; the standard error covers seeds and items."""
    first = runs[0]
    _refuse_other_items(runs)
    metric = first.metrics[name]
    if all(run.is_yes_or_no(name) for run in runs):
        return proportion_across_seeds(np.stack([run.column(metric.formula.columns[0]) for run in runs]))
    statistic, kept = metric.formula.statistic(first.columns), _held(metric, runs)
    if len(runs) == 1:
        return estimate(statistic, first.totals[kept], count=first.count(name), unit=metric.unit)
    return across_seeds(statistic, np.stack([run.totals[kept] for run in runs]), count=first.count(name), unit=metric.unit)


def compare_scores(name: str, first: Sequence[Scores], second: Sequence[Scores], *, seed: int = 0) -> Comparison:
    """First minus second in one metric, one table a seed, paired by item and by seed; the exact test where each item is right or wrong."""
    _refuse_other_items([*first, *second])
    metric = first[0].metrics[name]
    if all(run.is_yes_or_no(name) for run in (*first, *second)):
        right = metric.formula.columns[0]
        return compare_correct(np.stack([run.column(right) for run in first]), np.stack([run.column(right) for run in second]), seed=seed)
    statistic, kept = metric.formula.statistic(first[0].columns), _held(metric, [*first, *second])
    ours, theirs = (np.stack([run.totals[kept] for run in runs]) for runs in (first, second))
    return compare(statistic, ours, theirs, unit=metric.unit, seed=seed)


def _held(metric: Metric, runs: Sequence[Scores]) -> np.ndarray:
    """Which items [I] hold anything of a metric in any of the runs. The others say nothing of it, and would pass for certainty: with 3 of
    60 items counted, equal models were told apart 24 times in 100. All of them where none does."""
    places = [runs[0].columns.index(name) for name in metric.formula.columns]
    found = np.any([run.totals[:, places] != 0 for run in runs], axis=(0, 2))
    return found if found.any() else np.ones_like(found)


def _refuse_other_items(runs: Sequence[Scores]) -> None:
    if any(run.items != runs[0].items or run.columns != runs[0].columns for run in runs[1:]):
        raise ValueError("measured on different items, so they cannot be paired; measure all of them on one list")

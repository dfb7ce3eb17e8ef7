"""From the harness's answers to a table by item: each metric as sums whose ratio is the harness's own number.

What the harness computes over all items at once (F1, BLEU, ...) is no mean over items; it has no error and no comparison here, and
is said in a warning instead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from potstill.evaluation.harness.building import Questions, metric_name
from potstill.evaluation.scores import Formula, Kind, Metric, Scores

TOLERANCE = 1e-9
"""Sums in another order differ by less; right and wrong answers sum exactly."""
_LABELS = {
    "acc": "accuracy", "acc_norm": "length-normalised accuracy", "acc_bytes": "byte-normalised accuracy",
    "acc_mutual_info": "mutual-information accuracy", "exact_match": "exact-match accuracy", "brier_score": "Brier score",
    "word_perplexity": "word perplexity", "byte_perplexity": "byte perplexity", "bits_per_byte": "bits per byte", "f1": "F1",
}  # fmt: skip
_UNITS = {"bits_per_byte": "bits"}
# The harness's aggregations, by the function's name, that are a formula of sums.
_KINDS: dict[str, Kind] = {
    "mean": "ratio", "nanmean": "ratio", "brier_score": "ratio", "perplexity": "perplexity", "weighted_perplexity": "perplexity",
    "bits_per_byte": "bits",
}  # fmt: skip
_COUNTED = {"word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes"}


@dataclass(frozen=True)
class Answered:
    """One question with what the model did: the harness's logged samples, one for each of the task's filters."""

    item: str
    task: str
    samples: Mapping[str, Mapping[str, Any]]

    @property
    def first(self) -> Mapping[str, Any]:
        return next(iter(self.samples.values()))


@dataclass
class Table:
    """Columns of item sums as they are filled, and what could not be a column."""

    answered: Sequence[Answered]
    columns: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, sums: list[float], units: list[float], kind: Kind, counted: str, higher_is_better: bool | None) -> None:
        self.columns[name] = sums
        if self.columns.setdefault(counted, units) != units:
            counted = f"{counted} of {name}"
            self.columns[counted] = units
        self.metrics[name] = Metric(_label(name), _UNITS.get(name, ""), Formula(kind, (name, counted)), higher_is_better, counted)

    def value(self, name: str) -> float:
        """A metric over all questions."""
        totals = np.array([self.columns[column] for column in self.columns]).sum(axis=1)
        return float(self.metrics[name].formula.statistic(list(self.columns))(totals))

    def scores(self, primary: str) -> Scores:
        totals = np.array(list(self.columns.values()), dtype=np.float64).T
        return Scores(tuple(one.item for one in self.answered), tuple(self.columns), totals, self.metrics, primary)


def answered_questions(questions: Questions, results: Mapping[str, Any]) -> list[Answered]:
    """Every question in order, named by task, place and content, so that two models' answers to it pair."""
    found = []
    for task in questions.tasks:
        by_doc: dict[int, dict[str, Any]] = {}
        for sample in results["samples"][task]:
            by_doc.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
        for number, samples in sorted(by_doc.items()):
            digest = next(iter(samples.values()))["doc_hash"][:8]
            prefix = f"{task}:" if questions.group is not None else ""
            found.append(Answered(f"{prefix}{number}-{digest}", task, samples))
    return found


def fill(questions: Questions, results: Mapping[str, Any], answered: Sequence[Answered]) -> Table:
    """Every metric that is a formula of item sums, checked against the harness's own value."""
    table = Table(answered)
    for metric, filter_name in _published(questions, results):
        name, own = metric_name(metric, filter_name), results["results"][questions.name][f"{metric},{filter_name}"]
        sums, units, kinds = [], [], set[Kind | None]()
        for one, weight in zip(answered, _weights(questions, metric, answered), strict=True):
            kind, above, below = _sums(questions.tasks[one.task], metric, one.samples.get(filter_name, {}).get(metric))
            kinds.add(kind)
            sums.append(above * weight)
            units.append(below * weight)
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None:
            said = f"{name} is no mean over questions, so it has no error and no comparison here"
            table.warnings.append(f"{said}; the harness says {_shown(own)}")
            continue
        table.add(name, sums, units, kind, _COUNTED.get(metric, "questions"), _direction(questions, metric))
        value = table.value(name)
        if not math.isclose(value, float(own), rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            table.warnings.append(f"{name}: {value:.6g} over the questions, where the harness itself says {_shown(own)}")
    return table


def _published(questions: Questions, results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The metrics, each with its filter, of which the harness gives a number; of a group those that it aggregates."""
    for key in results["results"][questions.name]:
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filter_name


def _label(name: str) -> str:
    known = next((known for known in sorted(_LABELS, key=len, reverse=True) if name == known or name.startswith(f"{known}_")), None)
    if known is None:
        return name.replace("_", " ")
    rest = name.removeprefix(known).removeprefix("_")
    return _LABELS[known] + (f" ({rest})" if rest else "")


def _sums(task: Any, metric: str, value: Any) -> tuple[Kind | None, float, float]:
    """The formula, and what one question adds above and below its line; no formula where the metric is none of sums."""
    aggregation = task.aggregation().get(metric)
    name = getattr(aggregation, "__name__", "") if aggregation is not None else "mean"
    if aggregation is not None and not str(getattr(aggregation, "__module__", "")).startswith(("lm_eval.api", "numpy")):
        return None, 0.0, 0.0
    kind = _KINDS.get(name)
    if value is None or kind is None:
        return kind, 0.0, 0.0  # the harness leaves out a question that has no value
    if name in ("weighted_perplexity", "bits_per_byte"):
        nats, weight = value
        return kind, -float(nats), float(weight)
    if name == "brier_score":
        gold, probabilities = value
        truth = np.eye(len(probabilities))[gold]
        return kind, float(np.sum((np.asarray(probabilities) - truth) ** 2)), 1.0
    if not isinstance(value, int | float | np.integer | np.floating | np.bool_):
        return None, 0.0, 0.0
    if name == "nanmean" and math.isnan(value):
        return kind, 0.0, 0.0
    return kind, -float(value) if name == "perplexity" else float(value), 1.0


def _weights(questions: Questions, metric: str, answered: Sequence[Answered]) -> list[float]:
    """1 for each question; where a group's mean is over tasks and not over questions, what makes every task count alike."""
    group = questions.group
    if group is None or all(one.weight_by_size for one in group.aggregate_metric_list if one.metric == metric):
        return [1.0] * len(answered)
    sizes = {task: sum(one.task == task for one in answered) for task in questions.tasks}
    return [len(answered) / (len(sizes) * sizes[one.task]) for one in answered]


def _direction(questions: Questions, metric: str) -> bool | None:
    said = {task.higher_is_better().get(metric) for task in questions.tasks.values()} - {None}
    return said.pop() if len(said) == 1 else None


def primary_metric(asked: str | None, questions: Questions, metrics: Mapping[str, Metric]) -> str:
    """The one that is asked for; else a group's first, or acc_norm, or the task's first with its first filter."""
    if asked is not None:
        wanted = [metric_name(*asked.partition(",")[::2])]
    elif questions.group is not None:
        wanted = [one.metric for one in questions.group.aggregate_metric_list]
    else:
        (task,) = questions.tasks.values()
        wanted = ["acc_norm", *task.aggregation()]
    return next((name for metric in wanted for name in metrics if name == metric or name.startswith(f"{metric}_")), next(iter(metrics), ""))


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float | np.floating) else str(value)

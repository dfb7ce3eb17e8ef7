"""The metrics that are read off next-token distributions: their columns, their formula as a function of totals, their names.

Every metric is a statistic of sums over documents (see `statistics`), so value, standard error, comparison and seeds need no
further code. Torch-free: `agreement` fills the columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from potstill.evaluation.comparison import Comparison, compare
from potstill.evaluation.statistics import Estimate, Statistic, across_seeds, estimate, ratio

NUM_CALIBRATION_BINS = 15

COLUMNS = (
    "targets", "bytes", "nats", "teacher_nats", "agreements", "forward_kl", "reverse_kl", "jsd", "tvd",
    "entropy", "teacher_entropy", "brier",
)  # fmt: skip
"""Sums over a document's target tokens; behind them stand one column a calibration bin: sum of (correct - confidence)."""

COLUMN = {name: position for position, name in enumerate(COLUMNS)}
CALIBRATION = slice(len(COLUMNS), len(COLUMNS) + NUM_CALIBRATION_BINS)
NUM_COLUMNS = len(COLUMNS) + NUM_CALIBRATION_BINS


@dataclass(frozen=True)
class Metric:
    """What a metric is called, in which unit, which direction is good (None: neither), and what it needs besides a student."""

    label: str
    unit: str
    statistic: Statistic
    higher_is_better: bool | None = False
    needs_teacher: bool = False
    needs_bytes: bool = False

    @property
    def counted(self) -> str:
        """The column that says how many units the value averages."""
        return "bytes" if self.needs_bytes else "targets"


def _per_target(column: str) -> Statistic:
    return ratio(COLUMN[column], COLUMN["targets"])


def _perplexity(column: str) -> Statistic:
    mean_nats = _per_target(column)
    return lambda totals: np.exp(mean_nats(totals))


def _bits_per_byte(column: str) -> Statistic:
    nats_per_byte = ratio(COLUMN[column], COLUMN["bytes"])
    return lambda totals: nats_per_byte(totals) / np.log(2)


def _acceptance(totals: np.ndarray) -> np.ndarray:
    return 1 - _per_target("tvd")(totals)


def _entropy_gap(totals: np.ndarray) -> np.ndarray:
    return _per_target("entropy")(totals) - _per_target("teacher_entropy")(totals)


def _calibration_error(totals: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(totals[..., CALIBRATION]).sum(axis=-1) / totals[..., COLUMN["targets"]]


METRICS: dict[str, Metric] = {
    "cross_entropy": Metric("cross-entropy", "nats", _per_target("nats")),
    "perplexity": Metric("perplexity", "", _perplexity("nats")),
    "bits_per_byte": Metric("bits per byte", "bits", _bits_per_byte("nats"), needs_bytes=True),
    "top1_agreement": Metric("top-1 agreement", "", _per_target("agreements"), True, needs_teacher=True),
    "forward_kl": Metric("forward KL", "nats", _per_target("forward_kl"), needs_teacher=True),
    "reverse_kl": Metric("reverse KL", "nats", _per_target("reverse_kl"), needs_teacher=True),
    "jsd": Metric("Jensen-Shannon divergence", "nats", _per_target("jsd"), needs_teacher=True),
    "total_variation": Metric("total variation", "", _per_target("tvd"), needs_teacher=True),
    "acceptance_rate": Metric("acceptance rate", "", _acceptance, True, needs_teacher=True),
    "expected_calibration_error": Metric("expected calibration error", "", _calibration_error),
    "brier_score": Metric("Brier score", "", _per_target("brier")),
    "entropy": Metric("entropy", "nats", _per_target("entropy"), None),
    "entropy_gap": Metric("entropy gap to the teacher", "nats", _entropy_gap, None, needs_teacher=True),
    "teacher_perplexity": Metric("teacher's perplexity", "", _perplexity("teacher_nats"), None, needs_teacher=True),
    "teacher_bits_per_byte": Metric("teacher's bits per byte", "bits", _bits_per_byte("teacher_nats"), None, True, True),
}


@dataclass(frozen=True)
class Measurement:
    """Sums by document, [I, NUM_COLUMNS]; `documents` holds the Example.index of each, in rising order."""

    documents: tuple[int, ...]
    totals: np.ndarray
    has_teacher: bool
    has_bytes: bool

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that can be read off this measurement."""
        return [
            name for name, metric in METRICS.items()
            if (self.has_teacher or not metric.needs_teacher) and (self.has_bytes or not metric.needs_bytes)
        ]  # fmt: skip

    def estimate(self, name: str) -> Estimate:
        """One metric with its standard error, documents being the clusters."""
        metric = METRICS[name]
        return estimate(metric.statistic, self.totals, count=self._count(metric), unit=metric.unit)

    def estimates(self) -> dict[str, Estimate]:
        return {name: self.estimate(name) for name in self.metrics}

    def by_document(self) -> list[dict[str, float]]:
        """Every metric of every document alone, with its `document`, its `targets` and, where known, its `bytes`."""
        columns = {name: METRICS[name].statistic(self.totals) for name in self.metrics}
        counted = ["targets", "bytes"] if self.has_bytes else ["targets"]
        return [
            {"document": document, **{name: int(self.totals[position, COLUMN[name]]) for name in counted}}
            | {name: float(values[position]) for name, values in columns.items() if np.isfinite(values[position])}
            for position, document in enumerate(self.documents)
        ]

    def _count(self, metric: Metric) -> int:
        return int(self.totals[:, COLUMN[metric.counted]].sum())


def estimates_across_seeds(runs: Sequence[Measurement]) -> dict[str, Estimate]:
    """Each metric's mean over runs with other seeds on the same documents; the standard error covers seeds and documents."""
    stacked = _stack(runs)
    return {
        name: across_seeds(METRICS[name].statistic, stacked, count=runs[0]._count(METRICS[name]), unit=METRICS[name].unit)
        for name in runs[0].metrics
    }


def compare_metric(name: str, first: Sequence[Measurement], second: Sequence[Measurement], *, seed: int = 0) -> Comparison:
    """Two models on the same documents, one measurement a seed, paired by document and by seed."""
    if first[0].documents != second[0].documents:
        raise ValueError("the two models were measured on different documents, so they cannot be paired; measure both on one list")
    return compare(METRICS[name].statistic, _stack(first), _stack(second), unit=METRICS[name].unit, seed=seed)


def expected_tokens_per_round(acceptance_rate: float, num_drafts: int) -> float:
    """Tokens that one round of speculative decoding yields with `num_drafts` drafted tokens (Leviathan et al. 2023, eq. 1)."""
    if acceptance_rate == 1:
        return float(num_drafts + 1)
    return (1 - acceptance_rate ** (num_drafts + 1)) / (1 - acceptance_rate)


def _stack(runs: Sequence[Measurement]) -> np.ndarray:
    if any(one.documents != other.documents for one, other in pairwise(runs)):
        raise ValueError("seeds must be measured on the same documents; measure every run on one list")
    return np.stack([run.totals for run in runs])

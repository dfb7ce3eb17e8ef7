"""How much of the way from a student to its teacher was gone: (S - S0) / (T - S0), with its uncertainty.

S is the student's score, S0 that of the student it is compared with (as it was before, or its twin without a teacher), T the teacher's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from potstill.evaluation.scores import Scores
from potstill.evaluation.statistics import CONFIDENCE, Spread, jackknife, spread

_FARTHEST = 1e6


@dataclass(frozen=True)
class Recovered:
    """The share of the gap that was closed, and its 95 percent interval; None where there is no gap to speak of, and why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


def gap_recovered(name: str, student: Sequence[Scores], before: Sequence[Scores], teacher: Sequence[Scores]) -> Recovered:
    """The share in a metric, over one table a seed of each; a single one stands for all seeds. All tables hold the same items.

    The interval is Fieller's (1954): the shares r for which S - S0 - r (T - S0) is not told apart from 0, items and seeds varying. It
    is bounded because a gap that is itself within its error is not divided by.
    """
    metric, num_seeds = student[0].metrics[name], max(len(student), len(before), len(teacher))
    if metric.higher_is_better is None:
        return Recovered(None, reason="neither direction of this metric is better")
    if {run.items for run in (*student, *before, *teacher)} != {student[0].items}:
        return Recovered(None, reason="the models were not asked the same items")
    if len(student[0].items) < 2:
        return Recovered(None, reason="one item has no uncertainty")

    def jackknifed(runs: Sequence[Scores]) -> list[tuple[float, np.ndarray]]:
        found = [jackknife(metric.formula.statistic(run.columns), run.totals) for run in runs]
        return found * num_seeds if len(found) == 1 else found

    triples = list(zip(jackknifed(student), jackknifed(before), jackknifed(teacher), strict=True))

    def left(share: float) -> Spread:
        """S - S0 - share (T - S0)."""
        values = [s[0] - b[0] - share * (t[0] - b[0]) for s, b, t in triples]
        return spread(values, np.stack([s[1] - b[1] - share * (t[1] - b[1]) for s, b, t in triples]))

    gap = spread([t[0] - b[0] for _, b, t in triples], np.stack([t[1] - b[1] for _, b, t in triples]))
    if not np.isfinite(gap.value) or not np.isfinite(left(0).value):
        return Recovered(None, reason="a score is not a finite number")
    if (gap.value > 0) != metric.higher_is_better or gap.p_value >= 1 - CONFIDENCE:
        return Recovered(None, reason="the teacher is not better beyond the error of the difference, so there is no gap to recover")
    share = left(0).value / gap.value

    def is_told_apart(other: float) -> bool:
        rest = left(other)
        return abs(rest.value) > rest.critical * (rest.standard_error or 0.0)

    return Recovered(share, _end(is_told_apart, share, -1.0), _end(is_told_apart, share, 1.0))


def _end(is_told_apart: Callable[[float], bool], share: float, step: float) -> float | None:
    """Where the interval ends, going from `share` in the direction of `step`; None where it has no end within a million gaps."""
    near, far = share, share + step
    while not is_told_apart(far):
        near, far = far, share + 2 * (far - share)
        if abs(far) > _FARTHEST:
            return None
    for _ in range(30):
        middle = (near + far) / 2
        near, far = (near, middle) if is_told_apart(middle) else (middle, far)
    return near

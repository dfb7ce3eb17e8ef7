"""Estimates and their uncertainty: every number that is reported comes with a standard error.

One idea serves all metrics. A metric is a function of totals over items (documents, questions): the totals' columns are sums
such as "nats" and "tokens", and the function is a ratio of them or something less linear. The tokens of one document are not
independent, so the document is what is left out (jackknife) or drawn again (bootstrap). Knows nothing of models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""From totals [..., K] to values [...]; vectorised over the leading axes, which hold jackknife or bootstrap replicates."""

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error. `standard_error` is None where there was only one item: the uncertainty is unknown, not zero.

    `count` is how many units the value averages (target tokens, questions); `num_clusters` how many independent ones (documents,
    questions) its standard error rests on. `critical` is the half-width of the 95 percent interval in standard errors, where it is
    not that of Student's t over the clusters. The interval of what `is_share` of a whole ends at 0 and 1.
    """

    value: float
    standard_error: float | None
    count: int
    unit: str = ""
    num_clusters: int | None = None
    critical: float | None = None
    is_share: bool = False

    def interval(self) -> tuple[float, float] | None:
        """The 95 percent confidence interval; None where the standard error is unknown."""
        if self.standard_error is None:
            return None
        critical = self.critical or student_t_quantile(0.5 + CONFIDENCE / 2, (self.num_clusters or self.count) - 1)
        low, high = self.value - critical * self.standard_error, self.value + critical * self.standard_error
        return (max(low, 0.0), min(high, 1.0)) if self.is_share else (low, high)


def ratio(numerator: int = 0, denominator: int = 1) -> Statistic:
    """The statistic `totals[numerator] / totals[denominator]`: a mean over tokens of documents with unequal lengths."""

    def statistic(totals: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return totals[..., numerator] / totals[..., denominator]

    return statistic


def jackknife(statistic: Statistic, items: np.ndarray) -> tuple[float, np.ndarray]:
    """The statistic of items [I, K] and each item's influence on it [I].

    The influences are centred and scaled so that the variance of the statistic is `I / (I - 1) * sum(influence ** 2)`, and so
    that influences of statistics over the same items can be subtracted (paired differences) and averaged (seeds).
    Source: Efron and Stein (1981), the delete-one jackknife; for a ratio it equals the linearised cluster-robust variance up to O(1/I).
    """
    totals = items.sum(axis=0)
    value = float(statistic(totals))
    num_items = items.shape[0]
    if num_items < 2:
        return value, np.full(num_items, np.nan)
    without = statistic(totals - items)
    # An item that holds everything (all targets in one document) leaves nothing to compare: its influence is unknown.
    return value, (without.mean() - without) * (num_items - 1) / num_items


def influence_variance(influences: np.ndarray) -> float:
    """The variance of a statistic from its centred influences [I]; nan where I < 2."""
    num_items = influences.shape[0]
    if num_items < 2:
        return float("nan")
    return float(num_items / (num_items - 1) * np.square(influences).sum())


def estimate(statistic: Statistic, items: np.ndarray, *, count: int, unit: str = "") -> Estimate:
    """The statistic over items [I, K] with its jackknife standard error; the items are the independent clusters."""
    items = np.asarray(items, dtype=np.float64)
    value, influences = jackknife(statistic, items)
    variance = influence_variance(influences)
    return Estimate(value, _root(variance), count, unit, items.shape[0])


def mean_of(values: Sequence[float] | np.ndarray, unit: str = "") -> Estimate:
    """The mean of independent values (one a question, say) with its standard error."""
    column = np.asarray(values, dtype=np.float64)
    return estimate(ratio(), np.stack([column, np.ones_like(column)], axis=1), count=column.shape[0], unit=unit)


def proportion_of(correct: Sequence[bool] | np.ndarray) -> Estimate:
    """The share of independent yes-or-no items that are yes, as Agresti and Coull (1998): the standard error is that of
    (yes + 2) / (items + 4), so that 50 right answers of 50 are not reported as certain.
    """
    num_yes, num_items = float(np.sum(correct)), len(correct)
    adjusted = (num_yes + 2) / (num_items + 4)
    error = float(np.sqrt(adjusted * (1 - adjusted) / (num_items + 4)))
    return Estimate(num_yes / num_items, error, num_items, "", num_items, is_share=True)


@dataclass(frozen=True)
class Spread:
    """A value over S seeds and I shared items: `item_variance` is that of choosing other items, `seed_variance` that of training again.

    Each of the two also holds the residual of a seed and an item together, so that their sum counts it twice: it errs on the side of
    caution. One seed shows no spread over seeds, and its interval speaks of the items alone.
    """

    value: float
    item_variance: float
    seed_variance: float
    num_items: int
    num_seeds: int

    @property
    def standard_error(self) -> float | None:
        return _root(self.item_variance + self.seed_variance)

    def quantile(self, probability: float) -> float:
        """In standard errors: the mean of the two Student's t quantiles, weighted by the two variances (Cochran and Cox, 1950).

        Satterthwaite's effective degrees of freedom would be tighter, and too tight: with two seeds that differ little by luck they
        take the seeds' variance for small and known (coverage 0.87 in place of 0.95 in simulation; this one 0.93 or more).
        """
        total = self.item_variance + self.seed_variance
        of_items = student_t_quantile(probability, self.num_items - 1)
        if self.num_seeds == 1 or not total > 0:
            return of_items
        of_seeds = student_t_quantile(probability, self.num_seeds - 1)
        return (of_items * self.item_variance + of_seeds * self.seed_variance) / total

    @property
    def critical(self) -> float:
        """Half the width of the 95 percent interval, in standard errors."""
        return self.quantile(0.5 + CONFIDENCE / 2)

    @property
    def p_value(self) -> float:
        """Two-sided, of the value against 0: the level at which the interval just touches 0."""
        error = self.standard_error
        if not error:
            return float(self.value == 0)
        low, high = 0.5, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.quantile(middle) * error < abs(self.value) else (low, middle)
        return 2 * (1 - low)


def spread(values: Sequence[float], influences: np.ndarray) -> Spread:
    """Joins S values (one a seed) and their influences [S, I] over the same items: crossed random effects of seeds and items."""
    num_seeds, num_items = influences.shape
    item_variance = influence_variance(influences.mean(axis=0))
    seed_variance = float(np.var(values, ddof=1) / num_seeds) if num_seeds > 1 else 0.0
    return Spread(float(np.mean(values)), item_variance, seed_variance, num_items, num_seeds)


def across_seeds(statistic: Statistic, runs: np.ndarray, *, count: int, unit: str = "") -> Estimate:
    """The mean of a statistic over S runs measured on the same I items, runs [S, I, K]; its error covers other items and other seeds."""
    runs = np.asarray(runs, dtype=np.float64)
    values, influences = zip(*(jackknife(statistic, run) for run in runs), strict=True)
    joined = spread(values, np.stack(influences))
    return Estimate(joined.value, joined.standard_error, count, unit, runs.shape[1], joined.critical)


def proportion_across_seeds(correct: np.ndarray) -> Estimate:
    """The share of right answers over S runs on the same I questions, correct [S, I]; one run is a `proportion_of`.

    Where all runs agree on all questions by being right (or wrong), the error is that of one run: more seeds asked nothing new.
    """
    correct = np.asarray(correct, dtype=np.float64)
    if correct.shape[0] == 1 or correct.min() == correct.max():
        return proportion_of(correct[0])
    return replace(across_seeds(ratio(), np.stack([correct, np.ones_like(correct)], axis=-1), count=correct.shape[1]), is_share=True)


def student_t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t for at least one degree of freedom (one where fewer are given); the normal one beyond 10,000."""
    degrees = min(max(degrees, 1), 10_000)
    angles, mass = _student_t(degrees)
    angle = np.interp(abs(2 * probability - 1), mass, angles)
    return float(np.sign(probability - 0.5) * np.sqrt(degrees) * np.tan(angle))


def student_t_tail(value: float, degrees: int) -> float:
    """The two-sided p-value of `value` in standard errors, for the same degrees of freedom as `student_t_quantile`; never below 1e-9."""
    degrees = min(max(degrees, 1), 10_000)
    angles, mass = _student_t(degrees)
    return float(np.clip(1 - np.interp(np.arctan(abs(value) / np.sqrt(degrees)), angles, mass), 1e-9, 1.0))


@lru_cache
def _student_t(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's t folded at 0, as a table: with t = sqrt(degrees) * tan(angle) its density is cos(angle) ** (degrees - 1)."""
    # Squared spacing puts the points near 0, where the mass of many degrees of freedom lies.
    angles = np.linspace(0.0, 1.0, 20_001) ** 2 * (np.pi / 2)
    density = np.cos(angles).clip(0.0) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(angles))])
    return angles, mass / mass[-1]


def _root(variance: float) -> float | None:
    return float(np.sqrt(variance)) if np.isfinite(variance) else None

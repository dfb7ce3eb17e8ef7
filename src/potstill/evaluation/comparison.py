"""Two models on the same items: how much they differ, how sure of it we are, and what could not have been seen.

Paired throughout: an item that is hard for both says nothing about their difference. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, floor, lgamma, log, log10, sqrt
from statistics import NormalDist

import numpy as np

from potstill.evaluation.statistics import (
    CONFIDENCE,
    POWER,
    Estimate,
    Statistic,
    jackknife,
    ratio,
    spread,
    student_t_quantile,
    student_t_tail,
)

_WEIGHTS_AT_ONCE = 4_000_000
_FEWEST_DISCORDANT = 6
# With fewer the bootstrap's level would lie beyond what its draws resolve.
_FEWEST_DRAWN = 8
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Comparison:
    """First minus second, with its interval at 95 percent confidence.

    `smallest_visible` is the true difference that this many items and seeds would have found with a power of 80 percent (with two
    seeds it is a rough figure: 60 to 75 percent in simulation, because a spread of two is hardly known);
    `method` says where interval and p-value come from.
    """

    difference: Estimate
    low: float
    high: float
    p_value: float
    smallest_visible: float
    method: str

    @property
    def is_significant(self) -> bool:
        """Whether the difference is larger than its uncertainty."""
        return self.p_value < 1 - CONFIDENCE

    def adjusted(self, p_value: float | None) -> "Comparison":
        """The same comparison with a p-value that is corrected for the others beside it; None leaves it."""
        return self if p_value is None else replace(self, p_value=p_value)


def compare(statistic: Statistic, first: np.ndarray, second: np.ndarray, *, unit: str = "", draws: int = 2000, seed: int = 0) -> Comparison:
    """Compares a statistic of two models over the same items, first and second [S, I, K] (S seeds, paired as well) or [I, K].

    One seed: interval and p-value are the paired percentile bootstrap's over items, at a level that makes up for few items (see
    `_bootstrap`); fewer than eight are not drawn again. Several seeds: Student's t with the variance over items and over seeds (see
    `spread`), because two or three seeds are too few to be drawn again either. Where every item is right or wrong and there is one
    seed, prefer `compare_correct`.
    """
    first, second = _with_seed_axis(first), _with_seed_axis(second)
    if first.shape != second.shape:
        raise ValueError(f"first {first.shape} and second {second.shape} must hold the same items and seeds; measure both on one list")
    num_seeds, num_items, _ = first.shape
    if num_items < 2:
        raise ValueError("a difference over one item has no uncertainty; measure at least two")
    pairs = [(jackknife(statistic, one), jackknife(statistic, other)) for one, other in zip(first, second, strict=True)]
    values = [one[0] - other[0] for one, other in pairs]
    joined = spread(values, np.stack([one[1] - other[1] for one, other in pairs]))
    error = joined.standard_error
    if error is None or not np.isfinite(joined.value):
        raise ValueError("the difference is not a finite number: an item holds every unit that is counted, or none holds any")
    difference = Estimate(joined.value, error, num_items * num_seeds, unit, num_items, joined.critical)
    smallest = (joined.critical + joined.quantile(POWER)) * error
    # Differences that are all alike have no spread to judge by; that they have one sign is a coin's I tosses.
    least = 0.5 ** (num_items - 1) if error <= _ROUNDING * abs(joined.value) else 0.0
    if num_seeds == 1 and num_items >= _FEWEST_DRAWN:
        low, high, p_value = _bootstrap(statistic, first[0], second[0], error, draws, seed)
        return Comparison(difference, low, high, max(p_value, least), smallest, f"paired bootstrap over {num_items} items, {draws} draws")
    half = joined.critical * error
    over = ", too few to be drawn again" if num_seeds == 1 else f" and {num_seeds} seeds, each with its own degrees of freedom"
    method = f"Student's t over {num_items} items{over}"
    return Comparison(difference, joined.value - half, joined.value + half, max(joined.p_value, least), smallest, method)


def compare_correct(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> Comparison:
    """Compares two lists of right and wrong answers [I] to the same questions: McNemar's exact test, bootstrap interval.

    With a seed axis [S, I] the questions repeat, McNemar's independence is gone, and `compare` answers with seeds as clusters.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    found = compare(ratio(), _with_ones(first), _with_ones(second), seed=seed)
    if first.ndim > 1 and first.shape[0] > 1:
        return found
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    smallest = _smallest_share(only_first + only_second, first.shape[-1])
    return Comparison(
        found.difference, found.low, found.high, mcnemar_exact(only_first, only_second), smallest,
        f"McNemar's exact test: {only_first} questions right by the first alone, {only_second} by the second alone",
    )  # fmt: skip


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test from the discordant counts: a fair coin decides which model is right alone."""
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    if discordant == 0:
        return 1.0
    tail = sum(exp(lgamma(discordant + 1) - lgamma(k + 1) - lgamma(discordant - k + 1) - discordant * log(2)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def _smallest_share(discordant: int, num_items: int) -> float:
    """The difference of two shares that McNemar's exact test finds with a power of 80 percent, from how many of I questions one model
    alone answers (Connor 1987, with the continuity correction that an exact test amounts to).

    A difference larger than the observed share of discordant questions needs that many of them. Fewer than six can never be significant.
    """
    level, power = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2), NormalDist().inv_cdf(POWER)
    size = 1.0
    for _ in range(60):
        share = max(discordant / num_items, size)
        size = min((level * sqrt(share) + power * sqrt(max(share - size * size, 0.0))) / sqrt(num_items) + 1 / num_items, 1.0)
    return max(size, _FEWEST_DISCORDANT / num_items)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of one family, corrected so that the chance of any false finding among them stays at its level (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1, none becomes smaller than one before it, none larger than 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def verdict(
    comparison: Comparison, *, first: str, second: str, metric: str, higher_is_better: bool | None = None, family_size: int = 1
) -> str:
    """One sentence for people: whether the difference is larger than its uncertainty, and what could not have been seen.

    The p-value is as it stands in `comparison`; `family_size` says over how many comparisons it was corrected.
    """
    digits = decimals(comparison.difference.standard_error)
    value, unit = comparison.difference.value, f" {comparison.difference.unit}".rstrip()
    direction = "higher" if value > 0 else "lower"
    if value == 0 and comparison.difference.standard_error == 0:
        return f"{metric}: {first} and {second} are equal on every item, so there is no difference to judge."
    if value == 0:
        head = f"{metric}: {first} and {second} are equal on average"
    else:
        judged = "" if higher_is_better is None else (", which is better" if (value > 0) == higher_is_better else ", which is worse")
        head = f"{metric}: {first} is {abs(value):.{digits}f}{unit} {direction} than {second}{judged}"
    interval = f"95 % interval {comparison.low:+.{digits}f} to {comparison.high:+.{digits}f}, {format_p(comparison.p_value)}"
    interval += f" after Holm's correction over {family_size} comparisons" if family_size > 1 else ""
    size = f"the smallest difference that this measurement finds four times in five is {comparison.smallest_visible:.{digits}f}{unit}"
    if comparison.is_significant:
        return f"{head} ({interval}). The difference is larger than its uncertainty; {size}."
    return f"{head} ({interval}). The difference is not larger than its uncertainty: these data do not tell the two apart; {size}."


def decimals(standard_error: float | None) -> int:
    """How many decimals show two digits of a standard error; more would be noise."""
    if not standard_error:
        return 4
    return min(max(1 - floor(log10(standard_error)), 0), 9)


def format_p(p_value: float) -> str:
    """A p-value as people write it."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _bootstrap(
    statistic: Statistic, first: np.ndarray, second: np.ndarray, error: float, draws: int, seed: int
) -> tuple[float, float, float]:
    """Interval and two-sided p-value of the paired difference, the same items being drawn for both models.

    The percentiles are expanded, those of Student's t in place of the normal distribution's and of I - 1 in place of I, without which
    ten items find a difference between equal models 10 times in 100 in place of 5 (Hesterberg 2015, "What teachers should know about
    the bootstrap"). Beyond the draws' own resolution the p-value is Student's t, with `error` the standard error.
    """
    num_items = first.shape[0]
    generator = np.random.default_rng(seed)
    observed = float(statistic(first.sum(axis=0)) - statistic(second.sum(axis=0)))
    parts = []
    for part in np.array_split(np.arange(draws), max(1, draws * num_items // _WEIGHTS_AT_ONCE)):
        weights = generator.multinomial(num_items, np.full(num_items, 1 / num_items), size=part.size).astype(np.float64)
        parts.append(statistic(weights @ first) - statistic(weights @ second))
    drawn = np.concatenate(parts)
    # A draw of items that all lack what is counted says nothing.
    drawn = drawn[np.isfinite(drawn)]
    shrunk = sqrt((num_items - 1) / num_items)  # a bootstrap draw varies by (I - 1) / I of the sample's variance
    tail = NormalDist().cdf(student_t_quantile((1 - CONFIDENCE) / 2, num_items - 1) / shrunk)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    crossed = int(min((drawn <= 0).sum(), (drawn >= 0).sum()))
    share = min((crossed + 1) / (drawn.size + 1), 0.5)
    p_value = student_t_tail(NormalDist().inv_cdf(share) * shrunk, num_items - 1)
    if crossed == 0 and error > 0:
        p_value = min(p_value, student_t_tail(observed / error, num_items - 1))
    return float(low), float(high), float(p_value)


def _with_seed_axis(items: np.ndarray) -> np.ndarray:
    items = np.asarray(items, dtype=np.float64)
    return items[None] if items.ndim == 2 else items


def _with_ones(correct: np.ndarray) -> np.ndarray:
    return np.stack([correct, np.ones_like(correct)], axis=-1)

"""From matches and grades to tables of sums by prompt: the contestants' win rates or grades, and the judge's own habits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from potstill.evaluation.comparison import Comparison
from potstill.evaluation.judging.matches import Graded, Match
from potstill.evaluation.judging.sign_flip import sign_flip_p_value
from potstill.evaluation.scores import Formula, Metric, Scores, compare_scores

Unit = TypeVar("Unit", Match, Graded)
WIN_RATE, GRADE = "win_rate", "grade"
# Fewer prompts than this that are no tie can never be significant, however they fall.
_FEWEST = 6


@dataclass
class _Mean:
    """A metric that is a mean over units, and its units: (item, value)."""

    label: str
    counted: str
    higher_is_better: bool | None = True
    unit: str = ""
    units: list[tuple[str, float]] = field(default_factory=list)


def _scores(items: Sequence[str], means: dict[str, _Mean], primary: str) -> Scores:
    """Sums by item; a metric's units are counted in a column of their name, so metrics of like units must share them."""
    place = {item: row for row, item in enumerate(items)}
    columns: dict[str, np.ndarray] = {}
    for name, mean in means.items():
        total, count = columns.setdefault(name, np.zeros(len(items))), np.zeros(len(items))
        for item, value in mean.units:
            total[place[item]] += value
            count[place[item]] += 1
        columns[mean.counted] = count
    metrics = {
        name: Metric(mean.label, mean.unit, Formula("ratio", (name, mean.counted)), mean.higher_is_better, mean.counted)
        for name, mean in means.items()
    }
    return Scores(tuple(items), tuple(columns), np.stack(list(columns.values()), axis=1), metrics, primary)


def _items(units: Iterable[Match | Graded]) -> list[str]:
    return list(dict.fromkeys(unit.item for unit in units))


# ---------------------------------------------------------------- pairs


def contestant_scores(matches: Sequence[Match], *, is_first: bool) -> Scores:
    """The win rate of one contestant, a tie being half a win, and what it depends on; the prompts are the items."""

    def of(share: float) -> float:
        return share if is_first else 1 - share

    ours, theirs = (0, 1) if is_first else (1, 0)
    means = {
        WIN_RATE: _Mean("win rate", "comparisons"),
        "win_rate_soft": _Mean("win rate, mean of both orders", "comparisons"),
        "win_rate_longer": _Mean("win rate where its answer is longer", "comparisons with the longer answer", None),
        "win_rate_shorter": _Mean("win rate where its answer is shorter", "comparisons with the shorter answer", None),
        "length": _Mean("length of an answer", "answers", None, "characters"),
    }
    turns = sorted({match.turn for match in matches})
    means |= {f"win_rate_turn_{turn + 1}": _Mean(f"win rate in turn {turn + 1}", f"comparisons of turn {turn + 1}")
              for turn in (turns if len(turns) > 1 else [])}  # fmt: skip
    for match in matches:
        means["length"].units.append((match.item, match.lengths[ours]))
        if not match.counted:
            continue
        won = (match.item, of(match.consistent))
        means[WIN_RATE].units.append(won)
        means["win_rate_soft"].units.append((match.item, of(match.soft)))
        if f"win_rate_turn_{match.turn + 1}" in means:
            means[f"win_rate_turn_{match.turn + 1}"].units.append(won)
        if match.lengths[0] != match.lengths[1]:
            means["win_rate_longer" if match.lengths[ours] > match.lengths[theirs] else "win_rate_shorter"].units.append(won)
    return _scores(_items(matches), means, WIN_RATE)


def judge_scores(matches: Sequence[Match]) -> Scores:
    """What the judge does whoever answers: prefers a place, contradicts itself, prefers length, says nothing."""
    means = {
        "first_place": _Mean("verdicts for the answer shown first", "verdicts that prefer one", None),
        "orders_agree": _Mean("pairs where both orders agree", "pairs judged twice"),
        "longer_wins": _Mean("win rate of the longer answer", "pairs of unlike length", None),
        "no_verdict": _Mean("questions without a verdict", "questions to the judge", False),
    }
    for match in matches:
        if not match.asked:
            continue
        for order, share in enumerate(match.shares):
            means["no_verdict"].units.append((match.item, float(share is None)))
            if share is not None and share != 0.5:
                means["first_place"].units.append((match.item, float((share > 0.5) == (order == 0))))
        if match.counted:
            means["orders_agree"].units.append((match.item, float(match.agree)))
            if match.lengths[0] != match.lengths[1]:
                longer_first = match.lengths[0] > match.lengths[1]
                means["longer_wins"].units.append((match.item, match.consistent if longer_first else 1 - match.consistent))
    return _scores(_items(matches), means, "first_place")


# ---------------------------------------------------------------- grades


def grade_scores(graded: Sequence[Graded], name: str) -> Scores:
    """The mean grade of one contestant; turns that lack anybody's grade are left out for all, so that the same ones are compared."""
    means = {
        GRADE: _Mean("grade from 1 to 10", "grades"),
        "length": _Mean("length of an answer", "answers", None, "characters"),
    }
    turns = sorted({one.turn for one in graded})
    means |= {f"grade_turn_{turn + 1}": _Mean(f"grade in turn {turn + 1}", f"grades of turn {turn + 1}")
              for turn in (turns if len(turns) > 1 else [])}  # fmt: skip
    for one in graded:
        means["length"].units.append((one.item, one.lengths[name]))
        grade = one.grades[name]
        if not one.counted or grade is None:
            continue
        means[GRADE].units.append((one.item, grade))
        if f"grade_turn_{one.turn + 1}" in means:
            means[f"grade_turn_{one.turn + 1}"].units.append((one.item, grade))
    return _scores(_items(graded), means, GRADE)


def grader_scores(graded: Sequence[Graded]) -> Scores:
    """How often the judge gave no grade."""
    means = {"no_verdict": _Mean("questions without a verdict", "questions to the judge", False)}
    for one in graded:
        means["no_verdict"].units += [(one.item, float(grade is None)) for grade in one.grades.values()]
    return _scores(_items(graded), means, "no_verdict")


# ---------------------------------------------------------------- categories, and the comparison


def by_category(units: Sequence[Unit], count: Callable[[Sequence[Unit]], Scores]) -> dict[str, Scores]:
    """The primary metric of each category alone, its prompts being the items; none where there is only one category."""
    found = list(dict.fromkeys(unit.category for unit in units))
    if len(found) < 2:
        return {}
    return {category: _primary(count([unit for unit in units if unit.category == category])) for category in found if category}


def _primary(scores: Scores) -> Scores:
    metric = scores.metrics[scores.primary]
    columns = metric.formula.columns
    return Scores(scores.items, columns, np.stack([scores.column(name) for name in columns], axis=1), {scores.primary: metric})


def compare_contestants(name: str, first: Scores, second: Scores, *, seed: int = 0) -> Comparison | None:
    """First minus second, prompts being the clusters: bootstrap interval, sign-flip p-value. None where there is too little to compare.

    Under the hypothesis that neither is better, exchanging the two names at a prompt changes nothing: the difference of a prompt is as
    likely as its opposite.
    """
    total, counted = first.metrics[name].formula.columns
    kept = first.column(counted) > 0
    first, second = (_rows(scores, name, kept) for scores in (first, second))
    try:
        found = compare_scores(name, [first], [second], seed=seed)
    except ValueError:
        return None  # one prompt, or none
    differences = first.column(total) - second.column(total)
    p_value, exact = sign_flip_p_value(differences, seed=seed)
    decided = np.abs(differences[differences != 0])
    least = _FEWEST * float(decided.min()) / float(first.column(counted).sum()) if decided.size else 0.0
    method = (
        f"sign-flip test over {decided.size} prompts that tell the two apart ({'exact' if exact else 'by draws'}); interval by paired "
        f"bootstrap over {int(kept.sum())} prompts"
    )
    return replace(found, p_value=p_value, method=method, smallest_visible=max(found.smallest_visible, least))


def _rows(scores: Scores, name: str, kept: np.ndarray) -> Scores:
    items = tuple(item for item, keep in zip(scores.items, kept, strict=True) if keep)
    columns = scores.metrics[name].formula.columns
    totals = np.stack([scores.column(column) for column in columns], axis=1)[kept]
    return Scores(items, columns, totals.reshape(len(items), len(columns)), {name: scores.metrics[name]})

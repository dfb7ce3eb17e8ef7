"""From matches or grades to the record of an evaluation: a row for each contestant and one for the judge, with its words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation.judging.answers import Answers
from potstill.evaluation.judging.counting import (
    by_category,
    compare_contestants,
    contestant_scores,
    grade_scores,
    grader_scores,
    judge_scores,
)
from potstill.evaluation.judging.matches import Graded, Match
from potstill.evaluation.judging.prompts import JudgedPrompt
from potstill.evaluation.judging.sign_flip import sign_flip_p_value
from potstill.evaluation.record import EvaluationRecord, ModelRecord, PairRecord, TaskRecord, corrected
from potstill.evaluation.scores import Scores
from potstill.evaluation.task import Outcome, Sample, Series

_BIASED, _CONTRADICTING, _LEVEL = 0.1, 0.25, 0.05
_LENGTH_BINS = 20
_NOT_COMPARED = frozenset({"win_rate_longer", "win_rate_shorter"})


@dataclass(frozen=True)
class Judged:
    """Everything that a record is made of, whoever judged: `facts` say what, by whom and how."""

    task: str
    judge: str
    prompts: Sequence[JudgedPrompt]
    contestants: Sequence[Answers]
    facts: Mapping[str, Any]
    warnings: Sequence[str] = ()
    samples: int = 30


def pairs_record(judged: Judged, matches: Sequence[Match], *, both_orders: bool = True) -> EvaluationRecord:
    """The record of pairs; the first contestant's win rate is what it is about. Where the orders are not known, neither are the judge's
    habits, and it has no row."""
    first, second = judged.contestants
    tables = {one.name: contestant_scores(matches, is_first=one is first) for one in judged.contestants}
    parts = {
        one.name: by_category(matches, lambda some, one=one: contestant_scores(some, is_first=one is first)) for one in judged.contestants
    }
    habits = judge_scores(matches) if both_orders else None
    samples = {
        first.name: _samples(judged, {(m.item, m.turn): _won(m, 1.0) for m in matches}, first),
        second.name: _samples(judged, {(m.item, m.turn): _won(m, 0.0) for m in matches}, second),
        judged.judge: tuple(_judge_sample(judged, match, _pair_words(match, first.name, second.name)) for match in matches),
    }
    left_out = sum(not match.counted for match in matches)
    found = [f"{left_out:,} of {len(matches):,} pairs have no preference and are left out"] if left_out else []
    warnings = [*judged.warnings, *(found if habits is None else _pair_warnings(matches, habits))]
    return _record(judged, tables, parts, habits, samples, warnings, "win_rate")


def grades_record(judged: Judged, graded: Sequence[Graded]) -> EvaluationRecord:
    """The record of grades."""
    tables = {one.name: grade_scores(graded, one.name) for one in judged.contestants}
    parts = {one.name: by_category(graded, lambda some, one=one: grade_scores(some, one.name)) for one in judged.contestants}
    habits = grader_scores(graded)
    samples = {one.name: _samples(judged, {}, one) for one in judged.contestants}
    samples[judged.judge] = tuple(_judge_sample(judged, one, _grade_words(one)) for one in graded)
    left_out = sum(not one.counted for one in graded)
    warnings = [*judged.warnings, *_without_verdict(habits, left_out, len(graded), "turns")]
    return _record(judged, tables, parts, habits, samples, warnings, "grade")


def _record(
    judged: Judged, tables: Mapping[str, Scores], parts: Mapping[str, Mapping[str, Scores]], habits: Scores | None,
    samples: Mapping[str, tuple[Sample, ...]], warnings: Sequence[str], primary: str,
) -> EvaluationRecord:  # fmt: skip
    names = [one.name for one in judged.contestants]
    categories = {f"{judged.task}-{category}": category for category in next(iter(parts.values()), {})}
    tasks = [TaskRecord(judged.task, "judged", primary, data=dict(judged.facts))]
    tasks += [TaskRecord(task, "judged", primary, data={"category": category}) for task, category in categories.items()]
    models = []
    for one in judged.contestants:
        whole = Outcome(tables[one.name], samples[one.name], (_lengths(judged.contestants, one),))
        outcomes = {judged.task: [whole]} | {task: [Outcome(parts[one.name][category])] for task, category in categories.items()}
        models.append(ModelRecord(one.name, outcomes))
    if habits is not None:
        models.append(ModelRecord(judged.judge, {judged.task: [Outcome(habits, samples[judged.judge])]}))
    pairs = []
    if len(names) == 2:
        for task in tasks:
            ours, theirs = (model.outcomes[task.name][0].scores for model in models[:2])
            for name, metric in ours.metrics.items():
                if name in _NOT_COMPARED or (found := compare_contestants(name, ours, theirs)) is None:
                    continue
                family = "primary" if task.name == judged.task and name == primary else "secondary"
                pairs.append(PairRecord(task.name, name, metric, names[0], names[1], found, family))
    return EvaluationRecord(
        f"{' against '.join(names)}, judged by {judged.judge.removeprefix('judge: ')}", tasks, models, corrected(pairs), warnings=warnings,
        baseline=names[1] if len(names) == 2 else None, shown_samples=judged.samples,
    )  # fmt: skip


# ---------------------------------------------------------------- side by side


def _key(prompt: JudgedPrompt, turn: int) -> str:
    return prompt.item if len(prompt.turns) == 1 else f"{prompt.item}, turn {turn + 1}"


def _text(prompt: JudgedPrompt, turn: int) -> str:
    return "\n\n".join(prompt.turns[: turn + 1])


def _samples(judged: Judged, won: Mapping[tuple[str, int], bool | None], one: Answers) -> tuple[Sample, ...]:
    return tuple(
        Sample(_key(prompt, turn), _text(prompt, turn), one.texts[prompt.item][turn], _reference(prompt, turn),
               won.get((prompt.item, turn)))
        for prompt in judged.prompts for turn in range(len(prompt.turns))
    )  # fmt: skip


def _judge_sample(judged: Judged, unit: Match | Graded, words: str) -> Sample:
    prompt = next(prompt for prompt in judged.prompts if prompt.item == unit.item)
    return Sample(_key(prompt, unit.turn), _text(prompt, unit.turn), words, _reference(prompt, unit.turn))


def _reference(prompt: JudgedPrompt, turn: int) -> str:
    return prompt.references[turn] if turn < len(prompt.references) else ""


def _won(match: Match, side: float) -> bool | None:
    return None if not match.counted or match.consistent == 0.5 else match.consistent == side


def _pair_words(match: Match, first: str, second: str) -> str:
    """The verdict of both orders, then the judge's own words in each."""
    if not match.asked:
        return "Both answers are word for word alike: a tie, and the judge was not asked."
    said = []
    for shown, share, words in zip((first, second), match.shares, match.words, strict=True):
        verdict = "no verdict" if share is None else "a tie" if share == 0.5 else f"{first if share > 0.5 else second} is better"
        said.append(f"{shown} shown first: {verdict}\n{words}".rstrip())
    if not match.counted:
        head = "Left out: an order without a verdict."
    elif match.consistent == 0.5:
        head = "A tie." if match.agree else "A tie, because the two orders disagree."
    else:
        head = f"{first if match.consistent == 1 else second} wins."
    return "\n\n".join([head, *said])


def _grade_words(one: Graded) -> str:
    return "\n\n".join(
        f"{name}: {'no grade' if grade is None else f'{grade:g}'}\n{one.words[name]}".rstrip() for name, grade in one.grades.items()
    )


def _lengths(contestants: Sequence[Answers], one: Answers) -> Series:
    """How long the answers are, in bins that all contestants share."""
    every = [len(text) for other in contestants for texts in other.texts.values() for text in texts]
    edges = np.linspace(0, max([1, *every]), _LENGTH_BINS + 1)
    own = [len(text) for texts in one.texts.values() for text in texts]
    shares = np.histogram(own, edges)[0] / max(len(own), 1)
    middles = (edges[:-1] + edges[1:]) / 2
    return Series("lengths", "length of answers", "characters", "share of answers", tuple(middles.tolist()), tuple(shares.tolist()))


# ---------------------------------------------------------------- warnings


def _pair_warnings(matches: Sequence[Match], habits: Scores) -> list[str]:
    left_out = sum(not match.counted for match in matches)
    found = _without_verdict(habits, left_out, len(matches), "comparisons")
    preferred, decided = habits.column("first_place"), habits.column("verdicts that prefer one")
    share = float(preferred.sum() / decided.sum()) if decided.sum() else 0.5
    if abs(share - 0.5) > _BIASED and sign_flip_p_value(2 * preferred - decided)[0] < _LEVEL:
        place = "first" if share > 0.5 else "second"
        found.append(
            f"the judge prefers the answer that is shown {place}: {max(share, 1 - share):.0%} of {int(decided.sum()):,} verdicts; where "
            "that decides, the two orders disagree and count as a tie, which draws both win rates towards 0.5"
        )
    agreeing, judged = habits.column("orders_agree").sum(), habits.column("pairs judged twice").sum()
    if judged and 1 - agreeing / judged > _CONTRADICTING:
        found.append(f"the judge contradicts itself: in {judged - agreeing:,.0f} of {judged:,.0f} pairs the two orders disagree")
    return found


def _without_verdict(habits: Scores, left_out: int, units: int, words: str) -> list[str]:
    without, asked = habits.column("no_verdict").sum(), habits.column("questions to the judge").sum()
    if not without:
        return []
    return [f"{without:,.0f} of {asked:,.0f} questions to the judge got no verdict; {left_out:,} of {units:,} {words} are left out"]

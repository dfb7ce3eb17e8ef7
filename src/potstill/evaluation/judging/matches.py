"""What was judged, put together: each pair of answers with its verdicts in both orders, each answer with its grade. Counts nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from potstill.evaluation.judging.answers import Answers
from potstill.evaluation.judging.prompts import JudgedPrompt
from potstill.evaluation.judging.questions import Heard, JudgeQuestion, are_equal

Hear = Callable[[JudgeQuestion], Heard]


@dataclass(frozen=True)
class Match:
    """Two answers to one turn. `shares` are the first contestant's, one an order (its answer shown first, then second): 1 where its answer
    is preferred, 0 where the other one's is, anything between for a graded preference, None without a verdict.

    `asked` is false where both answered alike. `lengths` are characters of the two answers.
    """

    item: str
    turn: int
    category: str
    shares: tuple[float | None, float | None]
    lengths: tuple[int, int]
    asked: bool = True
    words: tuple[str, str] = ("", "")

    @property
    def counted(self) -> bool:
        """Whether both orders have a verdict; otherwise the pair is left out."""
        return None not in self.shares

    @property
    def soft(self) -> float:
        """The mean of both orders."""
        one, other = self.shares
        assert one is not None
        assert other is not None
        return (one + other) / 2

    @property
    def consistent(self) -> float:
        """1 or 0 where both orders prefer the same answer, and 0.5, a tie, wherever they do not: MT-Bench's rule."""
        one, other = self.shares
        assert one is not None
        assert other is not None
        return float(one > 0.5) if (one - 0.5) * (other - 0.5) > 0 else 0.5

    @property
    def agree(self) -> bool:
        """Whether the orders say the same: the same answer twice, or a tie twice."""
        return self.counted and (self.consistent != 0.5 or self.shares == (0.5, 0.5))


_SHARE = {"A": 1.0, "B": 0.0, "tie": 0.5}


def pair_matches(
    prompts: Sequence[JudgedPrompt], first: Answers, second: Answers, questions: Sequence[JudgeQuestion], hear: Hear
) -> list[Match]:
    """Every pair, in the order of the prompts and turns."""
    asked = {(question.item, question.turn, question.shown[0] == first.name): question for question in questions}
    found = []
    for prompt in prompts:
        for turn in range(len(prompt.turns)):
            lengths = len(first.texts[prompt.item][turn]), len(second.texts[prompt.item][turn])
            if are_equal(prompt, turn, first, second):
                found.append(Match(prompt.item, turn, prompt.category, (0.5, 0.5), lengths, asked=False))
                continue
            ours, theirs = (hear(asked[prompt.item, turn, order]) for order in (True, False))
            shares = _share(ours), None if (share := _share(theirs)) is None else 1 - share
            found.append(Match(prompt.item, turn, prompt.category, shares, lengths, words=(ours.words, theirs.words)))
    return found


def _share(heard: Heard) -> float | None:
    """The share of whoever was shown first."""
    return None if heard.verdict is None else _SHARE[str(heard.verdict)]


@dataclass(frozen=True)
class Graded:
    """The answers to one turn, each with its grade; None without a verdict. `lengths` are characters."""

    item: str
    turn: int
    category: str
    grades: Mapping[str, float | None]
    lengths: Mapping[str, int]
    words: Mapping[str, str]

    @property
    def counted(self) -> bool:
        """Whether every contestant's answer has a grade; otherwise the turn is left out for all of them."""
        return None not in self.grades.values()


def graded_answers(
    prompts: Sequence[JudgedPrompt], contestants: Sequence[Answers], questions: Sequence[JudgeQuestion], hear: Hear
) -> list[Graded]:
    """Every turn, in the order of the prompts."""
    said = {(question.item, question.turn, question.shown[0]): hear(question) for question in questions}
    return [
        Graded(
            prompt.item, turn, prompt.category,
            {one.name: None if (verdict := said[prompt.item, turn, one.name].verdict) is None else float(verdict) for one in contestants},
            {one.name: len(one.texts[prompt.item][turn]) for one in contestants},
            {one.name: said[prompt.item, turn, one.name].words for one in contestants},
        )
        for prompt in prompts for turn in range(len(prompt.turns))
    ]  # fmt: skip

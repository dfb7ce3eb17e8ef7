"""Which written answers go into a data set, and why the others do not: one reason each, in a fixed order, counted.

It knows an answer's tokens, its text and its row; no model, no tokenizer and no file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from potstill.rollouts.checkers import Checker
from potstill.rollouts.generate_config import FilterConfig
from potstill.rollouts.watch import repeated

# The reasons, in the order in which they are looked for: the first that holds is the one that is counted.
REASONS = ("empty", "unreadable", "cut", "short", "long", "refused", "repeated", "wrong", "same", "surplus")

# Openings of answers that decline the task. Case, curly apostrophes and what stands before the first letter make no difference.
REFUSALS = (
    "i'm sorry, but", "i am sorry, but", "sorry, but", "i apologize, but", "i apologise, but", "i'm sorry, i can't", "i'm sorry, i cannot",
    "sorry, i can't", "sorry, i cannot", "i cannot", "i can't", "i can not", "i'm unable", "i am unable", "i'm not able", "i am not able",
    "i won't", "i will not", "i must decline", "i have to decline", "unfortunately, i can't", "unfortunately, i cannot",
    "unfortunately, i am not", "unfortunately, i'm not", "as an ai", "as a language model", "as a large language model",
)  # fmt: skip
_REFUSAL = re.compile("(?:" + "|".join(map(re.escape, REFUSALS)) + r")(?!\w)")


@dataclass(frozen=True)
class Written:
    """One answer: `tokens` without the one that ended it. `readable` is False where the text could not stand in a data file."""

    tokens: Sequence[int]
    text: str
    ended: bool
    readable: bool = True


@dataclass
class Counts:
    """What became of the answers. Every answer is kept or has one reason."""

    asked: int = 0
    kept: int = 0
    kept_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))

    def add(self, reason: str | None, tokens: int) -> None:
        self.asked += 1
        if reason is None:
            self.kept += 1
            self.kept_tokens += tokens
        else:
            self.dropped[reason] += 1

    def as_dict(self) -> dict[str, Any]:
        return {"answers": self.asked, "kept": self.kept, "kept_tokens": self.kept_tokens, "dropped": dict(self.dropped)}


def judge(answers: Sequence[Written], reference: str, row: Mapping[str, Any], config: FilterConfig, checker: Checker | None
          ) -> list[str | None]:  # fmt: skip
    """For each answer to one prompt, in the order of its samples, why it is left out, or None. The outcome is a function of these alone.

    `same` and `surplus` look at the answers before it that are kept.
    """
    reasons: list[str | None] = []
    kept: set[str] = set()
    number = 0
    for answer in answers:
        reason = _of_itself(answer, config)
        if reason is None and checker is not None and not checker(answer.text, reference, row):
            reason = "wrong"
        if reason is None and config.same == "drop" and answer.text.strip() in kept:
            reason = "same"
        if reason is None and config.most is not None and number >= config.most:
            reason = "surplus"
        if reason is None:
            kept.add(answer.text.strip())
            number += 1
        reasons.append(reason)
    return reasons


def _of_itself(answer: Written, config: FilterConfig) -> str | None:
    tokens = len(answer.tokens)
    found = {
        "empty": not answer.text.strip(),
        "unreadable": not answer.readable,
        "cut": config.cut == "drop" and not answer.ended,
        "short": config.min_tokens is not None and tokens < config.min_tokens,
        "long": config.max_tokens is not None and tokens > config.max_tokens,
        "refused": config.refused == "drop" and declines(answer.text),
        "repeated": config.repeated is not None and repeated_share(answer.tokens) > config.repeated,
    }
    return next((reason for reason in REASONS if found.get(reason)), None)


def declines(text: str) -> bool:
    """Whether a text opens with one of REFUSALS."""
    plain = re.sub(r"^[\W_]+", "", text.replace("’", "'").casefold())
    return _REFUSAL.match(" ".join(plain[:80].split())) is not None


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of an answer's 4-grams that have stood in it before; 0 for one that is too short to repeat itself."""
    again, grams = repeated(tokens)
    return again / grams if grams else 0.0

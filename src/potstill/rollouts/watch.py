"""What is counted of written answers, and the warnings that a student collapses. Numbers of answers alone: no model, no file.

A collapsing student first repeats itself, or ends at once, or is certain of everything; all of it shows in what it writes long before
a validation loss says so.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from potstill.rollouts.config import WatchConfig
from potstill.rollouts.writing import Completion

_log = logging.getLogger("potstill")
_GRAM = 4


def repeated(tokens: Sequence[int]) -> tuple[int, int]:
    """How many of the answer's 4-grams have stood in it before, and how many it has."""
    grams = [tuple(tokens[place : place + _GRAM]) for place in range(len(tokens) - _GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


@dataclass
class Tally:
    """Sums over answers; what ranks add up is `astuple`."""

    answers: float = 0.0
    tokens: float = 0.0
    surprise: float = 0.0       # -log-probability of everything drawn, in nats
    repeated: float = 0.0
    grams: float = 0.0
    cut: float = 0.0
    empty: float = 0.0
    foreign: float = 0.0
    staleness: float = 0.0      # optimizer steps between the writer's weights and the student's
    rewards: float = 0.0
    rewarded: float = 0.0
    seconds: float = 0.0
    writings: float = 0.0

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Tally":
        return cls(*numbers)

    @property
    def numbers(self) -> list[float]:
        return [float(number) for number in astuple(self)]

    def plus(self, other: "Tally") -> "Tally":
        return Tally.of([mine + its for mine, its in zip(self.numbers, other.numbers, strict=True)])

    def count(self, completion: Completion, *, foreign: bool, step: int, reward: float | None) -> None:
        again, grams = repeated(completion.tokens)
        self.answers += 1
        self.tokens += len(completion.tokens)
        self.surprise -= sum(completion.log_probs)
        self.repeated += again
        self.grams += grams
        self.cut += not completion.ended
        self.empty += len(completion.tokens) <= completion.ended  # an end alone, or nothing at all
        self.foreign += foreign
        self.staleness += step - completion.version
        if reward is not None:
            self.rewards += reward
            self.rewarded += 1

    def means(self) -> dict[str, float]:
        """Length in tokens, its end included; entropy in nats a token, estimated from what was drawn; shares; seconds a step."""
        answers = max(self.answers, 1.0)
        found = {
            "length": self.tokens / answers, "cut": self.cut / answers, "empty": self.empty / answers,
            "entropy": self.surprise / max(self.tokens, 1.0), "repeated": self.repeated / max(self.grams, 1.0),
            "staleness": self.staleness / answers, "foreign_ends": self.foreign / answers,
            "seconds": self.seconds / max(self.writings, 1.0),
        }  # fmt: skip
        return {**found, "reward": self.rewards / self.rewarded} if self.rewarded else found


assert all(entry.type in ("float", float) for entry in fields(Tally))


def signs(config: WatchConfig, first: Mapping[str, float], means: Mapping[str, float]) -> dict[str, str]:
    """The signs of a collapse that `means` show, each in words; `first` is what the first line of the log said."""
    found = {
        "length": (means["length"] < config.min_length * first["length"],
                   f"answers have {means['length']:.1f} tokens on average, and had {first['length']:.1f} at the start"),
        "entropy": (means["entropy"] < config.min_entropy * first["entropy"],
                    f"the entropy of its text is {means['entropy']:.3f} nats a token, and was {first['entropy']:.3f} at the start"),
        "repeated": (0 < config.max_repeated < means["repeated"],
                     f"{means['repeated']:.0%} of the 4-grams of its answers have stood in them before"),
        "cut": (0 < config.max_cut < means["cut"], f"{means['cut']:.0%} of its answers are cut at max_new_tokens"),
    }  # fmt: skip
    return {name: words for name, (seen, words) in found.items() if seen}


class Watch:
    """Warns once of each sign of a collapse; what is measured against is the first line of the log. That line is state."""

    def __init__(self, config: WatchConfig):
        self._config = config
        self._first: dict[str, float] | None = None
        self._warned: set[str] = set()

    def look(self, means: Mapping[str, float], *, say: bool = True) -> list[str]:
        """The names of the signs that are seen for the first time. Where `say` is false (ranks but the first) nothing is printed."""
        if self._first is None:
            self._first = {name: float(means[name]) for name in ("length", "entropy")}
        seen = signs(self._config, self._first, means)
        found = [name for name in seen if name not in self._warned]
        self._warned.update(found)
        for name in found if say else ():
            key = f"{'max' if name in ('repeated', 'cut') else 'min'}_{name}"
            _log.warning(
                "the student's text may be collapsing: %s. See rollouts.jsonl; lower training.learning_rate, begin with a student that "
                "answers already, or mix in other text (rollouts.author). rollouts.watch.%s sets when this is said", seen[name], key,
            )  # fmt: skip
        return found

    def state(self) -> dict[str, Any]:
        return {"first": self._first, "warned": sorted(self._warned)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._first, self._warned = state.get("first"), set(state.get("warned", ()))

"""What of a written answer is learned: its tokens, and the one that ended it where it did. It knows ids and no tokenizer."""

from collections.abc import Sequence
from typing import Literal

from potstill.errors import ConfigError
from potstill.rollouts.writing import Completion

ForeignEnd = Literal["refuse", "keep", "mask"]
CutAnswers = Literal["keep", "drop"]


class Endings:
    """The target marks of a completion.

    An answer that ended has its end as a target; an empty one has nothing else. One that was cut has no end, and with `cut_answers`
    drop no target at all. `stop_ids` are those that end the writer; `foreign` are those of them at which the other model does not
    stop: with `mask` such an end is no target, with `refuse` there must be none (raises ConfigError).
    """

    def __init__(
        self, stop_ids: Sequence[int], foreign: frozenset[int] = frozenset(), foreign_policy: ForeignEnd = "refuse",
        cut_answers: CutAnswers = "keep",
    ):  # fmt: skip
        self.stop_ids, self.foreign = frozenset(stop_ids), frozenset(foreign)
        self._policy, self._cut_answers = foreign_policy, cut_answers
        if self.foreign and foreign_policy == "refuse":
            raise ConfigError(
                f"rollouts.foreign_end: of student and teacher only one stops at the ids {sorted(self.foreign)}, so that their words on an "
                "answer's end cannot be compared; set it to mask (leave ends out) or keep (learn them all the same)"
            )

    def marks(self, completion: Completion) -> list[bool]:
        """One mark a token of the completion."""
        if not completion.ended:
            return [self._cut_answers == "keep"] * len(completion.tokens)
        end = not (self._policy == "mask" and self.is_foreign(completion))
        return [True] * (len(completion.tokens) - 1) + [end]

    def is_foreign(self, completion: Completion) -> bool:
        """Whether it ended in a way that one of the models does not know."""
        return completion.ended and completion.tokens[-1] in self.foreign

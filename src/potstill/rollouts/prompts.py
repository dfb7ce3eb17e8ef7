"""What is answered: the part of each row of a training set that stands before its last answer. Decided for all rows, from their tokens
alone, before any model is loaded. It knows no tokenizer and no writer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from potstill.batch import Example
from potstill.data.examples import ExampleSet
from potstill.data.teacher_prompt import cut_left
from potstill.errors import ConfigError, DataError

TooLong = Literal["error", "drop", "truncate_left"]


@dataclass(frozen=True)
class PromptRow:
    """One row as a prompt. `reference` is the answer that stands in the data; `teacher_tokens` is what the teacher reads instead."""

    tokens: tuple[int, ...]
    reference: tuple[int, ...]
    origin: str
    index: int
    route: str
    teacher_tokens: tuple[int, ...] | None


@dataclass(frozen=True)
class PromptCounts:
    """What became of the rows. `longest` counts the tokens of the longest prompt before any cut, be it the student's or the teacher's."""

    rows: int
    dropped: int
    truncated: int
    longest: int


def _last_span(marks: Sequence[bool]) -> tuple[int, int]:
    """[start, end) of the last run of marked tokens; (n, n) where none of the n is marked."""
    backwards = list(marks)[::-1]
    if True not in backwards:
        return len(backwards), len(backwards)
    last = backwards.index(True)
    length = backwards[last:].index(False) if False in backwards[last:] else len(backwards) - last
    end = len(backwards) - last
    return end - length, end


class Prompts(Sequence[PromptRow]):
    """The prompts of `examples`, row by row; only places are kept, no tokens.

    `prompts.examples` is what to train on: the rows that are left, numbered as `prompts[row]` is. A prompt is what stands before a
    row's last answer, or its first `prompt_tokens` tokens where that is given (plain text has no prompt of its own). A prompt that
    leaves no room for `max_new_tokens` within `max_tokens` is too long, the student's or what the teacher reads instead: the same answer
    stands behind both. A cut on the left keeps the token `bos` in front. Raises DataError for a row without a prompt, or with one that is
    too long and not dealt with; ConfigError where there is room for none.
    """

    def __init__(
        self, examples: Sequence[Example], *, max_tokens: int, max_new_tokens: int, prompt_tokens: int | None = None,
        too_long: TooLong = "error", bos: object = None,
    ):  # fmt: skip
        self._room, self._bos = max_tokens - max_new_tokens, bos
        if self._room < 1:
            raise ConfigError(
                f"rollouts.sampling.max_new_tokens: {max_new_tokens} new tokens leave no room for a prompt within data.max_tokens "
                f"({max_tokens}); lower it, or raise data.max_tokens"
            )
        places = np.array([self._place(example, prompt_tokens) for example in examples], dtype=np.int32).reshape(-1, 3)
        longest = places[:, [0, 2]].max(axis=1)
        long = longest > self._room
        if long.any() and too_long == "error":
            first = int(np.argmax(long))
            whose = "its prompt" if places[first, 0] > self._room else "what the teacher reads in place of its prompt (data.teacher_prompt)"
            raise DataError(
                f"{examples[first].origin}: {whose}, {longest[first]} tokens, leaves no room for {max_new_tokens} new ones "
                f"(rollouts.sampling.max_new_tokens) within data.max_tokens ({max_tokens}), as in {int(long.sum())} of {len(places)} "
                "rows; lower the one, raise the other, or set rollouts.prompt_too_long to drop or truncate_left"
            )
        kept = np.flatnonzero(~long) if too_long == "drop" else np.arange(len(places))
        if len(places) and not len(kept):
            raise DataError(f"every prompt is longer than {self._room} tokens, and rollouts.prompt_too_long drops all of them")
        self._places = places[kept, :2]
        self.examples = _of(examples, kept)
        self.counts = PromptCounts(
            len(places), len(places) - len(kept), int(long[kept].sum()), int(longest.max(initial=0)),
        )  # fmt: skip

    @staticmethod
    def _place(example: Example, prompt_tokens: int | None) -> tuple[int, int, int]:
        """Tokens of the prompt, where the reference ends, and tokens of what the teacher reads in place of the prompt."""
        if prompt_tokens is not None:
            length = min(prompt_tokens, max(len(example.tokens) - 1, 0))
            return length, len(example.tokens), length
        start, end = _last_span(example.is_target)
        if start == 0:
            raise DataError(
                f"{example.origin}: an answer, and nothing before it that could be answered; for plain text set rollouts.prompt_tokens, "
                "otherwise give the row a prompt or take it out"
            )
        ahead = 0 if example.teacher_prompt is None else len(example.teacher_prompt) - example.prompt_length
        return start, end, start + ahead

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> PromptRow:  # type: ignore[override]  # no slices: nothing needs them
        example = self.examples[row]
        length, end = (int(place) for place in self._places[row])
        teacher = None
        if example.teacher_prompt is not None:
            teacher = self._cut([*example.teacher_prompt, *example.tokens[example.prompt_length : length]])
        prompt, reference = self._cut(example.tokens[:length]), tuple(example.tokens[length:end])
        return PromptRow(prompt, reference, example.origin, example.index, example.route, teacher)

    def _cut(self, tokens: list[int]) -> tuple[int, ...]:
        return tuple(cut_left(tokens, self._room, self._bos))


def _of(examples: Sequence[Example], kept: np.ndarray) -> Sequence[Example]:
    if len(kept) == len(examples):
        return examples
    return examples.select(kept) if isinstance(examples, ExampleSet) else [examples[int(row)] for row in kept]

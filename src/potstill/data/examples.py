"""Prepared examples in flat arrays, and what became of the rows. Knows tokens and counts; knows no tokenizer and no file."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import overload

import numpy as np

from potstill.batch import Example, sequence_key


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows of one set of sources. Every row read is in exactly one of used, empty, unfinished, dropped and rejected."""

    rows: int = 0
    used: int = 0
    examples: int = 0
    """Made of the used rows: one each, unless `too_long: split` cuts a row into several."""
    empty: int = 0
    """No answer to learn: nothing or white space, or nothing left of it after a cut."""
    unfinished: int = 0
    """`finish_reason` says that the answer's writer was cut off."""
    too_long: int = 0
    """More than max_tokens; dropped, truncated or split as the policy says."""
    dropped: int = 0
    truncated: int = 0
    rejected: int = 0
    """Bad lines that on_bad_line let pass."""
    unended: int = 0
    """Used answers whose last target is no end-of-turn token, so that the student would not learn to stop there; cut ones not counted."""
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row before any cut."""

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class TeacherPrompts:
    """For each of N examples the tokens that a teacher reads in place of the first `lengths` [N] ones; an empty part: the same tokens."""

    tokens: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], lengths: Sequence[int] | np.ndarray) -> "TeacherPrompts":
        return cls(
            np.concatenate([np.zeros(0, np.int32), *prompts]), np.cumsum([0, *map(len, prompts)], dtype=np.int64),
            np.asarray(lengths, dtype=np.int64),
        )  # fmt: skip

    def part(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: np.ndarray) -> "TeacherPrompts":
        return TeacherPrompts.of([self.part(index) for index in indices], self.lengths[indices])


class ExampleSet(Sequence[Example]):
    """N examples: tokens in one int32 array, marks in one bool array, and offsets. `self[i].index == i`."""

    def __init__(self, tokens: np.ndarray, is_target: np.ndarray, offsets: np.ndarray, *, places: np.ndarray,
                 sources: tuple[str, ...], bytes_of: np.ndarray, routes: np.ndarray, route_names: tuple[str, ...],
                 teacher_prompts: TeacherPrompts | None = None):
        """`offsets` [N+1]; `places` [N, 2]: number of the source and of the row in it; `bytes_of` [V]: bytes of text of each token;
        `routes` [N]: which of `route_names` answers."""
        self._tokens, self._is_target, self._offsets = tokens, is_target, offsets
        self._places, self._sources, self._bytes_of = places, sources, bytes_of
        self._routes, self._route_names, self._teacher_prompts = routes, route_names, teacher_prompts

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _part(self, index: int) -> slice:
        return slice(int(self._offsets[index]), int(self._offsets[index + 1]))

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "ExampleSet": ...

    def __getitem__(self, index: int | slice) -> "Example | ExampleSet":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index = int(index) % len(self)
        part = self._part(index)
        example = Example(self._tokens[part].tolist(), self._is_target[part].tolist(), index, self.origin(index), self.route(index))
        prompts = self._teacher_prompts
        if prompts is None or not len(prompt := prompts.part(index)):
            return example
        return replace(example, teacher_prompt=prompt.tolist(), prompt_length=int(prompts.lengths[index]))

    def origin(self, index: int) -> str:
        source, number = self._places[index]
        return f"{self._sources[source]}:{number}"

    def route(self, index: int) -> str:
        """Who answers it; empty where one answers all."""
        return self._route_names[self._routes[index]]

    @property
    def route_counts(self) -> dict[str, int]:
        """Examples of each route."""
        counts = np.bincount(self._routes, minlength=len(self._route_names))
        return {name: int(count) for name, count in zip(self._route_names, counts, strict=True) if count}

    @property
    def rows(self) -> list[range]:
        """The examples of each row of the sources: one, or the pieces that `too_long: split` made of it."""
        new = np.flatnonzero((self._places[1:] != self._places[:-1]).any(axis=1)) + 1 if len(self) else []
        starts = [0, *map(int, new), len(self)]
        return [range(start, end) for start, end in itertools.pairwise(starts) if end > start]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]."""
        return np.diff(self._offsets)

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    def _predicted(self) -> np.ndarray:
        """The marks without those in first place: they have no predictor."""
        predicted = self._is_target.copy()
        predicted[self._offsets[:-1][self.lengths > 0]] = False
        return predicted

    def _sum_by_example(self, values: np.ndarray) -> np.ndarray:
        running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return running[self._offsets[1:]] - running[self._offsets[:-1]]

    @property
    def target_counts(self) -> np.ndarray:
        """Predicted tokens of each example, int64 [N]."""
        return self._sum_by_example(self._predicted())

    @property
    def num_targets(self) -> int:
        return int(self._predicted().sum())

    @property
    def target_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that the predicted tokens of each example stand for, int64 [N]; special tokens are no text."""
        return self._sum_by_example(np.where(self._predicted(), self._bytes_of[self._tokens], 0))

    def digest(self, index: int) -> bytes:
        """The key of an example: equal for equal tokens and marks."""
        part = self._part(index)
        return sequence_key(self._tokens[part], self._is_target[part])

    def select(self, indices: Sequence[int] | np.ndarray) -> "ExampleSet":
        """A set of these examples in this order, numbered anew."""
        parts = [self._part(int(index)) for index in indices]
        offsets = np.concatenate([[0], np.cumsum([part.stop - part.start for part in parts])]).astype(np.int64)
        empty = self._tokens[:0], self._is_target[:0]
        chosen = np.asarray(indices, dtype=np.int64)
        return ExampleSet(
            np.concatenate([empty[0], *(self._tokens[part] for part in parts)]),
            np.concatenate([empty[1], *(self._is_target[part] for part in parts)]),
            offsets, places=self._places[chosen], sources=self._sources, bytes_of=self._bytes_of,
            routes=self._routes[chosen], route_names=self._route_names,
            teacher_prompts=None if self._teacher_prompts is None else self._teacher_prompts.select(chosen),
        )


class ExampleSetBuilder:
    """Collects examples one by one and makes the flat arrays at the end."""

    def __init__(self, bytes_of: np.ndarray):
        self._bytes_of = bytes_of
        self._tokens: list[np.ndarray] = []
        self._marks: list[np.ndarray] = []
        self._places: list[tuple[int, int]] = []
        self._sources: dict[str, int] = {}
        self._routes: list[int] = []
        self._route_names: dict[str, int] = {}
        self._teacher_prompts: list[np.ndarray] = []
        self._prompt_lengths: list[int] = []

    def add(
        self, tokens: Sequence[int], spans: Sequence[tuple[int, int]], source: str, number: int, route: str = "",
        teacher_prompt: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """`spans` are those of the targets; a teacher's prompt stands in place of everything before the only one."""
        marks = np.zeros(len(tokens), dtype=bool)
        for start, end in spans:
            marks[start:end] = True
        self._tokens.append(np.asarray(tokens, dtype=np.int32))
        self._marks.append(marks)
        self._places.append((self._sources.setdefault(source, len(self._sources)), number))
        self._routes.append(self._route_names.setdefault(route, len(self._route_names)))
        self._teacher_prompts.append(np.asarray(teacher_prompt or (), dtype=np.int32))
        self._prompt_lengths.append(spans[-1][0] if teacher_prompt else 0)

    def __len__(self) -> int:
        return len(self._tokens)

    def build(self) -> ExampleSet:
        return ExampleSet(
            np.concatenate(self._tokens) if self._tokens else np.zeros(0, np.int32),
            np.concatenate(self._marks) if self._marks else np.zeros(0, bool),
            np.concatenate([[0], np.cumsum([len(tokens) for tokens in self._tokens])]).astype(np.int64),
            places=np.array(self._places, dtype=np.int64).reshape(-1, 2), sources=tuple(self._sources), bytes_of=self._bytes_of,
            routes=np.array(self._routes, dtype=np.int32), route_names=tuple(self._route_names),
            teacher_prompts=(
                TeacherPrompts.of(self._teacher_prompts, self._prompt_lengths) if any(map(len, self._teacher_prompts)) else None
            ),
        )

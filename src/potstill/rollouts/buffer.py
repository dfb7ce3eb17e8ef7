"""Answers that the student wrote, first in first out: token ids, marks and log-probabilities, never logits.

An answer is a record of two flat arrays, so that one form travels between ranks, lies in the buffer, and stands in a checkpoint.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.batch import Example
from potstill.rollouts.writing import seed_of

# row, step, index, prompt_length, and the lengths of what follows: tokens, teacher prompt, log-probabilities, reward, origin, route.
# A teacher prompt of length -1 is none.
_HEAD = 10


@dataclass(frozen=True)
class Record:
    """One answer: to which row, after how many steps it was written, and the example in two arrays."""

    integers: np.ndarray
    floats: np.ndarray

    @classmethod
    def of(cls, example: Example, row: int, step: int) -> "Record":
        teacher, log_probs = example.teacher_prompt, example.log_probs or []
        origin, route = example.origin.encode(), example.route.encode()
        reward = [] if example.reward is None else [example.reward]
        head = [row, step, example.index, example.prompt_length, len(example.tokens), -1 if teacher is None else len(teacher),
                len(log_probs), len(reward), len(origin), len(route)]  # fmt: skip
        marked = [2 * token + mark for token, mark in zip(example.tokens, example.is_target, strict=True)]
        integers = np.array([*head, *marked, *(teacher or ()), *origin, *route], dtype=np.int64)
        return cls(integers, np.array([*log_probs, *reward], dtype=np.float64))

    @property
    def row(self) -> int:
        return int(self.integers[0])

    @property
    def step(self) -> int:
        return int(self.integers[1])

    def example(self) -> Example:
        _, _, index, prompt_length, tokens, teacher, log_probs, reward, origin, _ = self.integers[:_HEAD].tolist()
        marked, prompt, letters = np.split(self.integers[_HEAD:], np.cumsum([tokens, max(teacher, 0)]))
        return Example(
            (marked // 2).tolist(), (marked % 2 == 1).tolist(), index, bytes(letters[:origin].tolist()).decode(),
            bytes(letters[origin:].tolist()).decode(), self.floats[:log_probs].tolist() if log_probs else None,
            float(self.floats[-1]) if reward else None, prompt.tolist() if teacher >= 0 else None, prompt_length,
        )  # fmt: skip


def joined(records: Iterable[Record]) -> tuple[np.ndarray, np.ndarray]:
    """All of them in two arrays; each record says itself where it ends."""
    records = list(records)
    integers = [np.zeros(0, np.int64), *(record.integers for record in records)]
    return np.concatenate(integers), np.concatenate([np.zeros(0), *(record.floats for record in records)])


def parted(integers: np.ndarray, floats: np.ndarray) -> Iterator[Record]:
    """What `joined` joined."""
    start = place = 0
    while start < len(integers):
        tokens, teacher, log_probs, reward, origin, route = integers[start + 4 : start + _HEAD].tolist()
        end = start + _HEAD + tokens + max(teacher, 0) + origin + route
        yield Record(integers[start:end].copy(), floats[place : place + log_probs + reward].copy())
        start, place = end, place + log_probs + reward


class ReplayBuffer:
    """At most `capacity` records; what comes when it is full pushes out the oldest."""

    def __init__(self, capacity: int):
        self._records: deque[Record] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        """From the oldest to the newest."""
        return iter(self._records)

    @property
    def full(self) -> bool:
        return len(self._records) == self._records.maxlen

    def push(self, records: Iterable[Record]) -> None:
        self._records.extend(records)

    def draw(self, count: int, *, seed: int, step: int) -> list[Record]:
        """`count` records without repetition, or with as little as can be, as a function of (seed, step) and of what is held."""
        if not self._records:
            raise ValueError("an empty buffer has nothing to draw from")
        # The raw stream of PCG64, which NumPy promises never to change.
        keys = np.random.PCG64(np.random.SeedSequence(seed_of(seed, step, len(self._records)))).random_raw(len(self._records))
        order = np.argsort(keys, kind="stable")
        return [self._records[int(order[place % len(order)])] for place in range(count)]

    def tensors(self) -> dict[str, Tensor]:
        integers, floats = joined(self._records)
        return {"integers": torch.from_numpy(integers), "floats": torch.from_numpy(floats)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the place of what is held; of more than fit in, the newest."""
        self._records.clear()
        if tensors:
            self._records.extend(parted(tensors["integers"].numpy(), tensors["floats"].numpy()))


def gathered(records: Sequence[Record], gather: Callable[[np.ndarray], list[np.ndarray]]) -> list[Record]:
    """Those of all ranks, by their rows: in the same order for any number of ranks."""
    integers, floats = joined(records)
    parts = zip(gather(integers), gather(floats), strict=True)
    return sorted((record for part in parts for record in parted(*part)), key=lambda record: record.row)

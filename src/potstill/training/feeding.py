"""From row numbers to batches: packs or does not pack, and collates what an order asks for. It knows no model and no rank."""

import hashlib
from collections.abc import Sequence

import numpy

from potstill.batch import Batch, Example
from potstill.data.collation import collate, empty_batch
from potstill.data.packing import pack


class Rows:
    """The rows of a data set: packed sequences of up to `max_tokens`, or one example each where `max_tokens` is None.

    `fingerprint` changes when a row, a token, a target or who answers does: a resumed run must see what it would have seen.
    """

    def __init__(self, examples: Sequence[Example], *, pad_token: int, seed: int, max_tokens: int | None):
        self._examples, self._pad_token = examples, pad_token
        digest = hashlib.blake2b(digest_size=16)
        lengths: list[int] = []
        longer: list[int] = []  # what the teacher reads of each row beyond what the student does
        for example in examples:
            lengths.append(len(example.tokens))
            digest.update(numpy.asarray([example.index, lengths[-1], *example.tokens], dtype=numpy.int64).tobytes())
            digest.update(numpy.asarray(example.is_target, dtype=numpy.bool_).tobytes())
            longer.append(0 if example.teacher_prompt is None else len(example.teacher_prompt) - example.prompt_length)
            if example.teacher_prompt is not None:
                prompt = [example.prompt_length, len(example.teacher_prompt), *example.teacher_prompt]
                digest.update(numpy.asarray(prompt, dtype=numpy.int64).tobytes())
            if example.route:
                digest.update(example.route.encode())
        self._bins = pack(lengths, max_tokens, seed) if max_tokens is not None else [[index] for index in range(len(lengths))]
        digest.update(repr(self._bins).encode())
        self.fingerprint = digest.hexdigest()
        self.lengths = [sum(lengths[index] for index in members) for members in self._bins]
        # What student and teacher can take at least: padding never goes beyond it.
        self._widest = max(self.lengths, default=8)
        self._widest_view = max((sum(lengths[index] + longer[index] for index in members) for members in self._bins), default=8)

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows; of none, a batch of padding without a target."""
        if not rows:
            return empty_batch(pad_token=self._pad_token, width=min(8, self._widest))
        members = [[self._examples[index] for index in self._bins[row]] for row in rows]
        return self._collated(members)

    def collated(self, examples: Sequence[Example]) -> Batch:
        """A batch of these examples, one a row; of none, a batch of padding without a target."""
        if not examples:
            return self.batch(())
        return self._collated([[example] for example in examples])

    def _collated(self, members: Sequence[Sequence[Example]]) -> Batch:
        return collate(members, pad_token=self._pad_token, widest=self._widest, widest_view=self._widest_view)

    def example_numbers(self, rows: Sequence[int]) -> list[int]:
        """`Example.index` of everything in these rows, in order: what the log of seen samples holds."""
        return [self._examples[index].index for row in rows for index in self._bins[row]]

    def num_tokens(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)

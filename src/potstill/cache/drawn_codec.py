"""Draws: distinct ids and how often each came. The (id, row) pairs are sorted and stored as gaps, as in topk_codec.py.

Counts are bytes; weights are stored only where they are not 1 / n.
Which sequences the rows belong to is not known here.
"""

from collections.abc import Sequence

import numpy as np
import torch

from potstill.cache.gaps import EVENLY_SPREAD, join_gaps, most_bytes, split_gaps
from potstill.cache.ordering import row_bits
from potstill.cache.records import DrawnTokens, RecordFormat
from potstill.cache.streams import damaged, join, numbers, split
from potstill.errors import ConfigError

MOST_DRAWS = 127


class DrawnCodec:
    """Exact. Rows come back with their ids ascending, padded with id 0 and count 0 to the longest row.

    A row has all its draws or none. Weights that are not stored come back as 1 / n, which is right where all of p was drawn from.
    """

    def __init__(self, format: RecordFormat):
        if not 1 <= format.num_samples <= MOST_DRAWS:
            raise ConfigError(f"capture.num_samples: {format.num_samples} draws a row do not fit a record; choose 1 to {MOST_DRAWS}")
        self._n, self._vocabulary = format.num_samples, format.vocabulary_size
        self._weighted = format.proposal_exponent != 1.0

    def encode(self, record: DrawnTokens) -> bytes:
        ids, counts = record.ids.numpy(), record.counts.numpy()
        real = counts > 0
        keys = ids.astype(np.int64) << row_bits(len(ids)) | np.arange(len(ids))[:, None]
        order = np.argsort(keys[real], kind="stable")
        gaps = np.diff(keys[real][order], prepend=0).astype(np.uint32)
        weights = record.weights.numpy().astype("<f4")[real][order] if self._weighted else np.zeros(0)
        return join(0, [*split_gaps(gaps), counts[real][order].astype(np.uint8), weights], EVENLY_SPREAD)

    def _one(self, payload: bytes, n: int) -> tuple[np.ndarray, ...]:
        """Row by row: how many ids each row has, then all ids, counts and weights."""
        most = n * self._n
        first, (*gaps, counts, weights) = split(payload, [*most_bytes(most), most, 4 * most])
        total = counts.size
        if first or gaps[0].size != total:
            raise damaged("its streams do not fit each other")
        weights = numbers(weights, "<f4", total) if self._weighted else np.full(total, 1 / self._n, np.float32)
        bits = row_bits(n)
        keys = np.cumsum(join_gaps(gaps), dtype=np.int64)
        if total and keys[-1] >= self._vocabulary << bits:
            raise damaged("an id lies outside the vocabulary")
        rows = keys & ((1 << bits) - 1)
        per_row = np.bincount(rows, minlength=n)
        drawn = np.bincount(rows, weights=counts, minlength=n)
        if len(per_row) != n or not (counts.all() and ((drawn == self._n) | (drawn == 0)).all()):
            raise damaged(f"a row has not {self._n} draws")
        order = np.argsort(rows.astype(np.uint16) if n <= 2**16 else rows, kind="stable")
        return per_row, keys[order] >> bits, counts[order], weights[order]

    def decode(self, payloads: Sequence[bytes], rows: Sequence[int]) -> DrawnTokens:
        parts = [self._one(payload, n) for payload, n in zip(payloads, rows, strict=True)]
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.float32))
        per_row, ids, counts, weights = (np.concatenate(column) for column in zip(*(parts or [nothing]), strict=True))
        width = int(per_row.max(initial=0))
        real = np.arange(width) < per_row[:, None]
        arrays = []
        for values, dtype in [(ids, np.int64), (counts, np.int64), (weights, np.float32)]:
            array = np.zeros((len(per_row), width), dtype)
            array[real] = values
            arrays.append(torch.from_numpy(array))
        return DrawnTokens(*arrays)

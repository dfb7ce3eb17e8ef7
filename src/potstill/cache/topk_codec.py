"""Quantised top-K records. A payload's kept (id, row) pairs are sorted by id, then row, and stored as the gaps between them.

An id that is among the top K of many rows of a sequence then costs a fraction of a byte each time, and one that comes once costs what
a row's own sorted ids would. The largest outcome of a row (a kept id or the tail) is not stored: it is what the others leave of 1.
Which sequences the rows belong to is not known here.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from potstill.cache.codes import IMPLIED, Codes
from potstill.cache.gaps import read_gaps, write_gaps
from potstill.cache.quantiser import Quantiser
from potstill.cache.records import RecordFormat
from potstill.cache.streams import Reader, Writer, damaged
from potstill.signals import TopKOutcomes

_LEAST_IMPLIED = 0.2   # a smaller outcome would take up more error from the others than its own bits are worth
_MASS_ERROR = 1e-3     # where a row's mass is further from 1 than this, all its outcomes are stored
_DEEPEST_BYTE = -12.0  # nats below 1 / K: less probable outcomes need no short code
_WIDEST_OF_TARGETS = 0.125
_ROWS_AT_ONCE = 512    # so many rows' keys stay in the processor's second cache while they are put in order


class TopKCodec:
    """Ids exactly; log-probabilities by Quantiser, made to add up to 1 with the tail; rows come back most probable first."""

    def __init__(self, format: RecordFormat):
        self._k, self._temperature, self._vocabulary = format.k, format.temperature, format.vocabulary_size
        deepest = -np.log(format.k) + _DEEPEST_BYTE
        self._codes = Codes(Quantiser(format.k + 1), deepest)
        self._target_codes = Codes(Quantiser(max(format.k + 1, 33), _WIDEST_OF_TARGETS), deepest)
        self._id_bits = max(format.vocabulary_size - 1, 1).bit_length()

    # --- encoding ---------------------------------------------------------------------------------------------------------------

    def encode(self, record: TopKOutcomes) -> bytes:
        ids, log_probs, tails = record.ids.numpy(), _float32(record.log_probs), _float32(record.log_tail)
        n = len(ids)
        writer = Writer(record.target_log_probs is not None)
        if n == 0:
            return writer.payload()
        codes, tail_codes = self._codes.of(log_probs), self._codes.of(tails)
        every, top = np.arange(n), log_probs.argmax(axis=1)
        largest = log_probs[every, top]
        mass = np.exp(log_probs).sum(axis=1) + np.exp(tails)
        implied = (np.abs(mass - 1) < _MASS_ERROR) & (np.maximum(largest, tails) > np.log(_LEAST_IMPLIED))
        kept = implied & (largest >= tails)
        codes[every[kept], top[kept]] = IMPLIED
        tail_codes[implied & ~kept] = IMPLIED
        keys = ids.astype(np.int64) << _row_bits(n) | every[:, None]
        raws = codes == self._codes.raw
        raw_values = log_probs[raws][np.argsort(keys[raws], kind="stable")]
        keys = (keys << 16 | codes).reshape(-1)
        keys.sort()
        write_gaps(writer, np.diff(keys >> 16, prepend=0))
        self._codes.write(writer, (keys & 0xFFFF).astype(np.uint16), raw_values)
        self._codes.write(writer, tail_codes, tails[tail_codes == self._codes.raw])
        if record.target_log_probs is not None:
            targets = _float32(record.target_log_probs)
            target_codes = self._target_codes.of(targets)
            target_codes[kept & (targets == largest)] = IMPLIED
            self._target_codes.write(writer, target_codes, targets[target_codes == self._target_codes.raw])
        return writer.payload()

    # --- decoding ---------------------------------------------------------------------------------------------------------------

    def decode(self, payloads: Sequence[bytes], rows: Sequence[int]) -> TopKOutcomes:
        total, k = sum(rows), self._k
        ids, log_probs = np.empty((total, k), np.int64), np.empty((total, k), np.float32)
        tails, targets = np.empty(total, np.float32), np.empty(total, np.float32)
        known = set()
        start = 0
        for part in _groups(payloads, rows):
            stop = start + sum(n for _, n in part)
            known.add(self._group(part, ids[start:stop], log_probs[start:stop], tails[start:stop], targets[start:stop]))
            start = stop
        if known >= {True, False}:
            raise damaged("some sequences know their targets' log-probabilities and others do not")
        known_targets = None if False in known else torch.from_numpy(targets)
        return TopKOutcomes(torch.from_numpy(ids), torch.from_numpy(log_probs), torch.from_numpy(tails), known_targets, self._temperature)

    def _group(self, part: list[tuple[bytes, int]], ids, log_probs, tails, targets) -> bool | None:
        """Decodes some payloads into the arrays; returns whether the targets' log-probabilities are known, None where there are no rows."""
        pairs, tail_codes, target_codes, raws, target_raws = [], [], [], [], []
        first, known = 0, set()
        for payload, n in part:
            reader = Reader(payload)
            known.add(reader.byte())
            if n:
                pairs.append([*self._read_pairs(reader, n, first), self._codes.read(reader, n * self._k, raws)])
                tail_codes.append(self._codes.read(reader, n, raws))
                if 1 in known:
                    target_codes.append(self._target_codes.read(reader, n, target_raws))
            reader.end()
            first += n
        if len(known) > 1 or known - {0, 1}:
            raise damaged("its first byte is unknown or not that of the other sequences")
        if not pairs:
            return None
        values = np.concatenate([self._codes.values, *raws])
        ordered = self._by_row([np.concatenate(column) for column in zip(*pairs, strict=True)], len(ids), len(values))
        np.bitwise_and(ordered, (1 << self._id_bits) - 1, out=ids, casting="unsafe")
        ordered >>= self._id_bits
        np.take(values, ordered, out=log_probs, mode="clip")
        tails[:] = values.take(np.concatenate(tail_codes))
        self._normalise(ordered[:, 0] == IMPLIED, np.concatenate(tail_codes) == IMPLIED, log_probs, tails)
        if known == {1}:
            target_codes, target_values = np.concatenate(target_codes), np.concatenate([self._target_codes.values, *target_raws])
            targets[:] = np.where(target_codes == IMPLIED, log_probs[:, 0], target_values.take(target_codes))
        return known == {1}

    def _read_pairs(self, reader: Reader, n: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers, counted from `first`, and ids."""
        bits = _row_bits(n)
        keys = np.cumsum(read_gaps(reader, n * self._k))
        if keys[-1] >= self._vocabulary << bits:
            raise damaged("an id lies outside the vocabulary")
        numbers = keys & ((1 << bits) - 1)
        numbers += first
        return numbers.astype(np.uint16 if first + n <= 2**16 else np.int64), keys >> bits

    def _by_row(self, columns: list[np.ndarray], n: int, num_codes: int) -> np.ndarray:
        """From row numbers, ids and codes: (code, id) pairs as one number each, by row, the smallest code first."""
        row_numbers, ids, codes = columns
        narrow = num_codes << self._id_bits <= 2**32
        pairs = codes.astype(np.uint32 if narrow else np.int64)
        pairs <<= self._id_bits
        np.bitwise_or(pairs, ids, out=pairs, casting="unsafe")
        order = np.argsort(row_numbers, kind="stable")  # a radix sort for 16-bit numbers
        ends = row_numbers.take(order[:: self._k]), row_numbers.take(order[self._k - 1 :: self._k])
        if any((end != np.arange(n)).any() for end in ends):
            raise damaged("a row has more or fewer ids than K")
        pairs = pairs.take(order).reshape(n, self._k)
        pairs.sort(axis=1)
        return pairs

    @staticmethod
    def _normalise(top_implied: np.ndarray, tail_implied: np.ndarray, log_probs: np.ndarray, tails: np.ndarray) -> None:
        """In place: the outcome that was left out is what the others leave of 1, and where none was all are scaled to add up to 1."""
        top_implied &= ~tail_implied
        with np.errstate(divide="ignore"):
            mass = np.exp(log_probs).sum(axis=1) + np.exp(tails)
            rest = np.log(np.maximum(1 - mass, np.finfo(np.float32).tiny))
            log_probs[top_implied, 0] = rest[top_implied]
            tails[tail_implied] = rest[tail_implied]
            mass[top_implied | tail_implied] = 1
            mass[mass == 0] = 1
            log_mass = np.log(mass)
        log_probs -= log_mass[:, None]
        tails -= log_mass


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy(), np.float32)


def _row_bits(n: int) -> int:
    return max(n - 1, 1).bit_length()


def _groups(payloads: Sequence[bytes], rows: Sequence[int]) -> Iterator[list[tuple[bytes, int]]]:
    """Payloads in their order, so many together that they have about _ROWS_AT_ONCE rows."""
    part, held = [], 0
    for payload, n in zip(payloads, rows, strict=True):
        if part and held + n > _ROWS_AT_ONCE:
            yield part
            part, held = [], 0
        part.append((payload, n))
        held += n
    if part:
        yield part

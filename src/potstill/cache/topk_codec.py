"""Quantised top-K records. A payload's kept (id, row) pairs are sorted by id, then row, and stored as the gaps between them.

An id that is among the top K of many rows of a sequence then costs a fraction of a byte each time, and one that comes once costs what
a row's own sorted ids would. The largest outcome of a row (a kept id or the tail) is not stored: it is what the others leave of 1.
Which sequences the rows belong to is not known here; the putting in order is in ordering.py.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from potstill.cache.codes import IMPLIED, LAST, LONG, Codes
from potstill.cache.gaps import EVENLY_SPREAD, NUM_STREAMS, join_gaps, most_bytes, split_gaps
from potstill.cache.ordering import Blocks, Pairs
from potstill.cache.quantiser import Quantiser
from potstill.cache.records import RecordFormat
from potstill.cache.streams import damaged, join, numbers, split
from potstill.signals import TopKOutcomes

_LEAST_IMPLIED = 0.2       # a smaller outcome would take up more error from the others than its own bits are worth
_MASS_ERROR = 1e-3         # where a row's mass is further from 1 than this, all its outcomes are stored
_WIDEST_OF_TARGETS = 0.125
_UNKNOWN, _KNOWN = 0, 1     # a payload's first byte: whether the targets' log-probabilities follow
_NOTHING = np.zeros(0, np.float32)
_ROWS_TOGETHER = 4096  # so many rows are decoded in one go: enough that what each call costs by itself is little
_LEAST_OF_ROWS = -16.0     # nats: the last log-probability with a short code among what is stored once a row


class TopKCodec:
    """Ids exactly; log-probabilities by Quantiser, made to add up to 1 with the tail; rows come back most probable first."""

    def __init__(self, format: RecordFormat):
        self._k, self._temperature, self._vocabulary = format.k, format.temperature, format.vocabulary_size
        self._codes = Codes(Quantiser(format.k + 1), _LEAST_OF_ROWS)
        self._target_codes = Codes(Quantiser(max(format.k + 1, 33), _WIDEST_OF_TARGETS), _LEAST_OF_ROWS)
        self._id_bits = max(format.vocabulary_size - 1, 1).bit_length()
        self._blocks = Blocks(format.k, self._id_bits)

    # --- encoding ---------------------------------------------------------------------------------------------------------------

    def encode(self, record: TopKOutcomes) -> bytes:
        if len(record) == 0:
            return join(_UNKNOWN if record.target_log_probs is None else _KNOWN, [])
        log_probs, tails = _float32(record.log_probs), _float32(record.log_tail)
        codes, tail_codes, largest, implied = self._code_rows(log_probs, tails)
        raw = codes == self._codes.raw
        base = (np.where(raw, np.uint16(0), codes) if raw.any() else codes).max(axis=1)
        short, ids = self._codes.to_bytes(codes, base[:, None]), record.ids.numpy()
        short[implied] = IMPLIED
        gaps, ordered = self._blocks.by_id(ids, short)
        rows, places = np.divmod(np.flatnonzero(short == LONG), self._k)  # few: put in order on their own
        order = np.argsort(self._blocks.keys_of(ids[rows, places], rows), kind="stable")
        kept_long, kept_raw = (values[rows[order], places[order]] for values in (codes, log_probs))
        bases, tail_bytes = self._codes.to_bytes_of_rows(base), self._codes.to_bytes_of_rows(tail_codes)
        row_bytes, longs = [bases, tail_bytes], [kept_long, base[bases == LONG], tail_codes[tail_bytes == LONG], _NOTHING]
        raws = [kept_raw[kept_long == self._codes.raw], tails[tail_codes == self._codes.raw], _NOTHING]
        if record.target_log_probs is not None:
            targets = _float32(record.target_log_probs)
            target_codes = self._target_codes.of(targets)
            target_codes[implied[0][targets[implied[0]] == largest[implied[0]]]] = IMPLIED
            row_bytes.append(self._target_codes.to_bytes_of_rows(target_codes))
            longs[3], raws[2] = target_codes[row_bytes[2] == LONG], targets[target_codes == self._target_codes.raw]
        return join(
            _UNKNOWN if record.target_log_probs is None else _KNOWN,
            [*split_gaps(gaps), ordered, np.concatenate(row_bytes), *(part.astype("<u2") for part in longs), *raws],
            EVENLY_SPREAD,
        )

    def _code_rows(self, log_probs: np.ndarray, tails: np.ndarray) -> tuple:
        """Codes of the kept ids and of the tails, the largest kept log-probabilities, and the places (rows, columns) that are implied."""
        codes, tail_codes = self._codes.of(log_probs), self._codes.of(tails)
        every, top = np.arange(len(tails)), log_probs.argmax(axis=1)
        largest = log_probs[every, top]
        mass = np.exp(log_probs).sum(axis=1) + np.exp(tails)
        has_implied = (np.abs(mass - 1) < _MASS_ERROR) & (np.maximum(largest, tails) > np.log(_LEAST_IMPLIED))
        kept = np.flatnonzero(has_implied & (largest >= tails))
        codes[kept, top[kept]] = IMPLIED
        tail_codes[has_implied & (largest < tails)] = IMPLIED
        return codes, tail_codes, largest, (kept, top[kept])

    # --- decoding ---------------------------------------------------------------------------------------------------------------

    def decode(self, payloads: Sequence[bytes], rows: Sequence[int]) -> TopKOutcomes:
        total, k = sum(rows), self._k
        outputs = np.empty((total, k), np.int64), np.empty((total, k), np.float32), np.empty(total, np.float32), np.empty(total, np.float32)
        known, start = set(), 0
        for part in _groups(payloads, rows):
            stop = start + sum(n for _, n in part)
            known |= self._group(part, *(output[start:stop] for output in outputs))
            start = stop
        if len(known) > 1:
            raise damaged("some sequences know their targets' log-probabilities and others do not")
        ids, log_probs, tails, targets = (torch.from_numpy(output) for output in outputs)
        return TopKOutcomes(ids, log_probs, tails, None if known == {_UNKNOWN} else targets, self._temperature)

    def _group(self, part: list[tuple[bytes, int]], ids, log_probs, tails, targets) -> set[int]:
        """Decodes some payloads into the arrays; returns whether the targets' log-probabilities are known, as _KNOWN or _UNKNOWN."""
        firsts, parts, rows = set(), [], [n for _, n in part if n]
        for payload, n in part:
            kept = n * self._k
            first, streams = split(payload, [*most_bytes(kept), kept, 3 * n, 2 * kept, 2 * n, 2 * n, 2 * n, 4 * kept, 4 * n, 4 * n])
            if first not in (_KNOWN, _UNKNOWN):
                raise damaged("its first byte is unknown")
            if n:
                firsts.add(first)
                parts.append(streams)
        if len(firsts) != 1:
            return firsts  # no rows at all, or what the caller refuses
        known = firsts == {_KNOWN}
        *gaps, short, _, kept_long, base_long, tail_long, target_long, kept_raw, tail_raw, target_raw = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        if short.size != ids.size or [part[NUM_STREAMS + 1].size for part in parts] != [(2 + known) * n for n in rows]:
            raise damaged("it has another number of rows")
        columns = [np.concatenate(column) for column in zip(*(part[NUM_STREAMS + 1].reshape(2 + known, -1) for part in parts), strict=True)]
        base = self._codes.from_bytes(columns[0], numbers(base_long, "<u2"))
        tail_codes = self._codes.from_bytes(columns[1], numbers(tail_long, "<u2"))
        tails[:] = self._codes.log_probs(tail_codes, numbers(tail_raw, "<f4"))
        pairs = self._blocks.pairs(join_gaps(gaps), rows)
        if pairs.ids.max() >= self._vocabulary:
            raise damaged("an id lies outside the vocabulary")
        if (short == LONG).any():
            ids[:], mass, implied = self._with_long(pairs, short, numbers(kept_long, "<u2"), numbers(kept_raw, "<f4"), base, log_probs)
        else:
            ids[:], codes = pairs.by_row(short, 8)
            implied = codes[:, 0] == IMPLIED
            codes += (base - LAST)[:, None]
            codes[implied, 0] = IMPLIED
            mass = self._look_up(codes, log_probs)
        _normalise(implied, tail_codes == IMPLIED, mass, log_probs, tails)
        if known:
            target_codes = self._target_codes.from_bytes(columns[2], numbers(target_long, "<u2"))
            targets[:] = self._target_codes.log_probs(target_codes, numbers(target_raw, "<f4"))
            np.copyto(targets, log_probs[:, 0], where=target_codes == IMPLIED)
        return firsts

    def _look_up(self, codes: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """Fills in the log-probabilities of the codes, -inf for what is implied or kept as it is; returns the rows' mass."""
        self._codes.values.take(codes, out=log_probs, mode="clip")
        return self._codes.probabilities.take(codes, mode="clip").sum(axis=1)

    def _with_long(self, pairs: Pairs, short, long, raws, base, log_probs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where some outcomes have long codes or are kept as they are: ids, mass, and in which rows the first outcome is implied.

        Ranks ascend as a row's probabilities descend: 0 is what is implied; then come long codes; then, from `offset` on, bytes; then
        the values kept as they are.
        """
        (where,) = np.nonzero(short == LONG)
        raw, offset = long == self._codes.raw, self._codes.raw + 1
        if where.size != long.size or (long > self._codes.raw).any() or np.count_nonzero(raw) != raws.size or np.isnan(raws).any():
            raise damaged("its values do not fit its codes")
        ranks = short.astype(np.uint32) + np.uint32(offset)
        ranks[short == IMPLIED] = 0
        own = long.astype(np.int64)
        own[raw] = offset + LONG + 1 + np.argsort(np.argsort(-raws, kind="stable"))
        ranks[where] = own
        ids, ranks = pairs.by_row(ranks, (offset + LONG + 1 + raws.size).bit_length())
        kept_raw = ranks > offset + LONG
        codes = np.where(ranks < offset, ranks, ranks + (base - (offset + LAST))[:, None])
        codes[kept_raw] = self._codes.raw
        mass = self._look_up(codes, log_probs)
        log_probs[kept_raw] = -np.sort(-raws)[ranks[kept_raw] - (offset + LONG + 1)]
        return ids, mass, ranks[:, 0] == IMPLIED


def _normalise(top_implied: np.ndarray, tail_implied: np.ndarray, mass: np.ndarray, log_probs: np.ndarray, tails: np.ndarray) -> None:
    """In place: the outcome that was left out is what the others leave of 1, and where none was all are scaled to add up to 1."""
    top_implied = top_implied & ~tail_implied
    stored = ~(top_implied | tail_implied)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mass = mass + np.exp(tails)
        rest = np.log(np.maximum(1 - mass, np.finfo(np.float32).tiny))
        np.copyto(log_probs[:, 0], rest, where=top_implied)
        np.copyto(tails, rest, where=tail_implied)
        log_mass = np.log(mass[stored])
    log_mass[~np.isfinite(log_mass)] = 0
    log_probs[stored] -= log_mass[:, None]
    tails[stored] -= log_mass


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy(), np.float32)


def _groups(payloads: Sequence[bytes], rows: Sequence[int]) -> Iterator[list[tuple[bytes, int]]]:
    """Payloads in their order, so many together that they have at most _ROWS_TOGETHER rows, or one alone."""
    part, held = [], 0
    for payload, n in zip(payloads, rows, strict=True):
        if part and held + n > _ROWS_TOGETHER:
            yield part
            part, held = [], 0
        part.append((payload, n))
        held += n
    if part:
        yield part

"""(id, row) pairs of a sequence in the order of their ids, for storing, and back in the order of their rows.

Long sequences are put in order a block of rows at a time, so that a pair fits 32 bits and a block the processor's second cache.
"""

from collections.abc import Sequence

import numpy as np

from potstill.cache.streams import damaged

_MOST_ROWS, _MOST_PAIRS = 512, 2**17


class Blocks:
    """How sequences with k ids a row are cut; `rows` is how many a block has. Part of the format."""

    def __init__(self, k: int, id_bits: int):
        self.rows = max(1, min(_MOST_ROWS, _MOST_PAIRS // k))
        self._k, self._id_bits = k, id_bits

    def keys_of(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """int64 numbers that ascend as pairs stand in a sequence that by_id has put in order."""
        return (rows // self.rows).astype(np.int64) << 48 | ids.astype(np.int64) << 16 | rows % self.rows

    def by_id(self, ids: np.ndarray, short: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For ids [n, K] and a byte each: the gaps between the pairs' keys in ascending order, and the bytes in that order."""
        n, k = ids.shape
        gaps, ordered = np.empty(n * k, np.uint32), np.empty(n * k, np.uint8)
        for first in range(0, n, self.rows):
            rows = min(self.rows, n - first)
            bits = row_bits(rows)
            keys = ids[first : first + rows].astype(np.uint32 if self._id_bits + bits + 8 <= 32 else np.uint64)
            keys <<= keys.dtype.type(bits)
            keys |= np.arange(rows, dtype=keys.dtype)[:, None]
            keys <<= keys.dtype.type(8)
            keys |= short[first : first + rows]
            keys = keys.reshape(-1)
            keys.sort()
            ordered[first * k : (first + rows) * k] = keys
            keys >>= keys.dtype.type(8)
            own = gaps[first * k : (first + rows) * k]
            own[:1] = keys[:1]
            np.subtract(keys[1:], keys[:-1], out=own[1:], casting="unsafe")
        return gaps, ordered

    def pairs(self, gaps: np.ndarray, rows: Sequence[int]) -> "Pairs":
        """The pairs of sequences with so many rows each, none of them 0, from their gaps, one after the other."""
        blocks = [min(self.rows, n - first) for n in rows for first in range(0, n, self.rows)]
        sizes = np.array(blocks) * self._k
        starts = np.cumsum(sizes) - sizes
        if gaps.size != sizes.sum():
            raise damaged("it has another number of rows")
        sums = np.add.reduceat(gaps, starts, dtype=np.uint32)
        gaps[starts[1:]] -= sums[:-1]  # modulo 2 ** 32: the running sum starts anew with each block
        ids, numbers, chunks = np.cumsum(gaps, dtype=np.uint32), np.empty(gaps.size, np.uint16), [0]
        for n, start, size in zip(blocks, starts.tolist(), sizes.tolist(), strict=True):
            if chunks[-1] + n > self.rows:
                chunks.append(0)
            bits = row_bits(n)
            keys, own = ids[start : start + size], numbers[start : start + size]
            np.bitwise_and(keys, np.uint32((1 << bits) - 1), out=own, casting="unsafe")
            own += np.uint16(chunks[-1])
            keys >>= np.uint32(bits)
            chunks[-1] += n
        return Pairs(ids, numbers, chunks, self._k, self._id_bits)


class Pairs:
    """Ids, each with the number of its row within a chunk; so many rows have the chunks, which are put in order one by one."""

    def __init__(self, ids: np.ndarray, rows: np.ndarray, chunks: list[int], k: int, id_bits: int):
        self.ids, self._rows, self._chunks, self._k, self._id_bits = ids, rows, chunks, k, id_bits

    def by_row(self, ranks: np.ndarray, rank_bits: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 ids and ranks as [rows, K], each row in the order of ranks, then ids. Ranks are below 2 ** rank_bits."""
        k, start = self._k, 0
        ids, ordered = np.empty((len(ranks) // k, k), np.int64), np.empty((len(ranks) // k, k), np.int32)
        shift = rank_bits + self._id_bits
        kind = np.uint32 if shift + row_bits(max(self._chunks)) <= 32 else np.uint64
        for n in self._chunks:
            part = slice(start * k, (start + n) * k)
            keys = self._rows[part].astype(kind)
            keys <<= kind(rank_bits)
            keys |= ranks[part]
            keys <<= kind(self._id_bits)
            keys |= self.ids[part]
            keys.sort()
            if (keys[:: k] >> kind(shift) != np.arange(n)).any() or (keys[k - 1 :: k] >> kind(shift) != np.arange(n)).any():
                raise damaged("a row has more or fewer ids than K")
            keys = keys.reshape(n, k)
            np.bitwise_and(keys, kind((1 << self._id_bits) - 1), out=ids[start : start + n], casting="unsafe")
            keys >>= kind(self._id_bits)
            np.bitwise_and(keys, kind((1 << rank_bits) - 1), out=ordered[start : start + n], casting="unsafe")
            start += n
        return ids, ordered


def row_bits(n: int) -> int:
    return max(n - 1, 0).bit_length()

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
        return Pairs(ids, numbers, chunks, self._k)


class Pairs:
    """Ids, each with the number of its row within a chunk; so many rows have the chunks, which are put in order one by one."""

    def __init__(self, ids: np.ndarray, rows: np.ndarray, chunks: list[int], k: int):
        self.ids, self._rows, self._chunks, self._k = ids, rows, chunks, k

    def by_row(self, values: np.ndarray) -> np.ndarray:
        """Values of the pairs as [rows, K], each row's in ascending order."""
        k, start = self._k, 0
        ordered = np.empty((len(values) // k, k), values.dtype)
        for n in self._chunks:
            part = slice(start * k, (start + n) * k)
            order = np.argsort(self._rows[part], kind="stable")  # of 16-bit numbers: a radix sort
            every, ends = np.arange(n), self._rows[part].take([order[::k], order[k - 1 :: k]])
            if (ends != every).any():
                raise damaged("a row has more or fewer ids than K")
            values[part].take(order, out=ordered[start : start + n].reshape(-1), mode="clip")
            ordered[start : start + n].sort(axis=1)
            start += n
        return ordered


def row_bits(n: int) -> int:
    return max(n - 1, 1).bit_length()

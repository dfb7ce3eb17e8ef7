"""Log-probabilities as codes and codes as bytes: one byte for the likely ones, three for others, seven for a value kept as it is.

Which outcome of which row a code belongs to is its owner's business.
"""

import numpy as np

from potstill.cache.quantiser import Quantiser
from potstill.cache.streams import Reader, Writer, damaged

IMPLIED = 0  # the code of the outcome that is what the others leave of 1; cell c of the quantiser has code c + 1
_LONG = 255  # a byte that says: the code stands in the stream of long codes


class Codes:
    """Codes ascend as probabilities descend; the last, `raw`, stands for a value that is kept as it is."""

    def __init__(self, quantiser: Quantiser, deepest_byte: float):
        """`deepest_byte`: the log-probability of the least probable outcome that is worth a short code."""
        self._quantiser = quantiser
        self.raw = quantiser.size + 1
        self.values = np.append(np.array(-np.inf, np.float32), quantiser.log_probs)
        """The log-probability of each code below `raw`."""
        last = int(quantiser.cells(np.array([deepest_byte], np.float32))[0]) + 1
        codes = np.arange(max(1, last - 253), last + 1)
        self._byte = np.full(self.raw + 1, _LONG, np.uint8)
        self._byte[codes], self._byte[IMPLIED] = np.arange(1, len(codes) + 1), 0
        self._code = np.full(256, self.raw, np.uint16)
        self._code[1 : len(codes) + 1], self._code[0] = codes, IMPLIED

    def of(self, log_probs: np.ndarray) -> np.ndarray:
        return self._quantiser.cells(log_probs) + np.uint16(1)

    def write(self, writer: Writer, codes: np.ndarray, raw_values: np.ndarray) -> None:
        short = self._byte.take(codes)
        writer.stream(short)
        writer.stream(codes[short == _LONG].astype("<u2"))
        writer.stream(raw_values.astype("<f4"))

    def read(self, reader: Reader, count: int, raws: list[np.ndarray]) -> np.ndarray:
        """The codes; a value kept as it is gets one of its own beyond all others, in descending order, and is added to `raws`."""
        short = reader.exactly(count)
        codes = self._code.take(short)
        (where,) = np.nonzero(codes == self.raw)
        long = reader.exactly(2 * len(where)).view("<u2")
        (kept,) = np.nonzero(long == self.raw)
        values = reader.exactly(4 * len(kept)).view("<f4")
        if (long > self.raw).any() or np.isnan(values).any():
            raise damaged("a code is unknown")
        if len(where):
            codes = codes.astype(np.int64)
            codes[where] = long
            codes[where[kept]] = self.raw + sum(map(len, raws)) + np.argsort(np.argsort(-values, kind="stable"))
            raws.append(-np.sort(-values))
        return codes

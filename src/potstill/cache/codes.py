"""Log-probabilities as codes and codes as bytes. Codes ascend as probabilities descend.

Code 0 is the outcome that is not stored, because it is what the others leave of 1; cell c of the quantiser has code c + 1.
Which outcome of which row a code belongs to is its owner's business.
"""

import numpy as np

from potstill.cache.quantiser import Quantiser
from potstill.cache.streams import damaged

IMPLIED = 0
LONG = 255   # a byte that says: the code stands among the long ones
LAST = 254   # the byte of the last code that has one


class Codes:
    """`raw`, the last code, stands for a value that is kept as it is: one below the floor, or -inf."""

    def __init__(self, quantiser: Quantiser, last: float):
        """`last`: the log-probability of the least probable outcome that is worth a byte of its own, where bytes are of single values."""
        self._quantiser = quantiser
        self.raw = quantiser.size + 1
        self.values = np.concatenate([[-np.inf], quantiser.log_probs, [-np.inf]]).astype(np.float32)
        """The log-probability of each code; -inf where the code alone does not say it."""
        self.probabilities = np.exp(self.values)
        self._last = np.uint16(max(LAST, quantiser.cells(np.array([last], np.float32))[0] + 1))

    def of(self, log_probs: np.ndarray) -> np.ndarray:
        return self._quantiser.cells(log_probs) + np.uint16(1)

    def to_bytes(self, codes: np.ndarray, last: np.ndarray | None = None) -> np.ndarray:
        """A byte for each: how far the code is before `last`, the code that has the byte LAST; LONG for all others, IMPLIED among them."""
        before = codes - (self._last if last is None else last) + np.uint16(LAST - 1)  # wraps around below 0
        return np.minimum(before, np.uint16(LAST)).astype(np.uint8) + np.uint8(1)

    def to_bytes_of_rows(self, codes: np.ndarray) -> np.ndarray:
        short = self.to_bytes(codes)
        short[codes == IMPLIED] = IMPLIED
        return short

    def from_bytes(self, short: np.ndarray, long: np.ndarray) -> np.ndarray:
        """int32 codes of the bytes of to_bytes_of_rows; `long` fills in for LONG in order."""
        codes = short.astype(np.int32) + (int(self._last) - LAST)
        codes[short == IMPLIED] = IMPLIED
        where = short == LONG
        if np.count_nonzero(where) != long.size or (long > self.raw).any():
            raise damaged("a code is unknown")
        codes[where] = long
        return codes

    def log_probs(self, codes: np.ndarray, raws: np.ndarray) -> np.ndarray:
        """-inf for IMPLIED; `raws` are the values kept as they are, in order."""
        found = self.values.take(codes, mode="clip")
        where = codes == self.raw
        if np.count_nonzero(where) != raws.size or np.isnan(raws).any():
            raise damaged("its values do not fit its codes")
        found[where] = raws
        return found

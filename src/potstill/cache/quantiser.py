"""Log-probabilities as small whole numbers, finest where a step costs most KL.

Even steps of the square root of p, and below even steps of log p: an error e of a log-probability costs p e^2 / 2 nats, so even steps D
of sqrt(p) cost D^2 / 6 an outcome whatever p is; where they would move a log-probability by more than half of `widest`, the steps are
that many nats. It knows nothing of ids, rows and bytes.
"""

import numpy as np

MEAN_KL = 8.8e-5  # nats a row, for a row whose outcomes are all large enough for the even steps: the worst case
WIDEST = 0.7
FLOOR = -40.0   # below it, and for -inf, a value is kept as it is
_TABLE = 2**18  # beyond so many entries a search is made instead of a look-up


class Quantiser:
    """Cells numbered from the most probable one, 0, to the last; `size` is the number of cells, and the number of what lies below all."""

    def __init__(self, num_outcomes: int, widest: float = WIDEST):
        step = np.sqrt(6 * MEAN_KL / max(num_outcomes, 1))
        ends = [0.0]
        while ends[-1] > FLOOR:
            ends.append(ends[-1] - min(widest, 2 * step / np.exp(ends[-1] / 2)))
        self._ends = np.array(ends)
        self.size = len(ends) - 1
        middle = (np.exp(self._ends[:-1] / 2) + np.exp(self._ends[1:] / 2)) / 2
        self.log_probs = (2 * np.log(middle)).astype(np.float32)
        """The value that stands for each cell."""
        self._scale = 8 / step
        width = int(-ends[-1] * self._scale) + 2
        self._table = None
        if width <= _TABLE:
            self._table = self._search(np.arange(width) / -self._scale)
            self._table[-1] = self.size

    def _search(self, log_probs: np.ndarray) -> np.ndarray:
        cells = np.searchsorted(-self._ends, -log_probs, side="right") - 1
        return np.clip(cells, 0, self.size).astype(np.uint16)

    def cells(self, log_probs: np.ndarray) -> np.ndarray:
        """The cell of each float32 log-probability, `size` for those below the floor. Values above 0 are taken as 0."""
        if self._table is None:
            return self._search(np.nan_to_num(log_probs, neginf=-1e30))
        places = np.clip(log_probs * np.float32(-self._scale) + np.float32(0.5), 0, len(self._table) - 1)
        return self._table.take(places.astype(np.int32))

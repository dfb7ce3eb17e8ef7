"""Quantiles of a value over all rows, from how many rows of each document lie in each of a fixed set of bins.

A quantile is no function of sums, but counts in bins add up like every other column, and a quantile that is interpolated within its
bin is a smooth function of them: so the jackknife, the bootstrap and seeds serve it as they serve a mean. Knows numpy alone.
"""

import numpy as np

BINS_PER_DECADE = 12
LOWEST, HIGHEST = 1e-4, 1e2
EDGES = np.geomspace(LOWEST, HIGHEST, 6 * BINS_PER_DECADE + 1)
"""Nats. Neighbours differ by a factor of 1.21, which is the most that a quantile between LOWEST and HIGHEST can be wrong by."""
NUM_BINS = len(EDGES) + 1
"""One below LOWEST and one from HIGHEST on."""


def quantile(counts: np.ndarray, level: float) -> np.ndarray:
    """The value below which the share `level` of the rows lies, from counts [..., NUM_BINS]; nan where there are none.

    Within a bin rows are taken to lie evenly in the logarithm (below LOWEST: evenly). From HIGHEST on it is HIGHEST.
    """
    counts = np.asarray(counts, dtype=np.float64)
    running = counts.cumsum(axis=-1)
    aim = level * running[..., -1:]
    place = (running >= aim).argmax(axis=-1)[..., None]
    inside = np.take_along_axis(counts, place, axis=-1)
    before = np.take_along_axis(running, place, axis=-1) - inside
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (aim - before) / inside
    low, high = EDGES[np.clip(place - 1, 0, None)], EDGES[np.clip(place, None, len(EDGES) - 1)]
    found = np.where(place == 0, share * LOWEST, low * (high / low) ** share)
    return np.where(running[..., -1:] > 0, found, np.nan)[..., 0]

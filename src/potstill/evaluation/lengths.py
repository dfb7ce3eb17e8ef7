"""Lengths of answers as pictures: shares by length, and quantiles. Numbers alone."""

from collections.abc import Sequence

import numpy as np

from potstill.evaluation.task import Series

_BINS = 20
_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


def histogram(label: str, lengths: Sequence[int], longest: int) -> Series:
    """The share of answers in each of (at most) 20 equal classes of lengths 0 to `longest`, each at its middle; longer ones in the last.

    The classes hang on `longest` alone, so that those of several models are the same.
    """
    width = max(1, -(-(longest + 1) // _BINS))
    number = -(-(longest + 1) // width)
    counts = np.bincount(np.minimum(np.asarray(lengths, dtype=int) // width, number - 1), minlength=number)
    middles = tuple(float(place * width + (width - 1) / 2) for place in range(number))
    return Series("lengths", label, "tokens", "share of answers", middles, tuple((counts / max(len(lengths), 1)).tolist()))


def quantiles(label: str, lengths: Sequence[int]) -> Series:
    """The lengths below which 5, 10, 25, 50, 75, 90 and 95 percent of the answers lie."""
    values = np.quantile(np.asarray(lengths, dtype=float), _LEVELS)
    return Series("length quantiles", label, "share of answers", "tokens", _LEVELS, tuple(values.tolist()))

"""Ascending whole numbers as the gaps between them: one byte for a small gap, up to three for most others, in streams of like bytes.

What the numbers mean is their owner's business.
"""

import numpy as np

from potstill.cache.streams import damaged, numbers

# A gap's first byte: the gap itself; or the bits above 8, with one byte more; or those above 16, with two; or four bytes follow.
_DIRECT, _ONE, _TWO = 160, 64, 31
_FIRST_TWO = _DIRECT + (_ONE << 8)
_FIRST_WIDE = _FIRST_TWO + (_TWO << 16)
_HEAD_OF_TWO, _HEAD_OF_WIDE = _DIRECT + _ONE, _DIRECT + _ONE + _TWO
NUM_STREAMS = 4
EVENLY_SPREAD = (1, 2)  # the streams of the lower bytes of large gaps


def split_gaps(gaps: np.ndarray) -> list[np.ndarray]:
    """uint32 gaps as their first bytes, the further bytes of two classes, and the gaps beyond all classes."""
    heads = gaps.astype(np.uint8)
    (where,) = np.nonzero(gaps >= _DIRECT)
    beyond = gaps[where].astype(np.int64)
    one, two = beyond - _DIRECT, beyond - _FIRST_TWO
    heads[where] = np.where(two < 0, _DIRECT + (one >> 8), np.where(beyond < _FIRST_WIDE, _HEAD_OF_TWO + (two >> 16), _HEAD_OF_WIDE))
    middle = two[(two >= 0) & (beyond < _FIRST_WIDE)]
    return [heads, one[two < 0].astype(np.uint8), middle.astype("<u2"), beyond[beyond >= _FIRST_WIDE].astype("<u4")]


def most_bytes(count: int) -> list[int]:
    """How many bytes each stream of `count` gaps can have."""
    return [count, count, 2 * count, 4 * count]


def join_gaps(streams: list[np.ndarray]) -> np.ndarray:
    heads, one, two, wide = (numbers(stream, dtype) for stream, dtype in zip(streams, ["u1", "u1", "<u2", "<u4"], strict=True))
    gaps = heads.astype(np.uint32)
    (where,) = np.nonzero(heads >= _DIRECT)
    classes = gaps[where].astype(np.int64)
    is_one, is_wide = classes < _HEAD_OF_TWO, classes >= _HEAD_OF_WIDE
    is_two = ~(is_one | is_wide)
    if [np.count_nonzero(found) for found in (is_one, is_two, is_wide)] != [one.size, two.size, wide.size]:
        raise damaged("its gaps have too few or too many further bytes")
    classes[is_one] = ((classes[is_one] - _DIRECT) << 8) + one + _DIRECT
    classes[is_two] = ((classes[is_two] - _HEAD_OF_TWO) << 16) + two + _FIRST_TWO
    classes[is_wide] = wide
    gaps[where] = classes
    return gaps

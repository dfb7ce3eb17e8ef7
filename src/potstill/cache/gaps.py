"""Ascending whole numbers as the gaps between them: one byte for a small gap, up to three for most others, in streams of like bytes.

What the numbers mean is their owner's business.
"""

import numpy as np

from potstill.cache.streams import Reader, Writer, damaged

# A gap's first byte: the gap itself; or a class and the bits above 8, with one byte more; or above 16, with two; or eight bytes follow.
_DIRECT, _ONE, _TWO = 160, 64, 31
_FIRST_TWO = _DIRECT + (_ONE << 8)
_FIRST_WIDE = _FIRST_TWO + (_TWO << 16)
_WIDE = _DIRECT + _ONE + _TWO
LARGEST = 2**40


def write_gaps(writer: Writer, gaps: np.ndarray) -> None:
    """`gaps` are int64, 0 or more; their number is not stored."""
    heads = gaps.astype(np.uint8)
    (where,) = np.nonzero(gaps >= _DIRECT)
    beyond = gaps[where]
    one, two = beyond - _DIRECT, beyond - _FIRST_TWO
    heads[where] = np.where(two < 0, _DIRECT + (one >> 8), np.where(beyond < _FIRST_WIDE, _DIRECT + _ONE + (two >> 16), _WIDE))
    writer.stream(heads)
    writer.stream(one[two < 0].astype(np.uint8))
    middle = two[(two >= 0) & (beyond < _FIRST_WIDE)]
    writer.stream(middle.astype(np.uint8))
    writer.stream((middle >> 8).astype(np.uint8))
    writer.stream(beyond[beyond >= _FIRST_WIDE].astype("<u8"))


def read_gaps(reader: Reader, count: int) -> np.ndarray:
    heads = reader.exactly(count)
    gaps = heads.astype(np.int64)
    (where,) = np.nonzero(heads >= _DIRECT)
    classes = gaps[where]
    one, wide = classes < _DIRECT + _ONE, classes >= _WIDE
    two = ~(one | wide)
    if (classes > _WIDE).any():
        raise damaged("a gap is of no known class")
    classes[one] = ((classes[one] - _DIRECT) << 8) + reader.exactly(int(one.sum())) + _DIRECT
    num_two = int(two.sum())
    low = reader.exactly(num_two).astype(np.int64)
    classes[two] = ((classes[two] - _DIRECT - _ONE) << 16) + low + (reader.exactly(num_two).astype(np.int64) << 8) + _FIRST_TWO
    wide_gaps = reader.exactly(8 * int(wide.sum())).view("<u8")
    if wide_gaps.size and wide_gaps.max() > LARGEST:
        raise damaged("a gap is too large")
    classes[wide] = wide_gaps.astype(np.int64)
    gaps[where] = classes
    return gaps

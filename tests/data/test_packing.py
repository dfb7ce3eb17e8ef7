"""Laws of packing: each example in one bin, none too full, the same for the same seed, and few bins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.data.packing import pack, unpacked


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=120), st.integers(60, 100), st.integers(0, 3))
def test_laws(lengths, room, seed):
    bins = pack(lengths, room, seed)
    assert sorted(position for one in bins for position in one) == list(range(len(lengths)))  # each exactly once
    loads = [sum(lengths[position] for position in one) for one in bins]
    assert all(0 < load <= room for load in loads)
    assert bins == pack(np.array(lengths), room, seed)
    # Best fit leaves no two bins that would fit together, and so at most one that is half empty.
    assert sum(load <= room / 2 for load in loads) <= 1
    best = max(-(-sum(lengths) // room), sum(length > room / 2 for length in lengths))
    assert len(bins) <= 11 / 9 * best + 4


def test_a_row_of_the_whole_length_and_one_too_long():
    assert sorted(map(sorted, pack([8, 3, 5, 8], 8, 0))) == [[0], [1, 2], [3]]
    with pytest.raises(ValueError, match="example 1 has 9 tokens, more than a row of 8"):
        pack([1, 9], 8, 0)
    assert pack([], 8, 0) == []
    assert unpacked(3) == [[0], [1], [2]]


def test_the_seed_changes_the_company_and_the_fill_stays():
    lengths = np.random.Generator(np.random.PCG64(0)).geometric(0.01, 5000).clip(1, 2048)
    first, second = pack(lengths, 2048, 0), pack(lengths, 2048, 1)
    assert {frozenset(one) for one in first} != {frozenset(one) for one in second}
    for bins in (first, second):
        assert lengths.sum() / (len(bins) * 2048) > 0.99
    sizes = [len(one) for one in first]
    assert sizes != sorted(sizes)  # not in the order in which the bins were filled

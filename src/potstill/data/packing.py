"""Which examples share a row. Knows lengths; knows no tokens."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, max_tokens: int, seed: int) -> list[list[int]]:
    """Bins of example positions, each position in exactly one bin, no bin longer than `max_tokens`.

    Best fit by decreasing length (Johnson 1973: never more than 11/9 of the optimal number of bins, plus 1); the seed decides
    among equal lengths and the order of the bins and within them. Raises ValueError for an example that fits no bin.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > max_tokens:
        raise ValueError(f"example {int(sizes.argmax())} has {int(sizes.max())} tokens, more than a row of {max_tokens}")
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = generator.permutation(len(sizes))
    bins: list[list[int]] = []
    rooms: list[int] = []                   # the distinct free spaces, ascending
    with_room: dict[int, list[int]] = {}    # free space -> bins that have it
    for position in shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist():
        size = int(sizes[position])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            number, room = len(bins), max_tokens
            bins.append([])
        else:
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[number].append(position)
        if room > size:
            if room - size not in with_room:
                with_room[room - size] = []
                insort(rooms, room - size)
            with_room[room - size].append(number)
    return [[bins[number][i] for i in generator.permutation(len(bins[number]))] for number in generator.permutation(len(bins))]


def unpacked(num_examples: int) -> list[list[int]]:
    """Every example in a row of its own, in their order."""
    return [[position] for position in range(num_examples)]

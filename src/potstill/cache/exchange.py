"""Records between memory and the segments of a place: `fetch` compares every checksum, `commit` puts the data before its index.

Shared by readers, writers, compaction and verification. It does not know what a payload says.
"""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import xxhash

from potstill.cache.catalogue import Catalogue, Damage
from potstill.cache.segments import DATA, INDEX, SegmentName, checksum, encode_data, encode_index, key_list
from potstill.errors import StorageError
from potstill.place import Range


def fetch(catalogue: Catalogue, keys: np.ndarray, entries: np.ndarray, unseen: set[SegmentName] | None = None) -> list[bytes | None]:
    """The payloads in the order asked; None where the bytes are not those that were committed.

    Of the segments in `unseen` the bytes that are no payload are compared too, and the segment is taken out of the set.
    Raises a StorageError with errno ENOENT where a segment is gone: look again after `catalogue.refresh()`.
    """
    order = np.lexsort((entries["offset"], entries["segment"]))
    ordered = entries[order]
    names = {number: f"{catalogue.segments[number]}{DATA}" for number in np.unique(ordered["segment"]).tolist()}
    starts, segments = ordered["offset"].tolist(), ordered["segment"].tolist()
    ranges: list[Range] = [
        (names[segment], start, start + length) for segment, start, length in zip(segments, starts, ordered["length"].tolist(), strict=True)
    ]
    first_seen = [name for number in names if unseen and (name := catalogue.segments[number]) in unseen]
    contents = catalogue.place.read_ranges(ranges + [part for name in first_seen for part in _frame(catalogue, name)])
    payloads: list[bytes | None] = [None] * len(order)
    rows, sums = ordered["rows"].tolist(), ordered["xxh3"].tolist()
    for place, key, payload, count, stated in zip(order.tolist(), key_list(keys[order]), contents, rows, sums, strict=False):
        if checksum(key, count, payload) == stated:
            payloads[place] = payload
    for number, name in enumerate(first_seen):
        _compare_frame(catalogue, name, contents[len(ranges) + 2 * number : len(ranges) + 2 * number + 2])
        if unseen is not None:
            unseen.discard(name)
    return payloads


def _frame(catalogue: Catalogue, name: SegmentName) -> list[Range]:
    size, start, stop, _ = catalogue.facts[name]
    return [(f"{name}{DATA}", 0, start), (f"{name}{DATA}", stop, max(stop, size))]


def _compare_frame(catalogue: Catalogue, name: SegmentName, parts: Sequence[bytes]) -> None:
    digest = xxhash.xxh3_64(parts[0])
    digest.update(parts[1])
    if digest.intdigest() != catalogue.facts[name].frame and name not in catalogue.damage:
        problem = "its checksum does not match its content, outside the records; these have checksums of their own"
        catalogue.note(name, Damage(f"{name}{DATA}", problem))


def commit(catalogue: Catalogue, name: SegmentName, records: Sequence[tuple[bytes, int, bytes]]) -> None:
    """Durable on return: the data file, then its index. After an error neither counts."""
    data, index = encode_data(records, catalogue.digest)
    try:
        catalogue.place.put(f"{name}{DATA}", data)
        catalogue.place.put(f"{name}{INDEX}", encode_index(index))
    except StorageError:
        with suppress(StorageError):  # gives the room back; what stays is swept when this writer starts again
            retire(catalogue, [name])
        raise
    catalogue.extend([(name, index)])


def retire(catalogue: Catalogue, names: Sequence[SegmentName]) -> None:
    """Deletes segments, indices first: a crash between leaves data files that are not committed, never an index without its data."""
    catalogue.forget(names)
    catalogue.place.delete([f"{name}{INDEX}" for name in names])
    catalogue.place.delete([f"{name}{DATA}" for name in names])

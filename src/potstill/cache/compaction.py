"""Small segments of one writer become shards, and what a killed writer left is swept. The new shard is committed before the old ones go.

It touches segments of its own writer alone, so that many writers can work on one cache. A segment with a damaged record stays as it is.
"""

from collections.abc import Callable, Iterator, Sequence

from potstill.cache.catalogue import Catalogue, Damage
from potstill.cache.exchange import commit, fetch, retire
from potstill.cache.segments import DATA, INDEX, SegmentName, key_list, segment_of
from potstill.place import Place


class Numbers:
    """Gives the next name of a writer's segments. A number is never used again, not even after a failed put: on an object store that put
    may still come true."""

    def __init__(self, place: Place, writer: str):
        self._writer = writer
        names = [*place.sizes(), *place.unfinished().values()]
        parts = [found[0] for name in names if (found := segment_of(name)) is not None]
        self._last = max((part.number for part in parts if part.writer == writer), default=-1)

    def __call__(self) -> SegmentName:
        self._last += 1
        return SegmentName(self._writer, self._last)


def own_segments(catalogue: Catalogue, writer: str) -> list[SegmentName]:
    return sorted(name for name in catalogue.facts if name.writer == writer)


def compact(catalogue: Catalogue, writer: str, shard_bytes: int, next_name: Callable[[], SegmentName], *, last: bool) -> None:
    """Puts together segments under half a shard. Before the `last` time only whole shards are made, so that each byte moves about once."""
    for group in _groups(catalogue, _candidates(catalogue, writer, shard_bytes, last), shard_bytes, last):
        carry(catalogue, group, next_name)


def _candidates(catalogue: Catalogue, writer: str, shard_bytes: int, last: bool) -> list[SegmentName]:
    def wanted(name: SegmentName) -> bool:
        damage = catalogue.damage.get(name)
        if damage is None:
            return 2 * catalogue.facts[name].size < shard_bytes
        return last and bool(damage.keys) and bool(catalogue.find(damage.keys)[1].all())  # what it lost was asked for again

    return [name for name in own_segments(catalogue, writer) if wanted(name)]


def _groups(catalogue: Catalogue, names: Sequence[SegmentName], shard_bytes: int, last: bool) -> Iterator[list[SegmentName]]:
    group: list[SegmentName] = []
    size = 0
    for name in names:
        if group and size + catalogue.facts[name].size > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += catalogue.facts[name].size
    if last and (len(group) > 1 or any(name in catalogue.damage for name in group)):
        yield group


def carry(catalogue: Catalogue, group: Sequence[SegmentName], next_name: Callable[[], SegmentName], *, drop: bool = False) -> int:
    """Commits the records of `group` as one segment and deletes its own. Returns how many records do not read back.

    A segment that holds one of these stays, unless `drop` says to go on without them.
    """
    keys, entries = catalogue.within(group)
    payloads = fetch(catalogue, keys, entries)
    broken = [number for number, payload in enumerate(payloads) if payload is None]
    if broken and not drop:
        spoilt = {catalogue.segments[entries["segment"][number]] for number in broken}
        for name in spoilt:
            if name is not None:
                lost = tuple(key_list(keys[[number for number in broken if catalogue.segments[entries["segment"][number]] == name]]))
                catalogue.note(name, Damage(f"{name}{DATA}", f"{len(lost)} of its records do not match their checksums", lost))
        rest = [name for name in group if name not in spoilt]
        if len(rest) > 1:
            carry(catalogue, rest, next_name)
        return len(broken)
    rows = entries["rows"].tolist()
    records = [(key, count, payload) for key, count, payload in zip(key_list(keys), rows, payloads, strict=True) if payload is not None]
    if records:
        commit(catalogue, next_name(), records)
    retire(catalogue, group)
    return len(broken)


def sweep(catalogue: Catalogue, writer: str) -> list[str]:
    """Deletes what an earlier life of this writer left unfinished or did not need any more. Returns the names."""
    place = catalogue.place
    sizes = place.sizes()
    found = [name for name, final in place.unfinished().items() if (parts := segment_of(final)) is not None and parts[0].writer == writer]
    for name in sizes:
        parts = segment_of(name)
        if parts is not None and parts[0].writer == writer and parts[1] == DATA and f"{parts[0]}{INDEX}" not in sizes:
            found.append(name)
    place.delete(found)
    superseded = catalogue.superseded(own_segments(catalogue, writer))
    retire(catalogue, superseded)
    return found + [f"{name}{DATA}" for name in superseded]

"""Which record lies where: all indices of a cache in memory as sorted arrays (48 bytes a sequence), and what was found damaged.

It reads indices and nothing else, unless an index is damaged: then its data file. It never writes and never decodes.
"""

import errno
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from potstill.cache.segments import (
    DATA,
    ENTRY,
    INDEX,
    KEY,
    Index,
    SegmentName,
    decode_index,
    key_array,
    key_list,
    payload_span,
    rebuild_index,
    segment_of,
)
from potstill.errors import StorageError
from potstill.place import Place

_logger = logging.getLogger(__name__)
_INDICES_AT_ONCE = 256
_LISTINGS = 8


@dataclass(frozen=True)
class Damage:
    """What is wrong with one object of a cache, and the keys of the records that are lost by it. A foreign one is no part of the cache."""

    name: str
    problem: str
    keys: tuple[bytes, ...] = ()
    foreign: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


class Facts(NamedTuple):
    """Of a data file: its bytes, where its payloads begin and end, and the checksum of the rest of it."""

    size: int
    start: int
    stop: int
    frame: int


class _Table(NamedTuple):
    keys: np.ndarray      # sorted; of a key that stands in several segments the latest comes first
    entries: np.ndarray   # ENTRY, in the same order

    def firsts(self) -> np.ndarray:
        first = np.ones(len(self.keys), bool)
        first[1:] = self.keys[1:] != self.keys[:-1]
        return first


_EMPTY = _Table(np.empty(0, KEY), np.empty(0, ENTRY))


def _merged(tables: Sequence[_Table]) -> _Table:
    """One table of several, the later ones' entries first. Doubles stay: a segment may go and leave the other."""
    keys = np.concatenate([table.keys for table in reversed(tables)])
    order = np.argsort(keys, kind="stable")  # sorted runs are merged, not sorted anew
    return _Table(keys[order], np.concatenate([table.entries for table in reversed(tables)])[order])


class Catalogue:
    """The committed records of a cache. Tables are replaced, never changed, so that other threads may look meanwhile."""

    def __init__(self, place: Place, digest: str):
        self.place, self.digest = place, digest
        self.segments: list[SegmentName | None] = []      # by number; None: gone
        self.facts: dict[SegmentName, Facts] = {}
        self.damage: dict[SegmentName, Damage] = {}
        self._tables: tuple[_Table, ...] = ()
        self.refresh()

    def __len__(self) -> int:
        return int(self._whole().firsts().sum())

    def keys(self) -> np.ndarray:
        """All keys, sorted, each once."""
        table = self._whole()
        return table.keys[table.firsts()]

    def within(self, names: Iterable[SegmentName]) -> tuple[np.ndarray, np.ndarray]:
        """Keys and entries of these segments, in the order in which they lie, each key once (the latest)."""
        table = self._whole()
        wanted = set(names)
        here = np.isin(table.entries["segment"], [number for number, name in enumerate(self.segments) if name in wanted])
        part = _Table(table.keys[here], table.entries[here])
        part = _Table(part.keys[part.firsts()], part.entries[part.firsts()])
        order = np.lexsort((part.entries["offset"], part.entries["segment"]))
        return part.keys[order], part.entries[order]

    def by_segment(self, *, doubles: bool = False) -> Iterator[tuple[SegmentName, np.ndarray, np.ndarray]]:
        """Segment by segment its keys and entries, as they lie. Without `doubles` a key stands in the latest of its segments alone."""
        table = self._whole()
        order = np.lexsort((table.entries["offset"], table.entries["segment"]))
        if not doubles:
            order = order[table.firsts()[order]]
        for part in np.split(order, np.flatnonzero(np.diff(table.entries["segment"][order])) + 1):
            if len(part) and (name := self.segments[table.entries["segment"][part[0]]]) is not None:
                yield name, table.keys[part], table.entries[part]

    def superseded(self, names: Sequence[SegmentName]) -> list[SegmentName]:
        """Those of these segments whose records all stand in later ones of them, and of which nothing is damaged."""
        _, latest = self.within(names)
        live = set(np.unique(latest["segment"]).tolist())
        numbers = {name: number for number, name in enumerate(self.segments) if name is not None}
        return [name for name in names if numbers[name] not in live and name not in self.damage]

    def _whole(self) -> _Table:
        self._fold(to=1)
        return self._tables[0] if self._tables else _EMPTY

    def find(self, keys: Sequence[bytes] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each key its entry, and whether there is one (else the entry is empty)."""
        wanted = keys if isinstance(keys, np.ndarray) else key_array(keys)
        entries, found = np.zeros(len(wanted), ENTRY), np.zeros(len(wanted), bool)
        for table in self._tables:  # the later one wins
            if not len(table.keys):
                continue
            at = np.minimum(np.searchsorted(table.keys, wanted), len(table.keys) - 1)
            here = table.keys[at] == wanted
            entries[here] = table.entries[at[here]]
            found |= here
        return entries, found

    def _fold(self, to: int | None = None) -> None:
        # Sizes at least double from one table to the one before it: few tables, and each record is moved a few times in all.
        tables = list(self._tables)
        while len(tables) > 1 and (to == 1 or len(tables[-2].keys) < 2 * len(tables[-1].keys)):
            tables[-2:] = [_merged(tables[-2:])]
        self._tables = tuple(tables)

    # ------------------------------------------------------------ what is committed

    def refresh(self) -> int:
        """Takes in what was committed since, and forgets what is gone. Returns how many records are there now."""
        for _ in range(_LISTINGS):
            sizes = self._listing()
            committed = {found[0] for name in sizes if (found := segment_of(name)) is not None and found[1] == INDEX}
            try:
                loaded = self._load(sorted(committed - self.facts.keys(), key=lambda name: (name.number, name.writer)), sizes)
            except StorageError as error:
                if error.errno != errno.ENOENT:
                    raise
                continue  # a writer put several segments together meanwhile
            self.forget(self.facts.keys() - committed)
            self.extend(loaded)
            return len(self)
        raise StorageError(f"{self.place.name}: its list of segments changes faster than it can be read; wait for its writers")

    def _listing(self) -> dict[str, int]:
        # A list made while a shard replaces its segments may show neither; two lists that agree do not.
        former, sizes = None, self.place.sizes()
        while former is None or former.keys() != sizes.keys():
            former, sizes = sizes, self.place.sizes()
        return sizes

    def _load(self, names: Sequence[SegmentName], sizes: dict[str, int]) -> list[tuple[SegmentName, Index]]:
        loaded = []
        for first in range(0, len(names), _INDICES_AT_ONCE):
            part = names[first : first + _INDICES_AT_ONCE]
            contents = self.place.read_ranges([(f"{name}{INDEX}", 0, sizes[f"{name}{INDEX}"]) for name in part])
            loaded += [(name, self._read(name, content, sizes)) for name, content in zip(part, contents, strict=True)]
        return loaded

    def _read(self, name: SegmentName, content: bytes, sizes: dict[str, int]) -> Index:
        """The index without what cannot be used of it; what that is, is noted in `damage`."""
        data = f"{name}{DATA}"
        nothing = Index(_EMPTY.keys, _EMPTY.entries, 0, 0, self.digest)
        try:
            index = decode_index(content)
        except StorageError as error:
            index = self._rebuild(name, str(error), nothing, there=data in sizes)
        if index.cache != self.digest:
            self.note(name, Damage(f"{name}{INDEX}", "belongs to a cache that was made from something else", foreign=True))
            return nothing
        size = sizes.get(data)
        if size == index.size or not len(index.keys):
            return index
        whole = index.entries["offset"] + index.entries["length"] <= (size or 0)
        if size is None:
            whole[:] = False
        lost = tuple(key_list(index.keys[~whole]))
        found = "is missing" if size is None else f"{size:,} bytes instead of {index.size:,}"
        self.note(name, Damage(data, f"{found}: {len(lost)} of its {len(index.keys)} records are lost", lost))
        return Index(index.keys[whole], index.entries[whole], index.size, index.frame, index.cache)

    def _rebuild(self, name: SegmentName, problem: str, nothing: Index, *, there: bool) -> Index:
        if there:
            try:
                index, lost = rebuild_index(self.place.read(f"{name}{DATA}"))
            except StorageError as error:
                if error.errno == errno.ENOENT:
                    raise
                problem += f", and its data file: {error}"
            else:
                problem += f"; made anew from its data file, {len(lost)} of {len(index.keys) + len(lost)} records are lost"
                self.note(name, Damage(f"{name}{INDEX}", problem, tuple(lost)))
                return index
        else:
            problem += ", and its data file is missing"
        self.note(name, Damage(f"{name}{INDEX}", f"{problem}; its records are lost"))
        return nothing

    def note(self, name: SegmentName, damage: Damage) -> None:
        """Remembers what is wrong with a segment, and says it once."""
        self.damage[name] = damage
        _logger.warning("%s/%s", self.place.name, damage)

    def extend(self, segments: Iterable[tuple[SegmentName, Index]]) -> None:
        """Takes in segments that are committed; the later one wins."""
        tables = []
        for name, index in segments:
            entries = index.entries.copy()
            entries["segment"] = len(self.segments)
            self.segments.append(name)
            self.facts[name] = Facts(index.size, *payload_span(index.entries), index.frame)
            order = np.argsort(index.keys, kind="stable")
            tables.append(_Table(index.keys[order], entries[order]))
        if tables:
            self._tables = (*self._tables, _merged(tables))
            self._fold()

    def forget(self, names: Iterable[SegmentName]) -> None:
        """Leaves out segments that are gone, or about to go."""
        gone = set(names)
        if not gone:
            return
        numbers = [number for number, name in enumerate(self.segments) if name in gone]
        kept = [(table, ~np.isin(table.entries["segment"], numbers)) for table in self._tables]
        self._tables = tuple(_Table(table.keys[here], table.entries[here]) for table, here in kept)
        for number in numbers:
            self.segments[number] = None
        for name in gone:
            self.facts.pop(name, None)
            self.damage.pop(name, None)

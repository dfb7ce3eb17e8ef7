"""Compares every byte of a cache with its checksums and lists what is damaged and what is missing; on request drops what is damaged.

It decodes nothing: an answer whose checksum holds is the answer that was captured.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from potstill.cache.catalogue import Damage
from potstill.cache.compaction import Numbers, carry
from potstill.cache.exchange import fetch
from potstill.cache.locks import writer_lock
from potstill.cache.segments import DATA, INDEX, SegmentName, key_list, segment_of
from potstill.cache.store import CacheReader
from potstill.errors import StorageError

_BYTES_AT_ONCE = 64 * 2**20


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `damaged` names the file of each answer that does not read back; `missing` the origin of each that was
    expected and is not there, or not whole."""

    name: str
    answers: int
    segments: int
    damage: tuple[Damage, ...]
    damaged: Mapping[bytes, str]
    missing: Mapping[bytes, str]
    unfinished: tuple[str, ...]
    dropped: int = 0
    written_anew: bool = False

    @property
    def exit_code(self) -> int:
        return 1 if self.damage or self.damaged or self.missing else 0


def verify(path: str, expected: Iterable[tuple[bytes, str]] | None = None, *, drop: bool = False) -> Verification:
    """Reads the whole cache. `expected` holds the key and the origin of each sequence that should be there.

    With `drop` segments with damage are written anew without what is damaged, so that the next capture asks for it again; it needs the
    locks of their writers. Raises CacheError where there is no cache, StorageError where its description is damaged.
    """
    reader = CacheReader(path)
    of_files = [damage for name in reader.description.files if (damage := _look_at_file(reader, name)) is not None]
    damaged: dict[bytes, str] = {}
    whole = 0
    for name, keys, entries in reader.catalogue.by_segment(doubles=True):
        for part in parts_of(entries):
            broken = _broken(reader, name, keys[part], entries[part])
            damaged.update(dict.fromkeys(key_list(keys[part][broken]), f"{name}{DATA}"))
            whole += int((~broken).sum())
    wanted = list(expected or ())
    held = reader.holds([key for key, _ in wanted])
    missing = {key: origin for (key, origin), here in zip(wanted, held, strict=True) if not here or key in damaged}
    for damage in reader.damage:
        missing.update({key: missing.get(key, "") for key in damage.keys if key not in reader})
    found = (*of_files, *reader.damage)
    dropped = _drop(reader, {segment_of(name) for name in damaged.values()}) if drop else 0
    return Verification(reader.name, whole, len(reader.segments), found, damaged, missing, unfinished(reader), dropped, drop)


def parts_of(entries: np.ndarray) -> Iterator[slice]:
    """Neighbours in a segment, as many as memory should hold at once."""
    start, size = 0, 0
    for number, length in enumerate(entries["length"].tolist()):
        if size and size + length > _BYTES_AT_ONCE:
            yield slice(start, number)
            start, size = number, 0
        size += length
    if start < len(entries):
        yield slice(start, len(entries))


def unfinished(reader: CacheReader) -> tuple[str, ...]:
    """What writers at work, or killed, have not committed: temporary files, and data files without an index."""
    sizes = reader.place.sizes()
    found = {name: segment_of(name) for name in sizes}
    indexed = {parts[0] for parts in found.values() if parts is not None and parts[1] != DATA}
    orphans = [name for name, parts in found.items() if parts is not None and parts[0] not in indexed]
    return tuple(sorted([*orphans, *reader.place.unfinished()]))


def _look_at_file(reader: CacheReader, name: str) -> Damage | None:
    try:
        reader.file(name)
    except StorageError as error:
        return Damage(name, str(error).rpartition(f"{name}: ")[2])
    return None


def _broken(reader: CacheReader, name: SegmentName, keys: np.ndarray, entries: np.ndarray) -> np.ndarray:
    try:
        payloads = fetch(reader.catalogue, keys, entries, reader.unseen)
    except StorageError as error:
        if name not in reader.catalogue.damage:
            reader.catalogue.note(name, Damage(f"{name}{DATA}", str(error)))
        return np.ones(len(keys), bool)
    return np.array([payload is None for payload in payloads], bool)


def _drop(reader: CacheReader, spoilt: Iterable[tuple[SegmentName, str] | None]) -> int:
    """Writes the segments with damage anew; returns how many answers were left out."""
    names = {found[0] for found in spoilt if found is not None}
    names |= {name for name, damage in reader.catalogue.damage.items() if not damage.foreign}
    dropped = 0
    for writer in sorted({name.writer for name in names}):
        with writer_lock(reader.place, writer):
            next_name = Numbers(reader.place, writer)
            for name in sorted(name for name in names if name.writer == writer):
                lost = reader.catalogue.damage[name].keys if name in reader.catalogue.damage else ()
                dropped += len(lost) + carry(reader.catalogue, [name], next_name, drop=True)
    return dropped


def counted(count: int, noun: str) -> str:
    """1,234 answers."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def verification_text(found: Verification) -> str:
    """What was found, a line for each thing that is wrong."""
    whole = f"{counted(found.answers, 'answer')} in {counted(found.segments, 'segment')} read back as written"
    lines = [f"{found.name}: {whole}"]
    lines += [f"damaged: {damage}" for damage in found.damage]
    lines += [f"damaged: the answer {key.hex()} in {name}" for key, name in found.damaged.items()]
    lines += [f"missing: the answer {key.hex()}{f' to {origin}' if origin else ''}" for key, origin in found.missing.items()]
    lines += [f"not committed: {name}" for name in found.unfinished]
    if found.exit_code == 0:
        lines.append("nothing is damaged or missing")
    else:
        damaged = f"{counted(len(found.damage), 'file')} and {counted(len(found.damaged), 'answer')} damaged"
        lines.append(f"{damaged}, {counted(len(found.missing), 'answer')} missing")
        of_index = [damage for damage in found.damage if damage.name.endswith(INDEX)]
        if found.written_anew and not found.missing and not found.damaged and len(of_index) == len(found.damage):
            lines.append("what was damaged is written anew; nothing is lost")
        elif found.written_anew or not (found.damaged or of_index):
            lines.append("capture again: only what is not here is asked for")
        else:
            lines.append("`potstill cache verify --drop` leaves the damaged answers out; then capture again, and only these are asked for")
    return "\n".join(lines) + "\n"

"""Caches that several machines captured become one: every answer once, in shards of a bounded size, nothing asked again.

At every instant what was copied is a cache of its own; the same command goes on after a break. It decodes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from potstill.cache.description import differences
from potstill.cache.store import CacheReader, CacheWriter
from potstill.cache.verify import counted, parts_of
from potstill.errors import CacheError

_WRITER = "merged"


@dataclass(frozen=True)
class Merged:
    """`damaged` holds the answers that could not be copied, with the cache in which they lie."""

    name: str
    answers: int
    added: int
    damaged: tuple[tuple[bytes, str], ...]

    @property
    def exit_code(self) -> int:
        return 1 if self.damaged else 0


def merge(
    out: str, paths: Sequence[str], *, shard_bytes: int = 64 * 2**20, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Merged:
    """Copies the answers of `paths` to `out`, which may hold some already.

    Raises CacheError, naming caches and field, where two were made from different things. `on_progress` gets answers done and in all.
    """
    readers = [CacheReader(path) for path in paths]
    if not readers:
        raise CacheError("nothing to merge: name at least one cache")
    first = readers[0]
    for reader in readers[1:]:
        found = differences(first.description, reader.description)
        if found:
            listed = "; ".join(f"{name}: {one} in the first, {two} in the second" for name, one, two in (d.shown() for d in found))
            raise CacheError(f"{first.name} and {reader.name} were made from different things: {listed}. Merge only what one teacher said")
    extra = {name: first.file(name) for name in first.description.files}
    total, done = sum(map(len, readers)), 0
    damaged: list[tuple[bytes, str]] = []
    with CacheWriter(out, first.provenance, first.format, writer=_WRITER, shard_bytes=shard_bytes, extra_files=extra) as writer:
        if writer.name in [reader.name for reader in readers]:
            raise CacheError(f"{writer.name}: a cache cannot be merged into itself; name another folder for the result")
        before = len(writer)
        for reader in readers:
            for keys, entries in reader.in_order():
                for part in parts_of(entries):
                    damaged += [(key, reader.name) for key in _copy(reader, writer, keys[part])]
                    done += len(keys[part])
                    on_progress(done, total)
            damaged += [(key, reader.name) for damage in reader.damage for key in damage.keys if key not in reader]
    lost = tuple((key, name) for key, name in damaged if not writer.has(key))
    return Merged(writer.name, len(writer), len(writer) - before, lost)


def _copy(reader: CacheReader, writer: CacheWriter, keys: Sequence[bytes]) -> list[bytes]:
    """Returns the answers that do not read back."""
    new = [key for key, held in zip(keys, writer.holds(keys), strict=True) if not held]
    payloads, entries = reader.whole_payloads(new)
    broken = []
    for key, payload, rows in zip(new, payloads, entries["rows"].tolist(), strict=True):
        if payload is None:
            broken.append(key)
        else:
            writer.add(key, rows, payload)
    return broken


def merged_text(merged: Merged) -> str:
    """What was done, and a line for each answer that could not be copied."""
    lines = [f"{merged.name}: {counted(merged.answers, 'answer')}, {merged.added:,} of them copied now"]
    lines += [f"damaged: the answer {key.hex()} in {name}" for key, name in merged.damaged]
    if merged.damaged:
        lost = counted(len(merged.damaged), "answer")
        lines.append(f"{lost} could not be copied; capture again into {merged.name}: only what is not there is asked for")
    return "\n".join(lines) + "\n"

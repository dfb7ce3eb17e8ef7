"""A cache of a teacher's answers: who writes commits segments that never change again, who reads finds each record by its sequence's key.

A commit is the data file, then its index; nothing is read that has no index. What a payload says only the codec knows.
"""

import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np

from potstill.cache.catalogue import Catalogue, Damage
from potstill.cache.codec import Codec, make_codec
from potstill.cache.compaction import compact, sweep
from potstill.cache.description import Description, agree_on, describe, read_description, read_file
from potstill.cache.exchange import commit, fetch
from potstill.cache.provenance import Provenance
from potstill.cache.records import Record, RecordFormat
from potstill.cache.segments import DATA, KEY_BYTES, WRITER, SegmentName, key_array, key_list, segment_of
from potstill.errors import CacheError, RunFolderError, StorageError
from potstill.place import Place, place_at

_CREATION_SECONDS = 60.0  # the ranks of one capture start together, and each waits for those before it
_LOOKS = 3


class CacheReader:
    """The committed answers under a folder or a URL; `refresh` sees what was committed since.

    Raises CacheError where there is no cache, StorageError where its description is damaged. Damaged segments do not stop it: what is
    whole can be read, and `damage` says the rest.
    """

    def __init__(self, path: str):
        self._place = place_at(path)
        description = read_description(self._place)
        if description is None:
            raise CacheError(f"{self._place.name}: no cache of answers lies here (no cache.json); was it captured under another path?")
        self._description: Description = description
        self._catalogue = Catalogue(self._place, description.digest)
        self._unseen = set(self._catalogue.facts)
        self._codec: Codec | None = None

    @property
    def name(self) -> str:
        """Where it lies, for messages."""
        return self._place.name

    @property
    def provenance(self) -> Provenance:
        return self._description.provenance

    @property
    def format(self) -> RecordFormat:
        return self._description.format

    @property
    def identity(self) -> str:
        return self._description.provenance.digest

    @property
    def damage(self) -> list[Damage]:
        """What was found damaged so far: at opening, and in the segments that were read."""
        return list(self._catalogue.damage.values())

    @property
    def segments(self) -> dict[str, int]:
        """The committed data files and their bytes."""
        return {f"{name}{DATA}": facts.size for name, facts in self._catalogue.facts.items()}

    def __len__(self) -> int:
        return len(self._catalogue)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.holds([key])[0])

    def holds(self, keys: Sequence[bytes]) -> np.ndarray:
        """For each key whether its answer is committed."""
        return self._catalogue.find(keys)[1]

    def keys(self) -> Iterator[bytes]:
        return iter(key_list(self._catalogue.keys()))

    def in_order(self) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """All keys and their entries, segment by segment, as they lie: the cheapest order to read them in."""
        keys, entries = self._catalogue.keys(), self._catalogue.entries()
        order = np.lexsort((entries["offset"], entries["segment"]))
        for part in np.split(order, np.flatnonzero(np.diff(entries["segment"][order])) + 1):
            if len(part):
                yield key_list(keys[part]), entries[part]

    def rows(self, key: bytes) -> int:
        """Rows of one answer. Raises CacheError where it is not committed."""
        return int(self._find([key])["rows"][0])

    def refresh(self) -> int:
        """Sees what was committed since; returns how many answers there are."""
        known = set(self._catalogue.facts)
        count = self._catalogue.refresh()
        self._unseen |= self._catalogue.facts.keys() - known
        return count

    def read(self, keys: Sequence[bytes]) -> Record:
        """The answers one after another, in the order of `keys`, each compared with its checksum before it is decoded.

        Raises CacheError for a key that is not committed, StorageError that names segment and key for an answer that is damaged.
        """
        payloads, entries = self.payloads(keys)
        rows = entries["rows"].tolist()
        self._codec = codec = self._codec or make_codec(self.format)
        try:
            return codec.decode(payloads, rows)
        except StorageError as error:
            for key, payload, count in zip(keys, payloads, rows, strict=True):
                try:
                    codec.decode([payload], [count])
                except StorageError as of_this:
                    raise StorageError(f"{self._where(key)}: does not decode: {of_this}") from of_this
            raise StorageError(f"{self.name}: {error}") from error

    def payloads(self, keys: Sequence[bytes]) -> tuple[list[bytes], np.ndarray]:
        """The coded answers and their entries, in the order of `keys`; as `read`, but not decoded."""
        wanted = key_array(keys)
        for looks in range(1, _LOOKS + 1):
            entries = self._find(keys)
            try:
                found = fetch(self._catalogue, wanted, entries, self._unseen)
                break
            except StorageError as error:
                if error.errno != errno.ENOENT or looks == _LOOKS:
                    raise
                self.refresh()  # a writer put segments together meanwhile
        broken = [key for key, payload in zip(keys, found, strict=True) if payload is None]
        if broken:
            others = f" (and {len(broken) - 1} more that were asked for)" if len(broken) > 1 else ""
            remedy = f"`potstill cache verify {self.name}` lists all that is damaged"
            raise StorageError(f"{self._where(broken[0])}: does not read back as it was written{others}; {remedy}")
        return [payload for payload in found if payload is not None], entries

    def checked(self, keys: Sequence[bytes]) -> np.ndarray:
        """For each key whether its answer reads back as it was written."""
        return np.array([payload is not None for payload in fetch(self._catalogue, key_array(keys), self._find(keys), self._unseen)], bool)

    def file(self, name: str) -> bytes:
        """An extra file of the cache, compared with its checksum."""
        return read_file(self._place, self._description, name)

    def _find(self, keys: Sequence[bytes]) -> np.ndarray:
        entries, found = self._catalogue.find(keys)
        if not found.all():
            missing = [key for key, here in zip(keys, found, strict=True) if not here]
            raise CacheError(
                f"{self.name}: {len(missing)} of {len(keys)} sequences have no answer here, such as {missing[0].hex()}; "
                "capture them, with the tokenizer, template and truncation of this run"
            )
        return entries

    def _where(self, key: bytes) -> str:
        entry = self._catalogue.find([key])[0][0]
        return f"{self.name}/{self._catalogue.segments[entry['segment']]}{DATA}: the answer {key.hex()}"


class CacheWriter:
    """Adds answers under one writer's name; writers of other names may add to the same cache at the same time.

    `commit` is durable on return. As a context it commits at its end, or, after an exception, gives the cache back as it was committed.
    Raises CacheError where the cache was made from something else (naming the field) or a writer of this name is at work.
    """

    def __init__(
        self, path: str, provenance: Provenance, format: RecordFormat, *, writer: str = "0-of-1", shard_bytes: int = 64 * 2**20,
        extra_files: Mapping[str, bytes] | None = None,
    ):  # fmt: skip
        if not WRITER.match(writer):
            raise CacheError(f"writer {writer!r}: a name of letters, digits, '.', '_' and '-' that begins with a letter or a digit")
        self._place = place_at(path)
        self._writer, self._shard_bytes = writer, shard_bytes
        self._buffer: dict[bytes, tuple[int, bytes]] = {}
        self._buffered = 0
        self._place.prepare()
        with ExitStack() as stack:
            stack.enter_context(_writer_lock(self._place, writer))
            extra_files = extra_files or {}
            with _creation_lock(self._place):
                self._place.delete([name for name, final in self._place.unfinished().items() if segment_of(final) is None])
                found = agree_on(self._place, describe(provenance, format, extra_files), extra_files)
            self._catalogue = Catalogue(self._place, found.digest)
            self._number = self._last_number()
            self.swept = sweep(self._catalogue, writer)
            self._locks = stack.pop_all()

    def __len__(self) -> int:
        """Answers that are committed."""
        return len(self._catalogue)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        else:
            self._locks.close()

    @property
    def damage(self) -> list[Damage]:
        return list(self._catalogue.damage.values())

    def has(self, key: bytes) -> bool:
        """Whether an answer is committed: by anybody up to the start or the last `refresh`, by this writer up to now."""
        return bool(self.holds([key])[0])

    def holds(self, keys: Sequence[bytes]) -> np.ndarray:
        """`has` for many keys at once."""
        return self._catalogue.find(keys)[1]

    def refresh(self) -> int:
        """Sees what others committed; returns how many answers there are."""
        return self._catalogue.refresh()

    def add(self, key: bytes, rows: int, payload: bytes) -> None:
        """Keeps an answer for the next commit; one that is here already is passed over. A full shard is committed at once."""
        if len(key) != KEY_BYTES or rows < 0:
            raise ValueError(f"a key has {KEY_BYTES} bytes and rows count from 0; found {len(key)} bytes and {rows} rows")
        if key in self._buffer or self.has(key):
            return
        self._buffer[key] = (rows, payload)
        self._buffered += len(payload)
        if self._buffered >= self._shard_bytes:
            self.commit()

    def commit(self) -> None:
        """Durable on return: data first, then its index. After an error nothing of the failed segment counts, and what was added is kept
        for the next try."""
        while self._buffer:
            part = self._next_part()
            commit(self._catalogue, self._next_name(), part)
            for key, _, payload in part:
                del self._buffer[key]
                self._buffered -= len(payload)
        compact(self._catalogue, self._writer, self._shard_bytes, self._next_name, last=False)

    def close(self) -> None:
        """Commits, puts small segments together, and lets the next writer of this name in; a second call does nothing."""
        try:
            self.commit()
            compact(self._catalogue, self._writer, self._shard_bytes, self._next_name, last=True)
        finally:
            self._locks.close()

    def _next_part(self) -> list[tuple[bytes, int, bytes]]:
        part, size = [], 0
        for key, (rows, payload) in self._buffer.items():
            if part and size + len(payload) > self._shard_bytes:
                break
            part.append((key, rows, payload))
            size += len(payload)
        return part

    def _last_number(self) -> int:
        names = [*self._place.sizes(), *self._place.unfinished().values()]
        parts = [found[0] for name in names if (found := segment_of(name)) is not None]
        return max((part.number for part in parts if part.writer == self._writer), default=-1)

    def _next_name(self) -> SegmentName:
        # A number is never used again, not even after a failed put: on an object store that put may still come true.
        self._number += 1
        return SegmentName(self._writer, self._number)


@contextmanager
def _as_cache_error() -> Iterator[None]:
    try:
        yield
    except RunFolderError as error:
        raise CacheError(str(error)) from error


def _writer_lock(place: Place, writer: str) -> AbstractContextManager:
    with _as_cache_error():
        return _entered(place.lock(f".lock-{writer}", held=f"another writer {writer} is at work here", remedy="or stop it"))


@contextmanager
def _creation_lock(place: Place) -> Iterator[None]:
    deadline = time.monotonic() + _CREATION_SECONDS
    while True:
        try:
            held = place.lock(".lock-creation", held="another writer is making this cache", remedy="or stop it")
            entered = _entered(held)
            break
        except RunFolderError as error:
            if time.monotonic() > deadline:
                raise CacheError(str(error)) from error
            time.sleep(0.02)
    with entered:
        yield


def _entered(lock: AbstractContextManager) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(lock)
    return stack

"""A cache of a teacher's answers: who writes commits segments that never change again, who reads finds each record by its sequence's key.

A commit is the data file, then its index; nothing is read that has no index. What a payload says only the codec knows.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from potstill.cache.catalogue import Catalogue, Damage
from potstill.cache.codec import VERSION, Codec, make_codec
from potstill.cache.compaction import Numbers, compact, sweep
from potstill.cache.description import Description, agree_on, describe, read_description, read_file
from potstill.cache.exchange import commit, fetch
from potstill.cache.locks import creation_lock, writer_lock
from potstill.cache.provenance import CODEC_VERSION, Provenance
from potstill.cache.records import Record, RecordFormat
from potstill.cache.segments import DATA, KEY_BYTES, RECORD_OVERHEAD, SEGMENT_OVERHEAD, WRITER, key_array, key_list, segment_of
from potstill.errors import CacheError, StorageError
from potstill.place import place_at

_LOOKS = 3


class CacheReader:
    """The committed answers under a folder or a URL; `refresh` sees what was committed since.

    Raises CacheError where there is no cache or one of another codec, StorageError where its description is damaged. Damaged segments do
    not stop it: what is whole can be read, and `damage` says the rest.
    """

    def __init__(self, path: str):
        self.place = place_at(path)
        description = read_description(self.place)
        if description is None:
            raise CacheError(f"{self.place.name}: no cache of answers lies here (no cache.json); was it captured under another path?")
        coded = description.provenance.fields.get(CODEC_VERSION, VERSION)
        if coded != VERSION:  # a payload does not say how it is coded: what is misread would look like an answer
            raise CacheError(
                f"{self.place.name}: its answers are of {CODEC_VERSION} {coded}, and this Potstill reads {VERSION}; use the Potstill that "
                "made it, or capture into another path"
            )
        self.description: Description = description
        self.catalogue = Catalogue(self.place, description.digest)
        self.unseen = set(self.catalogue.facts)
        self._codec: Codec | None = None

    @property
    def name(self) -> str:
        """Where it lies, for messages."""
        return self.place.name

    @property
    def provenance(self) -> Provenance:
        return self.description.provenance

    @property
    def format(self) -> RecordFormat:
        return self.description.format

    @property
    def identity(self) -> str:
        return self.description.provenance.digest

    @property
    def damage(self) -> list[Damage]:
        """What was found damaged so far: at opening, and in the segments that were read."""
        return list(self.catalogue.damage.values())

    @property
    def segments(self) -> dict[str, int]:
        """The committed data files and their bytes."""
        return {f"{name}{DATA}": facts.size for name, facts in self.catalogue.facts.items()}

    def __len__(self) -> int:
        return len(self.catalogue)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.holds([key])[0])

    def holds(self, keys: Sequence[bytes]) -> np.ndarray:
        """For each key whether its answer is committed."""
        return self.catalogue.find(keys)[1]

    def keys(self) -> Iterator[bytes]:
        return iter(key_list(self.catalogue.keys()))

    def in_order(self) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """All keys and their entries, segment by segment, as they lie: the cheapest order to read them in."""
        for _, keys, entries in self.catalogue.by_segment():
            yield key_list(keys), entries

    def rows(self, key: bytes) -> int:
        """Rows of one answer. Raises CacheError where it is not committed."""
        return int(self._find([key])["rows"][0])

    def refresh(self) -> int:
        """Sees what was committed since; returns how many answers there are."""
        known = set(self.catalogue.facts)
        count = self.catalogue.refresh()
        self.unseen |= self.catalogue.facts.keys() - known
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
        found, entries = self.whole_payloads(keys)
        broken = [key for key, payload in zip(keys, found, strict=True) if payload is None]
        if broken:
            others = f" (and {len(broken) - 1} more that were asked for)" if len(broken) > 1 else ""
            remedy = f"`potstill cache verify {self.name}` lists all that is damaged"
            raise StorageError(f"{self._where(broken[0])}: does not read back as it was written{others}; {remedy}")
        return [payload for payload in found if payload is not None], entries

    def whole_payloads(self, keys: Sequence[bytes]) -> tuple[list[bytes | None], np.ndarray]:
        """As `payloads`, with None for an answer that does not read back as it was written."""
        wanted = key_array(keys)
        for looks in range(1, _LOOKS + 1):
            entries = self._find(keys)
            try:
                return fetch(self.catalogue, wanted, entries, self.unseen), entries
            except StorageError as error:
                if error.errno != errno.ENOENT or looks == _LOOKS:
                    raise
                self.refresh()  # a writer put segments together meanwhile
        raise AssertionError("the last look returns or raises")

    def file(self, name: str) -> bytes:
        """An extra file of the cache, compared with its checksum."""
        return read_file(self.place, self.description, name)

    def _find(self, keys: Sequence[bytes]) -> np.ndarray:
        entries, found = self.catalogue.find(keys)
        if not found.all():
            missing = [key for key, here in zip(keys, found, strict=True) if not here]
            raise CacheError(
                f"{self.name}: {len(missing)} of {len(keys)} sequences have no answer here, such as {missing[0].hex()}; "
                "capture them, with the tokenizer, template and truncation of this run"
            )
        return entries

    def _where(self, key: bytes) -> str:
        entry = self.catalogue.find([key])[0][0]
        return f"{self.name}/{self.catalogue.segments[entry['segment']]}{DATA}: the answer {key.hex()}"


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
            stack.enter_context(writer_lock(self._place, writer))
            extra_files = extra_files or {}
            with creation_lock(self._place):
                self._place.delete([name for name, final in self._place.unfinished().items() if segment_of(final) is None])
                found = agree_on(self._place, describe(provenance, format, extra_files), extra_files)
            self._catalogue = Catalogue(self._place, found.digest)
            self._next_name = Numbers(self._place, writer)
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
    def name(self) -> str:
        """Where it lies, for messages."""
        return self._place.name

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
        if key in self._buffer:
            return
        self._buffer[key] = (rows, payload)
        self._buffered += len(payload)
        if self._buffered >= self._shard_bytes:
            self.commit()

    def commit(self) -> None:
        """Durable on return: data first, then its index. After an error nothing of the failed segment counts, and what was added is kept
        for the next try."""
        keys = list(self._buffer)
        for number in np.flatnonzero(self.holds(keys)).tolist():
            self._buffered -= len(self._buffer.pop(keys[number])[1])
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
        part, size = [], SEGMENT_OVERHEAD
        for key, (rows, payload) in self._buffer.items():
            size += len(payload) + RECORD_OVERHEAD
            if part and size > self._shard_bytes:
                break
            part.append((key, rows, payload))
        return part

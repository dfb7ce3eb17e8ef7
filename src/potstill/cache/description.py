"""cache.json, the first object of a cache: what the answers were made from, how they are recorded, and the checksums of extra files.

Whoever writes compares with it; whoever reads believes it only if its own checksum holds. It knows nothing of segments.
"""

import errno
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from potstill.cache.provenance import NOTES, Difference, Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.segments import segment_of
from potstill.environment import redact
from potstill.errors import CacheError, StorageError
from potstill.manifest import FileRecord, check_name
from potstill.place import Place
from potstill.storage import to_json

DESCRIPTION = "cache.json"
VERSION = 1


@dataclass(frozen=True)
class Description:
    """What a cache says about itself."""

    provenance: Provenance
    format: RecordFormat
    files: Mapping[str, FileRecord]

    def text(self) -> str:
        body = {
            "potstill cache": VERSION, "provenance": self.provenance.fields, "format": asdict(self.format),
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }  # fmt: skip
        return to_json({**body, "xxh3": xxhash.xxh3_64_hexdigest(to_json(body).encode())}, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that each segment repeats, so that a segment of another cache is never taken for one of this."""
        body = {"provenance": self.provenance.digest, "format": asdict(self.format), "files": {n: r.xxh3 for n, r in self.files.items()}}
        return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())


def describe(provenance: Provenance, format: RecordFormat, extra_files: Mapping[str, bytes]) -> Description:
    for name in extra_files:
        check_name(name)
        if "/" in name or name.startswith(".") or name == DESCRIPTION or name.endswith((".arrow", ".index")):
            raise CacheError(f"{name!r}: not a name for an extra file of a cache")
    files = {name: FileRecord(len(data), xxhash.xxh3_64_hexdigest(data)) for name, data in extra_files.items()}
    fields = {**provenance.fields, "record": asdict(format)}
    if NOTES in fields:
        fields[NOTES] = redact(fields[NOTES])
    return Description(Provenance(fields), format, files)


def read_description(place: Place) -> Description | None:
    """None where the place holds no cache. Raises StorageError where cache.json is damaged."""
    try:
        text = place.read(DESCRIPTION)
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    where = f"{place.name}/{DESCRIPTION}"
    try:
        content = json.loads(text)
        version = content["potstill cache"]
        if version != VERSION:
            raise CacheError(f"{where}: a cache of version {version!r}; this Potstill reads version {VERSION}: use the one that made it")
        files = {name: FileRecord(int(record["size"]), str(record["xxh3"])) for name, record in content["files"].items()}
        description = Description(Provenance(content["provenance"]), RecordFormat(**content["format"]), files)
        whole = description.text().encode() == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CacheError):
            raise
        raise StorageError(f"{where}: does not describe a cache ({type(error).__name__}); copy the cache again") from error
    if not whole:
        raise StorageError(f"{where}: its checksum does not match its content; copy the cache again")
    for name in files:
        check_name(name)
    return description


def agree_on(place: Place, wanted: Description, extra_files: Mapping[str, bytes]) -> Description:
    """Writes the description where there is none, the files before it; else compares, and puts back a file that was damaged or lost.

    Raises CacheError that names what differs.
    """
    found = _read_or_unfinished(place)
    if found is None:
        for name, data in extra_files.items():
            place.put(name, data)
        place.put(DESCRIPTION, wanted.text().encode())
        found = read_description(place) or wanted  # on an object store another writer may have been quicker
    _refuse(place.name, wanted, found)
    for name, data in extra_files.items():
        if not _is_whole(place, found, name):
            place.put(name, data)
    return found


def _is_whole(place: Place, description: Description, name: str) -> bool:
    try:
        read_file(place, description, name)
    except StorageError:
        return False
    return True


def _read_or_unfinished(place: Place) -> Description | None:
    try:
        return read_description(place)
    except StorageError:
        if any(segment_of(name) for name in place.sizes()):
            raise
        return None  # nothing is committed yet: a store that does not put whole objects, and a writer that died in its first


def differences(here: Description, there: Description) -> list[Difference]:
    """Where two caches were made from different things, extra files among them."""
    found = here.provenance.differences(there.provenance)
    names = [name for name in {**here.files, **there.files} if here.files.get(name) != there.files.get(name)]
    return found + [Difference(name, _stated(here.files.get(name)), _stated(there.files.get(name))) for name in names]


def _refuse(where: str, wanted: Description, found: Description) -> None:
    differing = differences(wanted, found)
    if differing:
        listed = "; ".join(str(difference) for difference in differing)
        raise CacheError(
            f"{where}: its answers were made from something else: {listed}. Choose another path for these answers, or delete this cache"
        )


def _stated(record: FileRecord | None) -> Any:
    return None if record is None else f"{record.size:,} bytes, xxh3 {record.xxh3}"


def read_file(place: Place, description: Description, name: str) -> bytes:
    """An extra file of a cache, compared with cache.json before it is returned."""
    record = description.files.get(name)
    if record is None:
        raise StorageError(f"{place.name}: {name!r} is not among the files of this cache ({', '.join(description.files) or 'it has none'})")
    data = place.read(name)
    if FileRecord(len(data), xxhash.xxh3_64_hexdigest(data)) != record:
        raise StorageError(f"{place.name}/{name}: does not read back as it was written; copy the file again, or capture anew")
    return data

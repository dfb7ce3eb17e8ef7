"""The bytes of a segment: a data file (Arrow IPC: key, rows, xxh3, payload) and its index, which says where each payload lies in it.

The data file is complete before its index exists, so an index is the commit. Each record has a checksum over key, rows and payload,
each index one over itself, and an index holds one over all of its data file that is no payload. Nothing here reads or writes a place.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from potstill.errors import StorageError
from potstill.storage import to_json

DATA, INDEX = ".arrow", ".index"
KEY_BYTES = 16
WRITER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_NAME = re.compile(r"(?P<writer>[A-Za-z0-9][A-Za-z0-9._-]{0,99})-(?P<number>[0-9]{8})(?P<kind>\.arrow|\.index)\Z")
_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("rows", pa.int32()), ("xxh3", pa.uint64()), ("payload", pa.large_binary())])
_INDEX_SCHEMA = pa.schema(
    [("key", pa.binary(KEY_BYTES)), ("rows", pa.int32()), ("offset", pa.int64()), ("length", pa.int64()), ("xxh3", pa.uint64())]
)
_METADATA = b"potstill"
_CHECKSUM_BYTES = 8
RECORD_OVERHEAD, SEGMENT_OVERHEAD = 36, 4096   # at most, beside the payloads
_LARGEST = 2**62
# What pyarrow, json and numpy raise for bytes that are not what they should be; pyarrow's are OSErrors too.
_UNREADABLE = (pa.ArrowException, OSError, StopIteration, ValueError, KeyError, TypeError, OverflowError, RecursionError)

# Where one record lies; `segment` is a number that the catalogue gives, 0 within one index.
ENTRY = np.dtype([("segment", "<i4"), ("rows", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("xxh3", "<u8")])
KEY = np.dtype(f"S{KEY_BYTES}")  # compares and sorts as its bytes do: all are equally long, so its blindness to trailing zeros is harmless


class SegmentName(NamedTuple):
    """`0-of-8-00000003.index` in its parts; a segment is named without the ending."""

    writer: str
    number: int

    def __str__(self) -> str:
        return f"{self.writer}-{self.number:08d}"


def segment_of(name: str) -> tuple[SegmentName, str] | None:
    """The segment and the ending that an object's name says; None where it is no name of a segment's file."""
    found = _NAME.match(name)
    return None if found is None else (SegmentName(found["writer"], int(found["number"])), found["kind"])


@dataclass(frozen=True)
class Index:
    """What an index says. `frame` is the checksum of the data file without its payloads, `cache` the digest of its cache."""

    keys: np.ndarray
    entries: np.ndarray
    size: int
    frame: int
    cache: str


def checksum(key: bytes, rows: int, payload: bytes | memoryview) -> int:
    digest = xxhash.xxh3_64(key + rows.to_bytes(4, "little"))
    digest.update(payload)
    return digest.intdigest()


def encode_data(records: Sequence[tuple[bytes, int, bytes]], cache: str) -> tuple[memoryview, Index]:
    """The data file of these records, and what its index has to say."""
    payloads = [payload for _, _, payload in records]
    sums = np.array([checksum(key, rows, payload) for key, rows, payload in records], np.uint64)
    rows = np.array([rows for _, rows, _ in records], np.int32)
    starts = np.zeros(len(records) + 1, np.int64)
    np.cumsum([len(payload) for payload in payloads], out=starts[1:])
    payload = pa.Array.from_buffers(pa.large_binary(), len(records), [None, pa.py_buffer(starts), pa.py_buffer(b"".join(payloads))])
    columns = [*_columns(len(records), b"".join(key for key, _, _ in records), rows, sums), payload]
    sink = pa.BufferOutputStream()
    schema = _SCHEMA.with_metadata({_METADATA: to_json({"cache": cache}).encode()})
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    data = sink.getvalue()
    return memoryview(data).cast("B"), _locate(data)


def _columns(count: int, keys: bytes, *numbers: np.ndarray) -> list[pa.Array]:
    # From buffers: pa.array() would import pandas, and takes longer than all the rest.
    types = {np.dtype(np.int32): pa.int32(), np.dtype(np.int64): pa.int64(), np.dtype(np.uint64): pa.uint64()}
    made = [pa.Array.from_buffers(types[values.dtype], count, [None, pa.py_buffer(np.ascontiguousarray(values))]) for values in numbers]
    return [pa.Array.from_buffers(_SCHEMA.types[0], count, [None, pa.py_buffer(keys)]), *made]


def _values(batch: pa.RecordBatch, name: str, dtype) -> np.ndarray:
    """A column of fixed width as numpy sees it, without a copy."""
    buffer = batch.column(name).buffers()[1]
    return np.frombuffer(buffer, dtype, batch.num_rows) if batch.num_rows else np.empty(0, dtype)


def _locate(data: pa.Buffer) -> Index:
    """Reads a data file for where its payloads lie. Raises StorageError where it is no such file."""
    try:
        reader = pa.ipc.open_file(pa.BufferReader(data))
        if not reader.schema.equals(_SCHEMA) or reader.num_record_batches != 1:
            raise StorageError("not a data file of a cache")
        batch = reader.get_batch(0)
        batch.validate(full=True)
        cache = json.loads((reader.schema.metadata or {})[_METADATA])["cache"]
        _, starts, payloads = batch.column("payload").buffers()
        first = 0 if payloads is None or not payloads.size else payloads.address - data.address
        offsets = np.frombuffer(starts, np.int64, batch.num_rows + 1) if batch.num_rows else np.zeros(1, np.int64)
        entries = np.zeros(batch.num_rows, ENTRY)
        entries["rows"], entries["xxh3"] = _values(batch, "rows", np.int32), _values(batch, "xxh3", np.uint64)
        entries["offset"], entries["length"] = first + offsets[:-1], np.diff(offsets)
        keys = _values(batch, "key", KEY)
    except StorageError:
        raise
    except _UNREADABLE as error:
        raise StorageError(f"not a data file of a cache ({type(error).__name__})") from error
    index = Index(keys, entries, data.size, frame_checksum(memoryview(data).cast("B"), entries), str(cache))
    _check_bounds(index)
    return index


def payload_span(entries: np.ndarray) -> tuple[int, int]:
    """The first byte of the payloads of a data file and the byte after the last; they lie together."""
    if not len(entries):
        return 0, 0
    return int(entries["offset"].min()), int((entries["offset"] + entries["length"]).max())


def frame_checksum(data: memoryview | bytes, entries: np.ndarray) -> int:
    """Of all bytes of a data file that are no payload."""
    start, stop = payload_span(entries)
    digest = xxhash.xxh3_64(data[:start])
    digest.update(data[stop:])
    return digest.intdigest()


def encode_index(index: Index) -> bytes:
    """An Arrow IPC stream, which other readers take as it is, with its xxh3 behind it."""
    schema = _INDEX_SCHEMA.with_metadata({_METADATA: to_json({"size": index.size, "frame": index.frame, "cache": index.cache}).encode()})
    names = ("rows", "offset", "length", "xxh3")
    columns = _columns(len(index.keys), index.keys.tobytes(), *(index.entries[name] for name in names))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    body = sink.getvalue().to_pybytes()
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(_CHECKSUM_BYTES, "little")


def decode_index(data: bytes) -> Index:
    """Raises StorageError where it is damaged, cut, or places a record outside its data file."""
    body, stated = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if len(data) <= _CHECKSUM_BYTES or xxhash.xxh3_64_intdigest(body).to_bytes(_CHECKSUM_BYTES, "little") != stated:
        raise StorageError("its checksum does not match its content")
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(body))
        if not reader.schema.equals(_INDEX_SCHEMA):
            raise StorageError("not an index of a cache")
        batch = reader.read_next_batch()
        batch.validate(full=True)
        facts: dict[str, Any] = json.loads((reader.schema.metadata or {})[_METADATA])
        entries = np.zeros(batch.num_rows, ENTRY)
        for name in ("rows", "offset", "length", "xxh3"):
            entries[name] = _values(batch, name, ENTRY[name])
        keys = _values(batch, "key", KEY)
        size = min(int(facts["size"]), _LARGEST)
        index = Index(keys, entries, size, int(facts["frame"]), str(facts["cache"]))
    except StorageError:
        raise
    except _UNREADABLE as error:
        raise StorageError(f"not an index of a cache ({type(error).__name__})") from error
    _check_bounds(index)
    return index


def _check_bounds(index: Index) -> None:
    entries = index.entries
    counts = (entries["offset"] >= 0) & (entries["length"] >= 0) & (entries["rows"] >= 0)
    if not (counts & (entries["length"] <= index.size - entries["offset"])).all():
        raise StorageError("it places a record outside its data file")


def rebuild_index(data: bytes) -> tuple[Index, list[bytes]]:
    """The index of a data file whose own is damaged, with the records whose checksums hold; and the keys of the others."""
    index = _locate(pa.py_buffer(data))
    view = memoryview(data)
    keys = key_list(index.keys)
    whole = [
        checksum(key, int(entry["rows"]), view[entry["offset"] : entry["offset"] + entry["length"]]) == entry["xxh3"]
        for key, entry in zip(keys, index.entries, strict=True)
    ]
    kept = np.array(whole, bool)
    lost = [key for key, holds in zip(keys, whole, strict=True) if not holds]
    return Index(index.keys[kept], index.entries[kept], index.size, index.frame, index.cache), lost


def key_list(keys: np.ndarray) -> list[bytes]:
    """As bytes of full length; numpy cuts zeros at the end of what it takes for text."""
    return keys.view(f"V{KEY_BYTES}").tolist() if keys.flags.c_contiguous else np.ascontiguousarray(keys).view(f"V{KEY_BYTES}").tolist()


def key_array(keys: Sequence[bytes]) -> np.ndarray:
    """Raises ValueError for a key that is not 16 bytes long."""
    joined = b"".join(keys)
    if len(joined) != KEY_BYTES * len(keys) or any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"a key has {KEY_BYTES} bytes")
    return np.frombuffer(joined, KEY)

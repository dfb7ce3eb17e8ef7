"""A payload as a row of byte streams: each under zstd where that is shorter, with a header of a few bytes, read back with bounds.

It knows nothing of what the bytes mean. What does not parse raises StorageError, and nothing is allocated beyond what the reader allows.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from potstill.errors import StorageError

_SHORTEST = 192  # a call of zstd takes as long as some hundred values of a record take in all; below this it saves a few bytes at most
_ZSTD = pa.Codec("zstd", compression_level=1)  # one Huffman table a stream; a higher level finds next to nothing more


def damaged(what: str) -> StorageError:
    return StorageError(f"the record does not decode ({what}): it is damaged or was written under another format; capture it again")


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def join(first: int, streams: Sequence[np.ndarray], as_they_are: Sequence[int] = ()) -> bytes:
    """A payload: its first byte, which is the caller's; a bit for each of at most 16 streams that is not empty; and these.

    `as_they_are`: the places of streams that zstd could not make shorter.
    """
    parts, present = [b""], 0
    for place, data in enumerate(streams):
        if data.size == 0:
            continue
        present |= 1 << place
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        if raw.size >= _SHORTEST and place not in as_they_are:
            packed = _ZSTD.compress(raw, asbytes=True)
            header = _varint(len(packed) * 2 + 1) + _varint(raw.size)
            if len(packed) + len(header) < raw.size:
                parts += [header, packed]
                continue
        parts += [_varint(raw.size * 2), raw.tobytes()]
    parts[0] = bytes([first, present & 0xFF, present >> 8])
    return b"".join(parts)


class _Cursor:
    def __init__(self, payload: bytes):
        self.payload, self.at = payload, 0

    def byte(self) -> int:
        self.at += 1
        if self.at > len(self.payload):
            raise damaged("it ends too early")
        return self.payload[self.at - 1]

    def number(self) -> int:
        number = shift = 0
        while True:
            byte = self.byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7
            if shift > 56:
                raise damaged("a length has no end")

    def stream(self, at_most: int) -> np.ndarray:
        head = self.number()
        stored = size = head >> 1
        if head & 1:
            size = self.number()
        start, self.at = self.at, self.at + stored
        if self.at > len(self.payload):
            raise damaged("it ends too early")
        if size > at_most:
            raise damaged(f"a stream has {size} bytes where {at_most} are the most")
        part = memoryview(self.payload)[start : self.at]
        if head & 1:
            try:
                part = _ZSTD.decompress(part, decompressed_size=size)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise damaged("zstd refuses it") from error
        raw = np.frombuffer(part, np.uint8)
        if raw.size != size:
            raise damaged("a stream has another length than it says")
        return raw


def split(payload: bytes, at_most: Sequence[int]) -> tuple[int, list[np.ndarray]]:
    """The first byte and the streams, as bytes; `at_most` says how many bytes each may have and so bounds what is allocated."""
    cursor = _Cursor(payload)
    first, present = cursor.byte(), cursor.byte() | cursor.byte() << 8
    if present >> len(at_most):
        raise damaged("it has unknown streams")
    streams = [cursor.stream(most) if present >> place & 1 else np.zeros(0, np.uint8) for place, most in enumerate(at_most)]
    if cursor.at != len(payload):
        raise damaged("bytes are left over")
    return first, streams


def numbers(stream: np.ndarray, dtype: str, count: int | None = None) -> np.ndarray:
    """A stream's bytes as little-endian numbers; `count` is how many there must be."""
    size = np.dtype(dtype).itemsize
    if stream.size % size or count not in (None, stream.size // size):
        raise damaged(f"a stream has {stream.size} bytes, which is not {count if count is not None else 'a number of'} times {size}")
    return stream.view(dtype)


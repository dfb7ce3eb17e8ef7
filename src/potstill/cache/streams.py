"""A payload as a row of byte streams: each under zstd where that is shorter, with a header of a few bytes, read back with bounds.

It knows nothing of what the bytes mean. What does not parse raises StorageError, and nothing is allocated beyond what the reader allows.
"""

import numpy as np
import pyarrow as pa

from potstill.errors import StorageError

DAMAGED = "the record does not decode ({}): it is damaged or was written under another format; capture it again"
_SHORTEST = 32  # below this a frame's own 10 bytes never pay
_ZSTD = pa.Codec("zstd", compression_level=1)


def damaged(what: str) -> StorageError:
    return StorageError(DAMAGED.format(what))


def varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


class Writer:
    """Collects the streams of one payload."""

    def __init__(self, first: int):
        """`first` is the payload's first byte: which of a coder's layouts follows."""
        self._parts = [bytes([first])]

    def number(self, number: int) -> None:
        self._parts.append(varint(number))

    def stream(self, data: np.ndarray) -> None:
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        if raw.size >= _SHORTEST:
            packed = _ZSTD.compress(raw, asbytes=True)
            header = varint(len(packed) * 2 + 1) + varint(raw.size)
            if len(packed) + len(header) < raw.size:
                self._parts += [header, packed]
                return
        self._parts += [varint(raw.size * 2), raw.tobytes()]

    def payload(self) -> bytes:
        return b"".join(self._parts)


class Reader:
    """Gives the streams of one payload back, in the order in which they were written."""

    def __init__(self, payload: bytes):
        self._payload, self._at = payload, 0

    def byte(self) -> int:
        self._at += 1
        if self._at > len(self._payload):
            raise damaged("it ends too early")
        return self._payload[self._at - 1]

    def number(self, at_most: int) -> int:
        number = shift = 0
        while True:
            byte = self.byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 56:
                raise damaged("a length has no end")
        if number > at_most:
            raise damaged(f"{number} stands where {at_most} is the most")
        return number

    def stream(self, at_most: int) -> np.ndarray:
        """The next stream as bytes; `at_most` bounds what is allocated."""
        head = self.number(2 * (len(self._payload) - self._at) + 1)
        stored, size = head >> 1, head >> 1
        if head & 1:
            size = self.number(at_most)
        start, self._at = self._at, self._at + stored
        if self._at > len(self._payload) or size > at_most:
            raise damaged("a stream is longer than it can be")
        part = memoryview(self._payload)[start : self._at]
        if head & 1:
            try:
                part = _ZSTD.decompress(part, decompressed_size=size)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise damaged("zstd refuses it") from error
        raw = np.frombuffer(part, np.uint8)
        if raw.size != size:
            raise damaged("a stream has another length than it says")
        return raw

    def exactly(self, size: int) -> np.ndarray:
        raw = self.stream(size)
        if raw.size != size:
            raise damaged(f"a stream has {raw.size} bytes and not {size}")
        return raw

    def end(self) -> None:
        if self._at != len(self._payload):
            raise damaged("bytes are left over")

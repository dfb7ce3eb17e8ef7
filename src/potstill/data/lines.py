"""One line of a file becomes one row, or a reason why it cannot. Knows bytes, UTF-8 and JSON; knows no format.

A reason is a fragment that follows "file.jsonl:17: ": what is wrong there, for a person who can open the file.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.errors import DataError

MAX_LINE_BYTES = 64 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_SHOWN = 200


def printable(text: str) -> str:
    """The text with every character that could command a terminal escaped; line ends and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text)


class RowFault(ValueError):
    """A row cannot be used; the message is the reason, without the place."""


@dataclass(frozen=True)
class Reject:
    """A row that was left out: where it stood, why, and the beginning of its text."""

    origin: str
    reason: str
    beginning: str

    def as_json(self) -> str:
        return json.dumps({"origin": self.origin, "reason": self.reason, "beginning": self.beginning})


@dataclass
class Rejects:
    """Bad rows so far. The first beyond `allowed` stops the reading with one clear line."""

    allowed: int = 0
    items: list[Reject] = field(default_factory=list)

    def refuse(self, origin: str, reason: str, text: str = "") -> None:
        reason = printable(reason)  # it may quote the row
        self.items.append(Reject(origin, reason, text[:_SHOWN].encode("utf-8", "backslashreplace").decode()))
        if len(self.items) <= self.allowed:
            return
        if self.allowed:
            raise DataError(f"{origin}: {reason}. This is bad line {len(self.items)}; data.on_bad_line allows {self.allowed}. "
                            "Mend the lines, or raise data.on_bad_line.skip")
        raise DataError(f"{origin}: {reason}. Mend it, or set data.on_bad_line: {{skip: N}} to leave out up to N such rows")


@dataclass(frozen=True, slots=True)
class Row:
    """The values of one row and its place: `number` is the line, or the row's number from 1 where a file has no lines."""

    values: dict[str, Any]
    source: str
    number: int

    @property
    def origin(self) -> str:
        return f"{self.source}:{self.number}"


def open_bytes(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def numbered_lines(path: Path, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes without the line end) of every line that is not blank; a longer line than allowed is refused.

    A UTF-8 byte-order mark at the very beginning of the file is dropped; CRLF counts as a line end.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    beginning = line[:_SHOWN].decode(errors="replace")
                    rejects.refuse(f"{path}:{number}", f"the line is longer than {MAX_LINE_BYTES} bytes", beginning)
                    continue
                if number == 1:
                    line = line.removeprefix(_BOM)
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise DataError(f"{path}: the file is UTF-16; convert it to UTF-8")
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip stream is damaged or cut short after line {number} ({error}); "
                        "fetch or write the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def decode_line(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault(f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RowFault(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise RowFault(f"{name} is not JSON and no number to train on")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN, no Infinity, no key twice, nothing after the value."""
    if text.startswith("\ufeff"):
        raise RowFault("a byte-order mark stands before the object (files were joined?)")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowFault(f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}" if "\n" in text
                       else f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowFault("nested too deeply") from None
    except RowFault:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise RowFault(f"not usable JSON: {error}") from None


def parse_json_line(line: bytes) -> dict[str, Any]:
    return check_row(parse_json(decode_line(line)))


def check_row(value: Any) -> dict[str, Any]:
    """The row itself, if it is an object whose strings are text and whose numbers are finite."""
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
        raise RowFault(f"the row is {kind}, not an object of columns")
    for column, item in value.items():
        if reason := _fault(item) or _fault(column):
            raise RowFault(f"column {column!r} {reason}".encode("utf-8", "backslashreplace").decode())
    return value


def _fault(value: Any) -> str | None:
    if isinstance(value, str):
        if "\x00" in value:
            return "holds a NUL character"
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                return f"holds a lone surrogate (U+{ord(value[error.start]):04X}), which is no text"
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"holds {value}, which is not finite"
    if isinstance(value, dict):
        return next((reason for pair in value.items() for item in pair if (reason := _fault(item))), None)
    if isinstance(value, (list, tuple)):
        return next((reason for item in value if (reason := _fault(item))), None)
    return None

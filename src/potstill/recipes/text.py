"""The YAML of recipes as plain values, each with the line that it came from.

A small, strict part of YAML 1.2: mappings, lists and scalars; no tags, anchors, aliases, merges, documents or interpolation, so a
recipe can neither run anything nor grow while it is read. It knows nothing of what a recipe may say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from potstill.errors import ConfigError

MAX_BYTES = 2**20
_MAX_DEPTH = 16
_MAX_NODES = 5_000
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NAMED: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_NAMED |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}

Path = tuple[str | int, ...]


@dataclass
class Document:
    """What a YAML text holds. `places` says where a key stands; `plain` keeps the words that were read as numbers."""

    values: Any
    places: dict[Path, str] = field(default_factory=dict)   # path -> "recipe.yaml:12"
    plain: dict[Path, str] = field(default_factory=dict)    # path -> the unquoted text of a number

    def place(self, path: Path) -> str:
        """Where `path` stands, or the nearest thing around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")


def read_scalar(text: str) -> Any:
    """An unquoted YAML 1.2 scalar: null, true, false, a number, else the text itself.

    `1e-4` is a number; `no`, `010`, `1_000`, `1:30`, `.nan` and dates are text, so that none of them silently becomes another value.
    """
    if text in _NAMED:
        return _NAMED[text]
    if _INTEGER.fullmatch(text) and len(text) <= 20:
        return int(text)
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
        number = float(text)
        return number if abs(number) < float("inf") else text
    return text


class _Composer:
    """Builds values from the parser's events, and stops at the first thing that a recipe may not contain."""

    def __init__(self, text: str, source: str):
        self.source = source
        self.document = Document(None)
        self._events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self._nodes = 0
        self._shown = source + ":{line}" if source.endswith((".yaml", ".yml")) or "/" in source else source

    def read(self) -> Document:
        next(self._events)  # the stream's start
        start = next(self._events)
        if isinstance(start, yaml.StreamEndEvent):
            return self.document
        if start.version or start.tags:
            self._refuse(start, "a YAML directive (%); leave it out")
        self.document.values = self._node(next(self._events), ())
        next(self._events)
        if not isinstance(extra := next(self._events), yaml.StreamEndEvent):
            self._refuse(extra, "a second document (---); a recipe is one")
        return self.document

    def _place(self, event: Any) -> str:
        return self._shown.format(line=event.start_mark.line + 1)

    def _refuse(self, event: Any, what: str) -> NoReturn:
        raise ConfigError(f"{self._place(event)}: {what}")

    def _node(self, event: Any, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            self._refuse(event, f"more than {_MAX_NODES} values; this is not a recipe")
        if len(path) > _MAX_DEPTH:
            self._refuse(event, f"nested deeper than {_MAX_DEPTH} levels; this is not a recipe")
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"an alias (*{event.anchor}); write the value out")
        if event.anchor is not None:
            self._refuse(event, f"an anchor (&{event.anchor}); write the value out wherever it is needed")
        if event.tag is not None:
            self._refuse(event, f"a tag ({event.tag}); recipes hold plain values only, leave the tag out")
        self.document.places.setdefault(path, self._place(event))
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        value = read_scalar(event.value) if event.style is None else event.value
        if isinstance(value, int | float) and not isinstance(value, bool):
            self.document.plain[path] = event.value
        return value

    def _mapping(self, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None or not event.value:
                self._refuse(event, "a key that is not a plain word")
            key = event.value
            where = (*path, key)
            if key == "<<":
                self._refuse(event, "a merge (<<); write the keys out")
            if key in result:
                self._refuse(event, f"{dotted(where)} stands twice, first at {self.document.places[where]}; keep one of them")
            self.document.places[where] = self._place(event)
            result[key] = self._node(next(self._events), where)
        return result

    def _sequence(self, path: Path) -> list[Any]:
        result: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            result.append(self._node(event, (*path, len(result))))
        return result


def dotted(path: Path) -> str:
    """("data", "train", 0) as data.train[0]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def parse(text: str, source: str) -> Document:
    """The values of a YAML text. Raises ConfigError with the source and the line for anything that a recipe may not contain."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than 1 MiB; this is not a recipe")
    try:
        return _Composer(text, source).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: not YAML: {said}; check the indentation, colons and quotes of this line and the one above") from None
    except yaml.YAMLError as error:
        said = getattr(error, "reason", None) or "it cannot be read"
        raise ConfigError(f"{source}: not YAML: {said}; a recipe is UTF-8 text without control characters") from None
    except (RecursionError, ValueError, UnicodeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: not YAML that a recipe may hold ({type(error).__name__})") from None


def parse_value(text: str, source: str) -> Document:
    """The right side of `a.b=c`: a flow list or mapping, a quoted text, or one unquoted scalar, never anything longer."""
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse(text, source)
    value = read_scalar(text)
    document = Document(value, {(): source})
    if isinstance(value, int | float) and not isinstance(value, bool):
        document.plain[()] = text
    return document

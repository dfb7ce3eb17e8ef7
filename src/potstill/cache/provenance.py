"""What a cache's answers were made from, as flat names with JSON values, and how two such statements differ, field by field.

Weights, tokenizer, template, truncation and record are compared; "notes" (paths, names, versions) are kept for people and compared
never. It knows neither how the hashes are made nor where the statement lies.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import xxhash

from potstill.storage import to_json

NOTES = "notes"                              # said, not compared
CODEC_VERSION = "codec version"
RECORD_FIELDS = ("record", CODEC_VERSION)    # how answers are written down: a writer must agree, a reader takes what is there
TOLERANCE = "tolerance"                      # in a field that holds measured numbers: how far they may lie apart
ABSENT = "nothing"


class Difference(NamedTuple):
    """One field, `record.k` or `tokenizer`, and what each side states of it."""

    field: str
    here: Any
    there: Any

    def shown(self) -> tuple[str, str, str]:
        """The field and both values in words."""
        return self.field, shown(self.here), shown(self.there)

    def __str__(self) -> str:
        return "{}: {} here, {} in the cache".format(*self.shown())


def shown(value: Any) -> str:
    text = value if isinstance(value, str) else to_json(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Provenance:
    """JSON values by name. A mapping that holds "tolerance" holds measured numbers: they may differ by it, everything else may not."""

    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        # As JSON has it, so that what was written equals what is read: tuples become lists, and nothing is shared with the caller.
        object.__setattr__(self, "fields", json.loads(to_json(dict(self.fields))))

    @property
    def compared(self) -> dict[str, Any]:
        return {name: value for name, value in self.fields.items() if name != NOTES}

    @property
    def notes(self) -> dict[str, Any]:
        return self.fields.get(NOTES) or {}

    @cached_property
    def digest(self) -> str:
        """Hexadecimal; equal where every compared field is equal. Measured numbers do not count, for they never repeat exactly."""
        exact = {name: _without_measurements(value) for name, value in self.compared.items()}
        return xxhash.xxh3_128_hexdigest(json.dumps(exact, sort_keys=True, allow_nan=False).encode())

    def differences(self, other: "Provenance", *, only: Iterable[str] | None = None) -> list[Difference]:
        """Where `other` states something else; with `only`, among these fields. A field that one side lacks is a difference."""
        wanted = None if only is None else set(only)
        names = [name for name in {**self.compared, **other.compared} if wanted is None or name in wanted]
        return [found for name in names for found in _differences(name, self.compared.get(name, ABSENT), other.compared.get(name, ABSENT))]


def _differences(name: str, here: Any, there: Any) -> Iterator[Difference]:
    if isinstance(here, dict) and isinstance(there, dict):
        tolerances = [value for value in (here.get(TOLERANCE), there.get(TOLERANCE)) if isinstance(value, int | float)]
        if tolerances:
            if not _near({**here, TOLERANCE: 0}, {**there, TOLERANCE: 0}, max(tolerances)):
                yield Difference(name, here, there)
            return
        for key in {**here, **there}:
            yield from _differences(f"{name}.{key}", here.get(key, ABSENT), there.get(key, ABSENT))
    elif here != there or isinstance(here, bool) != isinstance(there, bool):
        yield Difference(name, here, there)


def _near(here: Any, there: Any, tolerance: float) -> bool:
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(_near(here[key], there[key], tolerance) for key in here)
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(_near(*pair, tolerance) for pair in zip(here, there, strict=True))
    if isinstance(here, float) or isinstance(there, float):
        if not (isinstance(here, int | float) and isinstance(there, int | float)):
            return False
        return math.isclose(here, there, rel_tol=0.0, abs_tol=tolerance)
    return here == there


def _without_measurements(value: Any) -> Any:
    """The same without floats, where a tolerance says that they were measured."""
    if isinstance(value, dict):
        if TOLERANCE in value:
            return {key: _without_floats(item) for key, item in value.items() if key != TOLERANCE}
        return {key: _without_measurements(item) for key, item in value.items()}
    return value


def _without_floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_floats(item) for key, item in value.items()}
    return ABSENT if isinstance(value, float) else value

"""A stranger's JSON, looked at piece by piece: each piece has the type that it must have, or the answer is not believed."""

import json
from typing import Any

from potstill.serving.endpoint import Unbelievable


def parse(body: bytes) -> Any:
    """The JSON of a body; NaN and infinities are not JSON."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise Unbelievable("bytes that are not UTF-8", body) from None
    except (ValueError, RecursionError) as error:
        raise Unbelievable(f"not JSON ({type(error).__name__})", body) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def is_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unbelievable(f"{what} is {_kind(value)}, not an object")
    return value


def is_list(value: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise Unbelievable(f"{what} is {_kind(value)}, not a list")
    if length is not None and len(value) != length:
        raise Unbelievable(f"{what} has {len(value)} entries where {length} were asked for")
    return value


def integer(value: Any, what: str) -> int:
    if type(value) is not int:
        raise Unbelievable(f"{what} is {_kind(value)}, not a whole number")
    return value


def text_or_nothing(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise Unbelievable(f"a token's text is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"

"""Every key that a recipe may have, read off the schema, as a table in Markdown: for `potstill recipes keys` and for the docs."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from potstill.models.config import LoadingConfig
from potstill.objectives import catalogue
from potstill.recipes.schema import PARAMETER_KEYS, ObjectiveConfig, Recipe

_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
_NAMES = {"divergence": catalogue.PARAMETERS, "support": catalogue.SUPPORTS, "token_weight": catalogue.TOKEN_WEIGHTS}


class Row(NamedTuple):
    """One key: what it holds, what it is where the recipe is silent, what it means. `kind` is the `kind:` beside which it stands."""

    key: str
    holds: str
    default: str
    meaning: str
    kind: str = ""


def key_rows() -> Iterator[Row]:
    """Every key in the order of the schema. A section of several kinds has the keys of each after one another."""
    yield from _rows(Recipe, "")


def markdown() -> str:
    """The table as Markdown, a section a heading."""
    lines: list[str] = []
    kind = ""
    for row in key_rows():
        section = row.key.split(".")[0]
        if row.key == section:
            lines += ["", f"### `{section}`", "", row.meaning, *([] if _kinds_at(section) else _HEAD)]
            kind = ""
            continue
        if row.kind and row.kind != kind:
            lines += ["", f"`{section}.kind: {row.kind}`", *_HEAD]
            kind = row.kind
        lines.append("| " + " | ".join(part.replace("|", "\\|") for part in (f"`{row.key}`", row.holds, row.default, row.meaning)) + " |")
    return "\n".join(lines).strip() + "\n"


_HEAD = ("", "| key | holds | default | meaning |", "|---|---|---|---|")


def _kinds_at(section: str) -> list[str]:
    return [kind for model in _models(Recipe.model_fields[section].annotation) if (kind := _kind_of(model))]


def _kind_of(model: type[BaseModel]) -> str:
    """The `kind:` of a configuration that is one of several."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None else ""


def _rows(model: type[BaseModel], prefix: str, kind: str = "") -> Iterator[Row]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield Row(key, _kind(model, name, field), _default(model, name, field), " ".join((field.description or "").split()), kind)
        if _is_by_name(field.annotation):
            continue  # each as a teacher of its kind, whose keys stand above
        for inner in _models(field.annotation):
            if inner in (LoadingConfig, model):
                continue  # as a local teacher; as the keys beside it
            yield from _rows(inner, f"{key}[]." if _is_list(field.annotation) else f"{key}.", kind or _kind_of(inner))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _is_by_name(annotation: Any) -> bool:
    return get_origin(annotation) is dict and bool(_models(annotation))


def _is_list(annotation: Any) -> bool:
    return any(get_origin(part) is list or _is_list(part) for part in (annotation, *get_args(annotation)) if part is not annotation)


def _kind(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    if model is ObjectiveConfig and name in _NAMES:
        return ", ".join(_NAMES[name])
    bounds = [f"at least {item.ge}" for item in field.metadata if isinstance(item, Ge)]
    bounds += [f"above {item.gt}" for item in field.metadata if isinstance(item, Gt)]
    bounds += [f"at most {item.le}" for item in field.metadata if isinstance(item, Le)]
    bounds += [f"below {item.lt}" for item in field.metadata if isinstance(item, Lt)]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bound = next((f", above {item.gt}" if isinstance(item, Gt) else f", at least {item.ge}" for item in arguments[1].metadata
                      if isinstance(item, Gt | Ge)), "") if isinstance(arguments[1], FieldInfo) else ""  # fmt: skip
        return _words(arguments[0]) + bound
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(argument) for argument in arguments))
    if origin is list:
        return f"list of {_words(arguments[0])}"
    return "mapping"


def _default(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    if model is ObjectiveConfig and name in PARAMETER_KEYS:
        tables = (catalogue.PARAMETERS, catalogue.SUPPORTS, catalogue.TOKEN_WEIGHTS)
        return ", ".join(f"{choice}: {_yaml(values[name])}" for table in tables for choice, values in table.items() if name in values)
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:
        held = _models(field.annotation) if not _is_list(field.annotation) else []
        return "by the teacher" if name == "objective" else "{}" if held or get_origin(field.annotation) is dict else "[]"
    return _yaml(field.default)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) if not isinstance(value, dict) else "{}"



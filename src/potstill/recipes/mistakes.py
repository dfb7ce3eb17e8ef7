"""From the values of a YAML text to a checked configuration, or to every mistake in it: place, key, what was found, what to do.

It knows pydantic's errors and the fields of a configuration; it knows no file and no command line. Imports no torch.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from potstill.errors import ConfigError
from potstill.recipes.text import Document, Path, dotted

_SHOWN = 60
_WORDS = {
    "int_type": "must be a whole number", "int_from_float": "must be a whole number", "float_type": "must be a number",
    "bool_type": "must be true or false", "string_type": "must be text", "list_type": "must be a list",
    "dict_type": "must be a mapping (key: value)", "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)", "none_required": "must be null",
    "union_tag_not_found": "must be a mapping (key: value)",
    "finite_number": "must be a finite number", "string_too_short": "must not be empty", "too_short": "must not be empty",
}  # fmt: skip
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class _Mistake:
    path: Path
    message: str


def build(model: type[M], document: Document, source: str) -> M:
    """The configuration of kind `model` that a document holds. Raises ConfigError with every mistake, one a line."""
    values = document.values
    for section in [name for name, value in values.items() if value is None and name in model.model_fields]:
        del values[section]  # `teacher: null` says the same as no teacher section
    mistakes = [*_unknown_keys(model, model, values, ()), *_interpolations(values, ())]
    try:
        built = _validate(model, document)
    except ValidationError as error:
        mistakes += _explain(error, model, values, known={mistake.path for mistake in mistakes})
        built = None
    if mistakes or built is None:
        raise ConfigError("\n".join(_line(mistake, document, source) for mistake in mistakes))
    return built


def _line(mistake: _Mistake, document: Document, source: str) -> str:
    return f"{document.place(mistake.path) or source}: {dotted(mistake.path)}{': ' if mistake.path else ''}{mistake.message}"


def _validate(model: type[M], document: Document) -> M:
    """Strict: 4.0 is no whole number and "4" no number. A number where text is expected is the text as it was written."""
    try:
        return model.model_validate_json(json.dumps(document.values), strict=True)
    except ValidationError as error:
        wanted = {_real_path(item["loc"], document.values) for item in error.errors() if item["type"] == "string_type"}
        numbers = [path for path in wanted if path in document.plain]
        if not numbers:
            raise
        for path in numbers:
            holder = document.values
            for part in path[:-1]:
                holder = holder[part]
            holder[path[-1]] = document.plain.pop(path)
        return model.model_validate_json(json.dumps(document.values), strict=True)


def _real_path(location: Iterable[str | int], values: Any) -> Path:
    """A pydantic location without the names of union members in it."""
    path: Path = ()
    for part in location:
        if (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            path, values = (*path, part), values[part]  # type: ignore[index]
    return path


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configurations inside an annotation such as `LoraConfig | None` or `list[MixtureItem]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _by_name(annotation: Any) -> Any:
    """What the values are of a mapping from free names to configurations; None where the annotation is none."""
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    return next((found for part in get_args(annotation) if (found := _by_name(part)) is not None), None)


def _kinds(models: list[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    return {kind: model for model in models if "kind" in model.model_fields for kind in get_args(model.model_fields["kind"].annotation)}


def _meant(models: list[type[BaseModel]], values: dict[str, Any]) -> type[BaseModel] | None:
    """The configuration, of several, that a mapping is meant to be: by its `kind`, and without one the kind that needs no saying."""
    kinds = _kinds(models)
    if "kind" in values:
        return kinds.get(values["kind"]) if isinstance(values["kind"], str) and kinds else models[0] if not kinds else None
    misspelt = [values[key] for key in difflib.get_close_matches("kind", values, cutoff=0.7)]
    said = next((kinds[kind] for kind in misspelt if isinstance(kind, str) and kind in kinds), None)
    return said or next((model for model in kinds.values() if not model.model_fields["kind"].is_required()), models[0])


def _inside(annotation: Any, value: Any, path: Path) -> Iterator[tuple[Path, type[BaseModel], list[type[BaseModel]], Any]]:
    """The configurations that a value holds, each with its place, what it is meant to be and what else could have stood there."""
    models, named = _models(annotation), _by_name(annotation)
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _inside(annotation, item, (*path, number))
    elif isinstance(value, dict) and models and named is not None:
        for name, item in value.items():
            yield from _inside(named, item, (*path, name))
    elif isinstance(value, dict) and models and (model := _meant(models, value)) is not None:
        yield path, model, models, value


def _unknown_keys(
    root: type[BaseModel], model: type[BaseModel], values: Any, path: Path, models: Iterable[type[BaseModel]] = ()
) -> list[_Mistake]:
    found = []
    for key, value in values.items() if isinstance(values, dict) else []:
        if key not in model.model_fields:
            found.append(_Mistake((*path, key), _unknown(root, key, list(model.model_fields), models)))
            continue
        for where, inner, others, item in _inside(model.model_fields[key].annotation, value, (*path, key)):
            found += _unknown_keys(root, inner, item, where, others)
    return found


def _unknown(root: type[BaseModel], key: str, siblings: list[str], others: Iterable[type[BaseModel]]) -> str:
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
    homes = [name for name, field in root.model_fields.items() if any(key in model.model_fields for model in _models(field.annotation))]
    kinds = [kind for kind, model in _kinds(list(others)).items() if key in model.model_fields]
    if kinds:
        hint = f"; it belongs to kind: {' or '.join(kinds)}"
    elif near:
        hint = f"; did you mean {near[0]}?"
    else:
        hint = f"; it belongs to {' or '.join(homes)}" if homes else ""
    return f"unknown key{hint}{'' if hint.endswith('?') else ';'} allowed here: {', '.join(siblings)}"


def _interpolations(values: Any, path: Path) -> list[_Mistake]:
    """Text with ${...} is meant for another tool; here it would silently name a folder `${HOME}`."""
    if isinstance(values, str) and "${" in values and path[-1:] != ("chat_template",):
        said = f"{show(values)} is not expanded: write the value out, or set it on the command line with {dotted(path)}=..."
        return [_Mistake(path, said)]
    children = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else []
    return [mistake for key, value in children for mistake in _interpolations(value, (*path, key))]


# ---------------------------------------------------------------- saying what is wrong


def _explain(error: ValidationError, model: type[BaseModel], values: Any, known: set[Path]) -> list[_Mistake]:
    """Pydantic's errors as ours, one for each place: the members of a union are joined by "or"."""
    said: dict[Path, list[str]] = {}
    of_a_member: set[Path] = set()
    for item in error.errors():
        if item["type"] in ("extra_forbidden", "default_factory_not_called"):
            continue  # said by _unknown_keys; a consequence of another mistake
        path = _real_path(item["loc"], values)
        if item["type"] == "missing":
            path = (*path, str(item["loc"][-1]))
        if item["type"] == "union_tag_invalid":
            path = (*path, "kind")
        if len(item["loc"]) > len(path):
            of_a_member.add(path)
        path, message = _message(dict(item), path, model, values)
        if path not in known and message not in said.setdefault(path, []):
            said[path].append(message)
    # Where a mistake lies inside the member of a union that was meant, the other members still complain of the kind of the whole.
    deeper = {_real_path(item["loc"], values) for item in error.errors()} | said.keys()
    meant = {path for path in of_a_member if any(path == other[: len(path)] and path != other for other in deeper)}
    return [_Mistake(path, _joined(messages, path, values)) for path, messages in said.items() if path not in meant]


def _message(item: dict[str, Any], path: Path, model: type[BaseModel], values: Any) -> tuple[Path, str]:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        return path, "missing; it has no default"
    if kind == "value_error":
        return _located(str(context["error"]), path, model, values)
    if kind == "union_tag_invalid":
        names = context["expected_tags"].replace("'", "").split(", ")
        return path, f"must be one of {', '.join(names[:-1])} or {names[-1]}"
    if kind == "literal_error":
        expected = context["expected"].replace("'", "")
        return path, f"must be one of {expected}" if " or " in expected else f"must be {expected}"
    for bound, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if bound in context:
            return path, f"must be {words} {context[bound]}"
    said = str(item["msg"])
    return path, _WORDS.get(kind, said[:1].lower() + said[1:])


def _located(message: str, path: Path, model: type[BaseModel], values: Any) -> tuple[Path, str]:
    """A rule's own words, and the key that they begin with: "data.validation: ..." or "objective: ... 'beta' ..."."""
    head = re.match(r"([a-z_.]+)(?::\s+|\s+of\s+|\s+)", message)
    begun = False  # what follows a key and a point is a key too, written in the recipe or not
    for part in head[1].split(".") if head else []:
        inside = _at(values, path)
        if part in model.model_fields and path[:1] == (part,):
            begun, message = True, message.removeprefix(part).lstrip(".: ")
        elif (begun and inside is None) or (
            isinstance(inside, dict) and (begun or part in inside or (not path and part in model.model_fields))
        ):
            begun, path, message = True, (*path, part), message.removeprefix(part).lstrip(".: ")
    for quoted in re.findall(r"'([a-z_]+)'", message):
        inside = _at(values, path)
        if isinstance(inside, dict) and quoted in inside:
            path = (*path, quoted)
    return path, message


def _at(values: Any, path: Path) -> Any:
    for part in path:
        if isinstance(values, dict | list):
            values = values.get(part) if isinstance(values, dict) else values[int(part)]
    return values


def _joined(messages: list[str], path: Path, values: Any) -> str:
    if not messages[0].startswith("must "):
        return messages[0]
    if "must not be empty" in messages:  # the kind was right
        return "must not be empty"
    kinds = [message for message in messages if message.startswith("must be ")] or messages[:1]
    parts = [kinds[0], *(message.removeprefix("must be ") for message in kinds[1:])]
    return f"{' or '.join(parts)}; found {show(_at(values, path))}"


def show(value: Any) -> str:
    if isinstance(value, dict | list):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return f"{kind} ({_cut(json.dumps(value, ensure_ascii=True))})"
    if value is None:
        return "nothing (null)"
    return _cut(json.dumps(value, ensure_ascii=True))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."

"""Reads a recipe, from a file or from the library, with `a.b=c` overrides on top, and refuses what does not fit.

Every mistake is reported at once, each with its line, the key, what was found and what to do. Imports no torch.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from potstill.errors import ConfigError
from potstill.recipes.schema import Recipe
from potstill.recipes.text import MAX_BYTES, Document, Path, dotted, parse, parse_value

_SHOWN = 60
_OVERRIDE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)=(.*)", re.DOTALL)
_WORDS = {
    "int_type": "must be a whole number", "int_from_float": "must be a whole number", "float_type": "must be a number",
    "bool_type": "must be true or false", "string_type": "must be text", "list_type": "must be a list",
    "dict_type": "must be a mapping (key: value)", "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)", "none_required": "must be null",
    "finite_number": "must be a finite number", "string_too_short": "must not be empty", "too_short": "must not be empty",
}  # fmt: skip


def library() -> dict[str, str]:
    """The recipes inside the package: name -> YAML text."""
    folder = resources.files("potstill.recipes") / "library"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in sorted(found, key=lambda entry: entry.name)}


def find_text(name: str) -> tuple[str, str]:
    """The YAML text of a recipe file or of a recipe of the library, and how to call it in messages.

    Raises ConfigError where there is neither, naming the nearest recipes.
    """
    path = FilePath(name).expanduser()
    if path.is_file():
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{name}: larger than 1 MiB; this is not a recipe")
        try:
            return path.read_bytes().decode("utf-8-sig"), name
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from None
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read ({error.strerror}); check the file's permissions") from None
    recipes = library()
    if name in recipes:
        return recipes[name], f"{name}.yaml"
    near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    kind = "a folder, not a recipe file" if path.is_dir() else "no such file, and no recipe of the library has this name"
    raise ConfigError(f"{name}: {kind}{hint}; `potstill recipes` lists the library")


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file or of the library called `name`, with `overrides` ("training.steps=20") applied.

    Raises ConfigError that lists every mistake, one a line.
    """
    text, source = find_text(name)
    document = parse(text, source)
    if not isinstance(document.values, dict):
        raise ConfigError(f"{source}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}; found {_show(document.values)}")
    for override in overrides:
        _apply(document, override)
    return build(document, source)


def recipe_from_values(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from values that are already read, under the same rules."""
    return build(Document(json.loads(json.dumps(values)), {(): source}), source)


# ---------------------------------------------------------------- overrides


def _apply(document: Document, override: str) -> None:
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(f"{override}: an override is written section.key=value, as in training.learning_rate=1e-4")
    keys, source = match[1].split("."), "command line"
    value = parse_value(match[2], source)
    holder, path = document.values, ()
    for key in keys[:-1]:
        path = (*path, _index(holder, key, path, source))
        if isinstance(holder, dict) and holder.get(key) is None:
            holder[key] = {}
            document.places[path] = source
        holder = holder[path[-1]]
        if not isinstance(holder, dict | list):
            raise ConfigError(f"{source}: {dotted(path)} is {_show(holder)} and holds no keys; override {dotted(path)} as a whole")
    path = (*path, _index(holder, keys[-1], path, source))
    holder[path[-1]] = value.values
    for known in [known for known in (*document.places, *document.plain) if known[: len(path)] == path]:
        document.places.pop(known, None)
        document.plain.pop(known, None)
    document.places |= {path + inner: source for inner in {(), *value.places}}
    document.plain |= {path + inner: text for inner, text in value.plain.items()}


def _index(holder: Any, key: str, path: Path, source: str) -> str | int:
    if isinstance(holder, dict):
        return key
    if not key.isdigit() or int(key) >= len(holder):
        raise ConfigError(f"{source}: {dotted(path)} is a list of {len(holder)}; its items are numbered from 0")
    return int(key)


# ---------------------------------------------------------------- building


@dataclass(frozen=True)
class _Mistake:
    path: Path
    message: str


def build(document: Document, source: str) -> Recipe:
    """The recipe that a document holds. Raises ConfigError with every mistake, one a line."""
    values = document.values
    for section in [name for name, value in values.items() if value is None and name in Recipe.model_fields]:
        del values[section]  # `teacher: null` says the same as no teacher section
    mistakes = [*_unknown_keys(Recipe, values, ()), *_interpolations(values, ())]
    try:
        recipe = _validate(document)
    except ValidationError as error:
        mistakes += _explain(error, values, known={mistake.path for mistake in mistakes})
        recipe = None
    if mistakes or recipe is None:
        raise ConfigError("\n".join(_line(mistake, document, source) for mistake in mistakes))
    return recipe


def _line(mistake: _Mistake, document: Document, source: str) -> str:
    return f"{document.place(mistake.path) or source}: {dotted(mistake.path)}{': ' if mistake.path else ''}{mistake.message}"


def _validate(document: Document) -> Recipe:
    """Strict: 4.0 is no whole number and "4" no number. A number where text is expected is the text as it was written."""
    try:
        return Recipe.model_validate_json(json.dumps(document.values), strict=True)
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
        return Recipe.model_validate_json(json.dumps(document.values), strict=True)


def _real_path(location: Iterable[str | int], values: Any) -> Path:
    """A pydantic location without the names of union members in it."""
    path: Path = ()
    for part in location:
        if (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            path, values = (*path, part), values[part]
    return path


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configurations inside an annotation such as `LoraConfig | None` or `list[MixtureItem]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _unknown_keys(model: type[BaseModel], values: Any, path: Path) -> list[_Mistake]:
    found = []
    for key, value in values.items() if isinstance(values, dict) else []:
        if key not in model.model_fields:
            found.append(_Mistake((*path, key), _unknown(key, list(model.model_fields))))
            continue
        inner = _models(model.model_fields[key].annotation)
        if inner:
            items = [((*path, key, i), item) for i, item in enumerate(value)] if isinstance(value, list) else [((*path, key), value)]
            found += [mistake for where, item in items for mistake in _unknown_keys(inner[0], item, where)]
    return found


def _unknown(key: str, siblings: list[str]) -> str:
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    homes = [name for name, field in Recipe.model_fields.items() for model in _models(field.annotation) if key in model.model_fields]
    if homes and not near:
        hint = f"; it belongs to {' or '.join(homes)}"
    return f"unknown key{hint}{'' if hint.endswith('?') else ';'} allowed here: {', '.join(siblings)}"


def _interpolations(values: Any, path: Path) -> list[_Mistake]:
    """Text with ${...} is meant for another tool; here it would silently name a folder `${HOME}`."""
    if isinstance(values, str) and "${" in values and path[-1:] != ("chat_template",):
        return [_Mistake(path, f"{_show(values)} is not expanded: write the value out, or set it on the command line with {dotted(path)}=...")]
    children = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else []
    return [mistake for key, value in children for mistake in _interpolations(value, (*path, key))]


# ---------------------------------------------------------------- saying what is wrong


def _explain(error: ValidationError, values: Any, known: set[Path]) -> list[_Mistake]:
    """Pydantic's errors as ours, one for each place: the members of a union are joined by "or"."""
    said: dict[Path, list[str]] = {}
    for item in error.errors():
        if item["type"] in ("extra_forbidden", "default_factory_not_called"):
            continue  # said by _unknown_keys; a consequence of another mistake
        path = _real_path(item["loc"], values)
        if item["type"] == "missing":
            path = (*path, str(item["loc"][-1]))
        path, message = _message(dict(item), path, values)
        if path not in known and message not in said.setdefault(path, []):
            said[path].append(message)
    # A union's other members complain about a key inside the member that was meant: the deeper complaint is the useful one.
    return [_Mistake(path, _joined(messages, path, values)) for path, messages in said.items()]


def _message(item: dict[str, Any], path: Path, values: Any) -> tuple[Path, str]:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        return path, "missing; it has no default"
    if kind == "value_error":
        return _located(str(context["error"]), path, values)
    if kind == "literal_error":
        return path, f"must be one of {context['expected'].replace(chr(39), '')}"
    for bound, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if bound in context:
            return path, f"must be {words} {context[bound]}"
    return path, _WORDS.get(kind, item["msg"][:1].lower() + item["msg"][1:])


def _located(message: str, path: Path, values: Any) -> tuple[Path, str]:
    """A rule's own words, and the key that they begin with: "data.validation: ..." or "objective: ... 'beta' ..."."""
    head = re.match(r"([a-z_.]+)(?::\s+|\s+of\s+|\s+)", message)
    for part in head[1].split(".") if head else []:
        inside = _at(values, path)
        if part in Recipe.model_fields and path[:1] == (part,):
            message = message.removeprefix(part).lstrip(".: ")
        elif isinstance(inside, dict) and (part in inside or (not path and part in Recipe.model_fields)):
            path, message = (*path, part), message.removeprefix(part).lstrip(".: ")
    for quoted in re.findall(r"'([a-z_]+)'", message):
        inside = _at(values, path)
        if isinstance(inside, dict) and quoted in inside:
            path = (*path, quoted)
    return path, message


def _at(values: Any, path: Path) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else values[part] if isinstance(values, list) else None
    return values


def _joined(messages: list[str], path: Path, values: Any) -> str:
    if not messages[0].startswith("must "):
        return messages[0]
    kinds = [message for message in messages if message.startswith("must be ")] or messages[:1]
    parts = [kinds[0], *(message.removeprefix("must be ") for message in kinds[1:])]
    return f"{' or '.join(parts)}; found {_show(_at(values, path))}"


def _show(value: Any) -> str:
    if isinstance(value, dict | list):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return f"{kind} ({_cut(json.dumps(value, ensure_ascii=True))})"
    if value is None:
        return "nothing (null)"
    return _cut(json.dumps(value, ensure_ascii=True))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


# ---------------------------------------------------------------- what the command line asks


def refuse_command(command: str, recipe: Recipe, name: str) -> None:
    """Raises ConfigError where a recipe is for the other command: distill needs a teacher, finetune has none."""
    if command == "distill" and recipe.teacher is None:
        raise ConfigError(f"{name}: teacher: missing; distill needs one: teacher: {{kind: local, path: ...}}; to learn from the text alone: potstill finetune")
    if command == "finetune" and recipe.teacher is not None:
        raise ConfigError(
            f"{name}: teacher: finetune learns from the text alone and would not ask it; say potstill distill, or leave it out with "
            "teacher=null objective=null and a run.folder of its own"
        )


def summary_line(text: str) -> str:
    """The comment that a recipe of the library opens with."""
    lines = [line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#")]
    return lines[0] if lines else ""

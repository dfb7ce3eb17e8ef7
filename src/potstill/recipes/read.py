"""Reads a recipe, from a file or from the library, with `a.b=c` overrides on top, and refuses what does not fit.

Every mistake is reported at once, each with its line, the key, what was found and what to do. Imports no torch.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path as FilePath
from typing import Any

from potstill.errors import ConfigError
from potstill.recipes.mistakes import build, show
from potstill.recipes.schema import Recipe
from potstill.recipes.text import MAX_BYTES, Document, Path, dotted, parse, parse_value

_OVERRIDE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)=(.*)", re.DOTALL)


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
        return read_text(path, name), name
    recipes = library()
    if name in recipes:
        return recipes[name], f"{name}.yaml"
    near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    kind = "a folder, not a recipe file" if path.is_dir() else "no such file, and no recipe of the library has this name"
    raise ConfigError(f"{name}: {kind}{hint}; `potstill recipes` lists the library")


def read_text(path: FilePath, name: str) -> str:
    """The text of a YAML file that messages call `name`. Raises ConfigError where it is too large, not UTF-8 or cannot be read."""
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{name}: larger than 1 MiB; this is not a recipe")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); check the file's permissions") from None


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file or of the library called `name`, with `overrides` ("training.steps=20") applied.

    Raises ConfigError that lists every mistake, one a line.
    """
    text, source = find_text(name)
    document = parse(text, source)
    if not isinstance(document.values, dict):
        sections = ", ".join(Recipe.model_fields)
        raise ConfigError(f"{source}: a recipe is a mapping with the sections {sections}; found {show(document.values)}")
    for override in overrides:
        apply_override(document, override)
    return build(Recipe, document, source)


def recipe_from_values(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from values that are already read, under the same rules."""
    return build(Recipe, Document(json.loads(json.dumps(values)), {(): source}), source)


# ---------------------------------------------------------------- overrides


def apply_override(document: Document, override: str) -> None:
    """Sets one key of the document, as in "training.steps=20". Raises ConfigError where it cannot be set."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(f"{override}: an override is written section.key=value, as in training.learning_rate=1e-4")
    set_key(document, match[1], parse_value(match[2], "command line"), "command line")


def set_key(document: Document, key: str, value: Document, source: str) -> None:
    """Sets the dotted `key` of `document` to what `value` holds, which keeps its own places. Raises ConfigError beginning with `source`."""
    keys = key.split(".")
    holder: Any = document.values
    path: Path = ()
    for part in keys[:-1]:
        place: Any = _index(holder, part, path, source)
        path = (*path, place)
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = {}
            document.places[path] = source
        holder = holder[place]
        if not isinstance(holder, dict | list):
            raise ConfigError(f"{source}: {dotted(path)} is {show(holder)} and holds no keys; override {dotted(path)} as a whole")
    place = _index(holder, keys[-1], path, source)
    path = (*path, place)
    holder[place] = value.values
    for known in [known for known in (*document.places, *document.plain) if known[: len(path)] == path]:
        document.places.pop(known, None)
        document.plain.pop(known, None)
    document.places |= {path: source} | {path + inner: place for inner, place in value.places.items()}
    document.plain |= {path + inner: text for inner, text in value.plain.items()}


def _index(holder: Any, key: str, path: Path, source: str) -> str | int:
    if isinstance(holder, dict):
        return key
    if not key.isdigit() or int(key) >= len(holder):
        raise ConfigError(f"{source}: {dotted(path)} is a list of {len(holder)}; its items are numbered from 0")
    return int(key)


# ---------------------------------------------------------------- what the command line asks


def refuse_command(command: str, recipe: Recipe, name: str) -> None:
    """Raises ConfigError where a recipe is for the other command: distill needs a teacher, finetune has none."""
    if command == "distill" and recipe.teacher is None:
        remedy = "add teacher: {kind: local, path: ...}, or learn from the text alone with potstill finetune"
        raise ConfigError(f"{name}: teacher: missing, and distill needs one; {remedy}")
    if command == "finetune" and recipe.teacher is not None:
        also = {"rollouts": recipe.rollouts, "capture": recipe.capture}
        sections = " ".join(["teacher=null objective=null", *(f"{name}=null" for name, said in also.items() if said is not None)])
        raise ConfigError(
            f"{name}: teacher: finetune learns from the text alone and would not ask it; say potstill distill, or leave it out with "
            f"{sections} and a run.folder of its own"
        )


def summary_line(text: str) -> str:
    """The comment that a recipe of the library opens with."""
    lines = [line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#")]
    return lines[0] if lines else ""


def print_library(kind: str, says: str, texts: Mapping[str, str]) -> None:
    """The names of a library, each with the comment that its file opens with."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(kind, no_wrap=True)
    table.add_column(says, overflow="fold")
    for name, text in texts.items():
        table.add_row(name, summary_line(text))
    Console().print(table, markup=False)

"""Reads a study, from a file or from the library, with `a.b=c` overrides on top, and the recipes that it names.

Every mistake is reported with its line, the key, what was found and what to do, as in a recipe. Imports no torch.
"""

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from potstill.errors import ConfigError
from potstill.recipes import read as recipes
from potstill.recipes.mistakes import build, show
from potstill.recipes.schema import Recipe
from potstill.recipes.text import Document, parse, parse_value
from potstill.recipes.text import Path as Keys
from potstill.studies.config import StudyConfig

# Their keys hold dotted keys of a recipe, so that what follows them is one key.
_OF_RECIPES = ("set", "grid")


@dataclass(frozen=True)
class Study:
    """A study as it was read: checked, and with the place of every value for messages."""

    config: StudyConfig
    document: Document
    source: str
    beside: Path | None
    """The folder of the study's file; None for one of the library."""

    def part(self, keys: Keys) -> Document:
        """What stands under `keys`, as a document of its own that may be changed."""
        values = self.document.values
        for key in keys:
            values = values[key]
        size = len(keys)
        places, plain = (
            {path[size:]: said for path, said in kept.items() if path[:size] == keys}
            for kept in (self.document.places, self.document.plain)
        )
        return Document(copy.deepcopy(values), places, plain)


def library() -> dict[str, str]:
    """The studies inside the package: name -> YAML text."""
    folder = resources.files("potstill.studies") / "library"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")] if folder.is_dir() else []
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in sorted(found, key=lambda entry: entry.name)}


def find_text(name: str) -> tuple[str, str, Path | None]:
    """The YAML text of a study file or of a study of the library, how to call it in messages, and the file's folder.

    Raises ConfigError where there is neither, naming the nearest studies.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return recipes.read_text(path, name), name, path.parent
    studies = library()
    if name in studies:
        return studies[name], f"{name}.yaml", None
    near = difflib.get_close_matches(name, studies, n=3, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    kind = "a folder, not a study file" if path.is_dir() else "no such file, and no study of the library has this name"
    raise ConfigError(f"{name}: {kind}{hint}; `potstill studies` lists the library")


def read_study(name: str, overrides: Sequence[str] = ()) -> Study:
    """The study in the file or of the library called `name`, with `overrides` applied: keys of the study (`seeds=[0]`), or keys of
    every cell's recipe (`training.steps=20`, the same as `set.training.steps=20`).

    Raises ConfigError that lists every mistake, one a line.
    """
    text, source, beside = find_text(name)
    document = parse(text, source)
    if not isinstance(document.values, dict):
        raise ConfigError(f"{source}: a study is a mapping with keys such as title, base, grid and folder; found {show(document.values)}")
    for override in overrides:
        _apply(document, override)
    given = Document(copy.deepcopy(document.values), dict(document.places), dict(document.plain))
    return Study(build(StudyConfig, document, source), given, source, beside)


def _apply(document: Document, override: str) -> None:
    key, equals, text = override.partition("=")
    first, _, rest = key.partition(".")
    if first in Recipe.model_fields and first not in StudyConfig.model_fields:
        first, rest = "set", key
    if not equals or first not in _OF_RECIPES or not rest:
        recipes.apply_override(document, override)
        return
    holder = document.values.setdefault(first, {})
    if not isinstance(holder, dict):
        raise ConfigError(f"{first}: {show(holder)} is no mapping; write dotted keys with their values")
    value, path = parse_value(text, "command line"), (first, rest)
    for known in [known for known in (*document.places, *document.plain) if known[:2] == path]:
        document.places.pop(known, None)
        document.plain.pop(known, None)
    holder[rest] = value.values
    document.places |= {path: "command line"} | {path + inner: place for inner, place in value.places.items()}
    document.plain |= {path + inner: said for inner, said in value.plain.items()}


def recipe_document(study: Study, keys: Keys) -> tuple[Document, str]:
    """The recipe under `keys` of the study, named or written there, as a document that may be changed, and how to call it."""
    part = study.part(keys)
    if isinstance(part.values, str):
        text, source = recipes.find_text(_beside(study, part.values))
        part = parse(text, source)
    else:
        source = study.source
    if not isinstance(part.values, dict):
        raise ConfigError(f"{source}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}; found {show(part.values)}")
    return part, source


def _beside(study: Study, name: str) -> str:
    """A file's name is read from the study's folder first, then from where the command runs."""
    near = study.beside / name if study.beside is not None else None
    return str(near) if near is not None and near.is_file() else name

"""`{NAME}` in the values of a recipe: the student, the adapter or the folder of a run that must exist first."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError
from potstill.recipes.text import Document, dotted
from potstill.recipes.text import Path as Keys

PARTS = {"student": "student", "adapter": "adapter", "run": ""}
"""What can be named of a run, and where it lies in the run's folder."""
_WHOLE = re.compile(r"\{([A-Za-z0-9][A-Za-z0-9_+-]*)(?:\.([a-z]+))?\}")
# Where a word in braces can only be meant as a reference: elsewhere it may belong to a prompt.
_PLACES = frozenset({"path", "adapter", "train", "validation", "tokenizer"})

Resolve = Callable[[str, str], str | None]


def real_paths(folder: Path) -> Resolve:
    """Where the runs of a study will have written what is named."""
    return lambda name, part: str(folder / "before" / name / PARTS[part])


def stand_ins(students: Mapping[str, str]) -> Resolve:
    """What can be looked at before those runs exist: the models that they start from, by the name of the run, and no adapter."""
    return lambda name, part: None if part == "adapter" else students[name]


def resolve(document: Document, names: Mapping[str, Any], resolve: Resolve) -> frozenset[str]:
    """Puts paths in the place of references, in `document` itself, and returns the names of the runs that were named.

    Raises ConfigError with the place of a reference to a run that is not among `names`.
    """
    used: set[str] = set()

    def visit(value: Any, path: Keys) -> Any:
        if isinstance(value, dict):
            return {key: visit(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [visit(inner, (*path, number)) for number, inner in enumerate(value)]
        found = _WHOLE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            return value
        name, part = found[1], found[2] or "student"
        if name in names and part in PARTS:
            used.add(name)
            return resolve(name, part)
        if path and path[-1] in _PLACES:
            known = ", ".join(names) or "nothing"
            raise ConfigError(
                f"{document.place(path)}: {dotted(path)}: {value} names no run that stands under before before it ({known}); of a run "
                f"there are {{NAME}}, its student, {{NAME.adapter}} and {{NAME.run}}"
            )
        return value

    document.values = visit(document.values, ())
    return frozenset(used)

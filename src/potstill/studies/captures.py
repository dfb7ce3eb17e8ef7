"""Which cells may learn from answers that are recorded once, and what is recorded for them."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from potstill.capture.config import CaptureConfig
from potstill.errors import ConfigError
from potstill.recipes.fitting import Answers, settled
from potstill.recipes.mistakes import build
from potstill.recipes.read import set_key
from potstill.recipes.schema import Recipe
from potstill.recipes.text import Document
from potstill.studies.cells import Cell
from potstill.studies.read import Study
from potstill.teachers.config import LocalTeacherConfig, ServerTeacherConfig

_READS = frozenset({"path", "revision", "eos_token", "chat_template"})


@dataclass(frozen=True)
class Recording:
    """One cache, and the recipe that fills it."""

    name: str
    folder: Path
    document: Document
    uses: frozenset[str]
    """The runs that must exist first."""


def make_recordings(study: Study, cells: Sequence[Cell], folder: Path) -> dict[str, Recording]:
    """The cache of each cell that may learn from one, by the cell's name; cells with the same teacher and text share theirs.

    Raises ConfigError where a capture that cells need cannot be.
    """
    capture = study.config.capture
    if capture is None:
        return {}
    made: dict[str, Recording] = {}
    for cell in cells:
        if not is_served(cell.built.checked, capture):
            continue
        key = _key(cell.built.checked, cell.built.recipe)
        path = folder / capture.path / key
        document = copy.deepcopy(cell.built.document)
        set_key(document, "capture", Document({**_given(study), "path": str(path)}), study.document.place(("capture",)))
        set_key(document, "run.seed", Document(study.config.seeds[0]), study.source)
        try:
            build(Recipe, copy.deepcopy(document), cell.built.source)
        except ConfigError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None
        same = next((recording for recording in made.values() if recording.name == key), None)
        made[cell.name] = same or Recording(key, path, document, cell.built.uses)
    return made


def is_served(recipe: Recipe, capture: CaptureConfig) -> bool:
    """Whether a record of this kind holds all that the objective asks, on text that is known before the run.

    An objective that names no support means the full one; only hidden rows serve that.
    """
    teacher, objective = recipe.teacher, recipe.objective
    if recipe.rollouts is not None or not recipe.asks_teacher or not isinstance(teacher, LocalTeacherConfig | ServerTeacherConfig):
        return False
    if capture.outcomes == "hidden":
        return isinstance(teacher, LocalTeacherConfig)
    if "support" not in objective.model_fields_set:
        return False
    k = capture.k if "top_k" in capture.outcomes else None
    samples = capture.num_samples if "sampled" in capture.outcomes else None
    try:
        settled(objective, Answers("the record", capture.outcomes, k, samples, capture.temperature))
    except ValueError:
        return False
    return True


def from_cache(document: Document, recording: Recording) -> Document:
    """The recipe of a cell with the recorded answers as its teacher."""
    changed = copy.deepcopy(document)
    changed.values.pop("capture", None)
    set_key(changed, "teacher", Document({"kind": "cache", "path": str(recording.folder)}), "capture")
    return changed


def _given(study: Study) -> dict[str, Any]:
    return study.part(("capture",)).values


def _key(checked: Recipe, recipe: Recipe) -> str:
    """Equal for cells whose teachers answer the same sequences: who answers, the text, and who reads it."""
    said = {
        "teacher": recipe.model_dump(mode="json", include={"teacher"}), "data": recipe.model_dump(mode="json", include={"data"}),
        "reader": checked.student.model_dump(mode="json", include=set(_READS)),
    }  # fmt: skip
    return f"answers-{xxhash.xxh3_64_hexdigest(json.dumps(said, sort_keys=True).encode())[:10]}"

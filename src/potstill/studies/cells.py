"""From a study to its cells: what each changes, its recipe, its twin without a teacher; equal recipes are one cell.

Everything is built and checked before anything runs, and every mistake is said at once, with the cell that it lies in.
"""

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError
from potstill.recipes.mistakes import build
from potstill.recipes.read import set_key
from potstill.recipes.schema import ObjectiveConfig, Recipe
from potstill.recipes.text import Document
from potstill.recipes.text import Path as Keys
from potstill.studies.config import SFT
from potstill.studies.read import Study, recipe_document
from potstill.studies.references import real_paths, resolve, stand_ins

_ALONE = "distilled"  # the cell of a study without axes
_LONGEST_NAME = 120
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._=,+-]+")
_OF_A_TEACHER = ("teacher", "objective", "rollouts", "capture", "generate")


@dataclass(frozen=True)
class Built:
    """A recipe of the study, checked, and the values with their places that it was made from."""

    written: Document
    """As the study says it, `{NAME}` included."""
    document: Document
    """With the paths that `{NAME}` stands for."""
    source: str
    recipe: Recipe
    """As it will run."""
    checked: Recipe
    """The same with models that exist already in the place of those that earlier runs will make."""
    uses: frozenset[str] = frozenset()
    """The runs that must exist first."""

    @property
    def identity(self) -> str:
        """Equal for recipes that train the same student."""
        return json.dumps(comparable(self.recipe), sort_keys=True)


@dataclass(frozen=True)
class Cell:
    """One training of the study, apart from its seed."""

    name: str
    built: Built
    is_sft: bool
    points: tuple[Mapping[str, str], ...] = ()
    """The places of the grid that it stands for: axis -> label. A twin may stand for none."""
    against: str | None = None
    """The cell that it is compared with."""


@dataclass(frozen=True)
class Axis:
    """One axis of the grid: its values by their labels, each as the keys that it sets with where their values stand in the study."""

    name: str
    values: Mapping[str, Mapping[str, Keys]]
    plain: Sequence[Any] | None


@dataclass
class _Mistakes:
    """Messages with the cells that they were found in, in the order of the grid."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cell: str, error: Exception) -> None:
        for line in str(error).splitlines():
            self.found.setdefault(line, []).append(cell)

    def refuse(self, num_cells: int) -> None:
        """Raises ConfigError with all of them; what is wrong in every cell is said once."""
        if self.found:
            lines = [line if len(cells) == num_cells else f"{_listed(cells)}: {line}" for line, cells in self.found.items()]
            raise ConfigError("\n".join(lines))


def _listed(cells: Sequence[str], most: int = 3) -> str:
    shown = "; ".join(cells[:most])
    return f"cell{'' if len(cells) == 1 else 's'} {shown}{f' and {len(cells) - most} more' if len(cells) > most else ''}"


def comparable(recipe: Recipe) -> dict[str, Any]:
    """A resolved recipe without what the study gives to each run, and without what a run does not look at."""
    values = recipe.resolved()
    values["run"] = {key: value for key, value in values["run"].items() if key not in ("folder", "seed")}
    return {key: value for key, value in values.items() if key not in ("capture", "generate")}


def make_before(study: Study) -> dict[str, Built]:
    """The runs that must exist first. Raises ConfigError."""
    made: dict[str, Built] = {}
    for name, config in study.config.before.items():
        keys: Keys = ("base",) if config.recipe is None else ("before", name, "recipe")
        document, source = recipe_document(study, keys)
        for key in config.set:
            _set(study, document, key, ("before", name, "set", key))
        set_key(document, "run.folder", Document(str(_folder(study) / "before" / name)), source)
        try:
            made[name] = _build(study, document, source, made)
        except ConfigError as error:
            raise ConfigError("\n".join(f"before.{name}: {line}" for line in str(error).splitlines())) from None
    return made


def make_cells(study: Study, before: Mapping[str, Built]) -> list[Cell]:
    """The cells in the order of the table: the twins first, then the grid. Raises ConfigError naming every cell that cannot be."""
    axes = make_axes(study)
    points = [dict(zip([axis.name for axis in axes], labels, strict=True)) for labels in itertools.product(*(axis.values for axis in axes))]
    mistakes, built = _Mistakes(), []
    for point in points:
        try:
            whole = _build_point(study, before, axes, point)
            built.append((point, whole, _twin(study, before, whole)))
        except ConfigError as error:
            mistakes.add(_name(axes, point), error)
    mistakes.refuse(len(points))
    twins: dict[str, tuple[Built, list[dict[str, str]]]] = {}
    for point, _, twin in built:
        twins.setdefault(twin.identity, (twin, []))[1].append(point)
    names = _twin_names(axes, [covered for _, covered in twins.values()])
    cells = {identity: Cell(name, twin, is_sft=True) for (identity, (twin, _)), name in zip(twins.items(), names, strict=True)}
    for point, whole, twin in built:
        own = whole if not _learns_from_text_alone(whole.recipe) else twin
        found = cells.get(own.identity) or Cell(_name(axes, point), own, is_sft=False, against=cells[twin.identity].name)
        cells[own.identity] = replace(found, points=(*found.points, point))
    return _against(study, _named_apart(list(cells.values())))


def _against(study: Study, cells: list[Cell]) -> list[Cell]:
    baseline = study.config.baseline
    if baseline == SFT:
        return cells
    names = [cell.name for cell in cells]
    if baseline not in names:
        raise ConfigError(f"{study.document.place(('baseline',))}: baseline: {baseline!r} is no cell; there are {', '.join(names)}")
    return [replace(cell, against=None if cell.name == baseline else baseline) for cell in cells]


# ---------------------------------------------------------------- recipes


def _folder(study: Study) -> Path:
    return Path(study.config.folder).expanduser()


def _set(study: Study, document: Document, key: str, at: Keys) -> None:
    set_key(document, key, study.part(at), study.document.place(at))


def _build_point(study: Study, before: Mapping[str, Built], axes: Sequence[Axis], point: Mapping[str, str]) -> Built:
    document, source = recipe_document(study, ("base",))
    for key in study.config.set:
        _set(study, document, key, ("set", key))
    for axis in axes:
        for key, at in axis.values[point[axis.name]].items():
            _set(study, document, key, at)
    return _build(study, document, source, before)


def _build(study: Study, document: Document, source: str, before: Mapping[str, Built]) -> Built:
    """The recipe twice: with the paths that will be, and with those that are."""
    run = document.values.get("run")
    if not isinstance(run, dict) or "folder" not in run:
        set_key(document, "run.folder", Document(str(_folder(study))), source)
    students = {name: made.checked.student.path for name, made in before.items()}
    real, checked = _copy(document), _copy(document)
    uses = resolve(real, before, real_paths(_folder(study)))
    resolve(checked, before, stand_ins(students))
    return Built(document, _copy(real), source, build(Recipe, real, source), build(Recipe, checked, source), uses)


def _copy(document: Document) -> Document:
    return Document(copy.deepcopy(document.values), dict(document.places), dict(document.plain))


def _learns_from_text_alone(recipe: Recipe) -> bool:
    return recipe.rollouts is None and not recipe.asks_teacher and recipe.objective.weights == (0.0, 1.0)


def _twin(study: Study, before: Mapping[str, Built], built: Built) -> Built:
    """The same training without a teacher: the same student, text, rate, batch and steps."""
    document, recipe = _copy(built.written), built.recipe
    values = document.values
    for section in _OF_A_TEACHER:
        values.pop(section, None)
    values["data"].pop("teacher_prompt", None)
    values["data"]["packing"] = recipe.data.packing  # rows that a model writes are not packed, and then these are not either
    if recipe.objective.reduction != ObjectiveConfig.model_fields["reduction"].default:
        values["objective"] = {"divergence": "cross_entropy", "reduction": recipe.objective.reduction}
    return _build(study, document, built.source, before)


# ---------------------------------------------------------------- axes and names


def make_axes(study: Study) -> list[Axis]:
    """The axes of the grid, with labels that tell their values apart. Raises ConfigError where they do not."""
    grid = study.config.grid
    lasts = Counter(name.rpartition(".")[2] for name, values in grid.items() if isinstance(values, list))
    bundled = Counter(label for values in grid.values() if isinstance(values, dict) for label in values)
    axes = []
    for name, values in grid.items():
        if isinstance(values, dict):
            labels = {label if bundled[label] == 1 else f"{name}={label}": label for label in values}
            said = {shown: {key: ("grid", name, label, key) for key in values[label]} for shown, label in labels.items()}
            axes.append(Axis(name, said, None))
            continue
        short = name.rpartition(".")[2]
        key = short if lasts[short] == 1 else name
        shown = [f"{key}={_value_label(value)}" for value in values]
        twice = [label for label, count in Counter(shown).items() if count > 1]
        if twice:
            raise ConfigError(
                f"{study.document.place(('grid', name))}: grid.{name}: two values would both be called {twice[0]}; give them names, as in "
                f"{name}: {{first: {{{name}: ...}}, second: {{{name}: ...}}}}"
            )
        axes.append(Axis(name, {label: {name: ("grid", name, number)} for number, label in enumerate(shown)}, values))
    _refuse_overlap(study, axes)
    return axes


def _value_label(value: Any) -> str:
    if isinstance(value, str):
        value = value.strip("{}").rstrip("/").rpartition("/")[2]
    said = value if isinstance(value, str) else json.dumps(value)
    return _NOT_IN_A_NAME.sub("-", said).strip("-") or "empty"


def _refuse_overlap(study: Study, axes: Sequence[Axis]) -> None:
    sets = [(axis.name, key) for axis in axes for key in {key for keys in axis.values.values() for key in keys}]
    for (first, key), (second, other) in itertools.combinations(sets, 2):
        if first != second and (f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")):
            at, both = study.document.place(("grid", second)), f"sets {other}, and grid.{first} sets {key}"
            raise ConfigError(f"{at}: grid.{second}: {both}: one would undo the other; make them one axis")


def _name(axes: Sequence[Axis], point: Mapping[str, str]) -> str:
    varied = [point[axis.name] for axis in axes if len(axis.values) > 1]
    return _cut(",".join(varied or point.values()) or _ALONE)


def _twin_names(axes: Sequence[Axis], groups: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """A twin is called after what it depends on: the axes whose label is the same wherever it is the twin, and not everywhere."""
    names = []
    for points in groups:
        own = [points[0][axis.name] for axis in axes if len(axis.values) > 1 and len({point[axis.name] for point in points}) == 1]
        names.append(_cut(",".join([SFT, *own])) if len(groups) > 1 else SFT)
    return names


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME].rstrip(",")


def _named_apart(cells: list[Cell]) -> list[Cell]:
    for name, count in Counter(cell.name for cell in cells).items():
        if count > 1:
            raise ConfigError(f"{count} cells would be called {name}; give the values of an axis shorter or other names")
    return cells

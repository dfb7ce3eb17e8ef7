"""What the caches of a recipe hold, and whether that fits the run: its support, its provenance, its rows; before any weight is read.

It knows no model but by its digest; what a server or a model in this process offers is said by `fitting`.
"""

from collections.abc import Mapping, Sequence

from potstill.cache.store import CacheReader
from potstill.data.examples import ExampleSet
from potstill.data.prepare import PreparedData
from potstill.errors import ConfigError
from potstill.head import Head
from potstill.models.identity import weights_digest
from potstill.objectives.projection import check_projected
from potstill.recipes.fitting import Answers, known_answers, members, refuse_trained_head, settled
from potstill.recipes.preparation import Preparation
from potstill.recipes.provenance import reading_fields
from potstill.recipes.schema import ObjectiveConfig, Recipe
from potstill.teachers.cached import CachedTeacher, refuse_foreign
from potstill.teachers.config import CacheTeacherConfig, EnsembleTeacherConfig

Readers = Mapping[str, CacheReader]


def open_caches(recipe: Recipe) -> dict[str, CacheReader]:
    """The caches that the recipe's teachers are, by their keys. Raises CacheError and StorageError naming the path.

    Raises ConfigError for a cache that a mean cannot take.
    """
    if not recipe.asks_teacher:
        return {}
    readers = {key: CacheReader(member.path) for key, member in members(recipe.teacher) if isinstance(member, CacheTeacherConfig)}
    if isinstance(recipe.teacher, EnsembleTeacherConfig) and recipe.teacher.column is None:
        for key, reader in readers.items():
            if reader.format.outcomes != "hidden":
                raise ConfigError(
                    f"{key}: a mean needs whole distributions, and the cache {reader.name} holds {reader.format.outcomes} outcomes; take a "
                    "local model or a cache of hidden rows, or give each row to one teacher with teacher.column"
                )
    return readers


def settle(recipe: Recipe, readers: Readers) -> tuple[Recipe, list[str]]:
    """The recipe with the support, and its size, that its teachers have, where it names none; and what was taken, in words.

    Raises ConfigError naming both sides where it names what they cannot serve.
    """
    if not recipe.asks_teacher:
        return recipe, []
    objective = recipe.objective
    routed = isinstance(recipe.teacher, EnsembleTeacherConfig) and recipe.teacher.column is not None
    if routed or not isinstance(recipe.teacher, EnsembleTeacherConfig):
        try:
            for answers in _narrowest_first(recipe, readers):
                objective = settled(objective, answers)
            if objective.support == "projected":
                refuse_trained_head(recipe, f"objective.support: projected, what {_sources(recipe, readers)} gives")
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None
    if objective == recipe.objective:
        return recipe, []
    taken = [
        f"{key}.{name}={value}" for key, new, old in _pairs(objective, recipe.objective)
        for name, value in {"support": new.support, **new.parameters}.items()
        if name in ("support", "top_k", "num_samples") and new != old
    ]  # fmt: skip
    return recipe.model_copy(update={"objective": objective}), [f"{', '.join(taken)}: what {_sources(recipe, readers)} gives"]


def _pairs(new: ObjectiveConfig, old: ObjectiveConfig) -> list[tuple[str, ObjectiveConfig, ObjectiveConfig]]:
    """The objective and that of the student's text, as they are and as they were, each with its key."""
    alone = {"on_student_text": None}
    pairs = [("objective", new.model_copy(update=alone), old.model_copy(update=alone))]
    if new.on_student_text is not None and old.on_student_text is not None:
        pairs.append(("objective.on_student_text", new.on_student_text, old.on_student_text))
    return pairs


def _narrowest_first(recipe: Recipe, readers: Readers) -> list[Answers]:
    """What each teacher gives; the one that gives least decides what is taken, and the others are asked whether they can serve it."""
    found = [
        _recorded_answers(key, readers[key]) if key in readers else known_answers(key, member) for key, member in members(recipe.teacher)
    ]
    return sorted((answers for answers in found if answers is not None), key=lambda answers: answers.k or answers.num_samples or 2**62)


def _recorded_answers(key: str, reader: CacheReader) -> Answers:
    form, named = reader.format, f"the cache {reader.name} ({key})"
    k, samples = (form.k if "top_k" in form.outcomes else None), (form.num_samples if "sampled" in form.outcomes else None)
    return Answers(named, form.outcomes, k, samples, None if form.outcomes == "hidden" else form.temperature)


def _sources(recipe: Recipe, readers: Readers) -> str:
    return " and ".join(answers.source for answers in _narrowest_first(recipe, readers) if answers.outcomes != "hidden")


# ---------------------------------------------------------------- before any weight is read


def refuse_foreign_caches(recipe: Recipe, readers: Readers, preparation: Preparation) -> dict[str, CachedTeacher]:
    """The cached teachers, each proven to belong to this text and to hold every row that is its own.

    Raises CacheError naming the field, or the number of rows and the first of them.
    """
    wanted = reading_fields(recipe, preparation)
    found = {}
    for key, member in members(recipe.teacher):
        if key not in readers or not isinstance(member, CacheTeacherConfig):
            continue
        reader = readers[key]
        refuse_foreign(reader.provenance, wanted, f"{key}.path: {reader.name}")
        if member.model is not None:
            _refuse_other_model(reader, key, weights_digest(member.model, seed=recipe.run.seed))
        teacher = CachedTeacher(reader, vocabulary_size=preparation.comparison.vocabulary_size, wanted=wanted)
        for examples in own_rows(recipe, key, preparation.data):
            teacher.refuse_missing(examples)
        found[key] = teacher
    return found


def refuse_other_head(cached: Mapping[str, CachedTeacher], head: Head, vocabulary_size: int) -> None:
    """Raises IncompatibleError where projected answers were made on another head than the student's, or one that learns."""
    for teacher in cached.values():
        if (record := teacher.projected_on()) is not None:
            check_projected(head, record, vocabulary_size)


def _refuse_other_model(reader: CacheReader, key: str, wanted: Mapping[str, str]) -> None:
    if "teacher weights" not in reader.provenance.fields:
        raise ConfigError(f"{key}.model: {reader.name} states no one model's weights: a server or several teachers made it; leave it out")
    refuse_foreign(reader.provenance, wanted, f"{key}.path: {reader.name}")


def own_rows(recipe: Recipe, key: str, data: PreparedData) -> Sequence[ExampleSet]:
    """The examples that the teacher under a key answers: all, or those whose column names it."""
    sets = [examples for examples in (data.train, data.validation) if examples is not None]
    if not isinstance(recipe.teacher, EnsembleTeacherConfig) or recipe.teacher.column is None:
        return sets
    name = key.removeprefix("teacher.teachers.")
    return [examples.select([i for i in range(len(examples)) if examples.route(i) == name]) for examples in sets]


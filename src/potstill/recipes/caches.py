"""`potstill cache`: a cache in numbers and words, verified, put together; what its records lose against a teacher asked anew."""

from collections.abc import Sequence
from contextlib import closing

import numpy as np

from potstill.batch import Example
from potstill.cache.inspect import inspect, inspection_text
from potstill.cache.merge import merge, merged_text
from potstill.cache.store import CacheReader
from potstill.cache.verify import verification_text, verify
from potstill.capture.record_loss import RecordLoss, record_loss
from potstill.capture.units import Share, sequences_of
from potstill.data.examples import ExampleSet
from potstill.errors import ConfigError, UsageError
from potstill.recipes.assemble import prepare_run
from potstill.recipes.preparation import Preparation
from potstill.recipes.provenance import provenance_of
from potstill.recipes.read import read_recipe
from potstill.recipes.recorded import open_caches
from potstill.recipes.schema import Recipe
from potstill.recipes.teachers import make_teacher, own_device
from potstill.teachers.cached import refuse_foreign
from potstill.teachers.config import CacheTeacherConfig
from potstill.teachers.teacher import Teacher

# Sequences that a teacher is asked anew to see what their records lose.
_ASKED_ANEW = 64


def inspect_cache(path: str, recipe_name: str | None, overrides: Sequence[str] = ()) -> str:
    """The lines of `potstill cache inspect`; with a recipe also what records lose against its teacher."""
    _refuse_idle(recipe_name, overrides, "--teacher")
    found = inspect(path)
    return inspection_text(found, () if recipe_name is None else _loss(path, recipe_name, overrides))


def verify_cache(path: str, recipe_name: str | None, overrides: Sequence[str] = (), *, drop: bool) -> tuple[str, int]:
    """The lines of `potstill cache verify` and its exit code."""
    _refuse_idle(recipe_name, overrides, "--recipe")
    expected = None
    if recipe_name is not None:
        _, preparation = _prepared(recipe_name, overrides)
        expected = [
            (key, examples.origin(index))
            for examples in _sets(preparation) for index in np.flatnonzero(examples.target_counts).tolist()
            for key in [examples.digest(index)]
        ]  # fmt: skip
    found = verify(path, expected, drop=drop)
    return verification_text(found), found.exit_code


def merge_caches(out: str, paths: Sequence[str]) -> tuple[str, int]:
    """The lines of `potstill cache merge` and its exit code."""
    merged = merge(out, paths)
    return merged_text(merged), 1 if merged.damaged else 0


def _refuse_idle(recipe_name: str | None, overrides: Sequence[str], option: str) -> None:
    if recipe_name is None and overrides:
        raise UsageError(f"{overrides[0]}: a key of a recipe, and no recipe is named; add {option} RECIPE")


def _prepared(recipe_name: str, overrides: Sequence[str]) -> tuple[Recipe, Preparation]:
    """A recipe and its rows, as a run would see them. Its own caches are not asked whether they hold them."""
    recipe = read_recipe(recipe_name, overrides)
    return recipe, prepare_run(recipe, {}, quiet=True)


def _sets(preparation: Preparation) -> list[ExampleSet]:
    return [examples for examples in (preparation.data.train, preparation.data.validation) if examples is not None]


# ---------------------------------------------------------------- against a live teacher


def _loss(path: str, recipe_name: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """What the records of some sequences lose, in words. Raises ConfigError and CacheError where teacher and cache do not fit together."""
    reader = CacheReader(path)
    if reader.format.outcomes not in ("top_k", "top_k_sampled"):
        raise ConfigError(
            f"--teacher: {path} holds {reader.format.outcomes} records; what one of them loses is no number of one row: only a top K has it"
        )
    recipe = read_recipe(recipe_name, overrides)
    if recipe.teacher is None or isinstance(recipe.teacher, CacheTeacherConfig):
        raise ConfigError(f"{recipe_name}: teacher: name the teacher itself, which is asked anew; a cache would be compared with itself")
    preparation = prepare_run(recipe, open_caches(recipe), quiet=True)
    with closing(make_teacher(recipe, preparation)) as teacher:
        refuse_foreign(reader.provenance, _of_teacher(recipe, preparation, teacher), path)
        return _in_words(record_loss(reader, teacher, _sample(reader, preparation), pad_token=preparation.pad_token, device=own_device()))


def _of_teacher(recipe: Recipe, preparation: Preparation, teacher: Teacher) -> dict:
    return {name: value for name, value in provenance_of(recipe, preparation, teacher).compared.items() if name != "codec version"}


def _sample(reader: CacheReader, preparation: Preparation) -> list[Example]:
    wanted = sequences_of(_sets(preparation), Share())
    held = np.flatnonzero(reader.holds(wanted.keys))[:_ASKED_ANEW]
    return [wanted.example(int(number)) for number in held]


def _in_words(loss: RecordLoss) -> list[tuple[str, str]]:
    coding = f"{loss.coding_mean:.2e} nats a token in the mean, {loss.coding_max:.2e} at worst, over {loss.rows:,} tokens"
    if loss.tail_mean is None:
        return [("lost by coding", coding)]
    tail = f"{loss.tail_mean:.2e} nats a token in the mean, {loss.tail_max:.2e} at worst, of a mass of {loss.tail_mass_mean:.4f}"
    return [("lost by coding", coding), ("lost with the tail", tail)]

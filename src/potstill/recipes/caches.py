"""`potstill cache`: a cache in numbers and words, verified, put together; what its records lose against a teacher asked anew."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from potstill.cache.inspect import Loss, inspect, inspection_text, loss_against
from potstill.cache.merge import merge, merged_text
from potstill.cache.records import Record, TopKAndDrawn
from potstill.cache.store import CacheReader
from potstill.cache.verify import verification_text, verify
from potstill.capture.units import Scorer, Share, sequences_of, units
from potstill.data.examples import ExampleSet
from potstill.errors import ConfigError, UsageError
from potstill.recipes.assemble import prepare_run
from potstill.recipes.preparation import Preparation
from potstill.recipes.provenance import provenance_of
from potstill.recipes.read import read_recipe
from potstill.recipes.recorded import open_caches
from potstill.recipes.schema import Recipe
from potstill.recipes.teachers import make_teacher, own_device
from potstill.signals import TopKOutcomes
from potstill.teachers.cached import refuse_foreign
from potstill.teachers.config import CacheTeacherConfig
from potstill.teachers.teacher import Teacher

# Sequences that a teacher is asked anew to see what their records lose.
_ASKED_ANEW = 64


def inspect_cache(path: str, recipe_name: str | None, overrides: Sequence[str] = ()) -> str:
    """The lines of `potstill cache inspect`; with a recipe also what records lose against its teacher."""
    _refuse_idle(recipe_name, overrides, "--teacher")
    found = inspect(path)
    return inspection_text(found, None if recipe_name is None else _loss(path, recipe_name, overrides))


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


def _loss(path: str, recipe_name: str, overrides: Sequence[str]) -> Loss:
    """What the records of some sequences lose. Raises ConfigError and CacheError where teacher and cache do not belong together."""
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
        return loss_against(reader, _live(reader, recipe, preparation, teacher), _divergence)


def _of_teacher(recipe: Recipe, preparation: Preparation, teacher: Teacher) -> dict:
    return {name: value for name, value in provenance_of(recipe, preparation, teacher).compared.items() if name != "codec version"}


def _live(reader: CacheReader, recipe: Recipe, preparation: Preparation, teacher: Teacher) -> Iterator[tuple[list[bytes], Record]]:
    wanted = sequences_of(_sets(preparation), Share())
    sequences = wanted.select(np.flatnonzero(reader.holds(wanted.keys))[:_ASKED_ANEW])
    widest = int(sequences.lengths.max()) if len(sequences) else 8
    scorer = Scorer(teacher, reader.format, recipe.run.seed, preparation.pad_token, widest, own_device(), None)
    for unit in units(sequences.lengths, 4096):
        for answer in scorer(sequences.examples(unit)):
            yield [answer.key], answer.record


def _divergence(live: Record, stored: Record) -> Tensor:
    """KL of what a teacher says now and of the stored record, row by row, over the ids that both kept and the rest.

    Both keep the same ids but for those that a tie, or a rounding that hangs on the batch, puts just inside or just outside.
    """
    ours, theirs = (record.top if isinstance(record, TopKAndDrawn) else record for record in (live, stored))
    assert isinstance(ours, TopKOutcomes)
    assert isinstance(theirs, TopKOutcomes)
    places, common = _places(theirs.ids, ours.ids)
    mine, kept = ours.log_probs.double(), theirs.log_probs.double().gather(1, places)
    rest, other = _rest(ours, common), _rest(theirs, _places(ours.ids, theirs.ids)[1])
    return torch.where(common, _term(mine, kept), 0.0).sum(1) + _term(rest, other)


def _places(ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row: where each of `wanted` stands in `ids`, and whether it does."""
    ordered, order = ids.sort(dim=1, stable=True)
    places = torch.searchsorted(ordered, wanted.contiguous()).clamp_max(ids.shape[1] - 1)
    return order.gather(1, places), ordered.gather(1, places) == wanted


def _rest(top: TopKOutcomes, common: Tensor) -> Tensor:
    """The log of the mass of all but the common ids."""
    alone = top.log_probs.double().masked_fill(common, -torch.inf)
    return torch.cat([alone, top.log_tail.double().unsqueeze(1)], 1).logsumexp(1)


def _term(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), 0 where p is 0."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)

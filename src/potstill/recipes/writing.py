"""What a model will write to, and where its answers end: all of it before any weight is read, for a run and for the look before it.

It knows recipes, tokenizers and rendered rows. Who writes is `authors`'s affair.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potstill.data.config import DataConfig
from potstill.data.examples import ExampleSet
from potstill.data.lines import Rejects
from potstill.data.prepare import prepare
from potstill.data.sources import read_training_sources
from potstill.errors import ConfigError, ModelError
from potstill.recipes.fitting import members
from potstill.recipes.preparation import Preparation, ends_of
from potstill.recipes.schema import Recipe
from potstill.rollouts.config import RolloutsConfig, TextConfig
from potstill.rollouts.named_function import NamedFunction
from potstill.rollouts.prompts import Prompts
from potstill.rollouts.reward import load_reward
from potstill.run_folder import ROLLOUT_WEIGHTS
from potstill.teachers.config import LocalTeacherConfig

# Rows that are looked at for the token that ends their answers.
_LOOKED_AT = 256


@dataclass(frozen=True)
class Writing:
    """`stops` end the student's answers and `teacher_stops` the teacher's; `foreign` are ends of the one at which the other goes on."""

    prompts: Prompts
    stops: tuple[int, ...]
    teacher_stops: tuple[int, ...]
    foreign: frozenset[int]
    reward: NamedFunction | None = None
    texts: ExampleSet | None = None


def prepare_writing(recipe: Recipe, preparation: Preparation, *, quiet: bool = True) -> Preparation:
    """The preparation with what its models will write to, and only the rows that have room for an answer.

    Raises ConfigError, DataError and ModelError naming key and row.
    """
    rollouts = recipe.rollouts
    if rollouts is None:
        return preparation
    texts = None if rollouts.text is None else _texts(recipe, rollouts.text, preparation, quiet)
    if rollouts.author == "dataset":
        return replace(preparation, texts=texts)
    student, teacher = _ends(recipe, preparation)
    writing = Writing(
        _prompts(recipe, rollouts, preparation), student, teacher, _foreign(rollouts, preparation, student, teacher),
        load_reward(rollouts.reward) if rollouts.reward is not None else None, texts,
    )  # fmt: skip
    data = replace(preparation.data, train=writing.prompts.examples)  # type: ignore[arg-type]
    return replace(preparation, data=data, writing=writing, texts=texts)


def _prompts(recipe: Recipe, rollouts: RolloutsConfig, preparation: Preparation) -> Prompts:
    longest = max(sampling.max_new_tokens for sampling in (rollouts.sampling, rollouts.teacher_sampling or rollouts.sampling))
    return Prompts(
        preparation.data.train, max_tokens=recipe.data.max_tokens, max_new_tokens=longest, prompt_tokens=rollouts.prompt_tokens,
        too_long=rollouts.prompt_too_long, bos=preparation.student.tokenizer.bos_token_id,
    )  # fmt: skip


def _texts(recipe: Recipe, config: TextConfig, preparation: Preparation, quiet: bool) -> ExampleSet:
    """Plain text in pieces, read as the rows of a run are."""
    data = DataConfig(
        train=config.path, format="text", columns={"text": config.column}, max_tokens=config.max_tokens or recipe.data.max_tokens,
        too_long="split", packing=False, text_rows=recipe.data.text_rows,
    )  # fmt: skip
    found = prepare(
        data, preparation.student.tokenizer, seed=recipe.run.seed, end_of_text=preparation.end_of_text, progress=False if quiet else None
    )
    return found.train


# ---------------------------------------------------------------- ends


def _ends(recipe: Recipe, preparation: Preparation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that end the student's answers: where it stops, and how the rows' own answers end. The same for every teacher at hand."""
    student = {*ends_of(recipe.student, preparation.student)} | _ends_of_rows(preparation)
    if not student:
        raise ModelError(f"student.path: {recipe.student.path} names no end-of-text token; say which with student.eos_token")
    stops = [
        {*ends_of(member, preparation.teachers[key])} for key, member in members(recipe.teacher)
        if isinstance(member, LocalTeacherConfig) and key in preparation.teachers
    ]  # fmt: skip
    teacher = set.intersection(*stops) if stops else student
    return tuple(sorted(student)), tuple(sorted(teacher))


def _ends_of_rows(preparation: Preparation) -> set[int]:
    """The special tokens that answers of the training set end with: a chat template may end a turn with one of its own."""
    # Not all_special_ids: Llama 3's <|eot_id|> is an added special token that has no name of its own there.
    tokenizer = preparation.student.tokenizer
    special = {*tokenizer.all_special_ids, *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)}
    found = set()
    for number in range(min(len(preparation.data.train), _LOOKED_AT)):
        example = preparation.data.train[number]
        targets = [token for token, is_target in zip(example.tokens, example.is_target, strict=True) if is_target]
        found.update(targets[-1:])
    return found & special


def _foreign(
    rollouts: RolloutsConfig, preparation: Preparation, student: tuple[int, ...], teacher: tuple[int, ...]
) -> frozenset[int]:
    ends = set[int]()
    if rollouts.student_writes:
        ends |= set(student) - set(teacher)
    if rollouts.teacher_writes and rollouts.author != "teacher_mixed":
        ends |= set(teacher) - set(student)
    if ends and rollouts.foreign_end == "refuse":
        named = ", ".join(repr(word) for word in preparation.student.tokenizer.convert_ids_to_tokens(sorted(ends)))
        raise ConfigError(
            f"rollouts.foreign_end: an answer may end with {named}, at which the other model does not stop, so that one would learn from "
            "the other where it has no meaning; set student.eos_token or teacher.eos_token to what both end with, or say "
            "rollouts.foreign_end=mask (such ends are not learned) or keep (they are)"
        )
    return frozenset(ends)


# ---------------------------------------------------------------- the columns of a row


def columns_of(recipe: Recipe, preparation: Preparation) -> Callable[[int], Mapping[str, Any]]:
    """The columns that a row of the training set has in its file, for a reward: every source is read once more, and kept."""
    sources = read_training_sources(recipe.data, Rejects(recipe.data.bad_lines_allowed), recipe.run.seed)
    rows = {row.origin: row.values for _, found in sources for row in found}
    train = preparation.data.train
    return lambda number: rows.get(train.origin(number), {})


def folder_of_weights(recipe: Recipe) -> Path:
    """Where weights lie that a server reads, unless the recipe says so."""
    return Path(recipe.run.folder) / ROLLOUT_WEIGHTS

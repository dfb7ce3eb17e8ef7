"""Everything of a run that needs no weights: the models' configurations, their tokenizers, and the rendered data.

Both the run and the look before it start here, so that what `check` shows is what a run does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from potstill.data.collation import padding_id
from potstill.data.examples import ExampleSet
from potstill.data.prepare import PreparedData, prepare
from potstill.errors import ModelError
from potstill.models.config import LoadingConfig
from potstill.models.loading import load_tokenizer, longest_context, read_model_config, stop_ids
from potstill.models.tokenizers import TokenizerComparison, compare_tokenizers
from potstill.recipes.fitting import members
from potstill.recipes.schema import Recipe
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.config import EnsembleTeacherConfig, LocalTeacherConfig, SelfTeacherConfig, ServerTeacherConfig

if TYPE_CHECKING:
    from potstill.recipes.writing import Writing


@dataclass(frozen=True)
class Reader:
    """A model without its weights: its configuration and its tokenizer."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def width(self) -> int:
        """Rows of its head, those beyond the tokenizer included."""
        return self.config.get_text_config().vocab_size

    @property
    def longest(self) -> int | None:
        """Tokens that its positions reach, where the configuration says so."""
        return longest_context(self.config)


@dataclass(frozen=True)
class Preparation:
    """What all models read, and how they compare. Without a teacher that has a tokenizer the student is compared with itself.

    `teachers` holds those that will be loaded, by the key that they stand under in the recipe.
    """

    student: Reader
    teachers: Mapping[str, Reader]
    comparison: TokenizerComparison
    data: PreparedData
    end_of_text: tuple[int, ...]
    cached: Mapping[str, CachedTeacher] = field(default_factory=dict)
    """Those whose answers are recorded, by their keys too: they need no weights."""
    writing: "Writing | None" = None
    """What a model will write to, where the data set does not write."""
    texts: ExampleSet | None = None
    """Plain text to learn beside."""

    @property
    def pad_token(self) -> int:
        pad, eos = self.student.tokenizer.pad_token_id, self.student.tokenizer.eos_token_id
        return padding_id(*(number if isinstance(number, int) else None for number in (pad, eos)))


def read_model(config: LoadingConfig) -> Reader:
    """Raises ModelError naming the path."""
    return Reader(read_model_config(config), load_tokenizer(config))


def ends_of(config: LoadingConfig, reader: Reader) -> tuple[int, ...]:
    """Where a model ends an answer: the ids at which it stops, then its tokenizer's EOS, each once."""
    eos = reader.tokenizer.eos_token_id
    return tuple(dict.fromkeys([*stop_ids(config, reader.config), *([eos] if isinstance(eos, int) else [])]))


def teacher_name(recipe: Recipe) -> str:
    """What messages call the teacher."""
    teacher = recipe.teacher
    if teacher is None or isinstance(teacher, SelfTeacherConfig):
        return recipe.student.path
    if isinstance(teacher, EnsembleTeacherConfig):
        return f"ensemble of {', '.join(teacher.teachers)}"
    return teacher.model if isinstance(teacher, ServerTeacherConfig) else teacher.path


def read_models(recipe: Recipe) -> tuple[Reader, dict[str, Reader], TokenizerComparison]:
    """Configurations and tokenizers of the student and of the teachers that will be loaded, and how all of them compare."""
    student = read_model(recipe.student)
    teachers: dict[str, Reader] = {}
    found: list[tuple[str, TokenizerComparison]] = []
    for key, member in members(recipe.teacher) if recipe.uses_teacher else ():
        if isinstance(member, LocalTeacherConfig):
            other = teachers[key] = read_model(member)
            found.append((key, _compared(student, other.tokenizer, other.width)))
        elif isinstance(member, ServerTeacherConfig) and member.tokenizer is not None:
            found.append((key, _compared(student, load_tokenizer(LoadingConfig(path=member.tokenizer)), None)))
    if not found:
        return student, teachers, _compared(student, student.tokenizer, student.width)
    if len(found) == 1 and found[0][0] == "teacher":
        return student, teachers, found[0][1]
    size = min(comparison.vocabulary_size for _, comparison in found)
    refusals, notes = (
        tuple(f"{key}: {said}" for key, comparison in found for said in getattr(comparison, kind)) for kind in ("refusals", "notes")
    )
    return student, teachers, TokenizerComparison(size, refusals, notes)


def _compared(student: Reader, tokenizer: PreTrainedTokenizerBase, width: int | None) -> TokenizerComparison:
    return compare_tokenizers(student.tokenizer, tokenizer, student_width=student.width, teacher_width=width)


def refuse_too_short(recipe: Recipe, readers: Mapping[str, Reader]) -> None:
    """Raises ModelError where a model's positions end before data.max_tokens."""
    for side, reader in readers.items():
        if reader.longest is not None and reader.longest < recipe.data.max_tokens:
            raise ModelError(
                f"data.max_tokens: {recipe.data.max_tokens} is more than the {side}'s {reader.longest} positions; set "
                f"data.max_tokens={reader.longest} and say with data.too_long what becomes of longer rows"
            )


def prepare_data(
    recipe: Recipe, student: Reader, *, quiet: bool, rejects_file: Path | None = None, strict: bool = True
) -> tuple[PreparedData, tuple[int, ...]]:
    """The examples of the run, and the ids at which the student stops."""
    ids = stop_ids(recipe.student, student.config)
    teacher = recipe.teacher if recipe.asks_teacher and isinstance(recipe.teacher, EnsembleTeacherConfig) else None
    data = prepare(
        recipe.data, student.tokenizer, seed=recipe.run.seed, end_of_text=ids, progress=False if quiet else None,
        rejects_file=rejects_file, strict=strict, route_column=teacher.column if teacher else None,
        routes=tuple(teacher.teachers) if teacher else (),
    )
    return data, ids

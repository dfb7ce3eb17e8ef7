"""Everything of a run that needs no weights: the models' configurations, their tokenizers, and the rendered data.

Both the run and the look before it start here, so that what `check` shows is what a run does.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from potstill.data.collation import padding_id
from potstill.data.prepare import PreparedData, prepare
from potstill.errors import ModelError
from potstill.models.config import LoadingConfig
from potstill.models.loading import load_tokenizer, local_folder, longest_context, read_model_config
from potstill.models.tokenizers import TokenizerComparison, compare_tokenizers
from potstill.recipes.schema import Recipe


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
    """What both models read, and how they compare. Without a teacher the student is compared with itself."""

    student: Reader
    teacher: Reader | None
    comparison: TokenizerComparison
    data: PreparedData
    end_of_text: tuple[int, ...]

    @property
    def pad_token(self) -> int:
        pad, eos = self.student.tokenizer.pad_token_id, self.student.tokenizer.eos_token_id
        return padding_id(*(number if isinstance(number, int) else None for number in (pad, eos)))


def read_model(config: LoadingConfig) -> Reader:
    """Raises ModelError naming the path."""
    return Reader(read_model_config(config), load_tokenizer(config))


def stop_ids(config: LoadingConfig, saved: PreTrainedConfig) -> tuple[int, ...]:
    """The ids at which the model stops, by its generation settings where a local folder has them, else by its configuration."""
    folder = local_folder(config)
    source: PreTrainedConfig | GenerationConfig = saved
    if folder is not None and (folder / "generation_config.json").is_file():
        source = GenerationConfig.from_pretrained(folder)
    stated = source.eos_token_id
    return tuple(stated) if isinstance(stated, list) else () if stated is None else (int(stated),)


def read_models(recipe: Recipe) -> tuple[Reader, Reader | None, TokenizerComparison]:
    """Configurations, tokenizers and their comparison."""
    student = read_model(recipe.student)
    teacher = read_model(recipe.teacher) if recipe.teacher is not None and recipe.objective.asks_teacher else None
    other = teacher or student
    comparison = compare_tokenizers(student.tokenizer, other.tokenizer, student_width=student.width, teacher_width=other.width)
    return student, teacher, comparison


def refuse_too_short(recipe: Recipe, readers: dict[str, Reader | None]) -> None:
    """Raises ModelError where a model's positions end before data.max_tokens."""
    for side, reader in readers.items():
        if reader is not None and reader.longest is not None and reader.longest < recipe.data.max_tokens:
            raise ModelError(
                f"data.max_tokens: {recipe.data.max_tokens} is more than the {side}'s {reader.longest} positions; set "
                f"data.max_tokens={reader.longest} and say with data.too_long what becomes of longer rows"
            )


def prepare_data(
    recipe: Recipe, student: Reader, *, quiet: bool, rejects_file: Path | None = None, strict: bool = True
) -> tuple[PreparedData, tuple[int, ...]]:
    """The examples of the run, and the ids at which the student stops."""
    ids = stop_ids(recipe.student, student.config)
    data = prepare(
        recipe.data, student.tokenizer, seed=recipe.run.seed, end_of_text=ids, progress=False if quiet else None,
        rejects_file=rejects_file, strict=strict,
    )
    return data, ids

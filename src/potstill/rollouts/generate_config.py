"""What `potstill generate` writes, and what it leaves out, as a recipe says it. Imports neither torch nor transformers."""

from typing import Annotated, Literal

from pydantic import Field

from potstill.config import Config
from potstill.rollouts.config import Positive, SamplingConfig


class FilterConfig(Config):
    """Which answers are left out of the data set. What is dropped is counted by its reason, and can be kept apart."""

    checker: Annotated[str, Field(min_length=1)] | None = None
    """Keep an answer only if it is right: exact, contains, numeric, choice, math, or FILE.py:NAME of a function of yours: (answer,
    reference, row) -> bool. The reference is the row's own answer."""
    min_tokens: Positive | None = None
    """Answers with fewer tokens are left out; the token that ends an answer is not counted."""
    max_tokens: Positive | None = None
    """Answers with more tokens are left out."""
    cut: Literal["drop", "keep"] = "drop"
    """Answers that did not end by themselves."""
    refused: Literal["drop", "keep"] = "keep"
    """Answers that decline the task, by their opening words."""
    repeated: Annotated[float, Field(gt=0, le=1)] | None = None
    """Answers of whose 4-grams more than this share has stood in them before."""
    same: Literal["drop", "keep"] = "drop"
    """A second answer to a prompt that equals an earlier one."""
    most: Positive | None = None
    """The most answers to one prompt that are kept."""


class GenerateConfig(Config):
    """A data set written once: the recipe's rows with answers of a model in place of their own."""

    path: Annotated[str, Field(min_length=1)]
    """The file to write: .jsonl or .jsonl.gz, in the format of data.train, which can be trained from by naming it there."""
    author: Literal["teacher", "student"] = "teacher"
    """Who answers."""
    samples: Positive = 1
    """Answers to each prompt."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How tokens are drawn."""
    batch_size: Positive = 32
    """Answers written side by side, and committed together."""
    filters: FilterConfig = Field(default_factory=FilterConfig)
    """Which answers are left out."""
    prompt_tokens: Positive | None = None
    """For data of the format text: so many first tokens of each text are its prompt."""
    dropped: str | None = None
    """A file for the answers that were left out, each with the reason; null keeps none of them."""

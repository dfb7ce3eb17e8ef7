"""What a task of samples says. Free of torch and transformers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.evaluation.task_config import name_of
from potstill.evaluation.writing_config import Positive, WritingTaskConfig


class SamplesTaskConfig(WritingTaskConfig):
    """Several answers to each prompt: how much they differ, how long they are, how they end, and how close they are to the references."""

    kind: Literal["samples"]
    """Several answers to each prompt, compared with each other and with the references."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits."""
    prompt_tokens: Positive | None = None
    """For data of the format text: so many first tokens of each text are its prompt, and the rest is the reference."""
    references: str | None = None
    """A column with further references, each as good as the row's own answer: a list of texts."""
    budget: Positive = 1000
    """How many n-grams distinct-n looks at, over all answers; the same for every model, because the share falls with the amount of text."""
    prompt_budget: Positive = 32
    """How many n-grams distinct-n looks at within one prompt's answers; prompts with fewer are left out of that number."""

    def default_name(self) -> str:
        return f"{name_of(self.data.sources[0].path)}-samples"

    @model_validator(mode="after")
    def _has_prompts(self) -> "SamplesTaskConfig":
        if self.asks_text and self.prompt_tokens is None:
            raise ValueError("prompt_tokens: rows of the format text have no prompt; say how many of their first tokens are it, such as 32")
        if not self.asks_text and self.prompt_tokens is not None:
            raise ValueError("prompt_tokens: is for the format text; leave it out")
        return self

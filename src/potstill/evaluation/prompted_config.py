"""What every task says in which a model goes on from the prompts of rows, and is read beside a teacher. Free of torch and transformers."""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from potstill.data.config import DataConfig
from potstill.evaluation.task_config import TaskConfig, name_of, refuse_validation


class PromptedTaskConfig(TaskConfig):
    """Prompts are what stands before the last answer of each row of `data.train`."""

    needs_teacher: ClassVar[bool] = True

    data: DataConfig
    """The rows whose prompts are answered. `data.max_tokens` holds prompt and answer together; a prompt that leaves too little room is
    refused, or left out with `data.too_long: drop`."""
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """For data of the format text, which has no prompts: so many first tokens of each text are its prompt."""
    seed: int = 0
    """What is drawn: each prompt has a seed of its own, made of this one and its place."""

    def default_name(self) -> str:
        return f"{name_of(self.data.sources[0].path)}-{self.suffix}"

    @property
    def suffix(self) -> str:
        """What the name ends with."""
        return self.kind.replace("_", "-")  # type: ignore[attr-defined]  # each kind has one

    @model_validator(mode="after")
    def _has_prompts(self) -> "PromptedTaskConfig":
        refuse_validation(self.data)
        formats = {source.format or self.data.format for source in self.data.sources}
        if "text" in formats and self.prompt_tokens is None:
            raise ValueError("prompt_tokens: the format text has no prompts; say how many first tokens of each text are one")
        if formats != {"text"} and self.prompt_tokens is not None:
            raise ValueError("prompt_tokens: is for the format text alone; rows of other formats have prompts of their own")
        return self

"""What a task of questions with checked answers says. Free of torch and transformers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.evaluation.task_config import name_of
from potstill.evaluation.writing_config import Positive, WritingTaskConfig


class QuestionsTaskConfig(WritingTaskConfig):
    """Answers that a program checks: accuracy, and with several samples pass@k, majority votes and consistency."""

    kind: Literal["questions"]
    """Written answers that a program checks."""
    checker: Annotated[str, Field(min_length=1)] = "exact"
    """Says whether an answer is right: exact, contains, numeric, choice, math, or FILE.py:NAME of a function of yours:
    (answer, reference, row) -> bool. The reference is the row's own answer."""
    pass_at: list[Positive] = Field(default=[])
    """For which k to estimate pass@k, at most `samples`; by default `samples` alone, where there are several."""

    def default_name(self) -> str:
        return f"{name_of(self.data.sources[0].path)}-questions"

    @property
    def ks(self) -> tuple[int, ...]:
        """Every k of pass@k, ascending."""
        return tuple(sorted({*self.pass_at} or ({self.samples} if self.samples > 1 else set())))

    @model_validator(mode="after")
    def _can_be_checked(self) -> "QuestionsTaskConfig":
        if self.asks_text:
            raise ValueError("data.format: rows of the format text hold no question; name rows of instruct, chat or prompt_completion")
        if self.pass_at and max(self.pass_at) > self.samples:
            most = max(self.pass_at)
            raise ValueError(f"pass_at: {most} answers cannot be drawn from {self.samples}; set samples to {most}")
        return self

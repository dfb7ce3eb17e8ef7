"""What every task says for which a model writes: which rows ask, and how answers are drawn. Free of torch and transformers."""

from typing import Annotated

from pydantic import Field, model_validator

from potstill.data.config import DataConfig
from potstill.evaluation.task_config import TaskConfig, refuse_validation
from potstill.rollouts.writing import Sampling

Positive = Annotated[int, Field(ge=1)]


class WritingTaskConfig(TaskConfig):
    """Rows whose prompts a model answers."""

    data: DataConfig
    """The rows that are asked are all of `data.train`, in the prompts that training renders. A prompt that leaves no room for
    `max_new_tokens` within `data.max_tokens` and the model's context is refused, or left out with `data.too_long: drop`."""
    samples: Positive = 1
    """Answers to each prompt."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most likely tokens that hold this share of the mass; 1 from all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from so many most likely tokens; 0 from all."""
    max_new_tokens: Positive = 256
    """Where an answer is cut that has not ended by itself."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of what is drawn. An answer is a function of the seed, its row's number and its own."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens)

    @model_validator(mode="after")
    def _can_be_asked(self) -> "WritingTaskConfig":
        refuse_validation(self.data)
        if self.data.too_long not in ("error", "drop"):
            raise ValueError(f"data.too_long: {self.data.too_long}: a prompt that is cut asks something else; say error or drop")
        if self.data.teacher_prompt is not None:
            raise ValueError("data.teacher_prompt: every model answers the same prompt here; leave it out")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"temperature: {self.samples} samples of a prompt are all the same at 0; set one above 0, or samples: 1")
        return self

    @property
    def asks_text(self) -> bool:
        """Whether some rows are plain text, which has no prompt of its own."""
        return any((item.format or self.data.format) == "text" for item in self.data.sources)

"""What `potstill evaluate` is asked. Free of torch and transformers, so that a wrong request is refused at once."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.config import Config
from potstill.data.config import DataConfig
from potstill.errors import UsageError
from potstill.models.config import LoadingConfig


class EvaluationConfig(Config):
    """Which model, against which teacher if any, on which text."""

    model: LoadingConfig
    """The model that is measured; with an adapter where it has one."""
    teacher: LoadingConfig | None = None
    """The model that it is compared with, token by token; it must have the same tokenizer."""
    data: DataConfig
    """The text is all of `data.train`. Nothing is cut: text longer than `data.max_tokens` is read in windows that overlap by half,
    each token being measured once."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Sequences that pass through the models at once."""
    precision: Literal["bf16", "float32"] | None = None
    """What the models compute in where their own `dtype` says nothing; by default bf16 on a GPU, else float32. Log-probabilities and
    sums are float32 and float64 either way."""
    device: str | None = None
    """Where the models run, such as cuda:1; by default a GPU if there is one."""
    documents: bool = False
    """Record every document's own numbers too."""

    @model_validator(mode="after")
    def _one_text(self) -> "EvaluationConfig":
        if self.data.validation is not None:
            raise ValueError("data.validation: an evaluation reads one text; name it as data.train and leave validation out")
        return self


def refuse_output(output: Path | str | None) -> None:
    """Raises UsageError unless `output`, where the record is to be written, is the name of a JSON file."""
    if output is None:
        return
    path = Path(output)
    if path.suffix != ".json" or path.is_dir():
        better = path / "record.json" if path.is_dir() else path.with_suffix(".json")
        raise UsageError(f"{output}: the record is one JSON file; name it so, for instance {better}")

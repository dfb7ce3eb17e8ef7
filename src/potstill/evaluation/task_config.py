"""What every kind of task says, and what the task on a text says. Free of torch and transformers."""

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.config import Config
from potstill.data.config import DataConfig

Role = Literal["target", "off_target"]


class TaskConfig(Config):
    """What every kind of task says."""

    needs_teacher: ClassVar[bool] = False
    """Without a teacher it cannot be measured at all."""

    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = None
    """What the task is called in tables; by default after what it reads."""
    role: Role = "target"
    """target: what the student was trained for. off_target: what it could do before, and may have forgotten."""

    @property
    def label(self) -> str:
        """What the task is called."""
        return self.name or self.default_name()

    @abstractmethod
    def default_name(self) -> str:
        """What it is called where the request does not say."""


class TextTaskConfig(TaskConfig):
    """Perplexity, bits per byte and calibration on a text; with a teacher also agreement and divergences on the text's own prefixes."""

    kind: Literal["text"] = "text"
    """Next-token distributions on a text."""
    data: DataConfig
    """The text is all of `data.train`. Nothing is cut: text longer than `data.max_tokens` is read in windows that overlap by half,
    each token being measured once."""

    def default_name(self) -> str:
        return name_of(self.data.sources[0].path)

    @model_validator(mode="after")
    def _one_text(self) -> "TextTaskConfig":
        refuse_validation(self.data)
        return self


def refuse_validation(data: DataConfig) -> None:
    """Raises ValueError where an evaluation's data names a validation set: it reads one text, `data.train`."""
    if data.validation is not None:
        raise ValueError("data.validation: an evaluation reads one text; name it as data.train and leave validation out")


def name_of(path: str) -> str:
    """What a file or a data set of the hub is called in a table."""
    name = Path(path).name
    for ending in (".gz", ".jsonl", ".json", ".parquet", ".csv", ".txt"):
        name = name.removesuffix(ending)
    return "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in name).strip("-.") or "text"

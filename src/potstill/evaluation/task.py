"""The nouns of an evaluation: a task, the task as one model will sit it, the model, and what comes out. They know no kind of task.

A task is prepared from configurations and tokenizers alone, so that what cannot be measured is refused before any weights are read;
what it was prepared from is its identity, by which a result that was measured before is found again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.evaluation.scores import Scores
from potstill.evaluation.task_config import Role
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Subject:
    """A loaded model that is measured, or the teacher that it is measured against."""

    name: str
    config: LoadingConfig
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 8


@dataclass(frozen=True)
class Sample:
    """What a model wrote for one item, for human eyes; `right` is None where nobody judged it. Items pair with those of other models."""

    item: str
    prompt: str
    answer: str
    reference: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong in one picture: `kind` says which ("calibration", "lengths", ...), models of one kind and label share it."""

    kind: str
    label: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What one model did on one task. `data` says in words and counts what it was measured on."""

    scores: Scores
    samples: tuple[Sample, ...] = ()
    series: tuple[Series, ...] = ()
    warnings: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "scores": self.scores.to_json(), "samples": [asdict(sample) for sample in self.samples],
            "series": [asdict(series) for series in self.series], "warnings": list(self.warnings), "data": dict(self.data),
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Outcome":
        """Raises ValueError, KeyError or TypeError where `value` is not what `to_json` wrote."""
        return cls(
            Scores.from_json(value["scores"]), tuple(Sample(**sample) for sample in value["samples"]),
            tuple(Series(**{**series, "x": tuple(series["x"]), "y": tuple(series["y"])}) for series in value["series"]),
            tuple(value["warnings"]), value["data"],
        )  # fmt: skip


class Exam(ABC):
    """A task as one model (beside one teacher) will sit it: rows rendered, tokenizers compared, nothing loaded."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Everything beside the models' weights that decides the numbers, as JSON values: the items' content, never a path."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many units the progress bar counts; `measure` calls `advance` with as many in all."""

    @abstractmethod
    def measure(self, subject: Subject, teacher: Subject | None, advance: Advance) -> Outcome: ...


class Task(ABC):
    """Something that models are measured on; `name` is its column in every table. `uses_teacher`: a teacher changes what it measures."""

    kind: str
    name: str
    role: Role
    uses_teacher: bool = False

    @abstractmethod
    def prepare(self, model: LoadingConfig, teacher: LoadingConfig | None) -> Exam | None:
        """Raises UsageError and its kinds for what cannot be measured. `teacher` is None where there is none, or the model is it.

        None where this model has nothing to sit: the teacher, in a task that compares with it and measures nothing else.
        """

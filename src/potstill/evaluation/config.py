"""What `potstill evaluate` and a study are asked to measure. Free of torch and transformers, so that a wrong request is refused at once."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from potstill.config import Config
from potstill.errors import UsageError
from potstill.evaluation.harness_config import HarnessTaskConfig
from potstill.evaluation.own_text_config import OwnTextTaskConfig
from potstill.evaluation.questions_config import QuestionsTaskConfig
from potstill.evaluation.samples_config import SamplesTaskConfig
from potstill.evaluation.speculation_config import SpeculationTaskConfig
from potstill.evaluation.task_config import TextTaskConfig
from potstill.models.config import LoadingConfig


def _kind(task: Any) -> str | None:
    """The kind that a task names; None where it is no task at all."""
    if isinstance(task, dict):
        kind = task.get("kind", "text")
        return kind if isinstance(kind, str) else repr(kind)
    return getattr(task, "kind", None)


AnyTask = Annotated[
    Annotated[TextTaskConfig, Tag("text")]
    | Annotated[QuestionsTaskConfig, Tag("questions")]
    | Annotated[SamplesTaskConfig, Tag("samples")]
    | Annotated[HarnessTaskConfig, Tag("harness")]
    | Annotated[OwnTextTaskConfig, Tag("own_text")]
    | Annotated[SpeculationTaskConfig, Tag("speculation")],
    Discriminator(_kind),
]  # fmt: skip


class MeasuringConfig(Config):
    """Which tasks, against which teacher if any, and how."""

    tasks: Annotated[list[AnyTask], Field(min_length=1)]
    """What is measured; each kind of task has its own keys."""
    teacher: LoadingConfig | None = None
    """The model that students are compared with. It is a row of the table too. Distances to it need the same tokenizer: a text is measured
    without them where it has another, and what cannot do without them refuses it."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Sequences that pass through the models at once."""
    precision: Literal["bf16", "float32"] | None = None
    """What the models compute in where their own `dtype` says nothing; by default bf16 on a GPU, else float32. Log-probabilities and
    sums are float32 and float64 either way."""
    device: str | None = None
    """Where the models run, such as cuda:1; by default a GPU if there is one."""
    samples: Annotated[int, Field(ge=0)] = 30
    """Written answers of each task that the record holds for human eyes, the same items for every model."""
    items: bool = False
    """Record every item's own numbers too."""

    @model_validator(mode="after")
    def _tasks_go_together(self) -> "MeasuringConfig":
        first: dict[str, int] = {}
        for place, task in enumerate(self.tasks):
            if first.setdefault(task.label, place) != place:
                before = first[task.label]
                raise ValueError(f"tasks[{place}].name: {task.label!r} is tasks[{before}] already; give one of them another name")
            if self.teacher is None and task.needs_teacher:
                raise ValueError(f"tasks[{place}]: {task.kind} compares the student with a teacher; name one, or leave the task out")
        return self


class EvaluationConfig(MeasuringConfig):
    """A table: models down, tasks across."""

    models: Annotated[dict[str, list[LoadingConfig]], Field(min_length=1)]
    """The models by the name that they have in the table; several under one name are the same training with other seeds."""
    baseline: str | None = None
    """The model that every other one is compared with; by default the first of several."""
    against: dict[str, str] | None = None
    """Which row each row is compared with, instead of one baseline for all: `{kd: sft, kd-fast: sft-fast}`. Rows not named are compared
    with none; `{}` compares none."""
    before: str | None = None
    """The student as it was before training: what was gained and forgotten is measured from it."""
    store: str | None = "evaluations"
    """The folder in which results are kept and found again, by the content of model and task; null keeps none."""

    @model_validator(mode="after")
    def _names_are_there(self) -> "EvaluationConfig":
        for key in ("baseline", "before"):
            name = getattr(self, key)
            if name is not None and name not in self.models:
                raise ValueError(f"{key}: {name!r} is no model of the table, which holds {', '.join(self.models)}")
        for name, other in (self.against or {}).items():
            for row in (name, other):
                if row not in self.models:
                    raise ValueError(f"against: {row!r} is no model of the table, which holds {', '.join(self.models)}")
            if name == other:
                raise ValueError(f"against.{name}: a row cannot be compared with itself")
        if self.against is not None and self.baseline is not None:
            raise ValueError("against: says what each row is compared with, and so does baseline for all; leave one of them out")
        if empty := [name for name, seeds in self.models.items() if not seeds]:
            raise ValueError(f"models.{empty[0]}: names no model")
        if len({len(seeds) for seeds in self.models.values() if len(seeds) > 1}) > 1:
            raise ValueError("models: seeds are paired, so every model of several seeds needs equally many of them, in the same order")
        return self


def refuse_output(output: Path | str | None) -> None:
    """Raises UsageError unless `output`, where the record is to be written, is the name of a JSON file."""
    if output is None:
        return
    path = Path(output)
    if path.suffix != ".json" or path.is_dir():
        better = path / "record.json" if path.is_dir() else path.with_suffix(".json")
        raise UsageError(f"{output}: the record is one JSON file; name it so, for instance {better}")

"""What a task of lm-evaluation-harness says. Free of torch and of the harness."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from potstill.evaluation.task_config import TaskConfig, name_of


class HarnessTaskConfig(TaskConfig):
    """A task of lm-evaluation-harness: one of its own by name, or a file that describes one."""

    kind: Literal["harness"]
    """A task of lm-evaluation-harness."""
    task: Annotated[str, Field(min_length=1)]
    """One of the harness's tasks or groups by name, such as hellaswag or mmlu, or a local task file (.yaml)."""
    data: str | dict[str, str] | None = None
    """Your own rows in the columns of the hub's data set: a .jsonl, .jsonl.gz, .json, .parquet or .csv file for the split that is asked,
    or a file for each split, as in `{train: examples.jsonl, test: rows.jsonl}`. By default the data set is fetched from the hub."""
    few_shot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples before each question; by default as many as the task itself says."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Ask only the first so many questions, of each task of a group."""
    chat_template: bool = False
    """Ask in the tokenizer's chat template, examples as earlier turns."""
    metric: str | None = None
    """The metric by which the task is judged, as the record names it; by default the published one (docs/harness.md)."""

    def default_name(self) -> str:
        return name_of(self.task.removesuffix(".yaml").removesuffix(".yml"))

    @property
    def file(self) -> Path | None:
        """The task file, where `task` is one and no name."""
        return Path(self.task).expanduser() if self.task.endswith((".yaml", ".yml")) else None

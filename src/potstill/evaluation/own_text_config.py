"""What the task on the student's own text says. Free of torch and transformers."""

from typing import Literal

from pydantic import Field

from potstill.evaluation.prompted_config import PromptedTaskConfig
from potstill.rollouts.config import SamplingConfig


class OwnTextTaskConfig(PromptedTaskConfig):
    """The student answers prompts, and student and teacher are compared on what it wrote: agreement where the student really goes, and
    exposure bias, the ratio of that distance to the distance on text that it did not write. Needs a teacher."""

    kind: Literal["own_text"]
    """Agreement on the student's own text."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How the student writes; the text beside it is cut at `sampling.max_new_tokens` too."""
    prefixes: Literal["dataset", "teacher"] = "dataset"
    """What the student's own text is held against: the rows' own answers, or the teacher's answers to the same prompts, drawn alike."""

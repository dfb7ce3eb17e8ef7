"""What the task on speculative decoding says. Free of torch and transformers."""

from typing import Annotated, Literal

from pydantic import Field

from potstill.evaluation.prompted_config import PromptedTaskConfig


class SpeculationTaskConfig(PromptedTaskConfig):
    """The student as the teacher's draft in speculative decoding (Leviathan et al. 2023): how many of its tokens the teacher keeps, how
    many tokens a round yields, and the speed-up that the cost of both models lets expect. Needs a teacher."""

    kind: Literal["speculation"]
    """The student as the teacher's draft."""
    drafts: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1)] = Field(default=[2, 4, 8])
    """Tokens drafted in a round, gamma in the paper; each is measured."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of both models, drafting and checking; 0: greedy decoding, where a draft is kept if it is the teacher's most likely token."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Where the teacher's answers are cut."""

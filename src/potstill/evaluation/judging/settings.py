"""What `potstill judge` is asked: who answers which prompts, how answers are written, and who judges. Free of torch and transformers."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from potstill.config import Config
from potstill.models.config import LoadingConfig
from potstill.rollouts.config import SamplingConfig
from potstill.serving.service import refuse_address

Format = Literal["alpaca_eval", "mt_bench"]
Style = Literal["pairs", "grade"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# The temperatures at which MT-Bench has its categories answered (Zheng et al. 2023, 2306.05685).
PUBLISHED_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip


class ContestantConfig(Config):
    """Who answers: a model that writes, or a file of answers that are written already."""

    name: Annotated[str | None, Field(pattern=NAME)] = None
    """What it is called in tables and files; by default after its path, or as the answers say who wrote them."""
    model: LoadingConfig | None = None
    """A chat model that writes its answers in this process."""
    answers: str | None = None
    """A file of answers: AlpacaEval's model_outputs.json, MT-Bench's model_answer.jsonl, or what this command wrote."""

    @model_validator(mode="after")
    def _one_source(self):
        if (self.model is None) == (self.answers is None):
            raise ValueError("answers: a contestant is a model or a file of answers; give one of model and answers")
        return self


class JudgedSamplingConfig(SamplingConfig):
    """How a next token is drawn: as elsewhere, with other defaults."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divides the writer's logits; 0 takes the most likely token."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024
    """Where an answer is cut that has not ended by itself."""


class WritingConfig(Config):
    """How the models write."""

    sampling: JudgedSamplingConfig = Field(default_factory=JudgedSamplingConfig)
    """How a next token is drawn."""
    category_temperatures: Literal["published"] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Temperatures of categories, over that of `sampling`: published (MT-Bench's own) or a mapping."""
    seed: int = 0
    """With the prompt and the turn it decides what is drawn."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Answers that are written side by side."""
    precision: Literal["bf16", "float32"] | None = None
    """What the models compute in where their own `dtype` says nothing; by default bf16 on a GPU, else float32."""
    device: str | None = None
    """Where the models run, such as cuda:1; by default a GPU if there is one."""

    def sampling_of(self, category: str) -> SamplingConfig:
        """How a prompt of this category is answered."""
        own = PUBLISHED_TEMPERATURES if self.category_temperatures == "published" else self.category_temperatures or {}
        return self.sampling.model_copy(update={"temperature": own.get(category, self.sampling.temperature)})


class JudgeConfig(Config):
    """The model that judges, behind an OpenAI-compatible server."""

    url: Annotated[str, Field(min_length=1)]
    """Where it listens; /v1/chat/completions is asked there."""
    model: Annotated[str, Field(min_length=1)]
    """The name under which it is served."""
    api_key_env: str | None = None
    """The environment variable that holds the key. The key itself never stands in a plan."""
    api_key_file: str | None = None
    """A file that holds the key."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """How its answers are drawn; null leaves it to the server."""
    max_tokens: Annotated[int, Field(ge=1)] | None = 2048
    """Where its answer is cut; null leaves it to the server."""
    body: dict[str, Any] = Field(default={})
    """More keys of each request, such as {max_completion_tokens: 2048, reasoning_effort: low}."""
    tries: Annotated[int, Field(ge=1, le=10)] = 3
    """How often a question is asked whose answers hold no verdict, before it counts as one without."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests under way at once, at most."""
    request_seconds: Annotated[float, Field(gt=0)] = 180.0
    """How long one request may take."""
    max_outage_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long the server may be away or refuse before the command stops, with everything committed."""

    @model_validator(mode="after")
    def _key_and_address(self):
        refuse_address(self.url, self.api_key_env, self.api_key_file)
        return self


class JudgingConfig(Config):
    """Two contestants and their prompts; without a judge their answers are written, and judged later."""

    first: ContestantConfig
    """Whose win rate is asked for: the student."""
    second: ContestantConfig | None = None
    """Whom it is compared with."""
    prompts: Annotated[str, Field(min_length=1)]
    """What is answered: a file or a name on the hub, AlpacaEval's instructions or MT-Bench's questions."""
    format: Format | None = None
    """Of the prompts; by default as their columns say."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only so many first prompts."""
    style: Style = "pairs"
    """pairs: which of two answers is better, asked in both orders. grade: each answer alone, from 1 to 10."""
    judge: JudgeConfig | None = None
    """Who judges; null: only write the answers."""
    annotations: str | None = None
    """In place of a judge: AlpacaEval's annotations.json, the preferences between the two that were judged elsewhere."""
    writing: WritingConfig = Field(default_factory=WritingConfig)
    """How the models write."""
    folder: Annotated[str, Field(min_length=1)]
    """Where answers, judgments and the record go."""
    samples: Annotated[int, Field(ge=0)] = 30
    """Prompts that the record shows with their answers and what the judge said."""

    @model_validator(mode="after")
    def _two_for_a_pair(self):
        if self.style == "pairs" and self.second is None:
            raise ValueError("second: a pair needs two contestants; name the other one, or grade one alone with style: grade")
        if self.annotations is not None and (self.judge is not None or self.style != "pairs"):
            raise ValueError("annotations: they are preferences between pairs, in place of a judge; leave out judge, and style: grade")
        return self

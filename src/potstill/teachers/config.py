"""Which teacher a recipe names: one of five kinds, a local one where none is named. Imports neither torch nor transformers."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from potstill.config import Config
from potstill.models.config import LoadingConfig
from potstill.serving.service import refuse_address


class LocalTeacherConfig(LoadingConfig):
    """A teacher in this process, quantised or with an adapter where the recipe says so."""

    kind: Literal["local"] = "local"
    """A model in this process."""
    sharded: bool = False
    """Spread its parameters over the ranks (FSDP2) instead of one copy on each."""


class CacheTeacherConfig(Config):
    """Answers that `potstill capture` has recorded; the teacher itself is not loaded."""

    kind: Literal["cache"]
    """Recorded answers."""
    path: Annotated[str, Field(min_length=1)]
    """The cache: a folder, or any path that fsspec knows (s3://..., memory://...)."""
    model: LoadingConfig | None = None
    """The model that must have made it, with the loading keys of a local teacher: its weights are compared with what the cache states."""


class ServerTeacherConfig(Config):
    """A teacher behind HTTP: vLLM's completions or SGLang's generate."""

    kind: Literal["server"]
    """A model behind HTTP."""
    url: Annotated[str, Field(min_length=1)]
    """Where the server listens, such as http://127.0.0.1:8000."""
    model: Annotated[str, Field(min_length=1)]
    """The name under which it serves the model."""
    backend: Literal["vllm", "sglang"] = "vllm"
    """How it is asked."""
    top_k: Annotated[int, Field(ge=1)] = 20
    """Outcomes asked for at each position; the server's own limit (--max-logprobs) must allow it."""
    tokenizer: str | None = None
    """The served model's tokenizer: a folder, or a name on the hub. Unset: ids and texts of a probe are compared."""
    api_key_env: str | None = None
    """The environment variable that holds the key. The key itself never stands in a recipe."""
    api_key_file: str | None = None
    """A file that holds the key."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests under way at once, at most."""
    sequences_per_request: Annotated[int, Field(ge=1)] = 4
    """Sequences in one request."""
    request_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long one request may take."""
    max_outage_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long the server may be away or refuse before the run stops, with everything committed."""
    probe_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How often a probe text is scored again, to notice another model behind the same address."""
    probe_tolerance: Annotated[float, Field(gt=0)] = 0.25
    """The largest drift of a probe's log-probability, in nats, that is still the same model. A server in bfloat16 rounds logits of 16 and
    more in steps of 1/8, differently from batch to batch."""

    @model_validator(mode="after")
    def _key_and_address(self):
        refuse_address(self.url, self.api_key_env, self.api_key_file)
        return self


class SelfTeacherConfig(Config):
    """The student itself, that sees more of the prompt (data.teacher_prompt): self-distillation with privileged context."""

    kind: Literal["self"]
    """The student itself."""
    weights: Literal["live", "base", "average"] = "base"
    """live: as they are now. base: without the student's adapter. average: an exponential moving average of them."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """average: what it keeps of itself at each optimizer step."""


def _kind(teacher: Any) -> str | None:
    """The kind that a section names; None where it is no section at all."""
    if isinstance(teacher, dict):
        kind = teacher.get("kind", "local")
        return kind if isinstance(kind, str) else repr(kind)
    return getattr(teacher, "kind", None)


_Local = Annotated[LocalTeacherConfig, Tag("local")]
_Cache = Annotated[CacheTeacherConfig, Tag("cache")]
_Server = Annotated[ServerTeacherConfig, Tag("server")]
_Self = Annotated[SelfTeacherConfig, Tag("self")]
SingleTeacherConfig = Annotated[_Local | _Cache | _Server, Discriminator(_kind)]


class EnsembleTeacherConfig(Config):
    """Several teachers with one tokenizer: a weighted mean of their probabilities, or each answering the rows that are its own."""

    kind: Literal["ensemble"]
    """Several teachers."""
    teachers: Annotated[dict[str, SingleTeacherConfig], Field(min_length=1)]
    """The teachers by name."""
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """The share of each in the mean, made to add up to 1; unset: equal shares."""
    column: str | None = None
    """A column of the data that names the teacher of each row; then nothing is averaged."""

    @model_validator(mode="after")
    def _names_agree(self):
        if self.weights is not None and self.column is not None:
            raise ValueError("column: rows go to one teacher each, or all are averaged by weights; leave out one of column and weights")
        if self.weights is not None and set(self.weights) != set(self.teachers):
            raise ValueError(f"weights: they name {sorted(self.weights)}, and the teachers are {sorted(self.teachers)}; name the same")
        return self


TeacherConfig = Annotated[_Local | _Cache | _Server | Annotated[EnsembleTeacherConfig, Tag("ensemble")] | _Self, Discriminator(_kind)]

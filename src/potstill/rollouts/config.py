"""Who writes the text that the student learns from, and how, as a recipe says it. Imports neither torch nor transformers."""

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from potstill.config import Config
from potstill.serving.service import refuse_address

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
AuthorName = Literal["dataset", "student", "teacher", "mixture", "teacher_mixed", "replay", "pair"]


class SamplingConfig(Config):
    """How a next token is drawn. What a model's own generation settings say is never looked at."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the writer's logits; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most likely tokens that hold this share of the mass; 1 from all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from so many most likely tokens; 0 from all."""
    max_new_tokens: Positive = 256
    """Where an answer is cut that has not ended by itself."""

    @property
    def whole(self) -> bool:
        """Whether every token can come: what estimators from drawn tokens need."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0


class LocalGeneratorConfig(Config):
    """The student writes in this process."""

    kind: Literal["local"] = "local"
    """In this process."""
    batch_size: Positive | None = None
    """Answers written side by side; null: all of an optimizer step."""


class VllmGeneratorConfig(Config):
    """A vLLM server writes, with weights that are given to it as the student learns."""

    kind: Literal["vllm"]
    """A vLLM server."""
    url: Annotated[str, Field(min_length=1)]
    """Where it listens, such as http://127.0.0.1:8000."""
    model: Annotated[str, Field(min_length=1)]
    """The name under which it serves the student."""
    weights: Literal["push", "adapter", "reload", "fixed"] = "push"
    """How it gets the student's weights: over NCCL on a GPU, as a LoRA adapter, from a folder that both see, or never."""
    folder: str | None = None
    """For adapter and reload: a folder that the server sees under the same path; by default one in the run folder."""
    every: Positive = 1
    """Optimizer steps between two updates of its weights: the text is at most so many steps old."""
    api_key_env: str | None = None
    """The environment variable that holds the key. The key itself never stands in a recipe."""
    api_key_file: str | None = None
    """A file that holds the key."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests under way at once, at most."""
    request_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long one request may take."""
    max_outage_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long the server may be away or refuse before the run stops, with everything committed."""

    @model_validator(mode="after")
    def _key_and_address(self):
        refuse_address(self.url, self.api_key_env, self.api_key_file)
        return self


def _kind(generator: Any) -> str | None:
    if isinstance(generator, dict):
        kind = generator.get("kind", "local")
        return kind if isinstance(kind, str) else repr(kind)
    return getattr(generator, "kind", None)


_Local = Annotated[LocalGeneratorConfig, Tag("local")]
_Vllm = Annotated[VllmGeneratorConfig, Tag("vllm")]
GeneratorConfig = Annotated[_Local | _Vllm, Discriminator(_kind)]


class ReplayConfig(Config):
    """Text of the student that is learned from more than once, and DistiLLM's schedule of how often (2402.03898)."""

    capacity: Positive = 1000
    """Answers in the buffer; the oldest leave first."""
    schedule: Literal["distillm", "constant"] = "distillm"
    """distillm: the threshold rises by `rise` where the cross-entropy on the validation set did, and fresh text becomes rarer as the run
    goes on; constant: the threshold stays, and half of the student's steps are on fresh text."""
    start: Share = 0.0
    """The threshold at the start: the probability that a step is taken on the student's text."""
    rise: Share = 0.1
    """What a worse validation adds to the threshold."""
    margin: Annotated[float, Field(ge=0)] = 0.1
    """How much higher that cross-entropy must be than at the last rise (before one: at the first validation), in nats a target, to count
    as worse."""

    @model_validator(mode="after")
    def _ever_the_student(self):
        if self.schedule == "constant" and self.start == 0:
            raise ValueError("start: 0, which a constant schedule never leaves, so that the student never writes; give a share above 0")
        return self


class PairConfig(Config):
    """Two answers to each prompt, the student's and another's, each with an objective of its own (DistiLLM-2, 2503.07067)."""

    student_weight: Annotated[float, Field(ge=0, le=2)] = 1.0
    """B: the weight of the student's text; the other's is 2 - B."""
    gradual: bool = False
    """B grows from 1 to 1.5 over the first half of the run, in place of student_weight."""


class TextConfig(Config):
    """Plain text that is learned beside, so that the student forgets less: MiniLLM's and DistiLLM's language-model loss."""

    path: Annotated[str, Field(min_length=1)]
    """A file or a hub name, as data.train."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """What its cross-entropy is multiplied by."""
    batch_size: Positive | None = None
    """Rows of a micro-batch; null: as training.batch_size."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longer texts are cut into pieces of so many tokens; null: data.max_tokens."""
    column: Annotated[str, Field(min_length=1)] = "text"
    """The column that holds it, where the file has columns."""


class RewardConfig(Config):
    """What a task gives for an answer, beside the divergence: REINFORCE with the mean of the other answers as its baseline."""

    function: Annotated[str, Field(min_length=1)]
    """FILE.py:NAME or MODULE:NAME of a Python function of yours: (prompt, answer, reference, row) -> number."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """What it is multiplied by."""

    @model_validator(mode="after")
    def _named(self):
        if re.fullmatch(r".+:[A-Za-z_][A-Za-z0-9_]*", self.function) is None:
            raise ValueError(f"function: {self.function!r} names no function; write FILE.py:NAME or MODULE:NAME")
        return self


class WatchConfig(Config):
    """When a warning is given that the student collapses; 0 gives none."""

    min_length: Annotated[float, Field(ge=0)] = 0.2
    """Answers shorter than this share of the first ones'."""
    min_entropy: Annotated[float, Field(ge=0)] = 0.1
    """Entropy below this share of the first answers'."""
    max_repeated: Share = 0.5
    """Share of 4-grams that an answer has had before."""
    max_cut: Share = 0.9
    """Share of answers that do not end."""


# Keys that mean something to some authors alone.
_OF_AUTHORS: dict[str, tuple[AuthorName, ...]] = {
    "student": ("mixture",), "teacher_share": ("teacher_mixed",), "replay": ("replay",), "pair": ("pair",),
    "others": ("mixture", "replay", "pair"),
}  # fmt: skip


class RolloutsConfig(Config):
    """Who writes the text that the student learns from. Without this section the data set does."""

    author: AuthorName = "student"
    """dataset; student; teacher (sequence-level KD); mixture (GKD: the student or the data set, step by step); teacher_mixed (each token
    from a mixture of teacher and student, MiniLLM); replay (a buffer of the student's text, DistiLLM); pair (both, DistiLLM-2)."""
    student: Share = 0.5
    """mixture: the probability that a step is taken on the student's text, GKD's lmbda."""
    others: Literal["dataset", "teacher"] = "dataset"
    """mixture, replay and pair: who writes what the student does not."""
    teacher_share: Share = 0.2
    """teacher_mixed: the teacher's share in the mixture that tokens are drawn from, MiniLLM's alpha."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How the student's tokens are drawn."""
    teacher_sampling: SamplingConfig | None = None
    """How the teacher's tokens are drawn where it writes; null: as the student's."""
    generator: GeneratorConfig = Field(default_factory=LocalGeneratorConfig)
    """Where the student writes."""
    prompt_tokens: Positive | None = None
    """For data of the format text: so many first tokens of each text are its prompt."""
    prompt_too_long: Literal["error", "drop", "truncate_left"] = "error"
    """What becomes of a prompt that leaves no room for max_new_tokens within data.max_tokens."""
    cut_answers: Literal["keep", "drop"] = "keep"
    """Whether answers are learned from that were cut at max_new_tokens. They never get an end-of-text target."""
    foreign_end: Literal["refuse", "keep", "mask"] = "refuse"
    """The student's end-of-text token where the teacher does not stop at it: refuse the run, learn it all the same, or leave it out."""
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    """Of the author replay."""
    pair: PairConfig = Field(default_factory=PairConfig)
    """Of the author pair."""
    text: TextConfig | None = None
    """Plain text to learn beside."""
    reward: RewardConfig | None = None
    """A task's reward for the student's answers."""
    watch: WatchConfig = Field(default_factory=WatchConfig)
    """When to warn of a collapse."""
    keep_texts: Annotated[int, Field(ge=0)] = 2
    """Answers of a logged step that are written to the run folder's rollouts.jsonl."""

    @model_validator(mode="after")
    def _of_the_author(self):
        for key in self.idle:
            if key in self.model_fields_set:
                authors = " or ".join(_OF_AUTHORS[key])
                raise ValueError(f"{key}: is of the author {authors}, and the author is {self.author}; leave it out")
        if self.author == "dataset" and self.reward is not None:
            raise ValueError("reward: the author is dataset, and a reward is for what the student writes; choose another author")
        return self

    @property
    def idle(self) -> list[str]:
        """The keys that mean nothing to this author, and that a recipe with it must not hold."""
        return [key for key, authors in _OF_AUTHORS.items() if self.author not in authors]

    @property
    def student_writes(self) -> bool:
        """Whether any text is the student's. A mixture with a share of 0 is the data set."""
        return self.author in ("student", "teacher_mixed", "replay", "pair") or (self.author == "mixture" and self.student > 0)

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher must be at hand to write."""
        return self.author in ("teacher", "teacher_mixed") or (self.author in ("mixture", "replay", "pair") and self.others == "teacher")

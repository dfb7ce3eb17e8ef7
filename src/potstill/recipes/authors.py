"""From the rollouts section to an author: the one place that knows every kind of author, writer and generator, and joins them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from potstill.errors import IncompatibleError
from potstill.models.causal_lm import CausalLM
from potstill.recipes.preparation import Preparation
from potstill.recipes.schema import Recipe
from potstill.recipes.writing import Writing, columns_of, folder_of_weights
from potstill.rollouts.author import Author
from potstill.rollouts.authors import MixtureAuthor, OneAuthor
from potstill.rollouts.config import RolloutsConfig, SamplingConfig, VllmGeneratorConfig
from potstill.rollouts.endings import Endings
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.pairs import PairAuthor
from potstill.rollouts.replay import ReplayAuthor
from potstill.rollouts.reward import Reward
from potstill.rollouts.watch import Watch
from potstill.rollouts.writer import Writer
from potstill.rollouts.writing import Generator, Sampling
from potstill.teachers.config import ServerTeacherConfig
from potstill.teachers.local import LocalTeacher
from potstill.teachers.teacher import Teacher
from potstill.training.processes import Ranks


def make_author(
    recipe: Recipe, preparation: Preparation, student: CausalLM, teacher: Teacher | None, ranks: Ranks, *, num_steps: int
) -> Author | None:
    """The author of a recipe; None where the data set writes. Raises PotstillError; where it raises nothing stays open."""
    rollouts, writing = recipe.rollouts, preparation.writing
    if rollouts is None or writing is None:
        return None
    with ExitStack() as opened:
        made = _Writers(recipe, rollouts, preparation, writing, student, teacher, ranks)
        own = made.student() if rollouts.author != "teacher" else None
        if own is not None:
            opened.callback(own.close)
        other = made.teacher() if rollouts.teacher_writes and rollouts.author != "teacher_mixed" else None
        if other is not None:
            opened.callback(other.close)
        author = _author(recipe, rollouts, own, other, ranks, num_steps)
        opened.pop_all()
    return author


def _author(
    recipe: Recipe, rollouts: RolloutsConfig, own: Writer | None, other: Writer | None, ranks: Ranks, num_steps: int
) -> Author:
    if own is None:
        assert other is not None
        return OneAuthor("teacher", other)
    if rollouts.author == "mixture":
        return MixtureAuthor(own, other, rollouts.student, recipe.run.seed)
    if rollouts.author == "replay":
        return ReplayAuthor(own, other, rollouts.replay, seed=recipe.run.seed, num_steps=num_steps, group=ranks)
    if rollouts.author == "pair":
        return PairAuthor(own, other, rollouts.pair, num_steps=num_steps)
    return OneAuthor("student", own)


class _Writers:
    """The writers of one run: what they share, and what each has of its own."""

    def __init__(
        self, recipe: Recipe, rollouts: RolloutsConfig, preparation: Preparation, writing: Writing, student: CausalLM,
        teacher: Teacher | None, ranks: Ranks,
    ):  # fmt: skip
        self._recipe, self._rollouts, self._preparation, self._writing = recipe, rollouts, preparation, writing
        self._student, self._teacher, self._ranks = student, teacher, ranks

    def student(self) -> Writer:
        return self._writer("student", self._student_generator(), self._rollouts.sampling, self._writing.stops)

    def teacher(self) -> Writer:
        sampling = self._rollouts.teacher_sampling or self._rollouts.sampling
        return self._writer("teacher", self._teacher_generator(), sampling, self._writing.teacher_stops)

    def _writer(self, by: Literal["student", "teacher"], generator: Generator, config: SamplingConfig, stops: Sequence[int]) -> Writer:
        rollouts, writing, own = self._rollouts, self._writing, by == "student"
        endings = Endings(stops, writing.foreign & set(stops), rollouts.foreign_end, rollouts.cut_answers)
        return Writer(
            writing.prompts, generator, Sampling(**config.model_dump()), endings, seed=self._recipe.run.seed, by=by,
            reward=self._reward() if own else None, group=self._ranks, watch=Watch(rollouts.watch) if own else None,
            keep_texts=rollouts.keep_texts, decode=self._decode(marks=True),
        )  # fmt: skip

    def _decode(self, *, marks: bool) -> Callable[[Sequence[int]], str]:
        tokenizer = self._preparation.student.tokenizer
        return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=not marks))

    def _reward(self) -> Reward | None:
        function = self._writing.reward
        if function is None:
            return None
        return Reward(function, self._writing.prompts.__getitem__, self._decode(marks=False), columns_of(self._recipe, self._preparation))

    # ------------------------------------------------------------ generators

    def _student_generator(self) -> Generator:
        config = self._rollouts.generator
        if isinstance(config, VllmGeneratorConfig):
            from potstill.rollouts.vllm import VllmGenerator

            folder = Path(config.folder) if config.folder is not None else folder_of_weights(self._recipe)
            return VllmGenerator(
                config, stop_ids=self._writing.stops, vocabulary_size=self._student.vocabulary_size, student=self._student, folder=folder,
                group=self._ranks,
            )  # fmt: skip
        if self._rollouts.author != "teacher_mixed":
            return self._local(self._student, self._writing.stops)
        return self._local(self._student, self._writing.stops, teacher=_whole(self._teacher), share=self._rollouts.teacher_share)

    def _teacher_generator(self) -> Generator:
        config = self._recipe.teacher
        if isinstance(config, ServerTeacherConfig):
            from potstill.rollouts.vllm import VllmGenerator

            served = VllmGeneratorConfig(
                kind="vllm", url=config.url, model=config.model, weights="fixed", api_key_env=config.api_key_env,
                api_key_file=config.api_key_file, concurrency=config.concurrency, request_seconds=config.request_seconds,
                max_outage_seconds=config.max_outage_seconds,
            )  # fmt: skip
            stops, size = self._writing.teacher_stops, self._student.vocabulary_size
            return VllmGenerator(served, stop_ids=stops, vocabulary_size=size, group=self._ranks, writer="teacher")
        return self._local(_whole(self._teacher), self._writing.teacher_stops)

    def _local(self, model: CausalLM, stops: Sequence[int], *, teacher: CausalLM | None = None, share: float = 0.0) -> LocalGenerator:
        # Ranks that share the parameters must read equally often; where each has all of them they need not.
        together = self._recipe.training.fsdp and self._ranks.together
        agree = (lambda more: self._ranks.largest([more])[0] > 0) if together else None
        return LocalGenerator(
            model, stop_ids=stops, pad_token=self._preparation.pad_token, teacher=teacher, teacher_share=share, agree=agree,
            batch_size=getattr(self._rollouts.generator, "batch_size", None),
        )  # fmt: skip


def _whole(teacher: Teacher | None) -> CausalLM:
    if not isinstance(teacher, LocalTeacher):
        found = "there is none" if teacher is None else f"it is {teacher.name}"
        raise IncompatibleError(f"rollouts.author: the teacher must be a model in this process to write, and {found}; name a local one")
    return teacher.causal_lm

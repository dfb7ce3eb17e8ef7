"""Rows as prompts that models go on from: the same prompts, names and seeds for every model that reads alike; and what they write.

Prompts are rendered as training renders them (`data.asking`); what is refused is refused before any weights are read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from potstill.batch import Batch, Example
from potstill.data.asking import ask
from potstill.data.collation import collate
from potstill.data.formats import read_item
from potstill.data.rendering import Rendered
from potstill.errors import DataError, IncompatibleError
from potstill.evaluation.exact_match import answer_ends
from potstill.evaluation.items import item_names
from potstill.evaluation.prompted_config import PromptedTaskConfig
from potstill.evaluation.task import Advance, Subject
from potstill.models.config import LoadingConfig
from potstill.models.identity import template_digest, tokenizer_digest
from potstill.models.loading import load_tokenizer, longest_context, read_model_config
from potstill.models.tokenizers import compare_tokenizers, refuse_different
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.writing import Completion, Prompt, Sampling, seed_of


@dataclass(frozen=True)
class Prompted:
    """P prompts by the names of their rows, and the tokens of the rows' own answers (empty where a row has none). `ends`: what the chat
    template ends an answer with."""

    names: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    rows: int
    ends: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def select(self, kept: Sequence[int], warning: str) -> "Prompted":
        """These places alone."""
        def of(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[place] for place in kept)

        return Prompted(of(self.names), of(self.prompts), of(self.answers), self.rows, self.ends, (*self.warnings, warning))

    @property
    def digest(self) -> str:
        """Of the prompts, the answers and the names."""
        hashed = xxhash.xxh3_128()
        for name, *tokens in zip(self.names, self.prompts, self.answers, strict=True):
            hashed.update(name.encode() + b"\0")
            for part in tokens:
                hashed.update(np.array([len(part), *part], dtype="<i4").tobytes())
        return hashed.hexdigest()

    def batches(self, answers: Sequence[Sequence[int]], batch_size: int) -> Iterator[Batch]:
        """The prompts with these answers [P], whose tokens are the targets, the longest first; Example.index is the prompt's place."""
        examples = [
            Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), place)
            for place, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True))
        ]  # fmt: skip
        examples.sort(key=lambda example: -len(example.tokens))
        for start in range(0, len(examples), batch_size):
            # No column more than there are tokens: a model whose positions are learned may have none.
            yield collate([[example] for example in examples[start : start + batch_size]], pad_token=0, multiple_of=None)


@dataclass(frozen=True)
class Pair:
    """What a student and a teacher that read alike stop at, and the tokens that both can read at once."""

    student_ends: tuple[int, ...]
    teacher_ends: tuple[int, ...]
    vocabulary_size: int


class PromptReader:
    """Reads the rows of one task once for all models that read alike. `max_new_tokens` is the room that an answer needs."""

    def __init__(self, config: PromptedTaskConfig, max_new_tokens: int):
        self._config, self._room = config, max_new_tokens
        self._read: dict[tuple, Prompted] = {}

    def prepare(self, model: LoadingConfig, teacher: LoadingConfig) -> tuple[Prompted, Pair]:
        """The prompts, and what the pair of models has in common. Raises IncompatibleError where they do not read the same tokens."""
        tokenizer, others = load_tokenizer(model), load_tokenizer(teacher)
        saved = [read_model_config(one) for one in (model, teacher)]
        widths = [one.get_text_config().vocab_size for one in saved]
        comparison = compare_tokenizers(tokenizer, others, student_width=widths[0], teacher_width=widths[1])
        try:
            refuse_different(comparison, model.path, teacher.path)
        except IncompatibleError as error:
            raise IncompatibleError(f"{self._config.label}: {error}; or leave this task or the teacher out") from error
        contexts = [context for one in saved if (context := longest_context(one)) is not None]
        context = min([self._config.data.max_tokens, *contexts])
        ends = [answer_ends(model, tokenizer), answer_ends(teacher, others)]
        key = tokenizer_digest(tokenizer), template_digest(tokenizer), ends[0], context
        if key not in self._read:
            self._read[key] = self._prompts(tokenizer, ends[0], context)
        prompted = self._read[key]
        student_ends, teacher_ends = (tuple(sorted({*own, *prompted.ends})) for own in ends)
        return prompted, Pair(student_ends, teacher_ends, comparison.vocabulary_size)

    def refuse(self, why: str) -> NoReturn:
        """Raises DataError, naming the task and its data."""
        raise DataError(f"{self._config.label}: {self._config.data.sources[0].path}: {why}")

    def _prompts(self, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], context: int) -> Prompted:
        config = self._config
        asked = ask(config.data, tokenizer, seed=0, end_of_text=ends, prompt_tokens=config.prompt_tokens)
        names = item_names([question.row.origin for question in asked.questions])
        # A row that a mixture draws twice is asked once.
        first = {name: place for place, name in reversed(list(enumerate(names)))}
        questions = {name: asked.questions[first[name]] for name in dict.fromkeys(names)}
        rendered = asked.renderer.render([read_item(question.row, question.reading) for question in questions.values()])
        answers = [_own_answer(one, len(question.tokens), question.reading.format)
                   for one, question in zip(rendered, questions.values(), strict=True)]  # fmt: skip
        found = Prompted(
            tuple(questions), tuple(tuple(question.tokens) for question in questions.values()),
            tuple(answer[: self._room] for answer in answers), asked.rows, tuple(asked.ends()),
            (f"{asked.rejected} of {asked.rows + asked.rejected} rows were malformed and are not in the numbers",) * bool(asked.rejected),
        )  # fmt: skip
        return self._fitting(found, context)

    def _fitting(self, found: Prompted, context: int) -> Prompted:
        kept = [place for place, prompt in enumerate(found.prompts) if len(prompt) + self._room <= context]
        left_out = len(found.prompts) - len(kept)
        if left_out and (self._config.data.too_long == "error" or not kept):
            longest = max(range(len(found.prompts)), key=lambda place: len(found.prompts[place]))
            raise DataError(
                f"{self._config.label}: {left_out} of {len(found.prompts)} prompts leave no room for {self._room} new tokens within "
                f"{context} (data.max_tokens, or a model's context); the longest has {len(found.prompts[longest])} "
                f"({found.names[longest]}). Lower max_new_tokens, raise data.max_tokens, or set data.too_long: drop"
            )
        if not found.prompts:
            raise DataError(f"{self._config.label}: none of {found.rows} rows can be asked; look at data.format and data.columns")
        return found.select(kept, f"{left_out} of {found.rows} prompts were too long and are not in the numbers") if left_out else found


def _own_answer(rendered: Any, prompt_length: int, format: str) -> tuple[int, ...]:
    """The tokens of a row's own last answer; of the format text all that follows the prompt."""
    if not isinstance(rendered, Rendered) or not rendered.spans:
        return ()
    start, end = rendered.spans[-1]
    return tuple(rendered.tokens[prompt_length if format == "text" else start : end])


@dataclass(frozen=True)
class Pen:
    """How answers are written: what ends them, how they are drawn, from which seed."""

    ends: tuple[int, ...]
    sampling: Sampling
    seed: int

    def write(self, subject: Subject, prompted: Prompted, advance: Advance) -> list[Completion]:
        """One answer a prompt. What is drawn hangs on the prompt's place and the seed alone; at temperature 0 nothing is drawn."""
        generator = LocalGenerator(subject.model, stop_ids=self.ends, pad_token=0)
        written: list[Completion | None] = [None] * len(prompted.prompts)
        order = sorted(range(len(written)), key=lambda place: -len(prompted.prompts[place]))
        for start in range(0, len(order), subject.batch_size):
            places = order[start : start + subject.batch_size]
            prompts = [Prompt(prompted.prompts[place], seed_of(self.seed, place)) for place in places]
            for place, completion in zip(places, generator.generate(prompts, self.sampling), strict=True):
                written[place] = completion
            advance(len(places))
        return [completion for completion in written if completion is not None]


class Written:
    """What the teacher wrote to the prompts of a task, once for all students."""

    def __init__(self):
        self._found: dict[tuple[str, str], list[Completion]] = {}

    def take(self, teacher: Subject, identity: Mapping[str, Any], write: Callable[[], list[Completion]], advance: Advance, count: int):
        """Completions by teacher and by `identity`; where they are known `advance` is told that `count` are done."""
        key = teacher.config.model_dump_json(), repr(sorted(identity.items()))
        if key in self._found:
            advance(count)
        else:
            self._found[key] = write()
        return self._found[key]

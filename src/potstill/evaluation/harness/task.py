"""A task of lm-evaluation-harness as a kind of task of an evaluation: prepared without weights, measured in memory."""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from potstill.errors import ModelError
from potstill.evaluation.harness.building import Questions, build_questions
from potstill.evaluation.harness.choices import add_calibration, choice_of, samples_of
from potstill.evaluation.harness.quiet import quietly
from potstill.evaluation.harness.scoring import answered_questions, fill, primary_metric
from potstill.evaluation.harness_config import HarnessTaskConfig
from potstill.evaluation.task import Advance, Exam, Outcome, Subject, Task
from potstill.models.config import LoadingConfig
from potstill.models.identity import tokenizer_digest
from potstill.models.loading import configured_ends, generation_settings, load_tokenizer, longest_context, read_model_config

_TOO_LONG = "exceeds model's maximum length"
_CUT = "Left truncation applied"
_OF_OUR_CALL = ("`pretrained` model kwarg", "Passed an already-initialized model")
_SHOWN = 5


class HarnessTask(Task):
    kind = "harness"

    def __init__(self, config: HarnessTaskConfig):
        self.config, self.name, self.role = config, config.label, config.role
        self._questions: Questions | None = None

    def prepare(self, model: LoadingConfig, teacher: LoadingConfig | None) -> "HarnessExam":
        self._questions = self._questions or build_questions(self.config)
        tokenizer = load_tokenizer(model)
        template = tokenizer.chat_template if self.config.chat_template else None
        if self.config.chat_template and not template:
            raise ModelError(f"{model.path}: has no chat template; say model.chat_template: chatml or another, or leave chat_template out")
        reach, longest = longest_context(read_model_config(model)), self._questions.longest_answer
        if reach is not None and longest >= reach:
            raise ModelError(f"{model.path}: reads {reach} tokens, and {self.name} lets a model write {longest} after its question")
        own = _writing(model) if longest else {}
        return HarnessExam(self.config, self._questions, tokenizer, template, own)


def _writing(model: LoadingConfig) -> dict[str, Any]:
    """What decides how the harness lets a model write beside its weights: its saved ends, penalties and ways of drawing."""
    settings = generation_settings(model)
    stated = {} if settings is None else settings.to_diff_dict()
    return {"ends": configured_ends(read_model_config(model)), "writes": {k: v for k, v in stated.items() if k != "transformers_version"}}


class HarnessExam(Exam):
    def __init__(
        self, config: HarnessTaskConfig, questions: Questions, tokenizer: PreTrainedTokenizerBase, template: Any, own: Mapping[str, Any]
    ):
        self.config, self.questions = config, questions
        read = {"tokenizer": tokenizer_digest(tokenizer), "reach": tokenizer.model_max_length, "chat template": template}
        self._identity = {**questions.identity, **read, **own, "metric": config.metric}

    @property
    def identity(self) -> Mapping[str, Any]:
        """The task's settings, every question as it is asked, and the version of the harness."""
        return self._identity

    @property
    def size(self) -> int:
        """Requests: for a question with choices one for each of them."""
        return self.questions.size

    def measure(self, subject: Subject, teacher: Subject | None, advance: Advance) -> Outcome:
        with quietly() as notes, _seeded():
            results = _ask(self.questions, self.config, subject, advance)
        answered = answered_questions(self.questions, results)
        table = fill(self.questions, results, answered)
        primary = primary_metric(self.config.metric, self.questions, table.metrics)
        choices = [choice_of(self.questions.tasks[one.task], one.first) for one in answered]
        samples = samples_of(self.questions, answered, choices, table, primary)
        series = add_calibration(table, choices)
        return Outcome(
            table.scores(primary), tuple(samples), () if series is None else (series,),
            (*table.warnings, *_said(notes.messages)), dict(self.questions.facts),
        )  # fmt: skip


def _ask(questions: Questions, config: HarnessTaskConfig, subject: Subject, advance: Advance) -> Mapping[str, Any]:
    """The harness's own evaluation of a model that is in memory, with its own handling of long text, padding and generation."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    inner = subject.model.inner
    # It sets a padding token, and the tokenizer is not its own.
    make: Any = HFLM
    model = make(pretrained=inner, tokenizer=copy.deepcopy(subject.tokenizer), batch_size=subject.batch_size)
    model.set_cache_hook(_Counter(advance))
    ask: Any = lm_eval.evaluate
    results = ask(
        lm=model, task_dict=dict(questions.loaded), limit=questions.limit, bootstrap_iters=0, log_samples=True,
        apply_chat_template=config.chat_template, fewshot_as_multiturn=True,
    )  # fmt: skip
    assert results is not None  # one process
    return results


class _Counter:
    """Is told of each answer where the harness would keep it."""

    def __init__(self, advance: Advance):
        self._advance = advance

    def add_partial(self, attr: str, request: Any, answer: Any) -> None:
        self._advance(1)


@contextmanager
def _seeded() -> Iterator[None]:
    """The harness's own seeds, for tasks that sample; ours go on afterwards as if nothing had been drawn."""
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


def _said(messages: list[str]) -> list[str]:
    """What the harness warned of while it asked, each thing once."""
    long = sum(_TOO_LONG in message for message in messages)
    cut = sum(message.startswith(_CUT) for message in messages)
    others = [message.splitlines()[0] for message in messages if message and _TOO_LONG not in message]
    return [
        *([f"{long} requests were longer than the model reads and lost their beginning"] if long else []),
        *([f"{cut} batches of prompts left no room for an answer and lost their beginning"] if cut else []),
        *list(dict.fromkeys(message for message in others if not message.startswith((_CUT, *_OF_OUR_CALL))))[:_SHOWN],
    ]

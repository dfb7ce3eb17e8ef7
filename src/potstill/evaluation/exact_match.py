"""Lets a model answer prompts greedily and has a program check each answer. Knows nothing of tasks: the caller brings the checker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from potstill.errors import DataError, ModelError
from potstill.evaluation.scores import Scores, mean
from potstill.evaluation.statistics import Estimate, proportion_of
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.loading import configured_ends, read_model_config, stop_ids
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.writing import Completion, Prompt, Sampling

EXACT_MATCH = "exact_match"


@dataclass(frozen=True)
class Question:
    """A rendered prompt, generation prompt included, and the program that says whether the answer's text is right."""

    prompt: Sequence[int]
    is_right: Callable[[str], bool]
    index: int


@dataclass(frozen=True)
class Answer:
    """What a model wrote: `tokens` without the stop token; `stopped` is False where `max_new_tokens` cut it."""

    index: int
    text: str
    correct: bool
    tokens: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True)
class ExactMatch:
    """Accuracy over questions and every answer, in the order of the questions."""

    accuracy: Estimate
    answers: tuple[Answer, ...]

    @property
    def correct(self) -> np.ndarray:
        """1.0 where the answer is right, by question [I]; what paired comparisons take."""
        return np.array([answer.correct for answer in self.answers], dtype=np.float64)

    def scores(self) -> Scores:
        """The table of right answers, a question an item, in the order of their numbers."""
        ordered = sorted(self.answers, key=lambda answer: answer.index)
        totals = np.array([[answer.correct, 1] for answer in ordered], dtype=np.float64)
        metrics = {EXACT_MATCH: mean("exact-match accuracy", "right")}
        return Scores(tuple(str(answer.index) for answer in ordered), ("right", "questions"), totals, metrics, EXACT_MATCH)


def exact_match(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *,
    max_new_tokens: int, batch_size: int = 32, on_answers: Callable[[int], None] | None = None,
) -> ExactMatch:  # fmt: skip
    """Greedy answers to all questions and the share that is right. `on_answers` is called with how many were just answered."""
    if not questions:
        raise DataError("there is no question to answer; check the data and its split")
    written = generate_greedily(
        model, [question.prompt for question in questions], max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens(model, tokenizer), batch_size=batch_size, on_answers=on_answers,
    )  # fmt: skip
    answers = []
    for question, (tokens, stopped) in zip(questions, written, strict=True):
        text = str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        answers.append(Answer(question.index, text, bool(question.is_right(text)), tuple(tokens), stopped))
    return ExactMatch(proportion_of([answer.correct for answer in answers]), tuple(answers))


def stop_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's EOS and those of the model's configurations (Llama 3 has several)."""
    configured = [model.inner.config.get_text_config().eos_token_id]
    if model.inner.generation_config is not None:
        configured.append(model.inner.generation_config.eos_token_id)
    found: set[int] = set()
    for named in (tokenizer.eos_token_id, *configured):
        found.update(int(token) for token in (named if isinstance(named, list) else [named]) if isinstance(token, int))
    if not found:
        raise DataError(f"{model.name}: neither the tokenizer nor the model names an end-of-sequence token; set tokenizer.eos_token")
    return frozenset(found)


def answer_ends(config: LoadingConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The `stop_tokens` of a model that is not loaded yet, from its files, each once. Raises ModelError where they name none."""
    saved, eos = read_model_config(config), tokenizer.eos_token_id
    own = (eos,) if isinstance(eos, int) else ()
    ends = tuple(dict.fromkeys((*stop_ids(config, saved), *configured_ends(saved), *own)))
    if not ends:
        raise ModelError(f"{config.path}: neither its tokenizer nor its configuration names a token that ends an answer; set eos_token")
    return ends


def generate_greedily(
    model: CausalLM, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_tokens: frozenset[int],
    batch_size: int = 32, on_answers: Callable[[int], None] | None = None,
) -> list[tuple[list[int], bool]]:  # fmt: skip
    """For each prompt the greedy continuation without its stop token, and whether it stopped by itself.

    Prompts of like length share a batch. Padded vocabulary rows are never chosen.
    """
    greedy = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    asked = [Prompt(tuple(prompt), seed=0) for prompt in prompts]
    found = write_all(model, asked, greedy, stop_tokens=stop_tokens, batch_size=batch_size, on_answers=on_answers)
    return [(list(completion.tokens[: len(completion.tokens) - completion.ended]), completion.ended) for completion in found]


def write_all(
    model: CausalLM, prompts: Sequence[Prompt], sampling: Sampling, *, stop_tokens: frozenset[int], batch_size: int = 32,
    on_answers: Callable[[int], None] | None = None,
) -> list[Completion]:  # fmt: skip
    """One completion a prompt, in their order, the same for any batch size."""
    empty = [position for position, prompt in enumerate(prompts) if len(prompt.tokens) == 0]
    if empty:
        raise DataError(f"prompt {empty[0]} is empty; a model needs at least one token to continue")
    generator = LocalGenerator(model, stop_ids=sorted(stop_tokens), pad_token=0)
    written: dict[int, Completion] = {}
    # Longest first: what is going to fail for want of memory fails at once.
    order = sorted(range(len(prompts)), key=lambda position: -len(prompts[position].tokens))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        written.update(zip(chosen, generator.generate([prompts[position] for position in chosen], sampling), strict=True))
        if on_answers is not None:
            on_answers(len(chosen))
    return [written[position] for position in range(len(prompts))]

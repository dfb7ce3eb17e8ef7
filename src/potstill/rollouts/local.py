"""Writes in this process, with the student as it is at this moment: a decoding loop of our own over the model's key-value cache.

transformers' `generate` is not used: it reads the model's generation settings, draws from the one random state of the process, and
carries finished rows along. What a token is drawn from is drawing.py's affair, how a model reads is reading.py's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from potstill.errors import IncompatibleError, UsageError
from potstill.models.causal_lm import CausalLM, evaluating
from potstill.rollouts.drawing import draw, uniforms
from potstill.rollouts.mixed import mixture
from potstill.rollouts.reading import Reader, Voice, reach, require_cache
from potstill.rollouts.writing import Completion, Prompt, Sampling


class LocalGenerator:
    """Answers prompts with `model`; with a `teacher`, every token is drawn from teacher_share * teacher + (1 - teacher_share) * model.

    `stop_ids` end an answer, any of them. At most `batch_size` answers are written side by side; None: all.
    Where ranks share the parameters, `agree` says whether any rank still has rows, and `enter` is a context in which the
    parameters of the root are whole; every rank must then call `generate` equally often.
    """

    def __init__(
        self, model: CausalLM, *, stop_ids: Sequence[int], pad_token: int, batch_size: int | None = None, teacher: CausalLM | None = None,
        teacher_share: float = 0.0, agree: Callable[[bool], bool] | None = None,
        enter: Callable[[], AbstractContextManager] | None = None,
    ):  # fmt: skip
        """Raises ModelError for a model without a key-value cache, IncompatibleError where the teacher counts other tokens."""
        for writer in (model, teacher):
            if writer is not None:
                require_cache(writer)
        if teacher is not None and teacher.vocabulary_size != model.vocabulary_size:
            raise IncompatibleError(
                f"{model.name} knows {model.vocabulary_size} tokens and {teacher.name} {teacher.vocabulary_size}; "
                "a mixture of both needs the same tokenizer"
            )
        self._model, self._teacher, self._share = model, teacher, teacher_share
        self._stop_ids, self._pad_token, self._batch_size = frozenset(stop_ids), pad_token, batch_size
        self._reaches = [(model, reach(model), _own), *([] if teacher is None else [(teacher, reach(teacher), _of_the_teacher)])]
        self._agree = agree
        self._enter = enter or nullcontext
        self._check: Callable[[], None] = _nothing
        self._version = 0

    @property
    def name(self) -> str:
        return f"the local generator with {self._model.name}"

    def refresh(self, step: int) -> None:
        """The weights are always those of the model; only their number is noted."""
        self._version = step

    def heed(self, check: Callable[[], None]) -> None:
        """`check` is called before each token."""
        self._check = check

    def close(self) -> None:
        """Nothing is held open."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in their order. Raises UsageError for an empty prompt, and for one beyond a table of positions."""
        for number, prompt in enumerate(prompts):
            self._require(number, prompt, sampling)
        completions: list[Completion | None] = [None] * len(prompts)
        writers = [self._model] if self._teacher is None else [self._model, self._teacher]
        with self._enter(), evaluating(*writers):
            voices = [Voice(writer, self._model.vocabulary_size) for writer in writers]
            for rows in _batches(prompts, self._batch_size):
                for row, completion in zip(rows, self._write(voices, [prompts[row] for row in rows], sampling), strict=True):
                    completions[row] = completion
            while self._agree is not None and self._agree(False):
                self._check()
                for voice in voices:
                    voice.step_along(self._pad_token)
        return [completion for completion in completions if completion is not None]

    def _require(self, number: int, prompt: Prompt, sampling: Sampling) -> None:
        if not prompt.tokens:
            raise UsageError(f"prompt {number} has no token, so there is nothing to answer; leave the row out, or give it a prompt")
        for writer, longest, tokens in self._reaches:
            read = len(tokens(prompt)) + sampling.max_new_tokens - 1  # the last token is written, and never read
            if longest is not None and read > longest:
                raise UsageError(
                    f"{writer.name} reads at most {longest} tokens, and prompt {number} with an answer of {sampling.max_new_tokens} has "
                    f"{read}; lower max_new_tokens or leave out long prompts"
                )

    def _write(self, voices: list[Voice], prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
        """The answers to one batch, rows leaving it as they end."""
        readers = [Reader(voice, self._pad_token) for voice in voices]
        tokens: list[list[int]] = [[] for _ in prompts]
        found: list[tuple[list[int], Tensor]] = []
        ended = [False] * len(prompts)
        rows = list(range(len(prompts)))
        drawn: Tensor | None = None
        for position in range(sampling.max_new_tokens):
            self._step()
            logits = self._begin(readers, prompts) if drawn is None else [reader.read(drawn) for reader in readers]
            drawn, log_probs = self._draw(logits, [prompts[row].seed for row in rows], position, sampling)
            found.append((rows, log_probs))
            for row, token in zip(rows, drawn.tolist(), strict=True):
                tokens[row].append(token)
                ended[row] = token in self._stop_ids
            going = [place for place, row in enumerate(rows) if not ended[row]]
            if not going:
                break
            if len(going) < len(rows):
                rows, drawn = [rows[place] for place in going], drawn[torch.tensor(going, device=drawn.device)]
                for reader in readers:
                    reader.keep(going)
        written: list[list[float]] = [[] for _ in prompts]
        for beside, log_probs in found:
            for row, value in zip(beside, log_probs.tolist(), strict=True):
                written[row].append(value)
        return [Completion(tuple(tokens[row]), tuple(written[row]), ended[row], self._version) for row in range(len(prompts))]

    def _step(self) -> None:
        """Before each forward: the word to stop, and to the other ranks that there is one more."""
        self._check()
        if self._agree is not None:
            self._agree(True)

    def _begin(self, readers: list[Reader], prompts: list[Prompt]) -> list[Tensor]:
        """Reads each different prompt once; answers to the same one go on from the same cache."""
        seen: dict[tuple, int] = {}
        places = [seen.setdefault((prompt.tokens, prompt.teacher_tokens), len(seen)) for prompt in prompts]
        different = [prompts[places.index(place)] for place in range(len(seen))]
        logits = []
        for reader, tokens in zip(readers, (_own, _of_the_teacher), strict=False):
            first = reader.begin([tokens(prompt) for prompt in different])
            if len(seen) < len(prompts):
                reader.keep(places)
                first = first[torch.tensor(places, device=first.device)]
            logits.append(first)
        return logits

    def _draw(self, logits: list[Tensor], seeds: list[int], position: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
        numbers = uniforms(seeds, position)
        if len(logits) == 1:
            return draw(logits[0], numbers, sampling)
        mixed = mixture(logits[0], logits[1], self._share, sampling)
        return draw(mixed, numbers, replace(sampling, temperature=1.0 if sampling.temperature else 0.0))


def _own(prompt: Prompt) -> Sequence[int]:
    return prompt.tokens


def _of_the_teacher(prompt: Prompt) -> Sequence[int]:
    return prompt.tokens if prompt.teacher_tokens is None else prompt.teacher_tokens


def _nothing() -> None:
    """Nobody asks to stop."""


def _batches(prompts: Sequence[Prompt], size: int | None) -> Iterator[list[int]]:
    """Row numbers, longest prompts first, so that rows of like length share their padding."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row].tokens))
    size = size or max(len(order), 1)
    for start in range(0, len(order), size):
        yield order[start : start + size]

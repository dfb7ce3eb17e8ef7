"""Writes on a vLLM server: token ids go out and come back, and the server is given the student's weights as it learns.

Of the student's weights it knows only when they are to be sent; how stands in vllm_weights.py and vllm_push.py.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from potstill.batch import Batch
from potstill.errors import GeneratorError, PotstillError, ServerError, TeacherError, UsageError
from potstill.models.causal_lm import CausalLM
from potstill.rollouts.author import Group
from potstill.rollouts.config import VllmGeneratorConfig
from potstill.rollouts.vllm_asking import Asker, refuse_inexact, within
from potstill.rollouts.vllm_push import PushWeights
from potstill.rollouts.vllm_weights import AdapterWeights, ReloadWeights, Weights, hint
from potstill.rollouts.writing import Completion, Prompt, Sampling
from potstill.serving.loop import Loop
from potstill.serving.service import Service

_log = logging.getLogger("potstill")
# Rows that heads have beyond their tokenizer are padding to a multiple; more are another vocabulary, and are cut off when they come.
_MOST_BARRED = 1024
# How far the server may be from the student right after it got its weights, in nats a token that it writes, on average: bfloat16 rounds
# by some hundredths, 8-bit weights by a tenth or two, and another model is further away.
_SUSPECT, _OTHER = 0.1, 0.5
_TRIES = 3


class VllmGenerator:
    """A `Generator`. It waits for the server when it is made, for `max_outage_seconds`.

    `stop_ids` are the only ids that end an answer. `vocabulary_size` counts the ids that the student knows: an answer is cut before
    another one. `student` is needed unless weights are fixed, `folder` for adapter and reload where the recipe names none; it belongs
    to this generator alone. `group`: the ranks, each of which makes a generator and, unless weights are fixed, calls it equally often;
    the first sends weights.
    `writer`: whose model the server has. A teacher's never changes; its section and not rollouts.generator stands in messages, and its
    log-probabilities are what the server states, since nobody corrects by them.

    Equal seeds give equal answers as far as the server's kernels do not depend on what is beside. Weights are sent at steps that
    `every` divides, and when a run begins or goes on.
    """

    def __init__(
        self, config: VllmGeneratorConfig, *, stop_ids: Sequence[int], vocabulary_size: int, student: CausalLM | None = None,
        folder: Path | None = None, group: Group | None = None, writer: Literal["student", "teacher"] = "student",
    ):  # fmt: skip
        """Raises UsageError and its kinds for what does not fit together, GeneratorError, and OutageError for a server that stays away."""
        self.config, self._student, self._group, self._writer = config, student, group, writer
        self._vocabulary_size = vocabulary_size
        section, refusal = ("rollouts.generator", GeneratorError) if writer == "student" else ("teacher", TeacherError)
        self._section = section
        service = Service(
            section=section, url=config.url, refusal=refusal, api_key_env=config.api_key_env, api_key_file=config.api_key_file,
            concurrency=config.concurrency, request_seconds=config.request_seconds, max_outage_seconds=config.max_outage_seconds,
            hint=partial(hint, section=section), if_unbelievable="is it a vLLM server of a version that answers with token ids?",
        )  # fmt: skip
        self._version, self._step = 0, 0
        self._tag: str | None = None
        self._serial = 0
        self._run = self._agreed_number()
        self._loop = Loop()
        self._asker = Asker(service, self.name, config.model, stop_ids, vocabulary_size)
        self._asker.barred = self._beyond(student)
        try:
            self._weights = self._chosen(folder)
            self._loop.run(self._asker.start())
        except BaseException:
            self._loop.close(self._asker.endpoint.close())
            raise

    def _chosen(self, folder: Path | None) -> Weights | None:
        """How weights travel; None where they stay."""
        if self.config.weights == "fixed" or self._writer == "teacher":
            return None
        if self._student is None:
            raise UsageError(f"{self._section}.weights: {self.config.weights} sends a student's weights, and there is none; use fixed")
        if self.config.weights == "push":
            return PushWeights(self._student, self._asker, self._loop)
        place = Path(self.config.folder).expanduser() if self.config.folder else folder
        if place is None:
            raise UsageError(f"{self._section}.folder: {self.config.weights} needs a folder that the server sees under the same path")
        way = AdapterWeights if self.config.weights == "adapter" else ReloadWeights
        return way(self._student, place, self._asker, self._loop)

    def _beyond(self, student: CausalLM | None) -> tuple[int, ...]:
        width = 0 if student is None else int(student.inner.config.get_text_config().vocab_size)
        return tuple(range(self._vocabulary_size, width)) if width - self._vocabulary_size <= _MOST_BARRED else ()

    def _agreed_number(self) -> int:
        """A number that no other run has, the same on every rank."""
        number = secrets.randbits(40)
        return number if self._group is None else int(self._group.gather(np.array([number], np.int64))[0][0])

    @property
    def name(self) -> str:
        return f"the vLLM server {self.config.url} with {self.config.model}"

    def heed(self, check: Callable[[], None]) -> None:
        """`check` is called several times a second while an answer is waited for; what it raises ends the waiting."""
        self._loop.check = check

    # ------------------------------------------------------------ weights

    def refresh(self, step: int) -> None:
        """Sends the student's weights where it is time to. Every rank calls it."""
        self._step = step
        if self._weights is None:
            self._version = step if self._writer == "teacher" else 0
        elif self._tag is None or step % self.config.every == 0:
            self._send(self._weights)

    def _send(self, weights: Weights) -> None:
        self._serial += 1
        first = self._group is None or self._group.rank == 0
        tag = f"potstill-{self._run:x}-{self._step}-{self._serial}"
        failure: PotstillError | None = None
        try:
            weights.send(tag, first=first)
        except PotstillError as error:
            failure = error
        if self._anywhere(failure is not None):  # all ranks hear of it, so that none waits for another
            raise failure or GeneratorError(f"{self.name}: the first rank could not give it the student's weights; its words say why")
        weights.adopt(tag)
        # Keys and values of former weights must not be read for a prompt that begins like an earlier one.
        self._asker.salt = tag
        self._tag, self._version = tag, self._step
        if first:
            self._compare()

    def _compare(self) -> None:
        """What the server now writes against what the student says of it. Raises GeneratorError where that is another model."""
        student = self._student
        if student is None or any(isinstance(parameter, DTensor) for parameter in student.parameters()):
            return  # a sharded student answers only where all ranks ask it
        written = self._loop.run(self._asker.probe())
        apart = [
            abs(one - other) for prompt, completion in zip(self._asker.probes, written, strict=True)
            for one, other in zip(log_probs_of(student, prompt, completion), completion.log_probs, strict=True)
        ]  # fmt: skip
        distance = sum(apart) / len(apart)
        if not distance <= _OTHER:
            raise GeneratorError(
                f"{self.name} was given the student's weights ({self.config.weights}) and does not write like the student: "
                f"{distance:.2g} nats a token apart. Is {self._section}.model of the student's architecture, an adapter on the same base?"
            )
        if distance > _SUSPECT:
            _log.warning(f"{self.name} is {distance:.2g} nats a token away from the student whose weights it was given: is it quantised?")

    def _anywhere(self, flag: bool) -> bool:
        return flag if self._group is None else self._group.sum([float(flag)])[0] > 0

    # ------------------------------------------------------------ writing

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in their order, all under way at once as far as `concurrency` allows.

        A server that has lost the student's weights meanwhile (it was started again) gets them anew, and writes anew.
        """
        if any(not prompt.tokens for prompt in prompts):
            raise UsageError("a prompt has no token, so there is nothing to answer; leave the row out, or give it a prompt")
        self._asker.refuse(prompts, sampling)
        if self._writer == "student":
            refuse_inexact(self._asker, sampling)
        weights = self._weights
        if weights is None:
            return [self._of_ours(completion) for completion in self._loop.run(self._asker.write(prompts, sampling))]
        for _ in range(_TRIES):
            if self._anywhere(self._is_lost(weights)):
                if self._tag is not None:
                    _log.warning(f"{self.name} has lost the student's weights (was it started again?); they are sent anew")
                self._send(weights)
            unanswered, completions, failure = self._asker.pool.failures, [], None
            try:
                completions = self._loop.run(self._asker.write(prompts, sampling))
            except ServerError as error:
                failure = error
            doubtful = failure is not None or self._asker.pool.failures > unanswered
            if self._anywhere(doubtful) and self._anywhere(self._is_lost(weights)):
                continue
            if failure is not None:
                raise failure
            return [self._of_ours(completion) for completion in completions]
        raise GeneratorError(f"{self.name} has lost the student's weights {_TRIES} times while it wrote; look into the server's log")

    def _is_lost(self, weights: Weights) -> bool:
        """Whether the server has not, or no longer, the weights that it was sent last."""
        return self._tag is None or not weights.is_there(self._tag)

    def _of_ours(self, completion: Completion) -> Completion:
        return replace(within(completion, self._vocabulary_size), version=self._version)

    def close(self) -> None:
        """Takes back the folder that weights were sent through, and ends the connections. A second time it does nothing."""
        if self._weights is not None and (self._group is None or self._group.rank == 0):
            with suppress(PotstillError):
                self._weights.close()
        self._loop.close(self._asker.endpoint.close())


@torch.no_grad()
def log_probs_of(student: CausalLM, prompt: Prompt, completion: Completion) -> list[float]:
    """The student's own log-probabilities of a completion's tokens, at temperature 1 over its whole head."""
    tokens = torch.tensor([prompt.tokens + completion.tokens], device=student.device)
    places = torch.arange(tokens.shape[1], device=student.device)[None]
    was_training = student.training
    student.eval()
    try:
        hidden, head = student(Batch(tokens, places, torch.zeros_like(tokens), places >= len(prompt.tokens)))
        log_probs = head.logits(hidden).float().log_softmax(-1)
    finally:
        student.train(was_training)
    return log_probs.gather(-1, tokens[0, len(prompt.tokens) :, None])[:, 0].tolist()

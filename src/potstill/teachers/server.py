"""A teacher behind HTTP: its K most likely tokens a row, or the target's log-probability; documents go out as ids, and come back validated.

An answer is given out only after a probe has passed over every connection that had been made when it came.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from potstill.batch import Batch, Document
from potstill.errors import IncompatibleError, TeacherError
from potstill.serving.endpoint import Endpoint
from potstill.serving.loop import Loop, together
from potstill.serving.service import Service
from potstill.signals import Needs, Offers, TargetOutcomes, TeacherSignal, TopKOutcomes
from potstill.teachers import server_sglang, server_vllm
from potstill.teachers.config import ServerTeacherConfig
from potstill.teachers.server_answers import Kept, cut_to
from potstill.teachers.server_asking import Asker
from potstill.teachers.teacher import require

_BACKENDS: dict[str, ModuleType] = {"vllm": server_vllm, "sglang": server_sglang}


def service_of(config: ServerTeacherConfig) -> Service:
    """How it is asked, with the keys of a recipe's teacher section in every message."""

    def hint(path: str, status: int, said: str) -> str:
        if status in (401, 403):
            return "check the key: teacher.api_key_env or teacher.api_key_file"
        if status in (400, 422) and "logprobs" in said:
            return f"lower teacher.top_k ({config.top_k}), or start the server with a larger limit (vLLM: --max-logprobs)"
        return "check teacher.url, teacher.model and teacher.backend" if status == 404 else ""

    return Service(
        section="teacher", url=config.url, refusal=TeacherError, api_key_env=config.api_key_env, api_key_file=config.api_key_file,
        concurrency=config.concurrency, request_seconds=config.request_seconds, max_outage_seconds=config.max_outage_seconds, hint=hint,
        if_one_fails="lower teacher.sequences_per_request or look into the server's log",
        if_unbelievable=f"is teacher.backend ({config.backend}) what the server is?",
    )  # fmt: skip


class ServerTeacher:
    """Asks a server that is there when it is made: it waits for it, for `max_outage_seconds`, and then scores the probe.

    `vocabulary_size` counts the ids that the student knows; `tokenizer` is the student's, and is compared with the server's.
    `quarantine` is a folder for answers that could not be believed.
    """

    def __init__(
        self, config: ServerTeacherConfig, *, vocabulary_size: int, tokenizer: PreTrainedTokenizerBase | None = None,
        quarantine: Path | None = None,
    ):  # fmt: skip
        self.config, self.vocabulary_size = config, vocabulary_size
        service = service_of(config)
        backend = _BACKENDS[config.backend]
        self._asker = Asker(config, service, Endpoint(service), backend, vocabulary_size, tokenizer, self.name, quarantine)
        self._loop = Loop()
        try:
            self._loop.run(self._asker.start())
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        return f"the server {self.config.url} with {self.config.model}"

    @property
    def offers(self) -> Offers:
        return Offers(frozenset({"top_k", "target"}), top_k=self.config.top_k, temperature=1.0)

    @property
    def identity(self) -> Mapping[str, str]:
        """The served model's name with the probe's digest, and the probe's values: compare those with `probe_difference`."""
        return {"served model": f"{self.config.model} (probe {self._asker.digest})", "probe": self._asker.fingerprint.as_text()}

    def heed(self, check: Callable[[], None]) -> None:
        """`check` is called several times a second while an answer is waited for; what it raises ends the waiting."""
        self._loop.check = check

    def confirm(self) -> None:
        """Scores the probe now, if the server answers. Raises TeacherError where another model does: what it said lately is suspect.

        Any thread may ask, and nothing breaks it off: it is what comes before a commit.
        """
        self._loop.run(self._asker.confirm_now(), heedless=True)

    def score(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """`TopKOutcomes` or `TargetOutcomes` for the target rows, in float32 on the batch's device. Equal documents are asked once."""
        if needs.outcomes == "nothing":
            return TeacherSignal()
        require(self, needs)
        wanted = [document for document in batch.sequences() if document.rows.stop > document.rows.start]
        prompts = [_prompt(document) for document in wanted]
        self._refuse_long(prompts)
        distinct = list(dict.fromkeys(prompts))
        k = 0 if needs.outcomes == "target" else self.config.top_k
        answers = dict(zip(distinct, self._loop.run(self._ask(distinct, k)) if distinct else [], strict=True))
        outcomes = self._joined(wanted, [answers[prompt] for prompt in prompts], batch.num_targets, k)
        if needs.outcomes == "target":
            assert outcomes.target_log_probs is not None
            return TeacherSignal(TargetOutcomes(outcomes.target_log_probs).to(batch.tokens.device))
        return TeacherSignal(outcomes.cut(needs.top_k or k).to(batch.tokens.device))

    def _refuse_long(self, prompts: Sequence[tuple[int, ...]]) -> None:
        limit = self._asker.max_model_len
        longest = max(map(len, prompts), default=0)
        if limit is not None and longest + 1 > limit:
            raise IncompatibleError(
                f"{self.name} takes {limit} tokens (its max_model_len), one of them for the token that it must generate; found a document "
                f"with {longest} up to its last target. Lower data.max_tokens, or start the server with a larger --max-model-len"
            )

    async def _ask(self, prompts: Sequence[tuple[int, ...]], k: int) -> list[Kept]:
        """All prompts, some in a request, the requests side by side; what is made of an answer is made while others are waited for."""
        size = self.config.sequences_per_request
        groups = [[list(prompt) for prompt in prompts[start : start + size]] for start in range(0, len(prompts), size)]

        async def answer(group: list[list[int]]) -> list[Kept]:
            return [cut_to(scored, self.vocabulary_size) for scored in await self._asker.score(group, k)]

        return [kept for group in await together([answer(group) for group in groups]) for kept in group]

    def _joined(self, documents: Sequence[Document], answers: Sequence[Kept], count: int, k: int) -> TopKOutcomes:
        """The rows of the targets alone: row t of an answer predicted token t + 1."""
        ids, log_probs = np.zeros((count, k), np.int64), np.zeros((count, k), np.float32)
        tail, actual = np.zeros(count, np.float32), np.zeros(count, np.float32)
        for document, answer in zip(documents, answers, strict=True):
            place = document.is_target[1:].nonzero().squeeze(-1).cpu().numpy()
            ids[document.rows], log_probs[document.rows] = answer.ids[place], answer.log_probs[place]
            tail[document.rows], actual[document.rows] = answer.log_tail[place], answer.actual[place]
        return TopKOutcomes(torch.from_numpy(ids), torch.from_numpy(log_probs), torch.from_numpy(tail), torch.from_numpy(actual))

    def close(self) -> None:
        self._loop.close(self._asker.close())


def _prompt(document: Document) -> tuple[int, ...]:
    """The document up to its last target: what comes after predicts nothing."""
    last = int(document.is_target.nonzero()[-1])
    return tuple(document.tokens[: last + 1].tolist())

"""What a served teacher says to its server: the start, the prompts, and the probe that says whether it is still the same model.

Belief is here: an answer goes on only if it is valid and a probe has passed since the connection that it came over was made.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from potstill import storage
from potstill.environment import redact_text
from potstill.errors import ModelError, TeacherError
from potstill.models.tokenizers import compare_tokenizers, refuse_different
from potstill.serving.endpoint import Endpoint, Unanswered, Unbelievable, clean, keeping
from potstill.serving.pool import Pool
from potstill.serving.service import Service
from potstill.serving.strict_json import is_list, is_object, parse
from potstill.teachers.config import ServerTeacherConfig
from potstill.teachers.server_answers import PADDED_ROWS, Scored, believe
from potstill.teachers.server_probe import Fingerprint, digest, probe_difference, probe_tokens, refuse_other_texts

_QUARANTINED_BYTES = 64 * 2**10
_QUARANTINED_ANSWERS = 20
# An answer's size: what stands around it, and one id's entry with its text, several times over.
_FRAME_BYTES, _ENTRY_BYTES = 2**20, 512
_CONFIRM_SECONDS = 10.0


class Asker:
    """Lives on one event loop. `start` comes first."""

    def __init__(
        self, config: ServerTeacherConfig, service: Service, endpoint: Endpoint, backend: ModuleType, vocabulary_size: int,
        tokenizer: PreTrainedTokenizerBase | None, name: str, quarantine: Path | None,
    ):  # fmt: skip
        self._config, self._endpoint, self._backend, self._name = config, endpoint, backend, name
        self._pool = Pool(service, name, self._read_models)
        self._tokenizer = tokenizer
        self._vocabulary_size = self._widest = vocabulary_size
        self._quarantine, self._quarantined = quarantine, itertools.count(1)
        self._probing = asyncio.Lock()
        self._probed_connections, self._probed_at = 0, 0.0
        self._since_probe = 0
        self.max_model_len: int | None = None
        self.fingerprint: Fingerprint
        self.digest = ""

    async def start(self) -> None:
        """Waits for the server, finds the model and its limits, scores the probe, and compares tokenizers."""
        if self._config.tokenizer is not None and self._tokenizer is not None:
            self._compare_tokenizers(self._config.tokenizer, self._tokenizer)
        await self._pool.ask(self._read_models)
        self._probe = probe_tokens(self._tokenizer, self._vocabulary_size, self.max_model_len)
        self.digest = digest(self._probe, self._tokenizer)
        self._pool.another = lambda seconds: self._exchange([self._probe], seconds, self._config.top_k)
        self.fingerprint = await self._score_probe()
        if self._config.tokenizer is None and self._tokenizer is not None:
            refuse_other_texts(self.fingerprint.texts, self._tokenizer, self._name)

    def _compare_tokenizers(self, path: str, ours: PreTrainedTokenizerBase) -> None:
        try:
            folder = Path(path).expanduser()
            theirs = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else path)
        except (OSError, ValueError) as error:
            raise ModelError(f"teacher.tokenizer: {path}: no tokenizer can be read there ({clean(str(error))})") from None
        refuse_different(compare_tokenizers(ours, theirs), str(ours.name_or_path), path)
        self._widest = max(self._widest, len(theirs))

    async def _read_models(self, seconds: float) -> None:
        body = await self._endpoint.get("/v1/models", seconds=seconds, most_bytes=_FRAME_BYTES)
        with keeping(body):
            cards = [is_object(card, "a model") for card in is_list(is_object(parse(body), "the answer").get("data"), "data")]
        served = [str(card.get("id")) for card in cards]
        if self._config.model not in served:
            named = clean(", ".join(map(repr, served[:10])))
            raise TeacherError(f"teacher.model: {self._config.model!r} is not what {self._config.url} serves; it serves {named}")
        limit = cards[served.index(self._config.model)].get("max_model_len")
        self.max_model_len = limit if type(limit) is int and limit > 0 else None

    # ------------------------------------------------------------ prompts

    async def score(self, prompts: Sequence[list[int]], k: int) -> list[Scored]:
        """One request with so many outcomes a token, asked until it is answered and the answer is believed."""
        scored = await self._pool.ask(lambda seconds: self._exchange(prompts, seconds, k))
        await self.confirm()
        self._since_probe += 1
        return scored

    async def _exchange(self, prompts: Sequence[list[int]], seconds: float, k: int, *, texts: bool = False) -> list[Scored]:
        config = self._config
        most_ids = self._widest + PADDED_ROWS
        body = await self._endpoint.post(
            self._backend.PATH, self._backend.request(config.model, prompts, k, texts=texts), seconds=seconds,
            most_bytes=_FRAME_BYTES + sum(map(len, prompts)) * (k + 2) * _ENTRY_BYTES,
        )  # fmt: skip
        try:
            with keeping(body):
                answers = self._backend.read(parse(body), config.model, prompts, k, texts=texts)
                for scored, prompt in zip(answers, prompts, strict=True):
                    believe(scored, prompt, k, most_ids)
        except Unbelievable as error:
            self._put_aside(error)
            raise
        return answers

    def _put_aside(self, error: Unbelievable) -> None:
        """The raw body, redacted and cut, for whoever wants to know what came; only the first few."""
        if self._quarantine is None or (number := next(self._quarantined)) > _QUARANTINED_ANSWERS:
            return
        text = f"{error}\n\n{redact_text(error.body.decode('utf-8', 'replace'))}"
        storage.make_folder(self._quarantine)
        storage.write_bytes(self._quarantine / f"answer-{number}.txt", text.encode("utf-8", "replace")[:_QUARANTINED_BYTES])

    # ------------------------------------------------------------ the probe

    async def confirm(self) -> None:
        """Sees that the probe has passed since the last connection was made, and lately. Raises TeacherError for another model."""
        if not self._is_due():
            return
        async with self._probing:
            if self._is_due():
                self._refuse_drift(await self._score_probe())
                self._since_probe = 0

    async def confirm_now(self) -> None:
        """Asks for the probe once. A server that does not answer has not become another model."""
        with suppress(Unanswered, Unbelievable):
            [scored] = await self._exchange([self._probe], min(self._config.request_seconds, _CONFIRM_SECONDS), self._config.top_k)
            self._refuse_drift(Fingerprint.of(scored))
            self._since_probe = 0

    def _is_due(self) -> bool:
        lately = time.monotonic() - self._probed_at < self._config.probe_seconds
        return self._endpoint.opened > self._probed_connections or not lately

    async def _score_probe(self) -> Fingerprint:
        began, connections = time.monotonic(), self._endpoint.opened
        [scored] = await self._pool.ask(lambda seconds: self._exchange([self._probe], seconds, self._config.top_k, texts=True))
        # A connection that the probe itself made is proven too; one that somebody else made meanwhile is not.
        made = self._endpoint.opened - connections
        self._probed_connections, self._probed_at = connections + min(made, 1), began
        return Fingerprint.of(scored)

    def _refuse_drift(self, found: Fingerprint) -> None:
        difference = probe_difference(self.fingerprint.as_text(), found.as_text(), self._config.probe_tolerance)
        if difference is not None:
            raise TeacherError(
                f"{self._name} has become another model: {difference}; teacher.probe_tolerance is {self._config.probe_tolerance:g}. "
                f"The {self._since_probe} requests that were answered since the last probe passed are suspect"
            )

    async def close(self) -> None:
        await self._endpoint.close()

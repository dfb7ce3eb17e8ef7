"""What a generator says to its vLLM server: the start, prompts, a probe, and calls that steer it. Knows no weights of ours.

One request is one prompt, since a request has one seed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from potstill.errors import GeneratorError, IncompatibleError
from potstill.rollouts import vllm_answers
from potstill.rollouts.writing import Completion, Prompt, Sampling
from potstill.serving.endpoint import Endpoint, clean, keeping
from potstill.serving.loop import together
from potstill.serving.pool import Pool
from potstill.serving.service import Service
from potstill.serving.strict_json import is_list, is_object, parse

# An answer's size: what stands around it, and what is said of one token, several times over.
_FRAME_BYTES, _TOKEN_BYTES = 2**20, 512
_PROBES, _PROBE_PROMPT, _PROBE_TOKENS = 4, 6, 8
_SHORT = Prompt((1, 0), seed=0)   # ids that every vocabulary has
_CERTAIN = -1e-6   # above it a log-probability is that of the only token that could come


class Asker:
    """Lives on one event loop. `start` comes first. `model` is the name that is asked for: it changes with an adapter."""

    def __init__(self, service: Service, name: str, model: str, stop_ids: Sequence[int], vocabulary_size: int):
        self.service, self.model = service, model
        self.served = model
        """What the server was started with; `model` may be an adapter on it."""
        self._name, self._stop_ids = name, tuple(stop_ids)
        self.endpoint = Endpoint(service)
        self.pool = Pool(service, name, self.names)
        ids = [(7919 * place + 11) % vocabulary_size for place in range(_PROBES * _PROBE_PROMPT)]
        self.probes = [Prompt(tuple(ids[number::_PROBES]), seed=number) for number in range(_PROBES)]
        self.barred: tuple[int, ...] = ()
        """Ids that are never to be drawn: rows of the head beyond the vocabulary."""
        self.salt: str | None = None
        self.max_model_len: int | None = None
        self.processed = False
        """Whether the server's log-probabilities are those of the distribution that it drew from (--logprobs-mode processed_logprobs)."""

    async def start(self) -> None:
        """Waits for the server; finds the model, its limits, and what its log-probabilities are of."""
        served = await self.pool.ask(self.names)
        if self.served not in served:
            named = clean(", ".join(map(repr, list(served)[:10])))
            raise self.service.refusal(
                f"{self.service.section}.model: {self.served!r} is not what {self.service.url} serves; it serves {named}"
            )
        limit = served[self.served].get("max_model_len")
        self.max_model_len = limit if type(limit) is int and limit > 0 else None
        # Of the only token that may come: 0 where truncation is in the log-probabilities, and less where it is not.
        [log_prob] = (await self.complete(_SHORT, Sampling(top_k=1, max_new_tokens=1))).log_probs
        self.processed = log_prob >= _CERTAIN
        # A server whose engine is dead still lists its models.
        self.pool.another = lambda seconds: self._attempt(_SHORT, Sampling(temperature=0, max_new_tokens=1), seconds)

    async def names(self, seconds: float) -> dict[str, dict[str, Any]]:
        """What the server lists, adapters among it, by name."""
        body = await self.endpoint.get("/v1/models", seconds=seconds, most_bytes=_FRAME_BYTES)
        with keeping(body):
            cards = [is_object(card, "a model") for card in is_list(is_object(parse(body), "the answer").get("data"), "data")]
        return {str(card.get("id")): card for card in cards}

    # ------------------------------------------------------------ prompts

    def refuse(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raises IncompatibleError for what this server cannot write."""
        if 0 < sampling.temperature < 0.01:
            raise IncompatibleError(
                f"rollouts.sampling.temperature: {sampling.temperature:g} is made 0.01 by vLLM without a word; take 0 or 0.01 and more"
            )
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        if self.max_model_len is not None and longest + sampling.max_new_tokens > self.max_model_len:
            raise IncompatibleError(
                f"{self._name} takes {self.max_model_len} tokens in all (its max_model_len); found a prompt of {longest} and "
                f"max_new_tokens {sampling.max_new_tokens}. Lower rollouts.sampling.max_new_tokens or data.max_tokens, or start the server "
                "with a larger --max-model-len"
            )

    async def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """All of them, side by side as far as the service allows."""
        return await together([self.complete(prompt, sampling) for prompt in prompts])

    async def complete(self, prompt: Prompt, sampling: Sampling) -> Completion:
        """One prompt, asked until it is answered and the answer is believed."""
        return await self.pool.ask(lambda seconds: self._attempt(prompt, sampling, seconds))

    async def _attempt(self, prompt: Prompt, sampling: Sampling, seconds: float) -> Completion:
        model, most = self.model, _FRAME_BYTES + (len(prompt.tokens) + sampling.max_new_tokens) * _TOKEN_BYTES
        asked = vllm_answers.request(model, prompt, sampling, self._stop_ids, salt=self.salt, barred=self.barred)
        body = await self.endpoint.post(vllm_answers.PATH, asked, seconds=seconds, most_bytes=most)
        with keeping(body):
            return vllm_answers.read(parse(body), model, prompt, sampling, self._stop_ids)

    async def probe(self) -> list[Completion]:
        """What the server writes after the probes' tokens, at temperature 1 and by fixed seeds.

        Not the log-probabilities of a prompt: vLLM's engine dies of these where adapters are loaded and others ask at the same time.
        """
        return await self.write(self.probes, Sampling(max_new_tokens=_PROBE_TOKENS))

    # ------------------------------------------------------------ steering

    async def call(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """A request that may be made twice, asked until the server has done it."""
        return await self.pool.ask(lambda seconds: self.endpoint.post(path, body or {}, seconds=seconds, most_bytes=_FRAME_BYTES))

    async def call_once(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """A request that others wait for meanwhile. Raises Unanswered where nothing came back."""
        return await self.endpoint.post(path, body or {}, seconds=self.service.request_seconds, most_bytes=_FRAME_BYTES)

    async def fetch(self, path: str) -> dict[str, Any]:
        async def attempt(seconds: float) -> dict[str, Any]:
            body = await self.endpoint.get(path, seconds=seconds, most_bytes=_FRAME_BYTES)
            with keeping(body):
                return is_object(parse(body), "the answer")

        return await self.pool.ask(attempt)


def within(completion: Completion, vocabulary_size: int) -> Completion:
    """The completion up to the first id that is beyond the vocabulary; cut where there is one."""
    end = next((place for place, token in enumerate(completion.tokens) if token >= vocabulary_size), None)
    if end is None:
        return completion
    return replace(completion, tokens=completion.tokens[:end], log_probs=completion.log_probs[:end], ended=False)


def refuse_inexact(asker: Asker, sampling: Sampling) -> None:
    """Raises GeneratorError where the server's log-probabilities are of another distribution than the one it draws from."""
    plain = sampling.temperature in (0, 1) and sampling.top_p == 1 and sampling.top_k == 0
    if sampling.temperature > 0 and not plain and not asker.processed:
        raise GeneratorError(
            f"rollouts.sampling: drawn with temperature {sampling.temperature:g}, top_p {sampling.top_p:g} and top_k {sampling.top_k}, but "
            f"{asker.service.url} states log-probabilities from before these, so that no ratio to them can be taken; start vLLM with "
            "--logprobs-mode processed_logprobs, or sample at temperature 1 without truncation"
        )

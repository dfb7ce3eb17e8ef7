"""vLLM's completions that write: what is sent for one prompt, and when the answer's JSON is believed. Knows no HTTP and no weights.

Every setting of sampling is sent, so that none comes from the served model's own generation settings.
"""

import math
from collections.abc import Sequence
from typing import Any

from potstill.rollouts.writing import Completion, Prompt, Sampling
from potstill.serving.endpoint import Unanswered, Unbelievable
from potstill.serving.strict_json import integer, is_list, is_object

PATH = "/v1/completions"
_EPSILON = 1e-3   # of a log-probability: servers round in float32 at worst
_PLACEHOLDER = "token_id:"


def request(
    model: str, prompt: Prompt, sampling: Sampling, stop_ids: Sequence[int], *, salt: str | None = None, barred: Sequence[int] = ()
) -> dict[str, Any]:
    """`salt` keeps keys and values that other weights have made out of this request; `barred` ids are never drawn.

    `ignore_eos` leaves `stop_ids` as the only ends: without it vLLM adds those of the model's generation settings.
    """
    body: dict[str, Any] = {
        "model": model, "prompt": list(prompt.tokens), "seed": prompt.seed, "n": 1, "stream": False, "echo": False,
        "max_tokens": sampling.max_new_tokens, "min_tokens": 0, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "stop": [], "stop_token_ids": list(stop_ids), "ignore_eos": True, "include_stop_str_in_output": False, "bad_words": [],
        "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
        "add_special_tokens": False,
    }  # fmt: skip
    if salt is not None:
        body["cache_salt"] = salt
    if barred:
        body["logit_bias"] = {str(number): -100.0 for number in barred}
    return body


def read(answer: Any, model: str, prompt: Prompt, sampling: Sampling, stop_ids: Sequence[int]) -> Completion:
    """Raises Unbelievable, saying what is wrong, unless all of it can be true; Unanswered where the server broke the writing off."""
    answer = is_object(answer, "the answer")
    if answer.get("model") != model:
        raise Unbelievable("it names another model")
    choice = is_object(is_list(answer.get("choices"), "choices", 1)[0], "the choice")
    if integer(choice.get("index"), "the choice's index") != 0:
        raise Unbelievable(f"the choice has index {choice['index']}")
    if choice.get("prompt_token_ids") != list(prompt.tokens):
        raise Unbelievable("it is about another prompt, or the server does not say which (return_token_ids)")
    tokens = _tokens(choice.get("token_ids"), sampling.max_new_tokens)
    _refuse_other_counts(answer.get("usage"), len(prompt.tokens), len(tokens))
    log_probs = _log_probs(choice.get("logprobs"), tokens)
    ended = _ended(choice.get("finish_reason"), tokens, sampling.max_new_tokens, frozenset(stop_ids))
    if sampling.temperature == 0:  # the most likely token is certain, whatever a server states of it
        log_probs = (0.0,) * len(tokens)
    return Completion(tokens, log_probs, ended)


def _tokens(value: Any, most: int) -> tuple[int, ...]:
    tokens = is_list(value, "token_ids")
    if not 1 <= len(tokens) <= most:
        raise Unbelievable(f"{len(tokens)} tokens where 1 to {most} were asked for")
    if not {*map(type, tokens)} <= {int} or not all(0 <= token < 2**31 for token in tokens):
        raise Unbelievable("a token's id that is none")
    return tuple(tokens)


def _refuse_other_counts(usage: Any, prompt: int, written: int) -> None:
    if usage is None:
        return
    usage = is_object(usage, "usage")
    for name, count in (("prompt_tokens", prompt), ("completion_tokens", written)):
        if (stated := integer(usage.get(name), f"usage.{name}")) != count:
            raise Unbelievable(f"usage.{name} is {stated} for {count} tokens")


def _log_probs(value: Any, tokens: tuple[int, ...]) -> tuple[float, ...]:
    stated = is_object(value, "logprobs")
    names = is_list(stated.get("tokens"), "logprobs.tokens", len(tokens))
    if names != [f"{_PLACEHOLDER}{token}" for token in tokens]:
        raise Unbelievable("log-probabilities of other tokens than those that were written")
    numbers = is_list(stated.get("token_logprobs"), "logprobs.token_logprobs", len(tokens))
    if not {*map(type, numbers)} <= {float, int}:
        raise Unbelievable("a log-probability that is no number")
    try:
        found = tuple(float(number) for number in numbers)
    except OverflowError:
        raise Unbelievable("a number beyond all bounds") from None
    for place, number in enumerate(found):
        if not math.isfinite(number) or number > _EPSILON:
            raise Unbelievable(f"a log-probability that is none: {number} at token {place + 1}")
    return tuple(min(number, 0.0) for number in found)


def _ended(reason: Any, tokens: tuple[int, ...], most: int, stop_ids: frozenset[int]) -> bool:
    early = next((token for token in tokens[:-1] if token in stop_ids), None)
    if early is not None:
        raise Unbelievable(f"it goes on after the end-of-text token {early}")
    if reason == "abort":
        raise Unanswered("the server broke the writing off")
    if reason == "stop":
        if tokens[-1] not in stop_ids:
            raise Unbelievable(f"it stopped at token {tokens[-1]}, which is none of the ends that were asked for")
        return True
    if reason != "length":
        raise Unbelievable(f"it finished for the reason {reason!r}")
    if tokens[-1] in stop_ids:
        raise Unbelievable(f"it was cut, and yet its last token {tokens[-1]} ends a text")
    if len(tokens) != most:
        raise Unbelievable(
            f"it was cut at {len(tokens)} tokens where {most} were asked for: a limit of the server's own, such as max_new_tokens in the "
            "served model's generation_config.json; start vLLM with --generation-config vllm"
        )
    return False

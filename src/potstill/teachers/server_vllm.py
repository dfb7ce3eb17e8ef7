"""vLLM's completions with `prompt_logprobs`: what is sent, and what the answer's JSON holds. Believes no number (server_answers.py).

Entry t of a prompt's list is the distribution that predicted its token t; entry 0 is null. An entry has K ids, or K + 1 where the token
that came is not among the first K.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from potstill.serving.endpoint import Unbelievable
from potstill.serving.strict_json import integer, is_list, is_object, text_or_nothing
from potstill.teachers.server_answers import Scored

PATH = "/v1/completions"


def request(model: str, prompts: Sequence[list[int]], k: int, *, texts: bool = False) -> dict[str, Any]:
    """One token has to be generated (`max_tokens: 0` is refused); it is not looked at. The texts of ids come in any case."""
    return {"model": model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}


def read(answer: Any, model: str, prompts: Sequence[list[int]], k: int, *, texts: bool = False) -> list[Scored]:
    """One `Scored` a prompt, in their order. Raises Unbelievable where the JSON has another shape."""
    answer = is_object(answer, "the answer")
    if answer.get("model", model) != model:
        raise Unbelievable("it names another model")
    choices = is_list(answer.get("choices"), "choices", len(prompts))
    usage = answer.get("usage")
    if usage is not None:
        stated = integer(is_object(usage, "usage").get("prompt_tokens"), "usage.prompt_tokens")
        if stated != sum(map(len, prompts)):
            raise Unbelievable(f"usage.prompt_tokens is {stated} for {sum(map(len, prompts))} tokens")
    scored = []
    for number, (choice, prompt) in enumerate(zip(choices, prompts, strict=True)):
        choice = is_object(choice, f"choice {number}")
        if integer(choice.get("index"), "a choice's index") != number:
            raise Unbelievable(f"choice {number} has index {choice['index']}")
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != prompt:
            raise Unbelievable(f"choice {number} is about another prompt")
        scored.append(_read_prompt(is_list(choice.get("prompt_logprobs"), "prompt_logprobs", len(prompt)), prompt, k, texts))
    return scored


def _read_prompt(entries: list[Any], prompt: list[int], k: int, texts: bool) -> Scored:
    if entries[0] is not None:
        raise Unbelievable("the first token has a distribution, and nothing stands before it")
    keys: list[str] = []
    cells: list[dict[str, Any]] = []
    sizes: list[int] = []
    for place, entry in enumerate(entries[1:], start=1):
        entry = is_object(entry, f"the entry of token {place}")
        if str(prompt[place]) not in entry:
            raise Unbelievable(f"the entry of token {place} lacks the token that came, {prompt[place]}")
        if len(entry) not in (k, k + 1):
            raise Unbelievable(f"the entry of token {place} has {len(entry)} ids for top_k {k}")
        keys.extend(entry)
        cells.extend(entry.values())
        sizes.append(len(entry))
    ids, log_probs, ranks = _columns(keys, cells)
    row = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((ranks, row))
    ids, log_probs, ranks = ids[order], log_probs[order], ranks[order]
    starts = np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, np.int64)
    place = starts[:, None] + np.arange(k)
    came = np.asarray(prompt[1:], dtype=np.int64)
    actual_at = np.flatnonzero(ids == came[row])
    if not (ranks[place] == np.arange(1, k + 1)).all():
        raise Unbelievable(f"ranks that are not 1 to {k}")
    extra = np.flatnonzero(np.asarray(sizes) == k + 1)
    last = starts[extra] + k
    if not (ids[last] == came[extra]).all() or (ranks[last] <= k).any():
        raise Unbelievable(f"an id beyond the first {k} that is not the token that came")
    said = {}
    if texts:
        said = {int(key): text for key, cell in zip(keys, cells, strict=True) if (text := text_or_nothing(cell.get("decoded_token")))}
    return Scored(ids[place], log_probs[place], log_probs[actual_at], said)


def _columns(keys: list[str], cells: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, log-probabilities and ranks of all entries, each of the type that it must have."""
    try:
        ids = [int(key) for key in keys]
        log_probs = [cell["logprob"] for cell in cells]
        ranks = [cell["rank"] for cell in cells]
    except (ValueError, TypeError, KeyError, IndexError):
        raise Unbelievable("an entry that is not an id with logprob and rank") from None
    if [str(number) for number in ids] != keys:
        raise Unbelievable("an id that is not written as a number")
    if not {*map(type, log_probs)} <= {float, int} or not {*map(type, ranks)} <= {int}:
        raise Unbelievable("a logprob or a rank that is no number")
    try:
        return np.array(ids, np.int64), np.array(log_probs, np.float64), np.array(ranks, np.int64)
    except OverflowError:
        raise Unbelievable("a number beyond all bounds") from None

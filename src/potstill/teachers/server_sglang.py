"""SGLang's /generate: what is sent, and what the answer's JSON holds, as lists or as base64 arrays. Believes no number.

`input_token_logprobs` has the token that came at each place and its log-probability; `input_top_logprobs` the K most likely ones. The
first place of both says nothing.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from potstill.serving.endpoint import Unbelievable
from potstill.serving.strict_json import integer, is_list, is_object, text_or_nothing
from potstill.teachers.server_answers import Scored

PATH = "/generate"
_FLAT = "input_top_logprobs"


def request(model: str, prompts: Sequence[list[int]], k: int, *, texts: bool = False) -> dict[str, Any]:
    """The arrays are asked for in base64, which costs a tenth of the JSON; a server that does not know them answers with lists.

    Texts of ids come with the lists alone.
    """
    return {
        "input_ids": [list(prompt) for prompt in prompts], "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": k, "return_text_in_logprobs": texts,
        "return_flat_raw_top_logprobs": k > 0 and not texts, "return_flat_raw_top_logprobs_b64": k > 0 and not texts,
    }  # fmt: skip


def read(answer: Any, model: str, prompts: Sequence[list[int]], k: int, *, texts: bool = False) -> list[Scored]:
    """One `Scored` a prompt, in their order. Raises Unbelievable where the JSON has another shape."""
    answers = is_list([answer] if isinstance(answer, dict) and len(prompts) == 1 else answer, "the answer", len(prompts))
    return [
        _read_prompt(is_object(is_object(one, f"answer {number}").get("meta_info"), "meta_info"), prompt, k, texts)
        for number, (one, prompt) in enumerate(zip(answers, prompts, strict=True))
    ]


def _read_prompt(meta: dict[str, Any], prompt: list[int], k: int, texts: bool) -> Scored:
    if (stated := integer(meta.get("prompt_tokens"), "meta_info.prompt_tokens")) != len(prompt):
        raise Unbelievable(f"meta_info.prompt_tokens is {stated} for {len(prompt)} tokens")
    tokens = is_list(meta.get("input_token_logprobs"), "input_token_logprobs", len(prompt))
    if [integer(_triple(cell)[1], "a token's id") for cell in tokens] != prompt:
        raise Unbelievable("it is about another prompt")
    actual = _numbers([cell[0] for cell in tokens[1:]])
    if not k:
        return Scored(np.zeros((len(actual), 0), np.int64), np.zeros((len(actual), 0)), actual, {})
    if f"{_FLAT}_shape" in meta:
        ids, log_probs = _flat(meta, len(prompt) - 1, k)
        return Scored(ids, log_probs, actual, {})
    entries = is_list(meta.get(_FLAT), _FLAT, len(prompt))
    if entries[0]:
        raise Unbelievable("the first token has a distribution, and nothing stands before it")
    cells = [_triple(cell) for entry in entries[1:] for cell in is_list(entry, "an entry of " + _FLAT, k)]
    ids = np.array([_int32(cell[1]) for cell in cells], np.int64).reshape(-1, k)
    said = {cell[1]: text for cell in cells if (text := text_or_nothing(cell[2]))} if texts else {}
    return Scored(ids, _numbers([cell[0] for cell in cells]).reshape(-1, k), actual, said)


def _triple(cell: Any) -> list[Any]:
    return is_list(cell, "a cell of logprob, id and text", 3)


def _int32(value: Any) -> int:
    if not 0 <= integer(value, "a token's id") < 2**31:
        raise Unbelievable("a number beyond all bounds")
    return value


def _numbers(values: list[Any]) -> np.ndarray:
    if not {*map(type, values)} <= {float, int}:
        raise Unbelievable("a log-probability that is no number")
    try:
        return np.array(values, np.float64)
    except OverflowError:
        raise Unbelievable("a number beyond all bounds") from None


def _flat(meta: dict[str, Any], rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of rows * k numbers. Servers differ in whether the shape counts the places that say nothing; the lengths decide."""
    shape = [integer(size, "a size") for size in is_list(meta.get(f"{_FLAT}_shape"), "the shape", 2)]
    silent = integer(meta.get(f"{_FLAT}_null_prefix"), "the null prefix")
    if silent != 1 or shape not in ([rows, k], [rows + silent, k]):
        raise Unbelievable(f"arrays of shape {shape} with {silent} silent places for {rows} tokens and top_k {k}")
    return _array(meta, "idx", "int32", rows, k).astype(np.int64), _array(meta, "val", "float32", rows, k).astype(np.float64)


def _array(meta: dict[str, Any], name: str, kind: str, rows: int, k: int) -> np.ndarray:
    if (plain := meta.get(f"{_FLAT}_{name}_flat")) is not None:
        plain = is_list(plain, name, rows * k)
        values = np.array([_int32(value) for value in plain], np.int64) if kind == "int32" else _numbers(plain)
        return values.reshape(rows, k)
    coded = meta.get(f"{_FLAT}_{name}_flat_b64")
    if not isinstance(coded, str) or meta.get(f"{_FLAT}_{name}_flat_b64_dtype", kind) != kind:
        raise Unbelievable(f"{name} is not base64 of {kind}")
    try:
        data = base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError):
        raise Unbelievable(f"{name} is not base64") from None
    if len(data) != rows * k * 4:
        raise Unbelievable(f"{name} has {len(data)} bytes for {rows} tokens and top_k {k}")
    return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).reshape(rows, k)

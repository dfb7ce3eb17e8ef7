"""F12: no spoiled answer is believed, whatever the way and whatever the seed; answers in SGLang's shapes say the same in all of them."""

import base64
import json
import random
from functools import cache

import numpy as np
import pytest

from potstill.serving.endpoint import Unbelievable
from potstill.serving.strict_json import parse
from potstill.teachers import server_sglang, server_vllm
from potstill.teachers.server_answers import PADDED_ROWS, Scored, believe, cut_to
from server_mutators import BYTE_MUTATORS, MUTATORS, naive_read
from stub_server import Bigram, StubServer

K, VOCABULARY, SEEDS = 6, 320, 200
# Tokens of low probability: entries of K + 1 ids are the rule, and two prompts cannot be taken for each other.
MODEL = Bigram(VOCABULARY, seed=3)


class _Speaker(StubServer):
    """The answers without the sockets."""

    def __init__(self, model: Bigram):
        self.model, self.texts = model, lambda number: None


@cache
def prompts_of(seed: int) -> list[list[int]]:
    numbers = random.Random(seed)
    found = []
    for length in (5, 5):
        tokens = [numbers.randrange(VOCABULARY)]
        while len(tokens) < length:
            tokens.append(int(np.argsort(-MODEL.log_probs[tokens[-1]])[numbers.randrange(K + 10, 200)]))
        found.append(tokens)
    return found


def read(data: bytes, prompts: list[list[int]]) -> list[Scored]:
    answers = server_vllm.read(parse(data), "tiny", prompts, K)
    for scored, prompt in zip(answers, prompts, strict=True):
        believe(scored, prompt, K, VOCABULARY + PADDED_ROWS)
    return answers


@cache
def body_of(seed: int) -> str:
    return json.dumps(body(prompts_of(seed)))


def body(prompts: list[list[int]]) -> dict:
    return _Speaker(MODEL).completions(server_vllm.request("tiny", prompts, K))


OF_THE_TARGET = (
    "no_choices", "a_choice_less", "a_choice_twice", "answers_exchanged", "indices_exchanged", "no_log_probs", "an_entry_less",
    "an_entry_more", "shifted_by_one", "a_null_in_the_middle", "an_empty_entry", "a_word_for_an_id", "not_a_number", "infinite",
    "a_probability_above_one", "a_log_prob_of_another_type", "no_log_prob", "a_rank_of_another_type", "tokens_miscounted", "another_model",
)  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_TARGET)
def test_no_spoiled_answer_of_the_target_alone_is_believed(name):
    """One number a token: there is no mass and no order to see a mistake by, and yet none of these passes."""
    for seed in range(40):
        numbers, prompts = random.Random(seed), prompts_of(seed)
        answer = _Speaker(MODEL).completions(server_vllm.request("tiny", prompts, 0))

        def look(answer, prompts=prompts):
            found = server_vllm.read(parse(json.dumps(answer).encode()), "tiny", prompts, 0)
            for scored, prompt in zip(found, prompts, strict=True):
                believe(scored, prompt, 0, VOCABULARY + PADDED_ROWS)
            return found

        for scored, prompt in zip(look(answer), prompts, strict=True):
            np.testing.assert_allclose(scored.actual, MODEL.after(prompt)[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-5)
            assert cut_to(scored, VOCABULARY).ids.shape == (len(prompt) - 1, 0)
        with pytest.raises(Unbelievable):
            look(MUTATORS[name](answer, numbers))


def test_there_are_enough_ways_to_spoil_an_answer():
    assert len(MUTATORS) + len(BYTE_MUTATORS) >= 30


@pytest.mark.parametrize("name", [*MUTATORS, *BYTE_MUTATORS])
def test_no_spoiled_answer_is_believed(name):
    for seed in range(SEEDS if name in MUTATORS else 40):
        numbers, prompts = random.Random(seed), prompts_of(seed)
        data = body_of(seed).encode()
        if name in BYTE_MUTATORS:
            spoiled = BYTE_MUTATORS[name](data, numbers)
        else:
            spoiled = json.dumps(MUTATORS[name](json.loads(data), numbers)).encode()
        assert spoiled != data
        with pytest.raises(Unbelievable) as caught:
            read(spoiled, prompts)
        assert str(caught.value)


def test_what_is_not_spoiled_is_believed():
    for seed in range(SEEDS):
        prompts = prompts_of(seed)
        for scored, prompt in zip(read(json.dumps(body(prompts)).encode(), prompts), prompts, strict=True):
            rows = MODEL.after(prompt)
            assert np.array_equal(scored.ids, np.argsort(-rows)[:, :K])
            np.testing.assert_allclose(scored.actual, rows[np.arange(len(rows)), prompt[1:]], atol=1e-6)


def test_a_trusting_reader_believes_most_of_them():
    """The mutators are no straw men."""
    believed = 0
    for mutate in MUTATORS.values():
        prompts = prompts_of(0)
        spoiled = json.dumps(mutate(body(prompts), random.Random(0))).encode()
        try:
            found = naive_read(spoiled, prompts, K)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            continue
        believed += found.shape == (8, K)
    assert believed >= 15


def test_the_token_that_came_is_read_inside_and_outside_of_the_first_k():
    best = np.argsort(-MODEL.log_probs[7])
    for rank in (0, K - 1, K, 300):
        prompt = [7, int(best[rank])]
        [scored] = read(json.dumps(body([prompt])).encode(), [prompt])
        assert scored.ids.shape == (1, K)
        assert (prompt[1] in scored.ids) == (rank < K)
        assert scored.actual[0] == pytest.approx(MODEL.log_probs[7, prompt[1]], abs=1e-6)


def test_a_tail_below_rounding_has_a_floor_and_holds_the_token_that_came():
    sure = np.log(np.array([[1 - 1e-12, 4e-13, 3e-13]]))
    floor = cut_to(Scored(np.array([[1, 2, 3]]), sure, sure[:, 0], {}), 100).log_tail[0]
    assert floor == pytest.approx(np.log(1e-9))
    half = np.log(np.array([[0.5, 0.5 - 1e-7, 2e-8]]))
    came = cut_to(Scored(np.array([[1, 2, 3]]), half, np.log(np.array([1.5e-8])), {}), 100).log_tail[0]
    assert came > floor


# ---------------------------------------------------------------- SGLang


def sglang_bodies(prompts: list[list[int]]) -> dict[str, list[dict]]:
    """One answer as nested lists, as flat lists, and as base64, with the two meanings of the shape that servers have."""
    nested = _Speaker(MODEL).generate(server_sglang.request("tiny", prompts, K))
    shapes = {"nested": nested}
    for name, coded, silent in (("lists", False, 0), ("base64", True, 0), ("base64 counting the first", True, 1)):
        shapes[name] = [{"text": "", "meta_info": _flattened(one["meta_info"], coded, silent)} for one in nested]
    return shapes


def _flattened(meta: dict, coded: bool, silent: int) -> dict:
    entries = meta["input_top_logprobs"][1:]
    values = np.array([[cell[0] for cell in entry] for entry in entries], "<f4")
    ids = np.array([[cell[1] for cell in entry] for entry in entries], "<i4")
    flat = {"input_top_logprobs_shape": [len(entries) + silent, K], "input_top_logprobs_null_prefix": 1}
    for name, array, kind in (("val", values, "float32"), ("idx", ids, "int32")):
        if coded:
            flat[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
            flat[f"input_top_logprobs_{name}_flat_b64_dtype"] = kind
        else:
            flat[f"input_top_logprobs_{name}_flat"] = array.ravel().tolist()
    return {key: value for key, value in meta.items() if key != "input_top_logprobs"} | flat


def read_sglang(answer, prompts):
    answers = server_sglang.read(parse(json.dumps(answer).encode()), "tiny", prompts, K)
    for scored, prompt in zip(answers, prompts, strict=True):
        believe(scored, prompt, K, VOCABULARY + PADDED_ROWS)
    return answers


@pytest.mark.parametrize("shape", ["nested", "lists", "base64", "base64 counting the first"])
def test_all_of_sglangs_shapes_say_the_same(shape):
    prompts = prompts_of(5)
    for scored, prompt in zip(read_sglang(sglang_bodies(prompts)[shape], prompts), prompts, strict=True):
        rows = MODEL.after(prompt)
        order = np.argsort(-rows)[:, :K]
        assert np.array_equal(scored.ids, order)
        np.testing.assert_allclose(scored.log_probs, np.take_along_axis(rows, order, 1), atol=1e-5)
        np.testing.assert_allclose(scored.actual, rows[np.arange(len(rows)), prompt[1:]], atol=1e-6)


SPOILED = {
    "an answer less": lambda answers: answers.pop(),
    "answers exchanged": lambda answers: answers.reverse(),
    "tokens miscounted": lambda answers: answers[0]["meta_info"].update(prompt_tokens=4),
    "no tokens": lambda answers: answers[0]["meta_info"].pop("input_token_logprobs"),
    "another token": lambda answers: answers[0]["meta_info"]["input_token_logprobs"][3].__setitem__(1, 319),
    "a null": lambda answers: answers[0]["meta_info"]["input_token_logprobs"][3].__setitem__(0, None),
    "another actual": lambda answers: answers[0]["meta_info"]["input_token_logprobs"][3].__setitem__(0, -0.001),
}
SPOILED_NESTED = {
    "an id twice": lambda entries: entries[2][1].__setitem__(1, entries[2][0][1]),
    "a negative id": lambda entries: entries[2][1].__setitem__(1, -1),
    "a word for an id": lambda entries: entries[2][1].__setitem__(1, "the"),
    "a word for a number": lambda entries: entries[2][1].__setitem__(0, "-1.0"),
    "a cell of two": lambda entries: entries[2][1].pop(),
    "an outcome less": lambda entries: entries[2].pop(),
    "a distribution before the first token": lambda entries: entries.__setitem__(0, entries[1]),
    "not in order": lambda entries: entries[2].reverse(),
}
SPOILED_FLAT = {
    "a shape": lambda meta: meta.update(input_top_logprobs_shape=[3, K]),
    "a prefix": lambda meta: meta.update(input_top_logprobs_null_prefix=2),
    "no base64": lambda meta: meta.update(input_top_logprobs_val_flat_b64="%%%"),
    "too few bytes": lambda meta: meta.update(input_top_logprobs_idx_flat_b64=base64.b64encode(b"1234").decode()),
    "another type": lambda meta: meta.update(input_top_logprobs_val_flat_b64_dtype="float16"),
    "nothing": lambda meta: meta.pop("input_top_logprobs_idx_flat_b64"),
    "ids for values": lambda meta: meta.update(input_top_logprobs_val_flat_b64=meta["input_top_logprobs_idx_flat_b64"]),
    "values for ids": lambda meta: meta.update(input_top_logprobs_idx_flat_b64=meta["input_top_logprobs_val_flat_b64"]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_no_spoiled_answer_of_sglang_is_believed(name):
    for shape in ("nested", "lists", "base64"):
        prompts = prompts_of(6)
        answers = json.loads(json.dumps(sglang_bodies(prompts)[shape]))
        SPOILED[name](answers)
        with pytest.raises(Unbelievable):
            read_sglang(answers, prompts)


@pytest.mark.parametrize("name", SPOILED_NESTED)
def test_no_spoiled_list_is_believed(name):
    prompts = prompts_of(8)
    answers = sglang_bodies(prompts)["nested"]
    read_sglang(answers, prompts)
    SPOILED_NESTED[name](answers[0]["meta_info"]["input_top_logprobs"])
    with pytest.raises(Unbelievable):
        read_sglang(answers, prompts)


@pytest.mark.parametrize("name", SPOILED_FLAT)
def test_no_spoiled_array_is_believed(name):
    prompts = prompts_of(7)
    answers = sglang_bodies(prompts)["base64"]
    SPOILED_FLAT[name](answers[1]["meta_info"])
    with pytest.raises(Unbelievable):
        read_sglang(answers, prompts)

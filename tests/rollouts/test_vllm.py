"""A generator on a vLLM server: what is asked and what is believed, against a bigram whose log-probabilities are known, and faults.

The real vLLM is in tests/vllm.
"""

import json
import logging
import random
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from potstill.errors import ConfigError, GeneratorError, IncompatibleError, OutageError, TeacherError, UsageError
from potstill.models.causal_lm import CausalLM
from potstill.rollouts import vllm_answers
from potstill.rollouts.config import VllmGeneratorConfig
from potstill.rollouts.vllm import VllmGenerator
from potstill.rollouts.writing import Generator, Prompt, Sampling, seed_of
from potstill.serving import pool
from potstill.serving.endpoint import Unanswered, Unbelievable
from potstill.serving.strict_json import parse
from stub_server import Fault, StubServer
from tiny import tiny_llama

VOCABULARY = 320
STOPS = [2, 11, 17]
PROMPTS = [Prompt(tuple(range(30 + row, 33 + 2 * row)), seed_of(0, 3, row)) for row in range(7)]
SAMPLING = Sampling(max_new_tokens=12)
# Every setting of vLLM's CompletionRequest that changes what is drawn or what is stated.
SETTINGS = {
    "n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "bad_words", "logprobs",
    "return_token_ids", "return_tokens_as_token_ids", "skip_special_tokens", "add_special_tokens", "stream", "echo", "model", "prompt",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(pool, "_LONGEST_PAUSE", 0.3)


def config(url: str, **changes) -> VllmGeneratorConfig:
    given = {"weights": "fixed", "concurrency": 3, "request_seconds": 5, "max_outage_seconds": 5, **changes}
    return VllmGeneratorConfig(kind="vllm", url=url, model="tiny", **given)


def generator(stub: StubServer, *, writer="student", **changes):
    return closing(VllmGenerator(config(stub.url, **changes), stop_ids=STOPS, vocabulary_size=VOCABULARY, writer=writer))


def stated(stub: StubServer, prompt: Prompt, tokens) -> np.ndarray:
    """The bigram's own log-probability of each token."""
    before = [prompt.tokens[-1], *tokens[:-1]]
    return np.array([stub.model.log_probs[one, other] for one, other in zip(before, tokens, strict=True)])


# ---------------------------------------------------------------- what is written


def test_answers_are_the_servers_and_depend_on_their_own_seed():
    with StubServer() as stub, generator(stub) as given:
        ours: Generator = given
        together = ours.generate(PROMPTS, SAMPLING)
        alone = [ours.generate([prompt], SAMPLING)[0] for prompt in reversed(PROMPTS)]
        assert together == alone[::-1]
        assert len({completion.tokens for completion in together}) == len(PROMPTS)
        other = ours.generate([Prompt(PROMPTS[0].tokens, PROMPTS[0].seed + 1)], SAMPLING)
        assert other[0].tokens != together[0].tokens
        assert ours.generate([], SAMPLING) == []
        for prompt, completion in zip(PROMPTS, together, strict=True):
            np.testing.assert_allclose(completion.log_probs, stated(stub, prompt, completion.tokens), atol=1e-12)
            assert completion.ended == (completion.tokens[-1] in STOPS)
            assert completion.ended or len(completion.tokens) == 12


def test_an_answer_ends_at_any_stop_id_and_at_no_other():
    with StubServer() as stub, generator(stub) as ours:
        answers = ours.generate([Prompt((row,), row) for row in range(60)], Sampling(max_new_tokens=80))
    ends = {answer.tokens[-1] for answer in answers if answer.ended}
    assert ends == set(STOPS)
    assert all(not STOPS.count(token) for answer in answers for token in answer.tokens[:-1])
    assert {len(answer.tokens) for answer in answers if not answer.ended} <= {80}


def test_every_setting_of_sampling_is_sent():
    """What is left out would come from the served model's generation_config."""
    with StubServer() as stub, generator(stub) as ours:
        bodies = []
        stub.script = lambda number, body: bodies.append(body)
        ours.generate(PROMPTS[:1], Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=5))
    [body] = bodies
    assert body.keys() >= SETTINGS
    assert None not in body.values()
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["max_tokens"]) == (1.0, 1.0, 0, 0.0, 5)
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
    assert body["ignore_eos"] is True
    assert (body["stop_token_ids"], body["seed"], body["prompt"]) == (STOPS, PROMPTS[0].seed, list(PROMPTS[0].tokens))
    assert "cache_salt" not in body   # fixed weights share what is cached


def test_the_most_likely_token_is_certain():
    with StubServer() as stub, generator(stub) as ours:
        [answer] = ours.generate(PROMPTS[:1], Sampling(temperature=0, max_new_tokens=4))
        best = int(stub.model.log_probs[PROMPTS[0].tokens[-1]].argmax())
    assert answer.tokens[0] == best
    assert set(answer.log_probs) == {0.0}


def test_ids_beyond_the_vocabulary_are_not_drawn_or_end_the_answer():
    """A student's head is known, and its padding barred; of a teacher's further tokens nothing is known, and the answer is cut there."""
    student = CausalLM(tiny_llama(), 300)
    with StubServer() as stub:
        given = config(stub.url)
        with closing(VllmGenerator(given, stop_ids=STOPS, vocabulary_size=300, student=student)) as ours:
            answers = ours.generate([Prompt((row,), row) for row in range(30)], SAMPLING)
            assert all(token < 300 for answer in answers for token in answer.tokens)
            assert all(answer.ended or len(answer.tokens) == 12 for answer in answers)
        with closing(VllmGenerator(given, stop_ids=STOPS, vocabulary_size=300, writer="teacher")) as ours:
            answers = ours.generate([Prompt((row,), row) for row in range(30)], SAMPLING)
    assert all(token < 300 for answer in answers for token in answer.tokens)
    cut = [answer for answer in answers if not answer.ended and len(answer.tokens) < 12]
    assert cut
    assert all(len(answer.tokens) == len(answer.log_probs) for answer in cut)


# ---------------------------------------------------------------- what the log-probabilities are of


@pytest.mark.parametrize("processed", [False, True])
def test_log_probabilities_are_of_what_was_drawn_from_or_it_is_refused(processed):
    with StubServer() as stub:
        stub.processed = processed
        with generator(stub) as ours:
            assert ours.generate(PROMPTS, SAMPLING)
            assert ours.generate(PROMPTS, Sampling(temperature=0, top_k=3, max_new_tokens=3))
            for changed in (Sampling(0.7, max_new_tokens=9), Sampling(top_k=5, max_new_tokens=9), Sampling(top_p=0.9, max_new_tokens=9)):
                if processed:
                    assert ours.generate(PROMPTS[:1], changed)
                else:
                    with pytest.raises(GeneratorError, match="--logprobs-mode processed_logprobs"):
                        ours.generate(PROMPTS[:1], changed)
        with generator(stub, writer="teacher") as ours:   # nobody corrects by a teacher's
            assert ours.generate(PROMPTS[:1], Sampling(0.7, max_new_tokens=9))


# ---------------------------------------------------------------- refused before anything is written


def test_what_the_server_cannot_write_is_refused_before_it_is_asked():
    with StubServer(max_model_len=20) as stub, generator(stub) as ours:
        stub.asked.clear()
        ours.generate([Prompt(tuple(range(8)), 0)], SAMPLING)
        with pytest.raises(IncompatibleError, match=r"takes 20 tokens.*a prompt of 9 and max_new_tokens 12.*max-model-len"):
            ours.generate([Prompt(tuple(range(9)), 0)], SAMPLING)
        with pytest.raises(IncompatibleError, match=r"temperature: 0\.005 is made 0\.01 by vLLM"):
            ours.generate(PROMPTS, Sampling(temperature=0.005))
        with pytest.raises(UsageError, match="no token"):
            ours.generate([Prompt((), 0)], SAMPLING)
        assert len(stub.asked) == 1


def test_another_model_behind_the_address_is_named():
    with StubServer() as stub:
        wrong = config(stub.url).model_copy(update={"model": "big"})
        with pytest.raises(GeneratorError, match=r"rollouts\.generator\.model: 'big' is not what .* serves; it serves 'tiny'"):
            VllmGenerator(wrong, stop_ids=STOPS, vocabulary_size=VOCABULARY)
        with pytest.raises(TeacherError, match=r"teacher\.model: 'big'"):
            VllmGenerator(wrong, stop_ids=STOPS, vocabulary_size=VOCABULARY, writer="teacher")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": "adapter"}, "there is none; use fixed"), ({"weights": "reload"}, "there is none; use fixed"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, r"rollouts\.generator\.api_key_env.*is not set"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(changes, said):
    with StubServer() as stub, pytest.raises((UsageError, ConfigError), match=said):
        VllmGenerator(config(stub.url, **changes), stop_ids=STOPS, vocabulary_size=VOCABULARY)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://user:secret@host", "http://host/?key=secret"])
def test_an_address_that_shows_a_secret_is_refused(url):
    with pytest.raises(ValueError, match="url:") as caught:
        config(url)
    assert "secret" not in str(caught.value).split("[type=")[0].replace("a key in the address", "")


# ---------------------------------------------------------------- what is not believed

ASKED = Prompt((5, 6, 7), 9)


def _answer() -> dict:
    stub = StubServer.__new__(StubServer)
    from stub_server import Bigram

    stub.model, stub.processed = Bigram(seed=2), False
    answer = stub.written(vllm_answers.request("tiny", ASKED, Sampling(max_new_tokens=6), [319]))
    assert answer["choices"][0]["finish_reason"] == "length"
    return answer


def _first(answer: dict) -> dict:
    return answer["choices"][0]


def _put(*place, value):
    """Sets what stands at a place of the only choice."""
    def change(answer):
        found = _first(answer)
        for key in place[:-1]:
            found = found[key]
        found[place[-1]] = value

    return change


NUMBERS = ("logprobs", "token_logprobs")
SPOILED = {
    "another model": lambda a: a.update(model="tiny-2"), "no model": lambda a: a.pop("model"), "no choices": lambda a: a.pop("choices"),
    "two choices": lambda a: a["choices"].append(_first(a)), "another index": _put("index", value=1),
    "another prompt": _put("prompt_token_ids", value=[5, 6, 8]), "no prompt": lambda a: _first(a).pop("prompt_token_ids"),
    "no tokens": _put("token_ids", value=None), "nothing written": _put("token_ids", value=[]),
    "a token less": lambda a: _first(a)["token_ids"].pop(), "a token more": lambda a: _first(a)["token_ids"].append(3),
    "another token": _put("token_ids", 2, value=318), "a negative id": _put("token_ids", 2, value=-1),
    "an id too far": _put("token_ids", 2, value=2**40), "a word for an id": _put("token_ids", 2, value="7"),
    "true for an id": _put("token_ids", 2, value=True), "no log-probs": _put("logprobs", value=None),
    "a null": _put(*NUMBERS, 0, value=None), "a log-prob less": lambda a: _first(a)["logprobs"]["token_logprobs"].pop(),
    "not a number": _put(*NUMBERS, 1, value=float("nan")), "infinite": _put(*NUMBERS, 1, value=float("-inf")),
    "above one": _put(*NUMBERS, 1, value=0.3), "a word": _put(*NUMBERS, 1, value="-1"),
    "beyond all bounds": _put(*NUMBERS, 1, value=-(10**400)), "texts for ids": _put("logprobs", "tokens", 1, value="the"),
    "a reason that is none": _put("finish_reason", value="repetition"), "no reason": _put("finish_reason", value=None),
    "stopped at another id": _put("finish_reason", value="stop"),
    "miscounted": lambda a: a["usage"].update(completion_tokens=5), "another prompt's count": lambda a: a["usage"].update(prompt_tokens=4),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_no_spoiled_answer_is_believed(name):
    answer = _answer()
    sampling = Sampling(max_new_tokens=6)
    assert len(vllm_answers.read(parse(json.dumps(answer).encode()), "tiny", ASKED, sampling, [319]).tokens) == 6
    SPOILED[name](answer)
    with pytest.raises(Unbelievable) as caught:
        vllm_answers.read(parse(json.dumps(answer).encode()), "tiny", ASKED, sampling, [319])
    assert str(caught.value)


def test_a_limit_of_the_servers_own_is_named():
    answer = _answer()
    with pytest.raises(Unbelievable, match=r"cut at 6 tokens where 9 were asked for.*--generation-config vllm"):
        vllm_answers.read(answer, "tiny", ASKED, Sampling(max_new_tokens=9), [319])


def test_ends_are_the_ones_that_were_asked_for():
    answer = _answer()
    tokens = _first(answer)["token_ids"]
    sampling = Sampling(max_new_tokens=6)
    with pytest.raises(Unbelievable, match=f"goes on after the end-of-text token {tokens[1]}"):
        vllm_answers.read(answer, "tiny", ASKED, sampling, [tokens[1]])
    if tokens[-1] not in tokens[:-1]:
        with pytest.raises(Unbelievable, match="cut, and yet its last token"):
            vllm_answers.read(answer, "tiny", ASKED, sampling, [tokens[-1]])
    _first(answer)["finish_reason"] = "abort"
    with pytest.raises(Unanswered):
        vllm_answers.read(answer, "tiny", ASKED, sampling, [319])


def test_a_spoiled_answer_is_asked_for_again_and_one_that_stays_so_is_refused():
    numbers = random.Random(0)

    def script(number, body):
        name = numbers.choice(sorted(SPOILED.keys() - {"another prompt's count"}))

        def mutate(answer):
            SPOILED[name](answer)
            return answer

        return Fault(mutate=mutate) if number % 2 and body["max_tokens"] > 9 else None

    with StubServer() as stub, generator(stub, concurrency=1) as ours:
        clean = ours.generate(PROMPTS, Sampling(max_new_tokens=10))
        stub.script = script
        stub.calls = 0
        assert ours.generate(PROMPTS, Sampling(max_new_tokens=10)) == clean
        stub.script = lambda number, body: Fault(body=b"<html>no</html>")
        with pytest.raises(GeneratorError, match=r"4 answers to one request cannot be believed: not JSON.*a vLLM server"):
            ours.generate(PROMPTS, SAMPLING)


# ---------------------------------------------------------------- away, slow, busy


def test_failures_now_and_then_lose_nothing():
    numbers = random.Random(0)
    faults = [Fault(drop=True), Fault(status=500), Fault(status=502), Fault(status=429, headers={"Retry-After": "0"}), Fault(delay=2)]
    with StubServer() as stub, generator(stub, request_seconds=0.6, max_outage_seconds=20) as ours:
        clean = ours.generate(PROMPTS, SAMPLING)
        stub.script = lambda number, body: numbers.choice(faults) if numbers.random() < 0.3 else None
        assert ours.generate(PROMPTS, SAMPLING) == clean


def test_a_server_that_is_busy_is_asked_for_less():
    with StubServer() as stub, generator(stub, concurrency=8) as ours:
        stub.script = lambda number, body: Fault(delay=0.05)
        ours.generate(PROMPTS, SAMPLING)
        assert stub.most_under_way >= 6
        stub.most_under_way = stub.calls = 0
        stub.script = lambda number, body: Fault(status=429, headers={"Retry-After": "0"}) if stub.under_way > 2 else Fault(delay=0.05)
        assert len(ours.generate(PROMPTS, SAMPLING)) == len(PROMPTS)


@pytest.mark.parametrize(
    "fault", [Fault(drop=True), Fault(status=503), Fault(drip=True), Fault(delay=60)], ids=["drop", "503", "drip", "stall"]
)
def test_an_outage_that_lasts_ends_with_75_and_the_reason(fault):
    with StubServer() as stub, generator(stub, max_outage_seconds=1, request_seconds=0.5) as ours:
        stub.script = lambda number, body: fault
        began = time.monotonic()
        with pytest.raises(OutageError, match=r"rollouts\.generator\.max_outage_seconds: 1.*run the same command again") as caught:
            ours.generate(PROMPTS, SAMPLING)
        assert caught.value.exit_code == 75
        assert 0.9 < time.monotonic() - began < 4


def test_waiting_is_broken_off():
    class Interrupted(Exception):
        pass

    asked = threading.Event()

    def check():
        if asked.is_set():
            raise Interrupted

    with StubServer() as stub, generator(stub, request_seconds=60, max_outage_seconds=60) as ours:
        def script(number, body):
            asked.set()
            return Fault(delay=60)

        stub.script = script
        ours.heed(check)
        began = time.monotonic()
        with pytest.raises(Interrupted):
            ours.generate(PROMPTS, SAMPLING)
        assert time.monotonic() - began < 3
        ours.heed(lambda: None)
        stub.script = lambda number, body: None
        assert len(ours.generate(PROMPTS[:2], SAMPLING)) == 2


def test_the_key_goes_into_one_header_and_nowhere_else(tmp_path, caplog):
    canary = "canary+key/0123456789=="
    (tmp_path / "key").write_text(f" {canary}\n")
    caplog.set_level(logging.DEBUG)
    with StubServer() as stub, generator(stub, api_key_file=str(tmp_path / "key")) as ours:
        ours.generate(PROMPTS[:1], SAMPLING)
        stub.script = lambda number, body: Fault(status=401, body=b'{"error": "key ' + canary.encode() + b' is wrong"}')
        with pytest.raises(GeneratorError, match=r"status 401.*check the key: rollouts\.generator\.api_key_env") as caught:
            ours.generate(PROMPTS[:1], SAMPLING)
        assert stub.headers[0]["Authorization"] == f"Bearer {canary}"
    assert "canary" not in str(caught.value) + caplog.text + repr(vars(ours)) + ours.name


# ---------------------------------------------------------------- weights that stay


def test_fixed_weights_grow_old_and_a_teachers_do_not():
    with StubServer() as stub:
        for writer, versions in (("student", [0, 0, 0]), ("teacher", [0, 3, 4])):
            with generator(stub, writer=writer) as ours:
                found = []
                for step in (0, 3, 4):
                    ours.refresh(step)
                    found += [answer.version for answer in ours.generate(PROMPTS[:1], SAMPLING)]
            assert found == versions
        assert stub.steered == []

"""`potstill generate` with a teacher behind HTTP: its text, an outage that is gone on from, another model that is noticed, no secret."""

import json
from collections import Counter
from pathlib import Path

import pytest

from potstill.serving import pool
from small_recipe import potstill
from stub_server import Bigram, Fault, StubServer
from tiny import tiny_tokenizer

CANARY = "canaryCANARYcanaryCANARYcanary12"
FILTERS = "{cut: keep, same: keep}"


def generate(place: Path, url: str, name: str, *overrides: str) -> int:
    teacher = f"teacher={{kind: server, url: '{url}', model: tiny, top_k: 8, api_key_env: SERVER_API_KEY, max_outage_seconds: 0}}"
    section = f"generate={{path: {place}/{name}, samples: 2, batch_size: 8, filters: {FILTERS}, sampling: {{max_new_tokens: 5}}}}"
    return potstill("generate", place / "r.yaml", "--quiet", teacher, section, *overrides)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", CANARY)
    monkeypatch.setattr(pool, "_FIRST_PAUSE", 0.02)


def readable() -> Bigram:
    """A bigram that says nothing but letters and the end."""
    model, tokenizer = Bigram(320), tiny_tokenizer()
    letters = [number for text, number in tokenizer.get_vocab().items() if text.isascii() and text.isalpha() and len(text) == 1]
    for number in range(320):
        if number not in letters and number != tokenizer.eos_token_id:
            model.log_probs[:, number] = -60.0
    return model


def prompts(stub: StubServer) -> Counter:
    """How often each prompt was paid for, by its ids; a probe is asked for otherwise."""
    found = Counter()
    for request in stub.answered:
        for prompt in request if isinstance(request[0], list) else [request]:
            found[json.dumps(prompt)] += 1
    return found


def test_a_served_teacher_writes_and_an_outage_costs_what_was_in_flight(place, capsys):
    with StubServer(model=readable()) as stub:
        assert generate(place, stub.url, "unbroken.jsonl") == 0
        whole = (place / "unbroken.jsonl").read_bytes()
        rows = [json.loads(line) for line in whole.splitlines()]
        assert len(rows) > 60
        assert all(row["output"].isalpha() for row in rows)
        assert any(row["finish_reason"] == "stop" for row in rows)
        calls = stub.calls

    def away(number: int, body: dict) -> Fault | None:
        return Fault(status=503) if number > calls // 2 else None

    with StubServer(away, model=readable()) as stub:
        port = stub.port
        assert generate(place, stub.url, "broken.jsonl") == 75
        assert not (place / "broken.jsonl").exists()
        first = prompts(stub)
    with StubServer(model=readable(), port=port) as stub:
        assert generate(place, stub.url, "broken.jsonl") == 0
        second = prompts(stub)
    assert (place / "broken.jsonl").read_bytes() == whole
    once = prompts_of(first + second)
    assert 72 <= sum(once.values()) <= 72 + 8, "more than one batch was paid for twice"
    shown = capsys.readouterr()
    assert CANARY not in shown.out + shown.err
    kept = [path for path in place.rglob("*") if path.is_file() and "jsonl" in str(path)]
    assert not [path for path in kept if CANARY.encode() in path.read_bytes()]


def prompts_of(found: Counter) -> Counter:
    """Those that belong to rows: each row's prompt holds the header of a turn, and no probe does."""
    start = tiny_tokenizer().convert_tokens_to_ids("<|im_start|>")
    return Counter({prompt: number for prompt, number in found.items() if start in json.loads(prompt)})


def test_another_model_behind_the_same_address_does_not_go_on_with_the_answers(place, capsys):
    with StubServer(model=readable()) as stub:
        assert generate(place, stub.url, "same.jsonl") == 0
    with StubServer(model=Bigram(320, seed=1)) as other:
        assert generate(place, other.url, "same.jsonl") == 2
    assert "its answers were made from something else: probe is" in capsys.readouterr().err


def test_a_key_in_a_file_is_refused_in_words(place, capsys):
    (place / "key").write_text(CANARY)
    teacher = f"teacher={{kind: server, url: 'http://127.0.0.1:9', model: tiny, api_key_file: {place}/key}}"
    assert potstill("generate", place / "r.yaml", teacher, f"generate={{path: {place}/x.jsonl, sampling: {{max_new_tokens: 5}}}}") == 2
    assert "teacher.api_key_file: a server that writes takes its key from a variable" in capsys.readouterr().err

"""A served teacher's answers are the model's: ids, log-probabilities, tails and targets by row, against a bigram that is known."""

import json

import numpy as np
import pytest
import torch

from potstill.batch import Batch
from potstill.errors import ConfigError, IncompatibleError, TeacherError
from potstill.serving.service import read_key
from potstill.signals import Needs, TargetOutcomes, TopKOutcomes
from potstill.teachers.config import ServerTeacherConfig
from potstill.teachers.server import ServerTeacher, service_of
from potstill.teachers.teacher import Teacher, require
from stub_server import Bigram, StubServer
from tiny import tiny_tokenizer

VOCABULARY, K = 320, 6


def config(url: str, **changes) -> ServerTeacherConfig:
    given = {"top_k": K, "concurrency": 3, "sequences_per_request": 2, "request_seconds": 5, "max_outage_seconds": 5, **changes}
    return ServerTeacherConfig(kind="server", url=url, model="tiny", **given)


def packed_batch(documents: list[list[int]], first_targets: list[int], row: int = 40) -> Batch:
    """Documents one after another in rows of equal length, padded at the end."""
    rows: list[list[tuple[int, int, int, bool]]] = [[]]
    number = 0
    for tokens, first in zip(documents, first_targets, strict=True):
        if len(rows[-1]) + len(tokens) > row:
            rows.append([])
            number = 0
        rows[-1] += [(token, place, number, place >= first) for place, token in enumerate(tokens)]
        number += 1
    cells = [cell + [(0, 0, -1, False)] * (row - len(cell)) for cell in rows]
    fields = list(zip(*(zip(*cell, strict=True) for cell in cells), strict=True))
    tokens, positions, numbers, marks = (torch.tensor(values) for values in fields)
    return Batch(tokens, positions, numbers, marks)


def some_documents(count: int = 7, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    numbers = np.random.default_rng(seed)
    documents = [numbers.integers(0, VOCABULARY, numbers.integers(2, 19)).tolist() for _ in range(count)]
    return documents, [int(numbers.integers(0, len(tokens))) for tokens in documents]


def expected(model: Bigram, documents: list[list[int]], first_targets: list[int], k: int) -> tuple[np.ndarray, ...]:
    """By the definitions, in float64 and probability space: ids, log-probs, log-tails, targets' log-probs."""
    ids, kept, tails, targets = [], [], [], []
    for tokens, first in zip(documents, first_targets, strict=True):
        for place in range(max(first, 1), len(tokens)):
            row = np.exp(model.log_probs[tokens[place - 1]])
            best = np.argsort(-row)[:k]
            ids.append(best)
            kept.append(np.log(row[best]))
            tails.append(np.log(row.sum() - row[best].sum()))
            targets.append(np.log(row[tokens[place]]))
    return np.array(ids), np.array(kept), np.array(tails), np.array(targets)


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_rows_are_what_the_model_says(backend):
    documents, first = some_documents()
    with StubServer() as stub:
        teacher: Teacher = ServerTeacher(config(stub.url, backend=backend), vocabulary_size=VOCABULARY)
        batch = packed_batch(documents, first)
        for k in (K, 3):
            outcomes = teacher.score(batch, Needs("top_k", top_k=k)).outcomes
            ids, kept, tails, targets = expected(stub.model, documents, first, k)
            assert isinstance(outcomes, TopKOutcomes)
            assert np.array_equal(outcomes.ids.numpy(), ids)
            np.testing.assert_allclose(outcomes.log_probs, kept, atol=1e-6)
            np.testing.assert_allclose(outcomes.log_tail, tails, atol=1e-5)
            np.testing.assert_allclose(outcomes.target_log_probs, targets, atol=1e-6)
        teacher.close()


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_the_target_alone_is_asked_for_where_nothing_else_is_needed(backend):
    """One log-probability a token: what an objective from drawn tokens asks for. Nothing else travels."""
    documents, first = some_documents()
    with StubServer() as stub:
        teacher = ServerTeacher(config(stub.url, backend=backend), vocabulary_size=VOCABULARY)
        bodies = []
        stub.script = lambda number, body: bodies.append(body)
        batch = packed_batch(documents, first)
        outcomes = teacher.score(batch, Needs("target")).outcomes
        assert isinstance(outcomes, TargetOutcomes)
        np.testing.assert_allclose(outcomes.log_probs, expected(stub.model, documents, first, 1)[3], atol=1e-6)
        asked = [body.get("prompt_logprobs", body.get("top_logprobs_num")) for body in bodies]
        assert asked.count(0) == 4
        assert asked.count(K) == len(asked) - 4 <= 1   # a probe
        nobody = packed_batch([[1, 2, 3], [4, 5]], [3, 2])
        assert len(teacher.score(nobody, Needs("target")).outcomes) == 0
        teacher.close()


def test_it_asks_what_is_needed_and_once():
    documents, first = some_documents(5)
    documents += [documents[0], documents[1]]
    first += [first[0], max(first[1] - 1, 0)]
    with StubServer() as stub:
        teacher = ServerTeacher(config(stub.url), vocabulary_size=VOCABULARY)
        stub.asked.clear()
        batch = packed_batch(documents, first)
        rows = teacher.score(batch, Needs("top_k")).outcomes
        prompts = [tuple(prompt) for prompts in stub.asked for prompt in prompts]
        probes = len(prompts) - 5
        assert 0 <= probes <= 1
        assert {tuple(tokens) for tokens in documents} <= set(prompts)
        assert len(rows) == batch.num_targets
        np.testing.assert_allclose(rows.target_log_probs, expected(stub.model, documents, first, K)[3], atol=1e-6)
        stub.asked.clear()
        assert teacher.score(batch, Needs("nothing")).outcomes is None
        nobody = packed_batch([[1, 2, 3], [4, 5]], [3, 2])
        assert len(teacher.score(nobody, Needs("top_k")).outcomes) == 0
        assert stub.asked == []
        teacher.close()


def test_what_comes_after_the_last_target_is_not_sent():
    with StubServer() as stub:
        teacher = ServerTeacher(config(stub.url), vocabulary_size=VOCABULARY)
        stub.asked.clear()
        tokens = torch.tensor([[5, 6, 7, 8, 9]])
        marks = torch.tensor([[False, False, True, False, False]])
        outcomes = teacher.score(Batch(tokens, torch.arange(5)[None], torch.zeros_like(tokens), marks), Needs("top_k")).outcomes
        assert stub.asked[0] == [[5, 6, 7]]
        np.testing.assert_allclose(outcomes.target_log_probs, [stub.model.log_probs[6, 7]], atol=1e-6)
        teacher.close()


def test_the_whole_vocabulary_has_no_tail_and_padded_rows_go_to_it():
    model = Bigram(12, spread=1.0)
    documents, first = [[1, 2, 3, 4, 3, 2]], [0]
    with StubServer(model=model) as stub:
        whole = ServerTeacher(config(stub.url, top_k=12), vocabulary_size=12)
        assert bool((whole.score(packed_batch(documents, first), Needs("top_k")).outcomes.log_tail == -torch.inf).all())
        whole.close()
        # A head of 12 rows for 8 tokens: rows 8 to 11 are padding.
        padded = ServerTeacher(config(stub.url), vocabulary_size=8)
        outcomes = padded.score(packed_batch(documents, first), Needs("top_k")).outcomes
        padded.close()
    assert int(outcomes.ids.max()) < 8
    found = torch.zeros(5, 8, dtype=torch.float64).scatter_add(1, outcomes.ids, outcomes.log_probs.double().exp())
    rows = np.exp(model.after(documents[0]))
    for row, mass, tail in zip(rows, found.numpy(), outcomes.log_tail, strict=True):
        kept = [number for number in np.argsort(-row)[:K] if number < 8]
        np.testing.assert_allclose(mass, [row[number] if number in kept else 0 for number in range(8)], atol=1e-6)
        np.testing.assert_allclose(float(tail), np.log(1 - row[kept].sum()), atol=1e-5)


def test_it_offers_top_k_and_the_target_at_temperature_one_and_nothing_else():
    with StubServer() as stub:
        teacher = ServerTeacher(config(stub.url), vocabulary_size=VOCABULARY)
        require(teacher, Needs("top_k", top_k=K, temperature=1.0))
        require(teacher, Needs("target"))
        for needs in (Needs("full"), Needs("sampled"), Needs("top_k", top_k=K + 1), Needs("top_k", temperature=2.0)):
            with pytest.raises(IncompatibleError, match="the server"):
                teacher.score(packed_batch([[1, 2]], [0]), needs)
        teacher.close()


def test_a_document_that_is_too_long_is_refused_before_it_is_sent():
    with StubServer(max_model_len=20) as stub:
        teacher = ServerTeacher(config(stub.url), vocabulary_size=VOCABULARY)
        stub.asked.clear()
        teacher.score(packed_batch([list(range(19))], [1]), Needs("top_k"))
        assert stub.asked
        stub.asked.clear()
        with pytest.raises(IncompatibleError, match=r"takes 20 tokens.*found a document with 20 .*data\.max_tokens"):
            teacher.score(packed_batch([[1, 2, 3], list(range(20))], [1, 1]), Needs("top_k"))
        assert stub.asked == []
        teacher.close()


def test_its_identity_is_the_served_model_and_the_probe():
    with StubServer() as one, StubServer(model=Bigram(seed=1)) as other:
        teachers = [ServerTeacher(config(stub.url), vocabulary_size=VOCABULARY, tokenizer=tiny_tokenizer()) for stub in (one, one, other)]
        first, again, another = ({**teacher.identity} for teacher in teachers)
        assert first == again
        assert first["served model"] == another["served model"]
        assert first["probe"] != another["probe"]
        assert len(json.loads(first["probe"])) >= 16
        assert "127.0.0.1" not in str(first)
        for teacher in teachers:
            teacher.close()


# ---------------------------------------------------------------- tokenizers


def spelled(changes: dict[int, str] | None = None):
    tokenizer = tiny_tokenizer()
    return lambda number: (changes or {}).get(number, tokenizer.decode([number]))


def test_a_server_that_spells_its_ids_alike_is_accepted():
    with StubServer(texts=spelled()) as stub:
        ServerTeacher(config(stub.url), vocabulary_size=VOCABULARY, tokenizer=tiny_tokenizer()).close()


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_another_tokenizer_is_refused_with_the_first_token_that_differs(backend):
    tokenizer = tiny_tokenizer()
    numbers = tokenizer("In 1999, 3 quick", add_special_tokens=False)["input_ids"]
    best = int(np.argmax(Bigram().log_probs[numbers[0]]))
    spell = spelled()
    wrong = {number: "elsewhere" for number in range(best, VOCABULARY) if spell(number).strip() and "\ufffd" not in spell(number)}
    with StubServer(texts=spelled(wrong)) as stub, pytest.raises(IncompatibleError, match=r"id \d+ is .* to the student and 'elsewhere'"):
        ServerTeacher(config(stub.url, backend=backend), vocabulary_size=VOCABULARY, tokenizer=tokenizer)


def test_a_tokenizer_that_the_recipe_names_is_compared_instead(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "same")
    tiny_tokenizer(300).save_pretrained(tmp_path / "other")
    with StubServer(texts=lambda number: "elsewhere") as stub:
        accepted = config(stub.url, tokenizer=str(tmp_path / "same"))
        ServerTeacher(accepted, vocabulary_size=VOCABULARY, tokenizer=tiny_tokenizer()).close()
        with pytest.raises(IncompatibleError, match="do not read the same tokens"):
            ServerTeacher(config(stub.url, tokenizer=str(tmp_path / "other")), vocabulary_size=VOCABULARY, tokenizer=tiny_tokenizer())


# ---------------------------------------------------------------- the start


def test_a_model_that_is_not_served_is_refused_with_what_is():
    with StubServer() as stub, pytest.raises(TeacherError, match=r"teacher\.model: 'big' is not what .* serves; it serves 'tiny'"):
        ServerTeacher(config(stub.url).model_copy(update={"model": "big"}), vocabulary_size=VOCABULARY)


@pytest.mark.parametrize("url", ["ftp://a", "http://name:key@host/v1", "http://host/v1?key=1", "http://host/#key"])
def test_an_address_with_a_key_in_it_is_no_address(url):
    with pytest.raises(ValueError, match="url: "):
        config(url)


@pytest.mark.parametrize(("value", "said"), [(None, "is not set"), ("  ", "is empty"), ("two words", "a blank"), ("bad\nkey", "a blank")])
def test_a_key_that_cannot_be_one_is_refused_with_its_place(value, said, monkeypatch):
    if value is not None:
        monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(ConfigError, match=f"teacher.api_key_env.*THE_KEY.*{said}") as caught:
        ServerTeacher(config("http://127.0.0.1:1", api_key_env="THE_KEY"), vocabulary_size=VOCABULARY)
    assert "words" not in str(caught.value)


def test_files_under_the_home_folder_are_found(tmp_path, monkeypatch):
    """What the check before a run finds there is what the run reads."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path / "served")
    (tmp_path / "key").write_text("canary-4711\n")
    with StubServer(texts=lambda number: "elsewhere") as stub:
        named = config(stub.url, tokenizer="~/served", api_key_file="~/key")
        key = read_key(service_of(named))
        assert key is not None
        assert key.reveal() == "canary-4711"
        ServerTeacher(named, vocabulary_size=VOCABULARY, tokenizer=tiny_tokenizer()).close()

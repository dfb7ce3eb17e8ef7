"""F9 to F13, F35: a server that is away, slow, busy, wrong, another model, or curious about the key. Real sockets, a scripted server."""

import logging
import random
import socket
import threading
import time
import traceback
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import count
from pathlib import Path

import pytest
import torch

from potstill.batch import Batch
from potstill.errors import OutageError, TeacherError
from potstill.serving import pool as server_pool
from potstill.serving.endpoint import retry_after
from potstill.signals import Needs
from potstill.teachers.config import ServerTeacherConfig
from potstill.teachers.server import ServerTeacher
from server_mutators import MUTATORS
from stub_server import Bigram, Fault, StubServer

VOCABULARY, K = 320, 6
_marks = count(1)


def config(url: str, **changes) -> ServerTeacherConfig:
    given = {"top_k": K, "concurrency": 3, "sequences_per_request": 1, "request_seconds": 5, "max_outage_seconds": 5, **changes}
    return ServerTeacherConfig(kind="server", url=url, model="tiny", **given)


def teacher_of(url: str, **changes) -> ServerTeacher:
    return ServerTeacher(config(url, **changes), vocabulary_size=VOCABULARY)


def batch(rows: int = 4, length: int = 6) -> Batch:
    """Documents that no other batch has had, so that they are told from each other in what a server was asked."""
    first = next(_marks)
    tokens = torch.stack([torch.tensor([first, number + 3, *range(50, 48 + length)]) for number in range(rows)])
    return Batch(tokens, torch.arange(length).repeat(rows, 1), torch.zeros_like(tokens), torch.arange(length).repeat(rows, 1) > 0)


def right(stub: StubServer, teacher: ServerTeacher, given: Batch) -> None:
    """Scores a batch and compares every target."""
    outcomes = teacher.score(given, Needs("top_k")).outcomes
    rows, targets = given.target_rows()
    expected = torch.from_numpy(stub.model.log_probs)[given.tokens.flatten()[rows], targets]
    assert torch.allclose(outcomes.target_log_probs.double(), expected, atol=1e-6)


def after(calls: int, fault: Fault):
    """The fault from that call on."""
    return lambda number, body: fault if number >= calls else None


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(server_pool, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(server_pool, "_LONGEST_PAUSE", 0.3)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return taken.getsockname()[1]


# ---------------------------------------------------------------- F9: away


def test_a_server_that_comes_late_is_waited_for():
    port = free_port()
    stubs: list[StubServer] = []
    timer = threading.Timer(1.0, lambda: stubs.append(StubServer(port=port)))
    timer.start()
    began = time.monotonic()
    teacher = teacher_of(f"http://127.0.0.1:{port}")
    assert 0.9 < time.monotonic() - began < 3
    right(stubs[0], teacher, batch())
    teacher.close()
    stubs[0].close()


def test_a_server_that_dies_and_comes_back_loses_nothing_and_is_paid_once():
    first = StubServer()
    teacher = teacher_of(first.url)
    right(first, teacher, batch())
    port = first.port
    first.close()
    later: list[StubServer] = []
    timer = threading.Timer(1.0, lambda: later.append(StubServer(port=port)))
    timer.start()
    given = batch(12)
    outcomes = teacher.score(given, Needs("top_k")).outcomes
    assert len(outcomes) == given.num_targets
    paid = [tuple(prompt) for prompts in later[0].answered for prompt in prompts]
    documents = [tuple(tokens) for tokens in given.tokens.tolist()]
    assert {document: paid.count(document) for document in documents} == dict.fromkeys(documents, 1)
    assert len(paid) - len(documents) >= 1   # the probe, since the connection is a new one
    teacher.close()
    later[0].close()


@pytest.mark.parametrize("fault", [Fault(drop=True), Fault(status=503), Fault(status=500, body=b"boom"), Fault(status=504)])
def test_an_outage_that_lasts_ends_with_75_and_the_reason(fault):
    with StubServer(after(1, fault)) as stub:
        teacher = teacher_of(stub.url, max_outage_seconds=1)
        began = time.monotonic()
        with pytest.raises(OutageError, match=r"not answered for .*max_outage_seconds: 1.*run the same command again") as caught:
            teacher.score(batch(), Needs("top_k"))
        assert caught.value.exit_code == 75
        assert 0.9 < time.monotonic() - began < 3
        teacher.close()


def test_a_failure_now_and_then_is_no_outage():
    numbers = random.Random(0)
    fault = [Fault(drop=True), Fault(status=500), Fault(status=502), Fault(status=504), Fault(status=408)]
    with StubServer(lambda number, body: numbers.choice(fault) if numbers.random() < 0.4 else None) as stub:
        teacher = teacher_of(stub.url, max_outage_seconds=20)
        for _ in range(5):
            right(stub, teacher, batch(6))
        teacher.close()


def test_one_request_that_fails_alone_is_named_and_not_waited_for():
    given = batch(60)
    poison = given.tokens[2].tolist()

    def script(number, body):
        return Fault(status=500, body=b"assertion failed") if poison in body["prompt"] else Fault(delay=0.05)

    with StubServer(script) as stub:
        teacher = teacher_of(stub.url, max_outage_seconds=60)
        began = time.monotonic()
        with pytest.raises(TeacherError, match="one request failed 10 times while others were answered: status 500: assertion failed"):
            teacher.score(given, Needs("top_k"))
        assert time.monotonic() - began < 10
        teacher.close()


# ---------------------------------------------------------------- F10: slow


@pytest.mark.parametrize("fault", [Fault(delay=60), Fault(drip=True)], ids=["silent", "dripping"])
def test_a_request_that_stalls_is_asked_again(fault):
    with StubServer(lambda number, body: fault if number == 3 else None) as stub:
        teacher = teacher_of(stub.url, request_seconds=2)
        began = time.monotonic()
        right(stub, teacher, batch(8))
        assert time.monotonic() - began < 2 + 2
        teacher.close()


@pytest.mark.parametrize("fault", [Fault(delay=60), Fault(drip=True)], ids=["silent", "dripping"])
def test_a_server_that_stalls_for_good_is_left(fault):
    with StubServer(after(1, fault)) as stub:
        teacher = teacher_of(stub.url, request_seconds=1, max_outage_seconds=2)
        began = time.monotonic()
        with pytest.raises(OutageError, match=r"no whole answer within .* \(teacher\.request_seconds\)"):
            teacher.score(batch(), Needs("top_k"))
        assert time.monotonic() - began < 3 + 2
        teacher.close()


def test_waiting_is_broken_off_by_whoever_asks_for_it():
    """What training does on SIGTERM: its check raises, and the connections go."""
    class Asked(Exception):
        pass

    def check():
        if time.monotonic() > moment:
            raise Asked

    for fault in (Fault(delay=60), Fault(status=503), Fault(status=429, headers={"Retry-After": "30"})):
        with StubServer(after(1, fault)) as stub:
            teacher = teacher_of(stub.url, request_seconds=60, max_outage_seconds=60)
            moment = time.monotonic() + 0.5
            teacher.heed(check)
            began = time.monotonic()
            with pytest.raises(Asked):
                teacher.score(batch(), Needs("top_k"))
            teacher.close()
            assert time.monotonic() - began < 1.5
            deadline = time.monotonic() + 2
            while stub.under_way and not fault.delay and time.monotonic() < deadline:
                time.sleep(0.01)
            assert fault.delay or stub.under_way == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "potstill-server"]


# ---------------------------------------------------------------- F11: busy


def test_being_told_to_wait_is_no_attempt():
    refusals = iter([Fault(status=429, headers={"Retry-After": "0"})] * 50)
    with StubServer(lambda number, body: next(refusals, None) if number else None) as stub:
        teacher = teacher_of(stub.url)
        right(stub, teacher, batch(3))
        assert stub.calls >= 50 + 3
        teacher.close()


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_obeyed_by_all(kind):
    """One is told to wait: none of the others asks meanwhile."""
    told = []

    def script(number, body):
        if number == 1:
            told.append(time.monotonic())
            value = "1" if kind == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
            return Fault(status=429, headers={"Retry-After": value})
        if number > 1 and told and time.monotonic() - told[0] < 0.9:
            early.append(number)
        return Fault(delay=0.05)

    early: list[int] = []
    with StubServer(script) as stub:
        teacher = teacher_of(stub.url, concurrency=1)
        right(stub, teacher, batch(4))
        assert time.monotonic() - told[0] > 0.9
        assert early == []
        teacher.close()


def test_a_wait_beyond_all_patience_is_not_begun():
    with StubServer(after(1, Fault(status=429, headers={"Retry-After": "3600"}))) as stub:
        teacher = teacher_of(stub.url)
        began = time.monotonic()
        with pytest.raises(OutageError, match="asks to wait 3600 s more"):
            teacher.score(batch(), Needs("top_k"))
        assert time.monotonic() - began < 1
        teacher.close()


def test_a_busy_server_is_asked_less_at_once_and_then_more_again():
    with StubServer() as stub:
        def script(number, body):
            busy = stub.under_way > 2 and number < 150
            return Fault(status=429, headers={"Retry-After": "0"}) if busy else Fault(delay=0.01)

        stub.script = script
        teacher = teacher_of(stub.url, concurrency=12)
        for _ in range(3):
            right(stub, teacher, batch(24))
        refused = stub.calls - len(stub.answered)
        assert refused < 60
        stub.script = lambda number, body: Fault(delay=0.02)
        stub.most_under_way = 0
        for _ in range(3):
            right(stub, teacher, batch(24))
        assert stub.most_under_way >= 8
        teacher.close()


def test_never_more_requests_at_once_than_agreed():
    with StubServer(lambda number, body: Fault(delay=0.02)) as stub:
        teacher = teacher_of(stub.url, concurrency=3, sequences_per_request=2)
        right(stub, teacher, batch(20))
        assert stub.most_under_way == 3
        assert max(len(prompts) for prompts in stub.asked) == 2
        teacher.close()


def test_retry_after_in_all_its_forms():
    assert retry_after("7") == 7
    assert retry_after("-3") == 0
    assert retry_after("nan") is None
    assert retry_after("soon") is None
    assert retry_after(None) is None
    in_a_minute = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert in_a_minute is not None
    assert 57 < in_a_minute <= 60
    assert retry_after("Fri, 01 Jan 1999 00:00:00 GMT") == 0


@pytest.mark.parametrize(
    ("status", "body", "hint"),
    [
        (400, b'{"error":{"message":"Requested prompt logprobs of 6, which is greater than max allowed: 5"}}', r"teacher\.top_k \(6\)"),
        (400, b'{"error": {"message": "maximum context length\\u001b[31m is\\u0000 4"}}', r"maximum context length \[31m is 4"),
        (401, b'{"error":"Unauthorized"}', r"Unauthorized; check the key"), (403, b"<h1>no</h1>", "check the key"),
        (404, b'{"detail":"Not Found"}', r"Not Found; check teacher\.url"),
        (422, b'{"detail":[{"msg":"field required"}]}', "field required"),
        (413, b"x" * 10_000, r"x{400,500}\.\.\."), (501, b"", "Not Implemented"),
    ],
)  # fmt: skip
def test_a_refusal_ends_at_once_with_the_servers_words(status, body, hint):
    with StubServer(after(1, Fault(status=status, body=body))) as stub:
        teacher = teacher_of(stub.url, max_outage_seconds=60)
        began = time.monotonic()
        with pytest.raises(TeacherError, match=f"status {status}: .*{hint}") as caught:
            teacher.score(batch(), Needs("top_k"))
        assert time.monotonic() - began < 1
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 900
        teacher.close()


# ---------------------------------------------------------------- F12: wrong


def test_a_spoiled_answer_is_asked_for_again():
    numbers = random.Random(0)

    def script(number, body):
        name = numbers.choice(sorted(MUTATORS.keys() - {"answers_exchanged", "indices_exchanged"}))
        spoiled = number % 2 == 1 and "prompt" in body
        return Fault(mutate=lambda answer: MUTATORS[name](answer, numbers)) if spoiled else None

    with StubServer(script) as stub:
        teacher = teacher_of(stub.url, concurrency=1)
        for _ in range(4):
            right(stub, teacher, batch(4))
        teacher.close()


def test_answers_that_stay_wrong_are_refused_and_kept_for_inspection(tmp_path):
    secret = "canary-in-a-body-0123"
    page = b"<html>" + secret.encode() + b"\x1b[2J" + b"x" * 200_000 + b"</html>"
    (tmp_path / "key").write_text(secret + "\n")
    with StubServer(after(1, Fault(body=page))) as stub:
        given = config(stub.url, api_key_file=str(tmp_path / "key"))
        teacher = ServerTeacher(given, vocabulary_size=VOCABULARY, quarantine=tmp_path / "wrong")
        with pytest.raises(TeacherError, match=r"4 answers to one request cannot be believed: not JSON .*teacher\.backend \(vllm\)"):
            teacher.score(batch(1), Needs("top_k"))
        teacher.close()
    kept = sorted((tmp_path / "wrong").iterdir())
    assert len(kept) == 4
    for path in kept:
        assert b"not JSON" in path.read_bytes()
        assert len(path.read_bytes()) <= 64 * 2**10
        assert secret not in path.read_text()


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with StubServer(after(1, Fault(body=b"no"))) as stub:
        teacher = teacher_of(stub.url)
        with pytest.raises(TeacherError):
            teacher.score(batch(1), Needs("top_k"))
        teacher.close()
    assert list(tmp_path.iterdir()) == []


def test_an_answer_without_end_is_not_read_to_its_end():
    with StubServer(after(1, Fault(body=b" " * 20_000_000))) as stub:
        teacher = teacher_of(stub.url)
        with pytest.raises(TeacherError, match=r"more than [\d,]+ bytes"):
            teacher.score(batch(1), Needs("top_k"))
        teacher.close()


# ---------------------------------------------------------------- F13: another model


def test_a_model_that_changes_under_way_is_noticed():
    with StubServer() as stub:
        def script(number, body):
            if number == 10:
                stub.model = Bigram(VOCABULARY, seed=1)

        stub.script = script
        teacher = teacher_of(stub.url, probe_seconds=0.2)

        def ask_on():
            for _ in range(100):
                teacher.score(batch(1), Needs("top_k"))
                time.sleep(0.02)

        with pytest.raises(TeacherError, match=r"become another model: token \d+ of the probe had log-probability -.* and has -.*suspect"):
            ask_on()
        teacher.close()


def test_another_model_after_a_reconnect_answers_nothing():
    first = StubServer()
    teacher = teacher_of(first.url)
    right(first, teacher, batch())
    first.close()
    with StubServer(port=first.port, model=Bigram(VOCABULARY, seed=1)):
        with pytest.raises(TeacherError, match="become another model"):
            teacher.score(batch(), Needs("top_k"))
        teacher.close()


def test_it_can_be_asked_at_any_time():
    """What a capture does before it commits."""
    with StubServer() as stub:
        teacher = teacher_of(stub.url)
        before = stub.calls
        teacher.confirm()
        assert stub.calls == before + 1
        stub.model = Bigram(VOCABULARY, seed=1)
        with pytest.raises(TeacherError, match="become another model"):
            teacher.confirm()
        teacher.close()


def test_small_drift_is_the_same_model():
    with StubServer() as stub:
        teacher = teacher_of(stub.url, probe_tolerance=0.2)
        near = Bigram(VOCABULARY)
        near.log_probs = near.log_probs - 0.05
        stub.model = near
        teacher.confirm()
        near.log_probs = near.log_probs - 0.3
        with pytest.raises(TeacherError, match="another model"):
            teacher.confirm()
        teacher.close()


# ---------------------------------------------------------------- F35: the key

CANARY = "canary+key/0123456789=="


def _faults_that_show_the_key() -> dict[str, Fault]:
    echo = CANARY.encode()
    return {
        "refused": Fault(status=401, body=b'{"error": "key ' + echo + b' is wrong"}'),
        "in a header": Fault(status=403, headers={"WWW-Authenticate": f'Bearer realm="{CANARY}"'}, body=b"no"),
        "cut in the middle": Fault(status=400, body=b"x" * 490 + echo),
        "percent-encoded": Fault(status=404, body=b"canary%2Bkey%2F0123456789%3D%3D"),
        "down": Fault(status=500, body=echo), "a body that is none": Fault(body=echo), "silent": Fault(delay=5),
        "sent on": Fault(status=307, headers={"Location": f"http://127.0.0.1:9/{CANARY}"}),
    }  # fmt: skip


@pytest.mark.parametrize("place", ["environment", "file"])
@pytest.mark.parametrize("name", list(_faults_that_show_the_key()))
def test_the_key_stands_nowhere(name, place, tmp_path, monkeypatch, caplog, capfd):
    (tmp_path / "key").write_text(f"  {CANARY}\n")
    monkeypatch.setenv("SOME_PLACE", f" {CANARY} ")
    source = {"api_key_env": "SOME_PLACE"} if place == "environment" else {"api_key_file": str(tmp_path / "key")}
    caplog.set_level(logging.DEBUG)
    with StubServer(after(1, _faults_that_show_the_key()[name])) as stub:
        given = config(stub.url, request_seconds=1.5 if name == "silent" else 10, max_outage_seconds=1.5, **source)
        teacher = ServerTeacher(given, vocabulary_size=VOCABULARY, quarantine=tmp_path / "wrong")
        with pytest.raises((TeacherError, OutageError)) as caught:
            teacher.score(batch(1), Needs("top_k"))
        teacher.close()
        assert stub.headers[0]["Authorization"] == f"Bearer {CANARY}"
        said = [
            "".join(traceback.format_exception(caught.value)), caplog.text, *capfd.readouterr(), str(teacher.identity), teacher.name,
            repr(given), repr(teacher), repr(vars(teacher._asker._endpoint)), *(str(record.__dict__) for record in caplog.records),
            *(path.read_text() for path in Path(tmp_path).rglob("*.txt")),
        ]  # fmt: skip
    assert len(caplog.records) > 5
    for text in said:
        assert "canary" not in text


def test_no_redirect_is_followed():
    with StubServer() as elsewhere:
        with StubServer(after(1, Fault(status=307, headers={"Location": elsewhere.url + "/v1/completions"}))) as stub:
            teacher = teacher_of(stub.url)
            with pytest.raises(TeacherError, match=f"sends on to {elsewhere.url}.*status 307.*teacher.url"):
                teacher.score(batch(), Needs("top_k"))
            teacher.close()
        assert elsewhere.calls == 0

"""F9, F13, F16: whole runs and captures with a served teacher that dies, stays away, is interrupted, or becomes another model."""

import os
import signal
import threading
import time
from contextlib import closing

import pytest
import torch

from potstill.cache.store import CacheReader
from potstill.errors import InterruptedRun, OutageError, TeacherError
from potstill.objectives.distribution import DistributionMatching
from potstill.serving import pool as server_pool
from potstill.teachers.config import ServerTeacherConfig
from potstill.teachers.server import ServerTeacher
from potstill.training.distiller import Distiller
from potstill.training.trainer import train
from small_captures import example_set, keys_of, make_format, run_capture
from small_runs import VOCABULARY, Run, digest, examples, make_student, opened, weights
from stub_server import Bigram, Fault, StubServer

K = 8
RUN = Run()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(server_pool, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(server_pool, "_LONGEST_PAUSE", 0.2)


def teacher_of(url: str, **changes) -> ServerTeacher:
    given = {"top_k": K, "concurrency": 2, "request_seconds": 30, "max_outage_seconds": 1, "probe_tolerance": 0.05, **changes}
    return ServerTeacher(ServerTeacherConfig(kind="server", url=url, model="tiny", **given), vocabulary_size=VOCABULARY)


def run(path, teacher: ServerTeacher):
    """The small run, from the start or from where it was broken off, on the top K and the rest."""
    objective = DistributionMatching(divergence="forward_kl", kd_ratio=0.5, support="top_k_tail", vocabulary_size=VOCABULARY)
    distiller = Distiller(make_student(RUN.student), objective)
    try:
        with opened(path, RUN) as folder:
            summary = train(
                distiller, teacher, examples(RUN.num_examples), None, RUN.config(), folder, seed=RUN.seed, pad_token=0, quiet=True
            )
    finally:
        teacher.close()
    return digest(weights(distiller)), summary


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> str:
    with StubServer() as stub:
        return run(tmp_path_factory.mktemp("unbroken") / "run", teacher_of(stub.url))[0]


def test_a_run_whose_server_dies_for_good_goes_on_to_the_same_bits(unbroken, tmp_path):
    with StubServer(lambda number, body: Fault(drop=True) if number > 9 else None) as stub, pytest.raises(OutageError) as caught:
        run(tmp_path / "run", teacher_of(stub.url))
    assert caught.value.exit_code == 75
    with StubServer() as stub:
        found, summary = run(tmp_path / "run", teacher_of(stub.url))
    assert summary.resumed_from is not None
    assert summary.resumed_from > 0
    assert found == unbroken


def test_a_run_whose_server_comes_back_is_not_broken_off(unbroken, tmp_path):
    stub = StubServer()
    later: list[StubServer] = []

    def script(number, body):
        if number == 9:
            threading.Thread(target=restart).start()
            return Fault(drop=True)
        return None

    def restart():
        stub.close()
        time.sleep(0.5)
        later.append(StubServer(port=stub.port))

    stub.script = script
    found, summary = run(tmp_path / "run", teacher_of(stub.url, max_outage_seconds=30))
    assert summary.resumed_from is None
    assert later[0].calls > 3
    assert found == unbroken
    later[0].close()


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(delay=60)], ids=["away", "silent"])
def test_a_signal_while_the_teacher_is_waited_for_commits_and_leaves(fault, unbroken, tmp_path):
    sent = []

    def script(number, body):
        if number == 9:
            def send():
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)

            threading.Timer(0.5, send).start()
        return fault if number >= 9 else None

    with StubServer(script) as stub, pytest.raises(InterruptedRun) as caught:
        run(tmp_path / "run", teacher_of(stub.url, max_outage_seconds=60))
    assert time.monotonic() - sent[0] < 4   # with the checkpoint, on a busy machine
    assert caught.value.exit_code == 143
    with StubServer() as stub:
        found, summary = run(tmp_path / "run", teacher_of(stub.url))
    assert summary.resumed_from
    assert found == unbroken


def test_no_answer_of_another_model_is_committed(tmp_path):
    """It changes behind a living connection; every commit asks first, and what came since the last one is asked again."""
    sets, other = [example_set(40)], Bigram(VOCABULARY, seed=1)
    format = make_format("top_k", k=K, exact=True)
    with StubServer() as stub:
        first = stub.model

        def script(number, body):
            if number == 20:
                stub.model = other
            return Fault(delay=0.02)

        stub.script = script
        with closing(teacher_of(stub.url)) as teacher, pytest.raises(TeacherError, match="become another model"):
            run_capture(tmp_path / "cache", sets, format=format, teacher=teacher, config={"batch_tokens": 64, "commit_seconds": 0.1})
        committed = len(list(CacheReader(str(tmp_path / "cache")).keys()))
        assert 0 < committed < 40
        stub.script, stub.model = (lambda number, body: None), first
        with closing(teacher_of(stub.url)) as teacher:
            run_capture(tmp_path / "cache", sets, format=format, teacher=teacher)
    reader = CacheReader(str(tmp_path / "cache"))
    for number, key in enumerate(sets[0].digest(n) for n in range(40)):
        example = sets[0][number]
        rows = [place - 1 for place in range(1, len(example.tokens)) if example.is_target[place]]
        expected = torch.from_numpy(first.after(example.tokens))[rows].topk(K).values
        assert torch.allclose(reader.read([key]).log_probs.double(), expected, atol=1e-5)
    assert sorted(reader.keys()) == sorted(keys_of(*sets))

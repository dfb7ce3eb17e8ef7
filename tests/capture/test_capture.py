"""A capture in one process: complete, once, gone on with, refused before it costs anything, and ended cleanly by whatever goes wrong."""

import os
import signal
import threading
import time

import pytest
import torch

from potstill.cache.store import CacheReader, CacheWriter
from potstill.capture import disk, recording
from potstill.capture.capture import say_end
from potstill.capture.disk import bytes_per_row
from potstill.capture.units import Share
from potstill.counting_progress import CountingProgress
from potstill.errors import IncompatibleError, InterruptedRun, OutageError, StorageError, TeacherError
from potstill.head import Head
from potstill.signals import Needs, Offers
from small_captures import VOCABULARY, example_set, held, keys_of, make_format, make_teacher, require_same, run_capture

SETS = [example_set(30), example_set(12, seed=1)]
KEYS = keys_of(*SETS)
ROWS = {key: int(examples.target_counts[n]) for examples in SETS for n in range(len(examples)) for key in [examples.digest(n)]}
HEAD = Head(torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(1)))


def asked(counter) -> list[str]:
    return counter.read_text().split() if counter.exists() else []


@pytest.mark.parametrize("outcomes", ["top_k", "sampled", "top_k_sampled", "hidden", "projected"])
def test_every_sequence_is_recorded_as_it_was_answered(outcomes, tmp_path):
    """Through units, the codec and the store, against the same sequences asked one at a time."""
    format = make_format(outcomes, **({"exact": True} if outcomes.startswith("top_k") else {}))
    summary = run_capture(tmp_path / "cache", SETS, format=format, project_on=HEAD)
    reader = CacheReader(str(tmp_path / "cache"))
    assert sorted(reader.keys()) == sorted(KEYS)
    assert (summary.sequences, summary.rows) == (len(KEYS), sum(ROWS.values()))
    assert summary.tokens == sum(int(examples.lengths.sum()) for examples in SETS)
    run_capture(tmp_path / "alone", SETS, format=format, project_on=HEAD, config={"batch_tokens": 1})
    require_same(reader, CacheReader(str(tmp_path / "alone")), KEYS, atol=1e-5)
    assert all(reader.rows(key) == ROWS[key] for key in KEYS)


def test_what_is_drawn_beside_a_top_k_keeps_its_weight(tmp_path):
    """(1 - a) / n, another in each row: what the codec does not write down it must know."""
    run_capture(tmp_path / "cache", SETS, format=make_format("top_k_sampled"))
    reader = CacheReader(str(tmp_path / "cache"))
    for key in KEYS:
        record = reader.read([key])
        mass = (record.drawn.weights * record.drawn.counts).sum(-1) + record.top.log_probs.exp().sum(-1)
        assert torch.allclose(mass, torch.ones(len(record)), atol=1e-3)


def test_the_next_start_asks_nothing(tmp_path):
    run_capture(tmp_path / "cache", SETS)
    summary = run_capture(tmp_path / "cache", SETS, teacher=make_teacher(tmp_path / "asked"))
    assert asked(tmp_path / "asked") == []
    assert (summary.sequences, summary.found_sequences) == (0, len(KEYS))
    assert "nothing was asked" in say_end(summary, "here")
    assert not list((tmp_path / "cache").glob("begun-*"))


def test_more_data_is_asked_alone(tmp_path):
    run_capture(tmp_path / "cache", SETS[:1])
    run_capture(tmp_path / "cache", SETS, teacher=make_teacher(tmp_path / "asked"))
    assert sorted(asked(tmp_path / "asked")) == sorted(key.hex() for key in keys_of(SETS[1]))


@pytest.mark.parametrize("packed", [None, 64])
def test_shards_make_one_cache(packed, tmp_path):
    run_capture(tmp_path / "whole", SETS, teacher=make_teacher(tmp_path / "asked"))
    for index in (1, 0, 2):
        run_capture(tmp_path / "shards", SETS, share=Share(index, 3), teacher=make_teacher(tmp_path / "asked"), packed_tokens=packed)
    counts = {key: asked(tmp_path / "asked").count(key.hex()) for key in KEYS}
    assert set(counts.values()) == {2}, "once for the whole, once for the shards"
    # Quantised: a number that lies on the edge of a step may fall to either side, so the exact ones are compared above.
    whole, shards = (CacheReader(str(tmp_path / name)) for name in ("whole", "shards"))
    for key in KEYS:
        assert torch.allclose(whole.read([key]).log_tail, shards.read([key]).log_tail, atol=0.1)


def test_a_cache_behind_fsspec(tmp_path):
    from uuid import uuid4

    path = f"memory://{uuid4().hex}"
    run_capture(path, SETS)
    assert sorted(CacheReader(path).keys()) == sorted(KEYS)


def test_every_rows_sequence_is_seen_by_the_progress(capsys):
    with CountingProgress(100, doing="Capturing", done="captured", unit="tokens", quiet=False) as progress:
        progress._said -= 100
        progress.advance(40)
    assert "captured 40 of 100 tokens" in capsys.readouterr().err
    with CountingProgress(100, doing="Capturing", done="captured", unit="tokens", quiet=True) as progress:
        progress._said -= 100
        progress.advance(40)
    assert capsys.readouterr().err == ""


def test_what_is_left_is_said_first(tmp_path, capsys):
    run_capture(tmp_path / "cache", SETS[:1])
    run_capture(tmp_path / "cache", SETS, quiet=False)
    said = capsys.readouterr().err
    assert f"{len(SETS[0])} sequences are committed, {len(SETS[1])} with" in said
    assert "a kill costs at most" in said


# ---------------------------------------------------------------- refused before it costs anything


class Server:
    """Offers a top K of 20 and is never asked."""

    name, offers, identity = "the server", Offers(frozenset({"top_k"}), top_k=20, temperature=1.0), {}

    def score(self, batch, needs: Needs):
        pytest.fail("the teacher was asked")


@pytest.mark.parametrize(
    ("format", "words"),
    [(make_format("sampled"), "sampled asks for full"), (make_format("hidden"), "hidden"), (make_format(k=21), "20 kept outcomes, not 21"),
     (make_format(temperature=2.0), "temperature 1.0, not 2.0")],
)  # fmt: skip
def test_what_a_server_does_not_offer_is_refused(format, words, tmp_path):
    with pytest.raises(IncompatibleError, match=words):
        run_capture(tmp_path / "cache", SETS, format=format, teacher=Server())


def test_a_disk_that_cannot_hold_it_is_refused_before_the_first_question(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"capture.path: .* bytes are needed, .* and 1,000 are free"):
        run_capture(tmp_path / "cache", SETS, teacher=make_teacher(tmp_path / "asked"))
    assert asked(tmp_path / "asked") == []


def test_the_first_unit_is_measured(tmp_path, monkeypatch):
    """Where the guess was too low the first answers show it, and nothing more is asked than what waits."""
    monkeypatch.setattr(disk, "bytes_per_row", lambda format: 0.0)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 10_000)
    with pytest.raises(StorageError, match="by the size of the first answers"):
        run_capture(tmp_path / "cache", SETS, format=make_format(exact=True), teacher=make_teacher(tmp_path / "asked"))
    assert len(asked(tmp_path / "asked")) < len(KEYS)


@pytest.mark.parametrize("outcomes", ["top_k", "sampled", "top_k_sampled", "hidden"])
def test_the_prediction_bounds_what_is_written(outcomes, tmp_path):
    format = make_format(outcomes)
    summary = run_capture(tmp_path / "cache", SETS, format=format)
    written = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert summary.bytes_per_row > 0.2 * bytes_per_row(format)
    # Short sequences cost their frame beside their rows; the bound counts that too.
    assert written < 1.5 * disk.predicted_bytes(format, summary.rows, summary.sequences) + 8192


# ---------------------------------------------------------------- ended by what goes wrong


class BrokenCodec:
    def __init__(self, after: int):
        self.left = after

    def encode(self, record) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise StorageError("the disk is full, say")
        return b"payload"


@pytest.mark.parametrize("after", [0, 9, 20])
def test_a_failure_of_the_recorder_ends_the_capture_within_one_unit(after, tmp_path, monkeypatch):
    """F6: no hang, no success, and the teacher is not asked on."""
    monkeypatch.setattr("potstill.capture.capture.make_codec", lambda format: BrokenCodec(after))
    teacher, began = make_teacher(tmp_path / "asked"), time.monotonic()
    with pytest.raises(StorageError, match="the disk is full, say"):
        run_capture(tmp_path / "cache", SETS, teacher=teacher, config={"batch_tokens": 24})
    assert time.monotonic() - began < 10  # a fifth of a second on a machine that has nothing else to do
    assert len(asked(tmp_path / "asked")) <= after + 2 * (recording._UNITS_WAITING + 2)
    assert not any(thread.name == "recorder" for thread in threading.enumerate())


def test_a_failure_of_the_last_unit_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.capture.capture.make_codec", lambda format: BrokenCodec(len(KEYS) - 1))
    with pytest.raises(StorageError):
        run_capture(tmp_path / "cache", SETS)


class Failing:
    """A teacher that is gone, or is told to stop, at its n-th question."""

    def __init__(self, inner, number: int, act):
        self.inner, self.number, self.act = inner, number, act
        self.name, self.offers, self.identity = inner.name, inner.offers, inner.identity

    def score(self, batch, needs):
        self.number -= 1
        if self.number == 0:
            self.act()
        return self.inner.score(batch, needs)


def test_a_teacher_that_is_gone_leaves_what_it_answered(tmp_path):
    def gone():
        raise OutageError("away for too long")

    teacher = Failing(make_teacher(tmp_path / "asked"), 3, gone)
    with pytest.raises(OutageError):
        run_capture(tmp_path / "cache", SETS, teacher=teacher, config={"commit_seconds": 1000.0})
    answered = asked(tmp_path / "asked")
    assert answered
    assert held(tmp_path / "cache") == sorted(answered)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_commits_what_was_answered(number, tmp_path, capsys):
    teacher = Failing(make_teacher(tmp_path / "asked"), 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(InterruptedRun, match="the same command asks for the rest") as raised:
        run_capture(tmp_path / "cache", SETS, teacher=teacher, config={"commit_seconds": 1000.0})
    assert raised.value.exit_code == 128 + number
    assert "committing what was answered" in capsys.readouterr().err
    assert held(tmp_path / "cache") == sorted(asked(tmp_path / "asked"))
    summary = run_capture(tmp_path / "cache", SETS, teacher=make_teacher(tmp_path / "asked"))
    assert len(asked(tmp_path / "asked")) == len(KEYS), "nothing was asked twice"
    assert summary.redone_rows == 0


def test_an_idle_capture_commits_too(tmp_path):
    """A teacher that is away for long does not leave what it answered uncommitted."""
    path = tmp_path / "cache"

    def wait():
        deadline = time.monotonic() + 10
        while len(CacheReader(str(path))) < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(CacheReader(str(path))) >= 10, "nothing was committed while the teacher was away"

    run_capture(path, SETS, teacher=Failing(make_teacher(), 4, wait), config={"commit_seconds": 0.2})


class Far:
    """A teacher that becomes another one: what it said since it was last confirmed must not be committed."""

    def __init__(self, inner, confirmations: int):
        self.inner, self.left = inner, confirmations
        self.name, self.offers, self.identity = inner.name, inner.offers, inner.identity

    def score(self, batch, needs):
        return self.inner.score(batch, needs)

    def heed(self, check):
        """Nothing is waited for."""

    def confirm(self):
        self.left -= 1
        if self.left < 0:
            raise TeacherError("it is another one now")


@pytest.mark.parametrize("confirmations", [0, 2])
@pytest.mark.parametrize("full_shards", [False, True])
def test_nothing_unconfirmed_is_committed(full_shards, confirmations, tmp_path, monkeypatch):
    """Neither by the clock nor by a shard that is full."""
    committed = []
    commit = CacheWriter.commit
    monkeypatch.setattr(CacheWriter, "commit", lambda writer: (committed.append(len(writer)), commit(writer))[1])
    teacher, settings = Far(make_teacher(), confirmations), {"commit_seconds": 1000.0 if full_shards else 1e-6}
    if full_shards:
        small = lambda *given, **named: recording.Recorder(*given, **{**named, "shard_bytes": 4096})  # noqa: E731
        monkeypatch.setattr("potstill.capture.capture.Recorder", small)
    with pytest.raises(TeacherError):
        run_capture(tmp_path / "cache", SETS, teacher=teacher, config=settings, shard_bytes=4096)
    assert len(committed) == confirmations
    assert len(held(tmp_path / "cache")) < len(KEYS)


def test_records_are_readable_while_they_are_written(tmp_path):
    reader_found = []

    def look():
        reader = CacheReader(str(tmp_path / "cache"))
        reader_found.extend((key, len(reader.read([key]))) for key in list(reader.keys()))

    run_capture(tmp_path / "cache", SETS, teacher=Failing(make_teacher(), 5, look))
    assert reader_found
    assert all(rows == ROWS[key] for key, rows in reader_found)

"""The answers of a generation through crashes, loss of power, a full disk and damage: none that was committed is lost, no other is read."""

import errno
import json

import pytest

from faultfs import CRASHES, Workload, explore, fill_up
from potstill import storage
from potstill.cache.provenance import Provenance
from potstill.errors import RunFolderError, StorageError
from potstill.rollouts.answers_folder import AnswersFolder, Job
from potstill.rollouts.writing import Completion

STATED = Provenance({"writer weights": "aa", "sampling": {"temperature": 1.0}, "notes": {"path": "/t"}})
UNITS = [[Job(row, sample) for sample in range(2)] for row in range(3)]


def answer(job: Job) -> Completion:
    tokens = tuple(range(100 * job.row + 10 * job.sample, 100 * job.row + 10 * job.sample + 3 + job.row))
    return Completion(tokens, tuple(-0.5 for _ in tokens), ended=job.sample == 0)


def run(root, done=lambda _: None) -> list[Job]:
    """What a launch does: takes the folder up, answers what is missing, unit by unit. Returns what it was asked to answer."""
    folder = AnswersFolder(root / "rows.jsonl")
    lock = folder.open(STATED)
    asked = []
    try:
        held = folder.read()
        for unit in UNITS:
            missing = [job for job in unit if job not in held]
            if missing:
                asked += missing
                folder.commit(missing, [answer(job) for job in missing], rank=0, world_size=1)
                for job in missing:
                    done(job)
    finally:
        lock.release()
    return asked


def require_truth(root, done) -> None:
    held = AnswersFolder(root / "rows.jsonl").read()
    assert set(done) <= held.keys(), "a committed answer is gone"
    for job, given in held.items():
        assert (tuple(given.tokens), given.ended) == (answer(job).tokens, answer(job).ended), "an answer is not what was given"
    for unit in UNITS:
        assert len([job for job in unit if job in held]) in (0, 2), "half a unit is there"


def require_truth_and_go_on(root, done) -> None:
    require_truth(root, done)
    before = set(AnswersFolder(root / "rows.jsonl").read())
    assert not before & set(run(root)), "an answer was asked for twice"
    require_truth(root, [job for unit in UNITS for job in unit])


LIFE = Workload(lambda root: None, run, require_truth_and_go_on)


@pytest.mark.parametrize("fault", CRASHES)
def test_at_every_operation_a_crash_loses_nothing_and_nothing_is_asked_twice(fault, tmp_path):
    assert explore(LIFE, tmp_path, fault) > 15


def test_at_every_operation_the_disk_may_be_full(tmp_path):
    messages = fill_up(Workload(lambda root: None, run, require_truth), tmp_path, errno.ENOSPC)
    assert len(messages) > 10
    assert all("bytes are needed" in message for message in messages)


def test_the_exploration_finds_answers_that_were_not_synced(tmp_path, monkeypatch):
    append = storage.append_lines
    monkeypatch.setattr(storage, "append_lines", lambda path, lines, **_: append(path, lines))
    with pytest.raises(AssertionError, match="a committed answer is gone"):
        explore(LIFE, tmp_path, "power_loss")


def file_of(root):
    (found,) = (root / "rows.jsonl.answers").glob("answers-*")
    return found


def test_every_flipped_bit_is_noticed_and_its_answers_are_asked_for_again(tmp_path):
    run(tmp_path)
    file = file_of(tmp_path)
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(bytes(damaged))
        folder = AnswersFolder(tmp_path / "rows.jsonl")
        for job, given in folder.read().items():
            assert tuple(given.tokens) == answer(job).tokens
        assert folder.damaged >= 1
    file.write_bytes(whole[: len(whole) // 2])
    assert 0 < len(run(tmp_path)) < 6
    require_truth(tmp_path, [job for unit in UNITS for job in unit])


def test_several_ranks_and_starts_write_files_of_their_own(tmp_path):
    folders = [AnswersFolder(tmp_path / "rows.jsonl") for _ in range(3)]
    folders[0].open(STATED).release()
    for folder, rank, unit in zip(folders, (0, 1, 1), UNITS, strict=True):
        folder.commit(unit, [answer(job) for job in unit], rank=rank, world_size=2)
    assert len(list((tmp_path / "rows.jsonl.answers").glob("answers-*"))) == 3
    require_truth(tmp_path, [job for unit in UNITS for job in unit])


def test_one_launch_at_a_time_and_only_of_the_same(tmp_path):
    folder = AnswersFolder(tmp_path / "rows.jsonl")
    lock = folder.open(STATED)
    with pytest.raises(RunFolderError, match="another potstill generate is writing this"):
        AnswersFolder(tmp_path / "rows.jsonl").open(STATED)
    lock.release()
    other = Provenance({**STATED.fields, "sampling": {"temperature": 0.5}})
    with pytest.raises(RunFolderError, match=r"sampling.temperature is 0.5 in this recipe and 1.0 there"):
        folder.open(other)
    folder.open(Provenance({**STATED.fields, "notes": {"path": "/elsewhere"}})).release()


def test_a_statement_that_does_not_read_is_said(tmp_path):
    run(tmp_path)
    statement = tmp_path / "rows.jsonl.answers" / "provenance.json"
    for content in (b"{", b"[]", b"\xff"):
        statement.write_bytes(content)
        with pytest.raises(StorageError, match="remove the folder to begin anew"):
            run(tmp_path)
    statement.unlink()
    with pytest.raises(RunFolderError, match="nobody can say whose"):
        run(tmp_path)


def test_a_line_of_json_that_is_no_answer_is_passed_over(tmp_path):
    run(tmp_path)
    with file_of(tmp_path).open("a") as file:
        for line in ({}, [], {"answers": 3, "xxh3": "x"}, {"answers": [[0, 0, 1, ["a"]]], "xxh3": "x"}):
            file.write(json.dumps(line) + "\n")
    folder = AnswersFolder(tmp_path / "rows.jsonl")
    assert len(folder.read()) == 6
    assert folder.damaged == 4

"""F2, F4, F5, F30, F40: a writer dies, tears a write, loses power or finds the disk full at every operation; nothing lies, nothing is lost.

Every workload has a naive twin beside it for which the same exploration must find a fault: a test that cannot fail proves nothing.
"""

import errno
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from faultfs import CRASHES, Workload, explore, fill_up
from potstill import storage
from potstill.run_folder import RunFolder
from potstill.training.checkpoint import CheckpointState, latest_checkpoint, load_checkpoint, save_checkpoint

OLD, NEW = b"old " * 100, b"new content " * 300


# ---------------------------------------------------------------- one file


def _check_file(root: Path, done: list) -> None:
    found = (root / "file").read_bytes()
    assert found in (OLD, NEW), f"{len(found)} bytes that nobody wrote"
    assert found == NEW or not done, "an acknowledged write is lost"


def _prepare_file(root: Path) -> None:
    (root / "file").write_bytes(OLD)


def _file(write) -> Workload:
    def run(root, done):
        write(root / "file", NEW)
        done("written")

    return Workload(_prepare_file, run, _check_file)


def _naive_write(path: Path, data: bytes) -> None:
    """open(path, "wb").write(data)"""
    descriptor = storage.OPERATIONS.append(path)
    storage.OPERATIONS.truncate(descriptor, 0)
    storage.OPERATIONS.write(descriptor, memoryview(data))
    storage.OPERATIONS.close(descriptor)


def _write_without_fsync(path: Path, data: bytes) -> None:
    """Temporary file and rename, the widespread recipe that trusts the page cache."""
    descriptor = storage.OPERATIONS.create(path.with_suffix(".new"))
    storage.OPERATIONS.write(descriptor, memoryview(data))
    storage.OPERATIONS.close(descriptor)
    storage.OPERATIONS.rename(path.with_suffix(".new"), path)
    storage.OPERATIONS.sync_folder(path.parent)


def _write_without_folder_sync(path: Path, data: bytes) -> None:
    descriptor = storage.OPERATIONS.create(path.with_suffix(".new"))
    storage.OPERATIONS.write(descriptor, memoryview(data))
    storage.OPERATIONS.fsync(descriptor)
    storage.OPERATIONS.close(descriptor)
    storage.OPERATIONS.rename(path.with_suffix(".new"), path)


# ---------------------------------------------------------------- a line of a log


def _prepare_log(root: Path) -> None:
    storage.append_lines(root / "log.jsonl", ['{"step": 0}'], sync=True)


def _log_lines(append) -> Workload:
    def run(root, done):
        for step in (1, 2, 3):
            append(root / "log.jsonl", [f'{{"step": {step}}}'], step == 2)
            if step == 2:
                done(step)

    def check(root, done):
        steps = [line["step"] for line in storage.read_lines(root / "log.jsonl")[0]]
        assert steps[:4] == list(range(len(steps)))[:4], f"found steps {steps}"
        assert len(steps) > max([0, *done]), "an acknowledged line is lost"

    return Workload(_prepare_log, run, check)


def _append(path, lines, sync):
    storage.append_lines(path, lines, sync=sync)


def _append_without_sync(path, lines, sync):
    storage.append_lines(path, lines, sync=False)


# ---------------------------------------------------------------- a committed folder that replaces another


def _fill(folder: Path, content: bytes) -> None:
    for name in ("a.bin", "b.bin"):
        storage.write_bytes(folder / name, content + name.encode())


def _prepare_folder(root: Path) -> None:
    storage.commit_folder(root / "student", lambda folder: _fill(folder, OLD))


def _check_folder(root: Path, done: list) -> None:
    storage.sweep(root)
    assert storage.verify_folder(root / "student") == [], "no whole folder is left"
    assert [path.name for path in root.iterdir()] == ["student"], "something unfinished lies about"
    content = storage.read_bytes(root / "student", "a.bin")
    assert content.startswith(NEW) or not done, "an acknowledged folder is lost"


def _folder(commit) -> Workload:
    def run(root, done):
        commit(root / "student", lambda folder: _fill(folder, NEW))
        done("committed")

    return Workload(_prepare_folder, run, _check_folder)


def _replace(final, writer):
    storage.commit_folder(final, writer, replace=True)


def _delete_then_write(final, writer):
    """shutil.rmtree(final); save(final)"""
    storage.remove(final)
    storage.commit_folder(final, writer)


def _manifest_first(final, writer):
    """Writes in place, over the old files."""
    (final / storage.MANIFEST).unlink()
    for name in ("a.bin", "b.bin"):
        _naive_write(final / name, NEW + name.encode())
    scratch = final.with_name("scratch")
    storage.commit_folder(scratch, writer)
    shutil.copy(scratch / storage.MANIFEST, final / storage.MANIFEST)
    shutil.rmtree(scratch)


# ---------------------------------------------------------------- checkpoints and their rotation


def _state(step: int) -> CheckpointState:
    return CheckpointState({"weights": {"w": torch.full((5,), float(step)), "v": torch.arange(step)}}, {"step": step})


def _prepare_checkpoints(root: Path) -> None:
    save_checkpoint(root, 1, _state(1), keep=1)
    torn = root / "step-00000002"  # a newer one that an unlucky disk tore
    shutil.copytree(root / "step-00000001", torn)
    (torn / "state.json").write_text("{")


def _checkpoints(save) -> Workload:
    def run(root, done):
        for step in (2, 3):
            save(root, step, _state(step))
            done(step)

    def check(root, done):
        storage.sweep(root)
        found = latest_checkpoint(root)
        assert found.path is not None, "no checkpoint can be loaded"
        assert found.step >= max([1, *done]), f"step {max(done)} was saved, only step {found.step} is left"
        state = load_checkpoint(found.path)
        assert state.numbers == {"step": found.step}
        assert torch.equal(state.tensors["weights"]["w"], torch.full((5,), float(found.step)))

    return Workload(_prepare_checkpoints, run, check)


def _save(root, step, state):
    save_checkpoint(root, step, state, keep=1)


def _rotate_first(root, step, state):
    """Deletes the old one to make room, then writes."""
    for path in root.glob("step-*"):
        storage.remove(path)
    save_checkpoint(root, step, state, keep=1)


def _rotate_by_name(root, step, state):
    """Counts a torn folder as a checkpoint: deletes the good one because a newer name is there."""
    for path in sorted(root.glob("step-*"))[:-1]:
        storage.remove(path)
    save_checkpoint(root, step, state, keep=10)


# ---------------------------------------------------------------- a whole run folder


RECIPE = {"student": {"path": "a"}, "training": {"epochs": 1}, "run": {"folder": "runs/a", "seed": 0}}


def _run_folder() -> Workload:
    def run(root, done):
        with RunFolder.open(root / "run", RECIPE) as folder:
            found = latest_checkpoint(folder.checkpoints)
            folder.cut_back(found.step if found.path else None)
            for step in range(found.step + 1, 4):
                folder.append_samples(step, 0, [step])
                folder.sync_logs()
                save_checkpoint(folder.checkpoints, step, _state(step), keep=2)
                done(step)
            storage.commit_folder(folder.student, lambda unfinished: _fill(unfinished, NEW), replace=True)
            folder.finish({"steps": 3})
            done("finished")

    def check(root, done):
        if not (root / "run" / "recipe.yaml").exists():
            assert not done, "a run that saved steps is gone"
            return
        with RunFolder.open(root / "run", RECIPE) as folder:
            found = latest_checkpoint(folder.checkpoints)
            steps = [step for step in done if step != "finished"]
            assert found.step >= max([0, *steps])
            folder.cut_back(found.step if found.path else None)
            trained = [line["step"] for line in folder.read_samples()]
            assert trained == list(range(1, found.step + 1)), f"checkpoint {found.step}, samples of steps {trained}"
            if folder.status == "finished":
                assert storage.verify_folder(folder.student) == []
            assert folder.status == "finished" or "finished" not in done

    return Workload(lambda root: None, run, check)


SOUND = {
    "file": _file(storage.write_bytes), "log": _log_lines(_append), "folder": _folder(_replace),
    "checkpoints": _checkpoints(_save), "run folder": _run_folder(),
}  # fmt: skip
NAIVE = {
    ("plain open", "torn"): _file(_naive_write),
    ("plain open", "crash"): _file(_naive_write),
    ("rename without fsync", "power_loss"): _file(_write_without_fsync),
    ("rename without fsync", "metadata_first"): _file(_write_without_fsync),
    ("rename without folder sync", "power_loss"): _file(_write_without_folder_sync),
    ("append without fsync", "power_loss"): _log_lines(_append_without_sync),
    ("delete, then write", "crash"): _folder(_delete_then_write),
    ("write in place", "torn"): _folder(_manifest_first),
    ("rotate, then save", "crash"): _checkpoints(_rotate_first),
    ("rotate by name", "crash"): _checkpoints(_rotate_by_name),
}


@pytest.mark.parametrize("fault", CRASHES)
@pytest.mark.parametrize("name", SOUND)
def test_every_crash_point_leaves_something_whole(name, fault, tmp_path):
    assert explore(SOUND[name], tmp_path, fault) >= 5


@pytest.mark.parametrize(("name", "fault"), NAIVE)
def test_the_exploration_finds_the_fault_of_a_naive_writer(name, fault, tmp_path):
    with pytest.raises((AssertionError, FileNotFoundError)):
        explore(NAIVE[name, fault], tmp_path, fault)


@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("name", ["file", "folder", "checkpoints"])
def test_a_full_or_failing_disk_keeps_what_was_committed_and_names_the_path(name, error_number, tmp_path):
    messages = fill_up(SOUND[name], tmp_path, error_number)
    assert messages
    assert all(str(tmp_path / "root") in message for message in messages)
    if error_number == errno.ENOSPC:
        assert all("bytes are needed" in message and "are free" in message for message in messages)


def test_a_disk_that_is_full_for_the_log_does_not_end_the_run(tmp_path, caplog):
    from faultfs import FaultyDisk

    with RunFolder.open(tmp_path / "run", RECIPE) as folder:
        folder.append_metrics({"step": 1, "loss": 1.0})
        with FaultyDisk(tmp_path, at=0, fault=errno.ENOSPC, lasting=True).installed():
            folder.append_metrics({"step": 2, "loss": 1.0})
            folder.append_metrics({"step": 3, "loss": 1.0})
        folder.append_metrics({"step": 4, "loss": 1.0})
        assert [line["step"] for line in folder.read_metrics()] == [1, 4]
        assert folder.lines_lost == 2
    assert len(caplog.records) == 1


def test_a_torn_append_is_cut_back_so_that_later_lines_are_read(tmp_path):
    from faultfs import FaultyDisk

    path = tmp_path / "log.jsonl"
    storage.append_lines(path, ['{"step": 1}'])
    with FaultyDisk(tmp_path, at=1, fault=errno.ENOSPC).installed(), suppress(storage.StorageError):
        storage.append_lines(path, ['{"step": 2}'])
    storage.append_lines(path, ['{"step": 3}'])
    assert [line["step"] for line in storage.read_lines(path)[0]] == [1, 3]

"""F3, F16: a run of the real command line, killed at any moment and started again by the same command, ends with the same bits.

The model, the data and the recipe are small; the process, the signals, the files and the command line are real.
"""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from command_runs import EPOCHS, MICRO_BATCHES, ROWS, SAVED_EVERY, STEPS, STEPS_AN_EPOCH, Server, write_recipe


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    write_recipe(folder)
    server = Server(folder)
    yield server
    server.close()


def _digest(run: Path) -> dict[str, str]:
    """sha256 of the exported student, the adapter and the last trained weights: the bytes that a user gets."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [run / "student" / "model.safetensors", run / "adapter" / "adapter_model.safetensors", *sorted(last.glob("weights*"))]
    return {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def _losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], name, line[name]) for line in lines for name in ("loss", "eval_loss", "grad_norm") if name in line]


@pytest.fixture(scope="module")
def unbroken(server):
    run = server.folder / "unbroken"
    server.finish(run)
    return run


def _require_equal(run: Path, unbroken: Path) -> None:
    assert _digest(run) == _digest(unbroken)
    assert _samples(run) == _samples(unbroken)
    assert _losses(run) == _losses(unbroken)
    assert not list(run.rglob(".tmp-*")), "orphans were not swept"


def test_the_unbroken_run_sees_every_row_once_an_epoch(unbroken):
    samples = _samples(unbroken)
    assert [line["step"] for line in samples] == list(range(1, STEPS + 1))
    for epoch in range(EPOCHS):
        seen = [example for line in samples if line["epoch"] == epoch for example in line["examples"]]
        assert sorted(seen) == list(range(ROWS))
    assert samples[0]["examples"] != samples[STEPS_AN_EPOCH]["examples"], "both epochs have one order"


def test_a_finished_run_says_so_and_changes_nothing(server, unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file() and path.name != ".lock"}
    assert "finished" in server.finish(unbroken)
    assert before == {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file() and path.name != ".lock"}


# Every micro-batch of the run (in the first and the second of a window, in both epochs), and the moments around a step.
KILLS = [
    *(("micro_batch", number) for number in range(1, STEPS * MICRO_BATCHES + 1)),
    ("step_done", 4), ("evaluation", 2), ("evaluation", 9), ("commit", 1), ("commit", 3), ("export", 1),
]  # fmt: skip


@pytest.mark.parametrize(("point", "number"), KILLS)
def test_killed_anywhere_the_run_ends_with_the_same_bits(point, number, server, unbroken):
    run = server.folder / f"killed-{point}-{number}"
    assert server.run(run, at=point, number=number) == -signal.SIGKILL
    said = server.finish(run)
    _require_equal(run, unbroken)
    if point == "micro_batch" and number > SAVED_EVERY * MICRO_BATCHES:
        assert "resuming at step" in said
    shutil.rmtree(run)


@pytest.mark.parametrize("number", [10, 60, 105, 118, 131])
def test_killed_inside_the_writer_the_run_ends_with_the_same_bits(number, server, unbroken):
    """F2, F40: at a primitive operation of storage: in a checkpoint, its manifest, its rotation, a log, the export."""
    run = server.folder / f"killed-operation-{number}"
    assert server.run(run, at="operation", number=number) == -signal.SIGKILL
    server.finish(run)
    _require_equal(run, unbroken)
    shutil.rmtree(run)


def test_killed_again_and_again(server, unbroken):
    """Each life gets a little further than the last checkpoint; some die while they restore."""
    run = server.folder / "killed-often"
    lives = [("micro_batch", 3), ("micro_batch", 8), ("restore", 1), ("micro_batch", 7), ("commit", 1), ("step_done", 2)]
    statuses = [server.run(run, at=point, number=number) for point, number in lives]
    assert statuses == [-signal.SIGKILL] * len(lives)
    server.finish(run)
    _require_equal(run, unbroken)
    shutil.rmtree(run)


@pytest.mark.parametrize("tear", ["half a file", "no manifest", "flipped bit"])
def test_a_torn_newest_checkpoint_is_named_and_the_one_before_it_used(tear, server, unbroken):
    run = server.folder / "torn"
    assert server.run(run, at="micro_batch", number=STEPS * MICRO_BATCHES) == -signal.SIGKILL
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000006"
    weights = newest / "weights-00000.safetensors"
    content = bytearray(weights.read_bytes())
    if tear == "no manifest":
        (newest / "MANIFEST.json").unlink()
    elif tear == "half a file":
        weights.write_bytes(content[: len(content) // 2])
    else:
        content[-5] ^= 4
        weights.write_bytes(content)
    said = server.finish(run)
    assert "step-00000006" in said
    assert "resuming at step 3" in said
    _require_equal(run, unbroken)
    shutil.rmtree(run)


TERMINATED = [
    ("micro_batch", 1, signal.SIGTERM), ("micro_batch", 10, signal.SIGTERM), ("micro_batch", 2, signal.SIGINT),
    ("evaluation", 2, signal.SIGTERM), ("evaluation", 8, signal.SIGTERM), ("commit", 1, signal.SIGTERM), ("step_done", 5, signal.SIGTERM),
]  # fmt: skip


@pytest.mark.parametrize(("point", "number", "signal_number"), TERMINATED)
def test_a_signal_commits_and_leaves_with_its_code(point, number, signal_number, server, unbroken):
    """F16: in the warm-up, in the middle of a window, in an evaluation, in a commit, after a step."""
    run = server.folder / f"signal-{point}-{number}"
    assert server.run(run, at=point, number=number, action=signal_number) == 128 + signal_number, server.log(run).read_text()
    samples = _samples(run) if (run / "samples.jsonl").exists() else []
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    assert max(steps, default=0) == len(samples), "every step that was taken is committed"
    server.finish(run)
    _require_equal(run, unbroken)
    shutil.rmtree(run)


def test_more_epochs_lengthen_a_finished_run(server, unbroken):
    run = server.folder / "longer"
    shutil.copytree(unbroken, run)
    said = server.finish(run, f"training.epochs={EPOCHS + 1}")
    assert "training.epochs" in said
    assert [line["step"] for line in _samples(run)] == list(range(1, STEPS + STEPS_AN_EPOCH + 1))


def test_a_changed_recipe_is_refused_with_code_2_and_can_be_overridden(server, unbroken):
    run = server.folder / "changed"
    assert server.run(run, at="micro_batch", number=9) == -signal.SIGKILL
    assert server.run(run, "objective.kd_ratio=0.9") == 2
    assert "--override-resume objective.kd_ratio" in server.log(run).read_text()
    server.finish(run, "objective.kd_ratio=0.9", "--override-resume", "objective.kd_ratio")
    assert _digest(run) != _digest(unbroken)
    assert _samples(run) == _samples(unbroken)


def test_other_rows_under_the_same_path_are_refused(server):
    run = server.folder / "other-rows"
    assert server.run(run, at="micro_batch", number=9) == -signal.SIGKILL
    train = server.folder / "train.jsonl"
    rows = train.read_text()
    try:
        train.write_text(rows.replace("Add 3", "Subtract 3"))
        assert server.run(run) == 2
        assert "training data" in server.log(run).read_text()
    finally:
        train.write_text(rows)
    server.finish(run)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_under_way(server):
    from potstill.run_folder import RunFolder

    run = server.folder / "busy"
    assert server.run(run, at="micro_batch", number=3) == -signal.SIGKILL
    with RunFolder.open(run, RunFolder.read(run).read_recipe()):
        assert server.run(run) == 2
        assert f"process {os.getpid()}" in server.log(run).read_text()
    server.finish(run)


@pytest.mark.parametrize(("file_bytes", "named", "left"), [(4_000, "checkpoints/step-00000006", [3]), (20_000, "student", [6, 8])])
def test_a_real_limit_on_file_size_ends_the_run_and_a_larger_disk_goes_on(file_bytes, named, left, server, unbroken):
    """F5: the kernel refuses the bytes; the exit code, the path and what is needed are said, and nothing that was committed is lost."""
    run = server.folder / f"full-{file_bytes}"
    assert server.run(run, at="micro_batch", number=9) == -signal.SIGKILL
    assert server.run(run, file_bytes=file_bytes) == 1
    said = server.log(run).read_text()
    assert f"{run}/{named}" in said
    assert "bytes are needed" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in left]
    server.finish(run)
    _require_equal(run, unbroken)


def test_a_folder_that_vanishes_under_a_run_is_named(server):
    """F38."""
    run = server.folder / "vanished"
    assert server.run(run, at="micro_batch", number=3, action="vanish") == 1
    assert f"{run}/checkpoints/step-00000003: the folder is gone" in server.log(run).read_text()
    assert "Traceback" not in server.log(run).read_text()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_trained(server):
    run = server.folder / "nowhere"
    assert server.run(run, "run.folder=/proc/potstill") == 2
    said = server.log(run).read_text()
    assert "/proc/potstill" in said
    assert "Traceback" not in said


def test_a_run_listens_on_no_socket(server):
    """F36."""
    run = server.folder / "sockets"
    assert server.run(run, at="micro_batch", number=5, action="say_sockets") == 0
    assert "listening on []" in server.log(run).read_text()


def test_naive_resume_is_told_apart(server, unbroken):
    """The comparison can fail: a run that starts over without its optimizer's state has other bits."""
    run = server.folder / "naive"
    assert server.run(run, at="micro_batch", number=STEPS * MICRO_BATCHES) == -signal.SIGKILL
    from potstill import storage
    from potstill.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

    found = latest_checkpoint(run / "checkpoints")
    assert found.path is not None
    state = load_checkpoint(found.path)
    for name, tensor in state.tensors["optimizer"].items():
        if name.startswith("exp_avg/"):
            tensor.zero_()
    storage.remove(found.path)
    save_checkpoint(run / "checkpoints", found.step, state, keep=5)
    server.finish(run)
    assert _samples(run) == _samples(unbroken)
    assert _digest(run) != _digest(unbroken)

"""A run on written text that is broken off anywhere, also in the middle of an answer, ends with the bits of the unbroken one."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import small_runs
from faultfs import without_syncing
from potstill.errors import InterruptedRun, NonFiniteError
from potstill.run_folder import RunFolder
from small_runs import Run, digest, execute, make_distiller, weights

# Dropout and an adapter; a draw at each step of who writes. Lines of the log span two steps, checkpoints three.
RUN = Run(
    student="lora", dropout=0.1, divergence="reverse_kl", num_examples=10, num_validation=3, author="mixture", share=0.7, rewarded=True,
    seed=2,
).but(epochs=None, steps=5, batch_size=2, accumulation=2, save_steps=3, eval_steps=2, logging_steps=2)
STUDENT = replace(RUN, author="student", student="plain", dropout=0.0)


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def broken_off(run: Run, path: Path, owner: str, call: int, number: int = signal.SIGKILL) -> int:
    """Trains in a fork that sends itself a signal at the `call`-th micro-batch, writing or token. Returns its exit status."""
    from potstill.rollouts.local import LocalGenerator
    from potstill.rollouts.writer import Writer
    from potstill.training.seam import DistillationTrainer

    holder, name = {
        "micro_batch": (DistillationTrainer, "training_step"), "token": (LocalGenerator, "_step"), "written": (Writer, "_others"),
        "commit": (DistillationTrainer, "commit"),
    }[owner]  # fmt: skip
    inner, calls = getattr(holder, name), 0

    def counted(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return inner(*arguments)

    def action() -> None:
        setattr(holder, name, counted)
        execute(run, path)

    return in_child(action)


def in_child(action: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            action()
            code = 0
        except InterruptedRun as interrupted:
            code = interrupted.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    with without_syncing():
        path = tmp_path_factory.mktemp("unbroken") / "run"
        distiller, summary = execute(RUN, path)
    return digest(weights(distiller)), summary, RunFolder.read(path)


def _written(folder: RunFolder) -> list[dict]:
    """What the log says of text; how long it took is another matter."""
    return [
        {key: value for key, value in line.items() if key == "step" or (key.startswith("rollouts/") and key != "rollouts/seconds")}
        for line in folder.read_metrics()
    ]


def _assert_same(path: Path, unbroken) -> None:
    expected, summary, folder = unbroken
    distiller, resumed = execute(RUN, path)
    assert digest(weights(distiller)) == expected
    assert (resumed.tokens, resumed.target_tokens, resumed.best_loss) == (summary.tokens, summary.target_tokens, summary.best_loss)
    here = RunFolder.read(path)
    assert here.read_samples() == folder.read_samples()
    assert _written(here) == _written(folder)
    assert here.read_rollouts() == folder.read_rollouts()


def test_the_run_has_steps_of_both_kinds(unbroken):
    """The fourth is the data set's: the line at 4 is of text that the checkpoint at 3 must remember."""
    lines = [line for line in unbroken[2].read_metrics() if "loss" in line]
    assert [("loss/student" in line, "loss/dataset" in line) for line in lines] == [(True, False), (True, False), (True, True)]
    assert [line["step"] for line in _written(unbroken[2]) if "rollouts/reward" in line] == [1, 2, 4]
    assert {text["step"] for text in unbroken[2].read_rollouts()} == {1, 2}


@pytest.mark.parametrize("call", range(1, 11))
def test_killed_in_any_micro_batch(call, unbroken, tmp_path):
    assert broken_off(RUN, tmp_path / "run", "micro_batch", call) == -signal.SIGKILL
    _assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize(("where", "call"), [("token", 1), ("token", 26), ("token", 45), ("written", 2), ("commit", 1)])
def test_killed_while_text_is_written(where, call, unbroken, tmp_path):
    assert broken_off(RUN, tmp_path / "run", where, call) == -signal.SIGKILL
    _assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize(("call", "steps"), [(3, 0), (40, 3)])
def test_a_signal_while_text_is_written_commits_the_step_before(call, steps, tmp_path):
    """And nothing of the text that was under way: it is written again."""
    run = STUDENT.but(save_steps=100)
    assert broken_off(run, tmp_path / "run", "token", call, signal.SIGTERM) == 128 + signal.SIGTERM
    resumed, summary = execute(run, tmp_path / "run")
    assert summary.resumed_from == steps
    straight, _ = execute(run, tmp_path / "straight")
    assert digest(weights(resumed)) == digest(weights(straight))


def test_a_step_that_is_not_finite_is_not_taken(tmp_path, monkeypatch):
    """The teacher's numbers break in the third step: the weights are those of the second, and the examples are named."""
    teachers = []

    def breaking():
        teachers.append(teacher())
        return teachers[-1]

    teacher = small_runs.make_teacher
    monkeypatch.setattr(small_runs, "make_teacher", breaking)
    distiller = make_distiller(STUDENT)
    run = STUDENT.but(logging_steps=1)
    with pytest.raises(NonFiniteError, match="step 3"):
        _break_at(2, teachers, lambda: execute(run, tmp_path / "run", distiller=distiller))
    monkeypatch.undo()
    folder = RunFolder.read(tmp_path / "run")
    assert [incident["step"] for incident in folder.read_refused_steps()] == [3]
    assert {line["step"] for line in folder.read_metrics() if "loss" in line} == {1, 2}
    resumed, summary = execute(run, tmp_path / "run")
    assert summary.resumed_from == 2
    assert digest(weights(resumed)) == digest(weights(execute(run, tmp_path / "straight")[0]))


def _break_at(step: int, teachers: list, action: Callable[[], object]) -> None:
    from potstill.training.seam import DistillationTrainer

    inner = DistillationTrainer.step_done

    def counted(trainer):
        inner(trainer)
        if trainer.state.global_step == step:
            with torch.no_grad():
                next(teachers[-1].causal_lm.parameters()).fill_(float("nan"))

    DistillationTrainer.step_done = counted
    try:
        action()
    finally:
        DistillationTrainer.step_done = inner


def test_a_student_whose_weights_are_broken_is_not_asked_to_learn_what_it_wrote(tmp_path):
    distiller = make_distiller(STUDENT)
    with torch.no_grad():
        next(distiller.student.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="no finite log-probability"):
        execute(STUDENT, tmp_path / "run", distiller=distiller)


def test_what_cannot_be_written_costs_no_step_that_was_taken(tmp_path, monkeypatch):
    """A server that is gone for good, in the third writing: two steps are committed though no checkpoint was due."""
    from potstill.errors import OutageError
    from potstill.rollouts.local import LocalGenerator

    inner, calls = LocalGenerator.generate, []

    def failing(generator, prompts, sampling):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise OutageError("away for too long")
        return inner(generator, prompts, sampling)

    run = STUDENT.but(save_steps=100)
    monkeypatch.setattr(LocalGenerator, "generate", failing)
    with pytest.raises(OutageError):
        execute(run, tmp_path / "run")
    monkeypatch.undo()
    resumed, summary = execute(run, tmp_path / "run")
    assert summary.resumed_from == 2
    assert digest(weights(resumed)) == digest(weights(execute(run, tmp_path / "straight")[0]))

"""Whole runs in which the student learns from itself on text that it writes: broken off and resumed, and with nothing to learn."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from faultfs import without_syncing
from potstill.errors import IncompatibleError
from potstill.rollouts.author import Alone
from potstill.run_folder import RunFolder
from potstill.teachers.self_teacher import SelfTeacher
from potstill.training.trainer import train
from small_runs import Run, digest, examples, furthest, make_author, make_distiller, opened, weights

RUN = Run(student="lora", dropout=0.1, divergence="reverse_kl", author="student", num_examples=10).but(
    steps=5, epochs=None, accumulation=1, save_steps=2, weight_decay=0.0, scheduler="constant"
)


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def told(rows, more: list[int]):
    """The same rows; the teacher reads `more` before each prompt."""
    return [
        replace(row, teacher_prompt=more + row.tokens[: row.is_target.index(True)], prompt_length=row.is_target.index(True)) for row in rows
    ]


def lived(path: Path, which: str = "average", more: tuple[int, ...] = (7, 8, 9), run: Run = RUN, decay: float = 0.8):
    """The whole run, or what is left of it: the student's trained weights, and the teacher's state."""
    distiller = make_distiller(run)
    teacher = SelfTeacher(distiller.student, which, decay=decay)  # type: ignore[arg-type]
    rows = told(examples(run.num_examples), list(more))
    author = make_author(run, distiller.student, None, Alone(), rows)
    with opened(path, run) as folder:
        train(
            distiller, teacher, rows, rows[:3], run.config(), folder, seed=run.seed, pad_token=0, quiet=True, author=author,
            kept={"teacher": teacher}, fingerprints=dict(teacher.identity),
        )  # fmt: skip
    return weights(distiller), teacher.state()[0]


def killed_at_step(step: int, path: Path, *, after: bool) -> None:
    """The run in a child that kills itself as the teacher hears of a step."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        inner, calls = SelfTeacher.step_done, 0

        def counted(self):
            nonlocal calls
            calls += 1
            if after:
                inner(self)
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            if not after:
                inner(self)

        SelfTeacher.step_done = counted  # type: ignore[assignment]
        try:
            lived(path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    with without_syncing():
        return lived(tmp_path_factory.mktemp("unbroken") / "run")


@pytest.mark.parametrize(("step", "after"), [(1, True), (3, False), (4, True)])
def test_killed_and_resumed_it_ends_with_the_same_student_and_the_same_average(tmp_path, unbroken, step, after):
    path = tmp_path / "run"
    killed_at_step(step, path, after=after)
    student, average = lived(path)
    assert digest(student) == digest(unbroken[0])
    assert digest(average) == digest(unbroken[1])
    assert average.keys() == {f"model.{name.removeprefix('student.model.')}" for name in student}


def test_the_average_follows_the_student_through_the_run(unbroken):
    student, average = unbroken
    start = weights(make_distiller(RUN))
    assert furthest(student, start) > 1e-3
    for name, value in average.items():
        where = f"student.{name}"
        # Five steps of 0.8: between the start, of which a third is left, and the student at the end.
        assert not torch.equal(value, start[where])
        assert not torch.equal(value, student[where])


@pytest.mark.parametrize("which", ["live", "average"])
def test_a_teacher_that_is_told_nothing_more_moves_nothing(tmp_path, which):
    run = replace(RUN, dropout=0.0).but(steps=2)
    student, _ = lived(tmp_path / "run", which, (), run)
    assert furthest(student, weights(make_distiller(run))) < 1e-5
    lines = [line for line in RunFolder.read(tmp_path / "run").read_metrics() if "loss" in line]
    assert lines
    assert all(abs(line["loss"]) < 1e-5 for line in lines)


def test_a_run_goes_on_with_the_teacher_that_it_had(tmp_path):
    lived(tmp_path / "run", run=RUN.but(steps=2))
    with pytest.raises(IncompatibleError, match="self"):
        lived(tmp_path / "run", decay=0.9)

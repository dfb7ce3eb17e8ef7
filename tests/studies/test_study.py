"""Whole studies of real commands on tiny models: broken off and finished they say what an unbroken one says; failures stay alone."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from potstill.errors import RunFolderError, UsageError
from potstill.interruption import LEASH
from potstill.lock import Lock
from potstill.run_folder import METRICS, RunFolder
from potstill.studies.plan import make_plan
from potstill.studies.read import read_study
from potstill.studies.study import study
from small_recipe import write_small_recipe

STUDY = """
title: What the teacher adds
base: r.yaml
set: {{objective.support: top_k_tail, training.steps: {steps}, training.save_steps: 5}}
grid: {{objective.kd_ratio: [0, 0.5]}}
capture: {{k: 16}}
evaluation:
  tasks: [{{kind: text, data: {{train: {folder}/rows.jsonl, format: instruct, max_tokens: 96}}}}]
  teacher: {{path: {folder}/teacher}}
folder: {out}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, rows and a recipe; children get one thread, so that they compute the same bits."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield write_small_recipe(tmp_path_factory.mktemp("study"))
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def write_study(place: Path, name: str, *, steps: int = 40) -> tuple[Path, Path]:
    """The study's file, and the folder that it will write."""
    out = place / name
    (place / f"{name}.yaml").write_text(STUDY.format(folder=place, out=out, steps=steps))
    return place / f"{name}.yaml", out


def read_json(path: Path):
    return json.loads(path.read_bytes())


def without_costs(value):
    if isinstance(value, dict):
        return {key: without_costs(inner) for key, inner in value.items() if key != "costs"}
    return [without_costs(inner) for inner in value] if isinstance(value, list) else value


def wait_for(condition, seconds: float = 400.0):
    """Waits until `condition` returns something true, and returns it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def steps_of(run: Path) -> int:
    return (run / METRICS).read_text().count('"loss"') if (run / METRICS).is_file() else 0


@pytest.fixture
def start():
    """Starts `potstill study` as a process of its own; its output goes to a log beside the study's file."""
    started: list[subprocess.Popen] = []

    def begin(file: Path, *arguments: str) -> subprocess.Popen:
        with file.with_suffix(".log").open("a") as log:
            started.append(subprocess.Popen(
                [sys.executable, "-m", "potstill", "study", str(file), *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            ))  # fmt: skip
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def unbroken(place):
    file, out = write_study(place, "unbroken")
    assert study(str(file), quiet=True) == 0
    return out


def test_a_study_that_was_killed_and_started_again_says_what_an_unbroken_one_says(place, unbroken, start):
    file, out = write_study(place, "killed")
    process = start(file)
    wait_for(lambda: steps_of(out / "runs" / "sft-0") >= 8)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run = RunFolder.read(out / "runs" / "sft-0")
    if run.status != "finished":  # the child saw that its study is gone, and commits
        wait_for(lambda: any(run.checkpoints.iterdir()))
    assert study(str(file), quiet=True) == 0
    assert (out / "evaluation" / "study.json").read_bytes() == (unbroken / "evaluation" / "study.json").read_bytes()
    assert without_costs(read_json(out / "study.json")) == without_costs(read_json(unbroken / "study.json"))


def test_what_a_study_says_of_its_cells(unbroken):
    said = read_json(unbroken / "study.json")
    assert [(cell["name"], cell["teacher_answers"], cell["against"]) for cell in said["cells"]] == [
        ("sft", "none", None), ("kd_ratio=0.5", "recorded", "sft"),
    ]  # fmt: skip
    assert [run["status"] for cell in said["cells"] for run in cell["runs"]] == ["finished", "finished"]
    assert {run["steps"] for cell in said["cells"] for run in cell["runs"]} == {40}
    assert said["warnings"] == []
    assert [cell["differences"]["objective.kd_ratio"] for cell in said["cells"]] == [None, 0.5]
    order = [(unbroken / "runs" / name / "samples.jsonl").read_text() for name in ("sft-0", "kd_ratio=0.5-0")]
    assert order[0] == order[1]
    record = read_json(unbroken / "evaluation" / "study.json")
    # The students of these cells begin from one saved model, which is what training changed.
    pairs = {(one["first"], one["second"], one["family"]) for one in record["comparisons"]}
    both = {(name, "before training", f"{family}, since before") for name in ("sft", "kd_ratio=0.5") for family in ("primary", "secondary")}
    assert pairs == both | {("kd_ratio=0.5", "sft", "primary"), ("kd_ratio=0.5", "sft", "secondary")}
    assert record["before"] == "before training"


def test_a_finished_study_runs_nothing_and_a_report_reads_it(unbroken, capfd):
    from potstill.reporting.summary import summarise_all

    before = {path: path.stat().st_mtime_ns for path in (unbroken / "runs").rglob("*")}
    assert study(str(unbroken.with_suffix(".yaml")), quiet=True) == 0
    assert {path: path.stat().st_mtime_ns for path in (unbroken / "runs").rglob("*")} == before
    assert {summary.path.name for summary in summarise_all([unbroken])} == {"unbroken", "sft-0", "kd_ratio=0.5-0"}
    assert "2 of 2 runs done" in capfd.readouterr().err


def test_a_changed_study_is_refused_and_a_larger_one_is_not(unbroken):
    file = unbroken.with_suffix(".yaml")
    with pytest.raises(RunFolderError, match=r"(?s)sft-0: training.learning_rate: 0.001 -> 0.01.*cells may be added freely"):
        study(str(file), ["training.learning_rate=0.01"], quiet=True)
    with pytest.raises(RunFolderError, match=r"training.steps: 40 -> 41"):
        study(str(file), ["training.steps=41"], quiet=True)
    plan = make_plan(read_study(str(file), ["grid.objective.kd_ratio=[0, 0.5, 1]", "seeds=[0, 1]"]))
    assert [job.name for job in plan.runs if not job.is_finished] == ["kd_ratio=1-0", "sft-1", "kd_ratio=0.5-1", "kd_ratio=1-1"]


def test_a_folder_with_something_else_and_a_study_at_work_are_refused(place, unbroken):
    file, out = write_study(place, "foreign")
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty, yet no study began here"):
        study(str(file), quiet=True)
    lock = Lock(unbroken / ".lock")
    try:
        with pytest.raises(RunFolderError, match="a study is at work in this folder"):
            study(str(unbroken.with_suffix(".yaml")), quiet=True)
    finally:
        lock.release()


def test_nothing_runs_where_a_cell_cannot(place):
    file, out = write_study(place, "wrong")
    said = yaml.safe_load(file.read_text())
    said["grid"] = {"teacher.path": [f"{place}/teacher", f"{place}/nobody"]}
    file.write_text(yaml.safe_dump(said))
    with pytest.raises(UsageError, match=r"path=nobody: teacher.path: .*nobody: no such folder"):
        study(str(file), quiet=True)
    with pytest.raises(UsageError, match=r"--only sfd: no such cell; there is sft"):
        study(str(write_study(place, "wrong")[0]), only=["sfd"], quiet=True)
    assert not out.exists()


def test_a_dry_run_prints_cells_and_what_they_take_and_writes_nothing(place, unbroken, capsys):
    from rich.console import Console

    file, out = write_study(place, "dry")
    assert study(str(file), dry_run=True, console=Console(width=160)) == 0
    text = capsys.readouterr().out
    assert "kd_ratio=0.5" in text
    assert "unknown: train one cell with --only" in text
    assert not out.exists()
    assert study(str(unbroken.with_suffix(".yaml")), ["seeds=[0, 1]"], dry_run=True, console=Console(width=160)) == 0
    text = capsys.readouterr().out
    assert "1 of 2" in text
    assert "unknown" not in text


def test_a_child_leaves_when_its_study_is_gone():
    script = "import time; from potstill.interruption import follow_leash; follow_leash(); print('on', flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, LEASH: "1"}
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdin is not None
    with child.stdout, child.stdin:
        assert child.stdout.readline() == b"on\n"
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(timeout=20) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_run_commit(place, number, start):
    file, out = write_study(place, f"signal-{int(number)}", steps=400)
    process = start(file, "--jobs", "2")
    wait_for(lambda: steps_of(out / "runs" / "sft-0") >= 8 and steps_of(out / "runs" / "kd_ratio=0.5-0") >= 1)
    process.send_signal(number)
    assert process.wait(timeout=120) == 128 + number
    assert "stopped with" in file.with_suffix(".log").read_text()
    for name in ("sft-0", "kd_ratio=0.5-0"):
        run = RunFolder.read(out / "runs" / name)
        assert run.status == "finished" or any(run.checkpoints.iterdir())
    assert {run["status"] for cell in read_json(out / "study.json")["cells"] for run in cell["runs"]} <= {"interrupted", "finished"}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [4, 9, 14, 19, 24, 30])
def test_killed_at_any_moment(place, unbroken, seconds, start):
    file, out = write_study(place, f"killed-{seconds}")
    process = start(file)
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert study(str(file), quiet=True) == 0
    assert (out / "evaluation" / "study.json").read_bytes() == (unbroken / "evaluation" / "study.json").read_bytes()
    assert without_costs(read_json(out / "study.json")) == without_costs(read_json(unbroken / "study.json"))


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("[{kind: questions, data: {train: nowhere.jsonl}}]", "evaluation: nowhere.jsonl: no such file"),
        ("[{kind: samples, data: {train: FOLDER/r.yaml}}]", "evaluation: .*r.yaml"),
        ("[{kind: questions, checker: 'own.py:f', data: {train: FOLDER/rows.jsonl}}]", "evaluation: .*checker: own.py:f: no such file"),
        ("[{kind: text, data: {train: FOLDER/rows.jsonl}}, {kind: text, data: {train: FOLDER/rows.jsonl}}]", "'rows' is tasks.0. already"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(place, tasks, said):
    file, out = write_study(place, "unmeasurable")
    with pytest.raises(UsageError, match=said):
        study(str(file), [f"evaluation.tasks={tasks.replace('FOLDER', str(place))}"], quiet=True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{kind: harness, task: hellaswag, data: nowhere.jsonl}", "evaluation: nowhere.jsonl: no such file"),
        ("{kind: harness, task: nowhere.yaml}", "evaluation: nowhere.yaml: no such file"),
        ("{kind: harness, task: hellaswagg, data: FOLDER/rows.jsonl}", "evaluation: hellaswagg: .*did you mean hellaswag"),
        ("{kind: harness, task: hellaswag, data: FOLDER/rows.jsonl}", "evaluation: .*rows.jsonl: hellaswag needs the column"),
    ],
)
def test_a_task_that_the_harness_cannot_ask_is_refused_before_anything_is_trained(place, task, said):
    pytest.importorskip("lm_eval")
    file, out = write_study(place, "unasked")
    with pytest.raises(UsageError, match=said):
        study(str(file), [f"evaluation.tasks=[{task.replace('FOLDER', str(place))}]"], quiet=True)
    assert not out.exists()


def test_a_task_beside_a_teacher_that_is_not_named_is_refused_before_anything_is_trained(place):
    file, out = write_study(place, "alone")
    tasks = f"[{{kind: speculation, data: {{train: {place}/rows.jsonl}}}}]"
    with pytest.raises(UsageError, match=r"tasks\[0\]: speculation compares the student with a teacher"):
        study(str(file), [f"evaluation.tasks={tasks}", "evaluation.teacher=null"], quiet=True)
    assert not out.exists()


def test_a_title_with_marks_of_the_terminal_is_printed_as_it_is(place):
    file, _ = write_study(place, "titled")
    console = Console(record=True, width=120, file=io.StringIO())
    assert study(str(file), ["title='What [red] adds'"], dry_run=True, console=console) == 0
    assert "What [red] adds" in console.export_text()

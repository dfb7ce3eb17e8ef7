"""Jobs of a study: a failure stays where it is and is said in a line; what another process still writes is waited for; time left."""

import json
import time
from pathlib import Path

import pytest
import yaml

from potstill.interruption import SignalWatch
from potstill.lock import Lock
from potstill.studies.plan import Job
from potstill.studies.processes import environment_of, last_line
from potstill.studies.progress import Pace, in_time, steps_done, time_left
from potstill.studies.schedule import Schedule, State, failures, look


class Seen:
    def __init__(self):
        self.changes: list[tuple[str, str]] = []

    def changed(self, state: State) -> None:
        self.changes.append((state.job.name, state.status))

    def tick(self) -> None:
        pass


def job(root: Path, name: str, *, kind="run", needs=(), values=None, cell=None, folder=None) -> Job:
    for part in ("cells", "logs", "runs"):
        (root / part).mkdir(exist_ok=True)
    made = Job(name, kind, "finetune", values or {"nonsense": 1}, folder or root / "runs" / name, root, tuple(needs), cell or name)
    made.recipe_file.write_text(yaml.safe_dump(dict(made.values)))
    return made


def finish(made: Job, seconds: float = 8.0) -> Job:
    made.folder.mkdir(parents=True, exist_ok=True)
    (made.folder / "recipe.yaml").write_text("{}")
    (made.folder / "summary.json").write_text(json.dumps({"seconds": seconds}))
    return made


def test_a_job_that_fails_holds_up_only_those_that_need_it(tmp_path):
    made = [
        job(tmp_path, "teacher", kind="before"), job(tmp_path, "taught", needs=["teacher"]), job(tmp_path, "alone"),
        finish(job(tmp_path, "done")),
    ]  # fmt: skip
    jobs = {one.name: one for one in made}
    states, seen = look(jobs), Seen()
    Schedule(states, jobs, jobs=1, gpus=[], watcher=seen).work(SignalWatch())
    assert seen.changes == [
        ("teacher", "running"), ("teacher", "failed"), ("taught", "failed"), ("alone", "running"), ("alone", "failed"),
    ]  # fmt: skip
    said = {line.partition(": ")[0]: line.partition(": ")[2] for line in failures(states)}
    assert said["taught"] == "needs teacher, which failed"
    assert "missing; it has no default" in said["alone"] or "unknown key" in said["alone"]
    assert states["done"].status == "finished"


def test_an_earlier_run_is_not_begun_for_what_is_finished(tmp_path):
    jobs = {one.name: one for one in [job(tmp_path, "teacher", kind="before"), finish(job(tmp_path, "taught", needs=["teacher"]))]}
    seen = Seen()
    Schedule(look(jobs), jobs, jobs=1, gpus=[], watcher=seen).work(SignalWatch())
    assert seen.changes == []


def test_a_run_that_someone_still_writes_is_waited_for(tmp_path):
    made = job(tmp_path, "busy")
    made.folder.mkdir(parents=True)
    lock = Lock(made.folder / ".lock")
    schedule = Schedule(look({"busy": made}), {"busy": made}, jobs=1, gpus=[], watcher=Seen())
    assert schedule._is_busy(made)
    lock.release()
    assert not schedule._is_busy(made)


def test_a_captures_end_is_remembered_and_its_cache_must_be_there(tmp_path):
    made = Job("answers", "capture", "capture", {}, tmp_path / "caches" / "answers", tmp_path)
    (tmp_path / "cells").mkdir()
    made.mark_done()
    assert not made.is_finished
    made.folder.mkdir(parents=True)
    (made.folder / "cache.json").write_text("{}")
    assert made.is_finished


def test_the_last_line_of_a_log_is_this_attempts_and_harmless(tmp_path):
    log = tmp_path / "x.log"
    log.write_bytes(b"potstill: the former failure\n")
    begins = log.stat().st_size
    assert last_line(log, begins) == ""
    log.write_bytes(log.read_bytes() + b"  10%\r 20%\npotstill: a.b: \x1b[31mwrong\xff\n\n")
    assert last_line(log, begins) == "a.b: \\x1b[31mwrong\ufffd"


def test_each_child_gets_its_part_of_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert environment_of(0, 1, []) == {}
    assert environment_of(1, 3, []) == {"OMP_NUM_THREADS": "2"}
    assert environment_of(1, 16, []) == {"OMP_NUM_THREADS": "1"}
    assert [environment_of(slot, 3, ["2", "5"])["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["2", "5", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert environment_of(1, 3, []) == {}


@pytest.mark.parametrize(("training", "share"), [({"steps": 40}, 0.25), ({"epochs": 2}, 0.2)])
def test_how_far_a_run_is_stands_in_its_last_whole_line(tmp_path, training, share):
    made = job(tmp_path, "r", values={"training": training})
    assert steps_done(made) == (0, 0.0)
    made.folder.mkdir(parents=True)
    lines = [{"step": 9, "epoch": 0.3}, {"step": 10, "epoch": 0.4}]
    (made.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    assert steps_done(made) == (10, pytest.approx(share))


def test_the_time_left_comes_from_runs_like_it(tmp_path):
    slow, fast = finish(job(tmp_path, "slow-0", cell="slow"), 30.0), finish(job(tmp_path, "fast-0", cell="fast"), 10.0)
    waiting = [job(tmp_path, f"{cell}-1", cell=cell) for cell in ("slow", "fast")]
    states = [State(slow, "finished"), State(fast, "finished"), *(State(one, "waiting") for one in waiting)]
    assert time_left(states, Pace([slow, fast]), 1) == pytest.approx(40.0)
    assert time_left(states, Pace([slow, fast]), 2) == pytest.approx(20.0)
    assert time_left(states, Pace([]), 1) is None
    half = job(tmp_path, "slow-2", cell="slow", values={"training": {"steps": 10}})
    half.folder.mkdir(parents=True)
    (half.folder / "metrics.jsonl").write_text('{"step": 5}\n')
    assert time_left([State(half, "running", began=time.monotonic())], Pace([slow]), 1) == pytest.approx(15.0)
    assert time_left([State(half, "running", began=time.monotonic() - 6)], Pace([]), 1) == pytest.approx(6.0, abs=0.5)
    assert [in_time(seconds) for seconds in (30, 300, 3900)] == ["30 s", "5 min", "1 h 05 min"]

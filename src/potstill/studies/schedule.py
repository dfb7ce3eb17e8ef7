"""Runs the jobs of a study, side by side where there is room. A job that fails holds up only those that need it.

The first signal asks every child to commit and leave, and nothing more is begun; the same study goes on later.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from potstill.errors import RunFolderError
from potstill.interruption import SignalWatch
from potstill.lock import Lock
from potstill.studies.plan import Job
from potstill.studies.processes import Child, environment_of

Status = Literal["waiting", "running", "finished", "failed", "interrupted"]
_POLL_SECONDS = 0.1
# How long a child of a study that was killed may need to commit before its folder is free again.
_ORPHAN_SECONDS = 120.0


@dataclass
class State:
    """How far a job is. `failure` says in a line why it ended badly."""

    job: Job
    status: Status
    failure: str | None = None
    began: float | None = None
    """On the monotonic clock, where it runs."""


class Watcher(Protocol):
    """Who is told of the jobs while they run."""

    def changed(self, state: State) -> None:
        """The status of a job is another one."""

    def tick(self) -> None:
        """A moment has passed."""


def look(jobs: Mapping[str, Job]) -> dict[str, State]:
    """The state of every job as the disk says it."""
    found: dict[str, State] = {}
    for name, job in jobs.items():
        found[name] = State(job, "finished" if job.is_finished else "interrupted" if job.has_begun else "waiting")
    return found


class Schedule:
    """The jobs of one call of a study. `states` holds all jobs, `due` the names of those that are to be finished."""

    def __init__(self, states: dict[str, State], due: Mapping[str, Job], *, jobs: int, gpus: list[str], watcher: Watcher):
        self.states, self._due, self._jobs, self._gpus, self._watcher = states, due, jobs, gpus, watcher
        self._running: dict[int, tuple[State, Child]] = {}
        self._busy_since: dict[str, float] = {}

    def work(self, watch: SignalWatch) -> None:
        """Until nothing is left that can be begun, or until `watch` has received a signal and every child has left."""
        pending = [self.states[name] for name in self._needed()]
        try:
            while (pending and not watch.received) or self._running:
                for _, child in self._running.values() if watch.received else ():
                    child.ask_to_leave()
                self._reap(interrupted=bool(watch.received))
                if not watch.received:
                    pending = self._begin(pending)
                self._watcher.tick()
                time.sleep(_POLL_SECONDS)
        finally:
            for _, child in self._running.values():
                child.close()

    def _needed(self) -> list[str]:
        """What is due and not finished; a capture or an earlier run only where something that is not finished needs it."""
        needed: set[str] = set()
        for name, job in reversed(list(self._due.items())):
            if self.states[name].status != "finished" and (job.kind == "run" or name in needed):
                needed |= {name, *job.needs}
        return [name for name in self._due if name in needed and self.states[name].status != "finished"]

    def _begin(self, pending: list[State]) -> list[State]:
        left = []
        for state in pending:
            needs = [self.states[name] for name in state.job.needs]
            failed = next((need for need in needs if need.status == "failed"), None)
            slot = next((slot for slot in range(self._jobs) if slot not in self._running), None)
            if failed is not None:
                self._change(state, "failed", f"needs {failed.job.name}, which failed")
            elif slot is None or any(need.status != "finished" for need in needs) or self._is_busy(state.job):
                left.append(state)
            else:
                arguments = [state.job.command, str(state.job.recipe_file), "--quiet"]
                self._running[slot] = state, Child(arguments, state.job.log, environment_of(slot, self._jobs, self._gpus))
                state.began = time.monotonic()
                self._change(state, "running")
        return left

    def _reap(self, *, interrupted: bool) -> None:
        for slot, (state, child) in list(self._running.items()):
            code = child.poll()
            if code is None:
                continue
            del self._running[slot]
            child.close()
            if code == 0:
                state.job.mark_done()
            if state.job.is_finished:
                self._change(state, "finished")
            elif interrupted:
                self._change(state, "interrupted")
            else:
                self._change(state, "failed", child.failure())

    def _change(self, state: State, status: Status, failure: str | None = None) -> None:
        state.status, state.failure = status, failure
        self._watcher.changed(state)

    def _is_busy(self, job: Job) -> bool:
        """Whether a process of a study that was killed is still at work here; after a while it is left to the job itself to say so."""
        since = self._busy_since.setdefault(job.name, time.monotonic())
        if not job.folder.is_dir() or time.monotonic() - since > _ORPHAN_SECONDS:
            return False
        for path in job.folder.glob(".lock*"):
            try:
                Lock(path).release()
            except RunFolderError:
                return True
        return False


def failures(states: Mapping[str, State], told: Callable[[State], bool] = lambda state: True) -> list[str]:
    """Which jobs failed and why, a line each."""
    return [f"{state.job.name}: {state.failure}" for state in states.values() if state.status == "failed" and told(state)]

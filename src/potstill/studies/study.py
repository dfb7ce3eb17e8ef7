"""`potstill study`: trains every cell of a study with every seed, measures the students, and shows what differs.

The same command goes on where one was broken off: what is finished is not run again, what failed is tried again.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from potstill import storage
from potstill.errors import InterruptedRun, RunFolderError, UsageError
from potstill.interruption import SignalWatch
from potstill.lock import Lock
from potstill.recipes.words import in_words, printable
from potstill.run_folder import LOCK
from potstill.studies import snapshot
from potstill.studies.measure import Comparable, comparable, measure, precheck_measuring, precheck_questions
from potstill.studies.plan import Job, Plan, chosen, left_behind, make_plan, refuse_changed, write_recipes
from potstill.studies.processes import visible_gpus
from potstill.studies.progress import ProgressView
from potstill.studies.read import read_study
from potstill.studies.schedule import Schedule, State, failures, look

_MARK = "study.yaml"
# In the order in which `--fresh` removes them: what makes the folder a study goes last.
_KNOWN = (snapshot.FILE, "evaluation", "report.html", "results.md", "plots", "runs", "before", "caches", "cells", "logs", _MARK)


def study(
    name: str, overrides: Sequence[str] = (), *, jobs: int | None = None, dry_run: bool = False, fresh: bool = False,
    only: Sequence[str] = (), quiet: bool = False, console: Console | None = None,
) -> int:  # fmt: skip
    """Runs the study `name`, a file or one of the library, and returns the exit code: 0, or 1 where a run failed.

    `jobs` runs go side by side, by default one a GPU. `only` names cells or runs that are to be trained now. Raises PotstillError for
    what can be refused before anything runs, and InterruptedRun after a signal, when every run has committed and left.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: at least one run at a time")
    plan = make_plan(read_study(name, overrides))
    due = chosen(plan, only)
    precheck_measuring(plan)
    if dry_run:
        from potstill.studies.costs import show_costs

        show_costs(plan, due, console or Console())
        return 0
    if any(not job.is_finished for job in due.values()):
        precheck_questions(plan)
    with _opened(plan, fresh):
        states = _train(plan, due, jobs, quiet)
        found = comparable(plan, states)
        missing = [job.name for job in plan.runs if states[job.name].status != "finished"]
        _measure_and_show(plan, states, found, missing, bool(only), quiet, console)
    for said in failures(states):
        _say(f"failed: {said}")
    if any(states[name].status == "failed" for name in due):
        _say("the same command tries again what failed; what is finished stays")
        return 1
    return 0


@contextmanager
def _opened(plan: Plan, fresh: bool) -> Iterator[None]:
    """The study's folder, made and locked, its recipes written. Raises RunFolderError for one that holds something else."""
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"folder: {folder}: a file, where a study needs a folder")
    if folder.is_dir() and not (folder / _MARK).is_file():
        ours = (*_KNOWN, LOCK)
        names = sorted(entry.name for entry in folder.iterdir())
        foreign = [name for name in names if name not in ours and not name.startswith(storage.TEMPORARY)]
        if foreign:
            raise RunFolderError(f"folder: {folder}: not empty, yet no study began here (it holds {foreign[0]!r}); choose another one")
    storage.make_folder(folder)
    lock = Lock(folder / LOCK, held="a study is at work in this folder", remedy="or give this one another folder")
    try:
        storage.sweep(folder)
        if fresh:
            for name in _KNOWN:
                storage.remove(folder / name)
        refuse_changed(plan)
        write_recipes(plan)
        yield
    finally:
        lock.release()


def _train(plan: Plan, due: Mapping[str, Job], jobs: int | None, quiet: bool) -> dict[str, State]:
    states = look(plan.jobs)
    gpus = visible_gpus()
    side_by_side = jobs or max(1, len(gpus))
    _say_start(plan, states)

    def keep() -> None:
        snapshot.write(plan, states, warnings=failures(states))

    keep()
    shown = {name: states[name] for name in due}
    with SignalWatch("asking every run to commit") as watch:
        with ProgressView(shown, side_by_side=side_by_side, quiet=quiet, on_change=keep) as view:
            Schedule(states, due, jobs=side_by_side, gpus=gpus, watcher=view).work(watch)
        if watch.received:
            done = sum(state.status == "finished" for state in shown.values())
            raise InterruptedRun(
                f"{plan.folder}: stopped with {done} of {in_words(len(shown), 'run')} done; what was under way is committed, and the same "
                "command goes on",
                watch.received,
            )
    return states


def _measure_and_show(
    plan: Plan, states: Mapping[str, State], found: Comparable, missing: Sequence[str], only: bool, quiet: bool, console: Console | None
) -> None:
    measures = plan.study.config.evaluation is not None and bool(found.cells) and not (only and missing)
    if measures:
        measure(plan, found, quiet=quiet)
    elif only and missing:
        _say(f"{in_words(len(missing), 'run')} of the study {'is' if len(missing) == 1 else 'are'} missing, so nothing is compared yet")
    warnings = [*found.warnings, *failures(states)]
    snapshot.write(plan, states, seeds_compared=found.seeds if measures else (), warnings=warnings)
    if measures:
        for warning in warnings:
            _say(f"note: {warning}")
        _show(plan.folder, console)


def _show(folder: Path, console: Console | None) -> None:
    from potstill.studies.results import show

    show(folder, console=console)


def _say_start(plan: Plan, states: Mapping[str, State]) -> None:
    runs = [states[job.name] for job in plan.runs]
    done = sum(state.status == "finished" for state in runs)
    seeds = len(plan.study.config.seeds)
    _say(f"{plan.study.config.title}: {in_words(len(plan.cells), 'cell')} with {in_words(seeds, 'seed')}, {done} of {len(runs)} runs done; "
         f"everything goes to {plan.folder}")  # fmt: skip
    for cell in plan.cells:
        if not cell.is_sft and len(cell.points) > 1:
            _say(f"note: {cell.name}: {len(cell.points)} points of the grid have this very recipe; it runs once")
    for note in snapshot.budget_warnings(plan.cells):
        _say(f"note: {note}")
    if behind := left_behind(plan):
        _say(f"note: {in_words(len(behind), 'run')} in {plan.folder / 'runs'} belong to no cell of this study and are left alone: "
             f"{', '.join(behind[:5])}")  # fmt: skip


def _say(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")

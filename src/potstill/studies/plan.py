"""What a study runs: every job with its recipe, its folder and what must be finished first; checked as far as that goes without torch.

Jobs are commands of Potstill itself. What is done is read off the folders, so that nothing else has to be remembered.
"""

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from potstill import storage
from potstill.environment import redact
from potstill.errors import ConfigError, PotstillError, RunFolderError, UsageError
from potstill.recipe_changes import ALLOWED_CHANGES, flatten
from potstill.recipes.precheck import precheck
from potstill.recipes.read import recipe_from_values
from potstill.recipes.schema import Recipe
from potstill.run_folder import RECIPE, SUMMARY
from potstill.studies.captures import Recording, from_cache, make_recordings
from potstill.studies.cells import Axis, Built, Cell, make_axes, make_before, make_cells
from potstill.studies.read import Study

Kind = Literal["before", "capture", "run"]
_CACHE = "cache.json"  # what makes a folder a cache
# What may change in a run that has begun without changing what it learns.
_HARMLESS = tuple(key for key in ALLOWED_CHANGES if not key.startswith(("training.epochs", "training.steps", "training.early_stopping")))


@dataclass(frozen=True)
class Job:
    """One command that the study runs, to the end or again."""

    name: str
    kind: Kind
    command: Literal["distill", "finetune", "capture"]
    values: Mapping[str, Any]
    """The recipe."""
    folder: Path
    """The run folder, or the cache."""
    root: Path
    """The study's folder."""
    needs: tuple[str, ...] = ()
    """Jobs that must be finished first."""
    cell: str | None = None
    seed: int = 0

    @property
    def recipe_file(self) -> Path:
        return self.root / "cells" / f"{'' if self.kind == 'run' else f'{self.kind}-'}{self.name}.yaml"

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"{'' if self.kind == 'run' else f'{self.kind}-'}{self.name}.log"

    @property
    def _done_mark(self) -> Path:
        return self.recipe_file.with_suffix(".done")

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do, as the disk says it."""
        if self.kind == "capture":
            return self._done_mark.is_file() and (self.folder / _CACHE).is_file()
        return (self.folder / RECIPE).is_file() and (self.folder / SUMMARY).is_file()

    @property
    def has_begun(self) -> bool:
        return self.folder.is_dir() and any((self.folder / name).is_file() for name in (RECIPE, _CACHE))

    def mark_done(self) -> None:
        """A capture leaves nothing that says so itself."""
        if self.kind == "capture":
            storage.write_text(self._done_mark, "")


@dataclass(frozen=True)
class Plan:
    """A study made concrete."""

    study: Study
    folder: Path
    axes: Sequence[Axis]
    cells: Sequence[Cell]
    before: Mapping[str, Built]
    recordings: Mapping[str, Recording]
    """The cache of each cell that learns from one."""
    jobs: Mapping[str, Job]
    """In the order in which they are begun; `runs` come seed by seed, so that a study broken off has whole comparisons."""

    @property
    def runs(self) -> Iterator[Job]:
        return (job for job in self.jobs.values() if job.kind == "run")

    def run_of(self, cell: str, seed: int) -> Job:
        return self.jobs[f"{cell}-{seed}"]

    def needed_for(self, names: Sequence[str]) -> dict[str, Job]:
        """The jobs called `names` with all that they need, in order."""
        wanted = set(names)
        for name in reversed(list(self.jobs)):
            if name in wanted:
                wanted |= set(self.jobs[name].needs)
        return {name: job for name, job in self.jobs.items() if name in wanted}


def make_plan(study: Study) -> Plan:
    """Every job of a study. Raises ConfigError, ModelError or DataError, naming the cell, for what cannot run."""
    folder = Path(study.config.folder).expanduser()
    before = make_before(study)
    cells = make_cells(study, before)
    _precheck(before, cells)
    recordings = make_recordings(study, cells, folder)
    jobs: dict[str, Job] = {}
    for name, built in before.items():
        values = built.document.values
        jobs[name] = Job(name, "before", _command(built.recipe), values, folder / "before" / name, folder, tuple(sorted(built.uses)))
    for recording in recordings.values():
        name = recording.name
        jobs[name] = Job(
            name, "capture", "capture", recording.document.values, recording.folder, folder, tuple(sorted(recording.uses))
        )  # fmt: skip
    for seed in study.config.seeds:
        for cell in cells:
            job = _run(study, cell, seed, folder, recordings.get(cell.name))
            if job.name in jobs:
                raise ConfigError(f"{job.name}: two runs would have this name; rename before.{job.name} or the cell")
            jobs[job.name] = job
    _refuse_secrets(jobs)
    return Plan(study, folder, make_axes(study), cells, before, recordings, jobs)


def _run(study: Study, cell: Cell, seed: int, folder: Path, recording: Recording | None) -> Job:
    name = f"{cell.name}-{seed}"
    document = copy.deepcopy(cell.built.document) if recording is None else from_cache(cell.built.document, recording)
    values = document.values
    values["run"] = {**(values.get("run") or {}), "folder": str(folder / "runs" / name), "seed": seed}
    needs = tuple(sorted(cell.built.uses)) + (() if recording is None else (recording.name,))
    return Job(name, "run", _command(cell.built.recipe), values, folder / "runs" / name, folder, needs, cell.name, seed)


def _command(recipe: Recipe) -> Literal["distill", "finetune"]:
    return "finetune" if recipe.teacher is None else "distill"


def _precheck(before: Mapping[str, Built], cells: Sequence[Cell]) -> None:
    """Files and folders that recipes name are there. Raises the first cell's error of each kind, all at once."""
    found: dict[str, list[str]] = {}
    kinds: list[type[PotstillError]] = []
    for name, built in [*((f"before.{name}", built) for name, built in before.items()), *((cell.name, cell.built) for cell in cells)]:
        try:
            precheck(built.checked)
        except UsageError as error:
            found.setdefault(str(error), []).append(name)
            kinds.append(type(error))
    if found:
        raise kinds[0]("\n".join(f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}: {said}" for said, names in found.items()))


def _refuse_secrets(jobs: Mapping[str, Job]) -> None:
    for job in jobs.values():
        if redact(dict(job.values)) != job.values:
            raise ConfigError(
                f"{job.name}: its recipe holds what looks like a secret, and would be written to {job.recipe_file}; name a variable or a "
                "file that holds it (api_key_env, api_key_file)"
            )


# ---------------------------------------------------------------- the folder


def refuse_changed(plan: Plan) -> None:
    """Raises RunFolderError naming every run that has begun with another recipe than the study now gives it, and what differs."""
    lines = []
    for job in plan.jobs.values():
        if not job.has_begun or not job.recipe_file.is_file():
            continue
        before = recipe_from_values(_read(job.recipe_file), str(job.recipe_file))
        now = recipe_from_values(job.values, job.name)
        changes = _differences(before.resolved(), now.resolved(), of_capture=job.kind == "capture")
        lines += [f"  {job.name}: {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items()]
    if lines:
        shown = [*lines[:12], *([f"  and {len(lines) - 12} more"] if len(lines) > 12 else [])]
        listed = "\n".join(shown)
        raise RunFolderError(
            f"{plan.folder}: these runs began with other recipes than the study now says:\n{listed}\nuse the former values, give the study "
            "another folder, or --fresh to start over; cells may be added freely, and those that are done stay"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], *, of_capture: bool) -> dict[str, tuple[Any, Any]]:
    old, new = flatten(before), flatten(now)
    harmless = tuple(key for key in _HARMLESS if not (of_capture and key == "capture"))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == known or key.startswith(f"{known}.") for known in harmless)
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path}: does not read ({type(error).__name__}); --fresh starts over") from error
    if not isinstance(values, dict):
        raise RunFolderError(f"{path}: holds no recipe; --fresh starts over")
    return values


def write_recipes(plan: Plan) -> None:
    """The recipes that the jobs are given, and the study itself."""
    for name in ("cells", "logs", "runs"):
        storage.make_folder(plan.folder / name)
    for job in plan.jobs.values():
        _write_yaml(job.recipe_file, dict(job.values))
    _write_yaml(plan.folder / "study.yaml", redact(plan.study.document.values))


def _write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(values))  # no value twice, which YAML would write as an alias
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        storage.write_text(path, text)


def left_behind(plan: Plan) -> list[str]:
    """Runs in the folder whose cells the study no longer has."""
    found = (recipe.parent.name for recipe in (plan.folder / "runs").glob(f"*/{RECIPE}"))
    return sorted(name for name in found if name not in plan.jobs)


def chosen(plan: Plan, only: Sequence[str]) -> dict[str, Job]:
    """The jobs of the cells or runs called `only`, all where nothing is named. Raises UsageError for a name that is none."""
    if not only:
        return dict(plan.jobs)
    names = []
    for name in only:
        found = [job.name for job in plan.jobs.values() if name in (job.name, job.cell)]
        if not found:
            known = [cell.name for cell in plan.cells]
            near = difflib.get_close_matches(name, [*known, *plan.jobs], n=1) or [", ".join(known)]
            raise UsageError(f"--only {name}: no such cell; there {'is' if len(near) == 1 else 'are'} {near[0]}")
        names += found
    return plan.needed_for(names)

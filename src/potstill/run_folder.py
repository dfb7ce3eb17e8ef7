"""The run folder: what a run writes, where, and how it is found again. Training and evaluation append; reporting reads.

It decides whether a folder is new, interrupted or finished. It knows nothing of models or steps beyond their numbers, and
imports no torch.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from potstill import storage
from potstill.environment import environment, redact
from potstill.errors import RunFolderError, StorageError
from potstill.lock import Lock
from potstill.recipe_changes import recipe_changes, refuse_changes, reopens

RECIPE, ENVIRONMENT, SUMMARY, METRICS, SAMPLES = "recipe.yaml", "environment.json", "summary.json", "metrics.jsonl", "samples.jsonl"
REJECTED, NON_FINITE, REFUSED_ANSWERS, ROLLOUTS = "rejected.jsonl", "non_finite.json", "refused_answers", "rollouts.jsonl"
ROLLOUT_WEIGHTS = "rollout-weights"
LOCK = ".lock"
# In the order in which `--fresh` removes them: the recipe, which makes the folder a run, goes last.
KNOWN = (
    SUMMARY, "student", "adapter", "evaluation", "checkpoints", "trackers", "report.html", NON_FINITE, REJECTED, REFUSED_ANSWERS,
    ROLLOUT_WEIGHTS, METRICS, SAMPLES, ROLLOUTS, ENVIRONMENT, RECIPE,
)  # fmt: skip
Status = Literal["new", "interrupted", "finished"]
_log = logging.getLogger("potstill")


def _recorded(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it is written: JSON values, secrets blanked."""
    return redact(json.loads(storage.to_json(recipe)))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFolder:
    """One run's folder. `open` locks it for writing; `RunFolder.read` looks at a folder that anyone may be writing to.

    Where `writer` is false (ranks other than the first, and readers) nothing is ever written and the append methods do nothing.
    """

    def __init__(self, path: Path, status: Status, lock: Lock | None, notes: list[str]):
        self.path = path
        self.status: Status = status
        self.notes = notes          # what the user should be told about this opening, a line each
        self.lines_lost = 0         # log lines that could not be written; a full disk must not end a run by its log
        self._lock = lock

    # ------------------------------------------------------------ opening

    @classmethod
    def open(
        cls, path: Path | str, recipe: Mapping[str, Any], *, fresh: bool = False, override_resume: Sequence[str] = (), writer: bool = True
    ) -> "RunFolder":
        """Locks `path` for this process and finds out what is there.

        `recipe` is the resolved recipe as JSON values. `fresh` removes a former run's own files, and no other. Raises RunFolderError
        for a folder that is in use, holds something else, or belongs to a run that began with another recipe; StorageError if it
        cannot be written. A rank that is not the `writer` may call this only after the writer's call has returned.
        """
        path = Path(path).expanduser().absolute()
        wanted = _recorded(recipe)
        if not writer:
            return cls(path, cls._find_status(path), None, [])
        cls._refuse_foreign(path)
        try:
            storage.make_folder(path)
        except StorageError as error:
            raise RunFolderError(f"run.folder cannot be made: {error}") from error
        lock = Lock(path / LOCK)
        try:
            folder = cls(path, "new", lock, [])
            folder._prepare(wanted, fresh, override_resume)
        except BaseException:
            lock.release()
            raise
        return folder

    @classmethod
    def read(cls, path: Path | str) -> "RunFolder":
        """For reading only, without the lock. Raises RunFolderError if `path` holds no run."""
        path = Path(path).expanduser().absolute()
        if not (path / RECIPE).is_file():
            raise RunFolderError(f"{path}: no run here ({RECIPE} is missing)")
        return cls(path, cls._find_status(path), None, [])

    @classmethod
    def look(cls, path: Path | str, recipe: Mapping[str, Any], *, override_resume: Sequence[str] = ()) -> Status:
        """The status that `open` would find, without the lock and without writing. Raises RunFolderError for a change that it refuses.

        A finished run whose recipe now asks for more is "interrupted".
        """
        path = Path(path).expanduser().absolute()
        status = cls._find_status(path)
        if status == "new":
            return status
        changes = recipe_changes(cls(path, status, None, []).read_recipe(), _recorded(recipe), override_resume)
        refuse_changes(path, changes)
        return "interrupted" if reopens(changes) else status

    @staticmethod
    def _find_status(path: Path) -> Status:
        if not (path / RECIPE).exists():
            return "new"
        return "finished" if (path / SUMMARY).exists() else "interrupted"

    @staticmethod
    def _refuse_foreign(path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path}: a file, where run.folder must be a folder")
        if not path.is_dir() or (path / RECIPE).exists():
            return
        ours = (*KNOWN, LOCK)
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in ours and not entry.name.startswith(storage.TEMPORARY))
        foreign += ["checkpoints"] if (path / "checkpoints").is_dir() and any((path / "checkpoints").iterdir()) else []
        if foreign:
            raise RunFolderError(f"{path}: not empty, yet no run began here (it holds {foreign[0]!r}); choose another run.folder")

    def _prepare(self, wanted: dict[str, Any], fresh: bool, overrides: Sequence[str]) -> None:
        assert self._lock is not None
        if self._lock.taken_over:
            self.notes.append(f"the former run here ({self._lock.taken_over}) ended without a word; its lock is taken over")
        if swept := storage.sweep(self.path) + storage.sweep(self.checkpoints):
            self.notes.append(f"removed what a killed run left unfinished: {', '.join(swept)}")
        storage.probe(self.path)
        if fresh:
            for name in KNOWN:
                storage.remove(self.path / name)
        self.status = self._find_status(self.path)
        changes = recipe_changes(self.read_recipe(), wanted, overrides) if self.status != "new" else []
        refuse_changes(self.path, changes)
        self.notes += [f"{change} ({change.allowed})" for change in changes]
        if self.status == "finished" and reopens(changes):
            storage.remove(self.path / SUMMARY)
            self.status = "interrupted"
        if self.status != "finished":
            storage.make_folder(self.checkpoints)
            self._record_session([str(change) for change in changes])
        if changes or self.status == "new":
            self._write_recipe(wanted)

    def _write_recipe(self, recipe: dict[str, Any]) -> None:
        import yaml

        storage.write_text(self.path / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))

    def _record_session(self, changes: list[str]) -> None:
        sessions = self.read_sessions()
        now = {"started": datetime.now(UTC).isoformat(timespec="seconds"), **environment(), "recipe_changes": changes}
        if sessions and sessions[-1]["versions"] != now["versions"]:
            before = sessions[-1]["versions"]
            moved = sorted(name for name in now["versions"] if before.get(name) != now["versions"][name])
            self.notes.append(f"other versions than before of {', '.join(moved)}: the result may differ in its last bits")
        storage.write_json(self.path / ENVIRONMENT, {"sessions": [*sessions, now]})

    def close(self) -> None:
        """Gives the lock back; a second call does nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ where things are

    @property
    def writer(self) -> bool:
        return self._lock is not None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    # ------------------------------------------------------------ writing

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; `values` holds the optimizer `step`. What is not finite is written as null."""
        self._append(METRICS, {"step": int(values["step"]), **{key: _finite(value) for key, value in values.items()}})

    def append_samples(self, step: int, epoch: int, examples: Sequence[int]) -> None:
        """One line of samples.jsonl: the examples, by their numbers in the data set, that optimizer step `step` trained on."""
        self._append(SAMPLES, {"step": step, "epoch": epoch, "examples": list(examples)})

    def append_rollouts(self, step: int, texts: Sequence[Mapping[str, Any]]) -> None:
        """Lines of rollouts.jsonl: answers that were written for optimizer step `step`, as their author puts them."""
        for text in texts:
            self._append(ROLLOUTS, {"step": step, **{key: _finite(value) for key, value in text.items()}})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if not self.writer:
            return
        try:
            storage.append_lines(self.path / name, [storage.to_json(redact(line))])
        except StorageError as error:
            if self.lines_lost == 0:
                _log.warning("%s; the run goes on without this line of its log", error)
            self.lines_lost += 1

    def sync_logs(self) -> None:
        """Makes the logs durable. Call it before a checkpoint is committed, so that no step counts whose samples are unknown."""
        for name in (METRICS, SAMPLES, ROLLOUTS):
            if self.writer and (self.path / name).exists():
                storage.sync_file(self.path / name)

    def cut_back(self, step: int | None) -> int:
        """Drops log lines of steps after the committed `step` (None: all of them), and torn last lines. Returns the steps to redo."""
        redo = 0
        for name in (METRICS, SAMPLES, ROLLOUTS):
            lines, torn = storage.read_lines(self.path / name)
            kept = [line for line in lines if step is not None and line["step"] <= step]
            redo = max([redo, *(line["step"] - (step or 0) for line in lines)])
            if self.writer and (torn or len(kept) < len(lines)):
                storage.write_text(self.path / name, "".join(storage.to_json(line) + "\n" for line in kept))
        return redo

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a file of the run folder atomically, secrets blanked; `name` is relative, as in "evaluation/held_out.json"."""
        return self.write_text(name, storage.to_json(redact(value), indent=2) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        storage.check_name(name)
        path = self.path / name
        if self.writer:
            storage.make_folder(path.parent)
            storage.write_text(path, text)
        return path

    def finish(self, summary: Mapping[str, Any]) -> None:
        """States that the run is complete: written last, after everything that it stands for is committed."""
        self.sync_logs()
        self.write_json(SUMMARY, dict(summary))
        self.status = "finished"

    # ------------------------------------------------------------ reading

    def read_recipe(self) -> dict[str, Any]:
        import yaml

        try:
            recipe = yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunFolderError(f"{self.path / RECIPE}: does not read ({type(error).__name__}); --fresh starts over") from error
        if not isinstance(recipe, dict):
            raise RunFolderError(f"{self.path / RECIPE}: holds no recipe; --fresh starts over")
        return recipe

    def read_metrics(self) -> list[dict[str, Any]]:
        return storage.read_lines(self.path / METRICS)[0]

    def read_samples(self) -> list[dict[str, Any]]:
        return storage.read_lines(self.path / SAMPLES)[0]

    def read_rollouts(self) -> list[dict[str, Any]]:
        return storage.read_lines(self.path / ROLLOUTS)[0]

    def read_summary(self) -> dict[str, Any]:
        """What `finish` stated; empty for a run that is not finished."""
        return self._read_json(SUMMARY)

    def read_refused_steps(self) -> list[dict[str, Any]]:
        """The steps whose loss or gradient was not finite, with the examples that were in them."""
        path = self.path / NON_FINITE
        return json.loads(path.read_bytes()) if path.exists() else []

    def read_sessions(self) -> list[dict[str, Any]]:
        """One entry for each time that the run was started: versions, platform, threads, and what changed in its recipe."""
        return self._read_json(ENVIRONMENT).get("sessions", [])

    def read_evaluations(self) -> dict[str, Any]:
        """The content of each evaluation/*.json by its name without the ending."""
        return {path.stem: json.loads(path.read_bytes()) for path in sorted(self.evaluation.glob("*.json"))}

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return json.loads(path.read_bytes()) if path.exists() else {}

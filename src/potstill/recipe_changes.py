"""Which changes of its recipe a run may carry on with when it is resumed: a table of verdicts, and the difference that is shown.

It compares mappings and knows no file.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.errors import RunFolderError

# What a resume may change, and why; a name covers the keys below it. Every other key is refused unless it is named by --override-resume.
ALLOWED_CHANGES = {
    "run.folder": "a run folder may be moved",
    "run.trackers": "trackers only watch",
    "run.merge_adapter": "how the student is exported",
    "training.epochs": "how long to train; the learning-rate schedule bends to the new end",
    "training.steps": "how long to train; the learning-rate schedule bends to the new end",
    "training.early_stopping": "when to stop",
    "training.save_steps": "when to save",
    "training.keep_checkpoints": "how many checkpoints to keep",
    "training.eval_steps": "when to evaluate",
    "training.logging_steps": "when to log",
    "training.non_finite": "what to do when a step is refused",
    "training.fsdp": "the same mathematics, laid out differently",
    "training.compile": "the same mathematics, executed differently",
    "training.deterministic": "the same mathematics, executed differently",
    "teacher.sharded": "the same mathematics, laid out differently",
    "student.activation_checkpointing": "the same mathematics, executed differently",
    "capture": "what potstill capture records; a run does not look at it",
    "generate": "what potstill generate writes; a run does not look at it",
    "rollouts.watch": "when a warning is given",
    "rollouts.keep_texts": "how many answers are shown",
    "rollouts.generator.batch_size": "the same text, written in other portions",
    "rollouts.generator.url": "where the student writes",
    "rollouts.generator.model": "where the student writes",
    "rollouts.generator.folder": "where the student writes",
    "rollouts.generator.api_key_env": "how a server is asked",
    "rollouts.generator.api_key_file": "how a server is asked",
    "rollouts.generator.concurrency": "how a server is asked",
    "rollouts.generator.request_seconds": "how a server is asked",
    "rollouts.generator.max_outage_seconds": "how a server is asked",
}
_MOVED = "recorded answers may be moved; which they are is compared"
_ASKED = "how a server is asked; who answers is compared by a probe"
# The same for the keys of a teacher whose kind stays what it was.
_ALLOWED_BY_KIND = {
    "cache": {"path": _MOVED, "model": "it is only compared with what the cache states"},
    "server": dict.fromkeys((
        "url", "tokenizer", "api_key_env", "api_key_file", "concurrency", "sequences_per_request", "request_seconds",
        "max_outage_seconds", "probe_seconds", "probe_tolerance",
    ), _ASKED),
}  # fmt: skip
_TEACHER_KEY = re.compile(r"(teacher(?:\.teachers\.[^.]+)?)\.([^.]+)(?:\..*)?")
# These give a finished run something to do.
_REOPENING = ("training.epochs", "training.steps", "training.early_stopping.patience", "run.merge_adapter")
_GLOBAL_BATCH = ("training.batch_size", "training.accumulation")
# They fix which rows belong to which step. With other values the place in the data is lost, so that no override helps.
_ORDER = (*_GLOBAL_BATCH, "run.seed", "data.packing", "data.max_tokens")


@dataclass(frozen=True)
class Change:
    """One key whose value in the recipe differs from the one that the run began with. `allowed` is the reason, or None."""

    key: str
    recorded: Any
    wanted: Any
    allowed: str | None

    def __str__(self) -> str:
        return f"{self.key}: {self.recorded!r} -> {self.wanted!r}"


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists are values. A key that holds None counts as absent."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def recipe_changes(recorded: Mapping[str, Any], wanted: Mapping[str, Any], overrides: Iterable[str] = ()) -> list[Change]:
    """Every key that differs, with the verdict on it. Batch size and accumulation may change while their product does not."""
    before, after, overridden = flatten(recorded), flatten(wanted), set(overrides)
    unknown = overridden - before.keys() - after.keys()
    if unknown:
        raise RunFolderError(f"--override-resume {sorted(unknown)[0]}: no such key in the recipe")

    def same_global_batch() -> bool:
        return math.prod(before.get(key, 1) for key in _GLOBAL_BATCH) == math.prod(after.get(key, 1) for key in _GLOBAL_BATCH)

    def verdict(key: str) -> str | None:
        if key in overridden and key not in _ORDER:
            return "--override-resume"
        if key in _GLOBAL_BATCH and same_global_batch():
            return "the same rows in every optimizer step"
        if (found := _TEACHER_KEY.fullmatch(key)) and before.get(f"{found[1]}.kind") == after.get(f"{found[1]}.kind"):
            reason = _ALLOWED_BY_KIND.get(str(before.get(f"{found[1]}.kind")), {}).get(found[2])
            if reason is not None:
                return reason
        parts = key.split(".")
        return next((reason for length in range(len(parts), 0, -1) if (reason := ALLOWED_CHANGES.get(".".join(parts[:length])))), None)

    differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [Change(key, before.get(key), after.get(key), verdict(key)) for key in differing]


def refuse_changes(where: object, changes: Sequence[Change]) -> None:
    """Raises RunFolderError naming every change that is not allowed, and the ways on."""
    refused = [change for change in changes if change.allowed is None]
    if refused:
        listed = "\n".join(f"  {change}" for change in refused)
        regardless = " ".join(f"--override-resume {change.key}" for change in refused)
        lost = any(change.key in _ORDER for change in refused)
        last = "the place in the data would be lost otherwise" if lost else f"or go on regardless with {regardless}"
        raise RunFolderError(
            f"{where}: this run began with another recipe:\n{listed}\n"
            f"use the former values, or --fresh to start over, or another run.folder; {last}"
        )


def reopens(changes: Iterable[Change]) -> bool:
    """Whether a finished run has something to do again."""
    return any(change.key in _REOPENING for change in changes)

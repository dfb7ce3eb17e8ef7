"""Finds the definition of a task of lm-evaluation-harness by its name, and everything that the definition refers to.

The harness's own index of all its tasks is built from some 14,000 files in a quarter of a minute; here the files are searched for
the name, and only the folders that hold it are indexed.
"""

import difflib
import re
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from potstill import storage
from potstill.errors import UsageError

_INLINE = re.compile(rb"""^\s*["']?(task|group|tag)["']?\s*:\s*(\S.*)$""", re.MULTILINE)
_LISTED = re.compile(rb"""^\s*-\s+["']?([\w.:-]+)["']?\s*$""", re.MULTILINE)
_NAME = re.compile(rb"[\w.:-]+")
_NEAR, _SHOWN = 3, 8


@dataclass(frozen=True)
class Definition:
    """One YAML file that describes a task or a group, as the harness reads it; functions stand as text."""

    name: str
    path: Path
    values: dict[str, Any]
    is_class: bool = False


@dataclass
class Catalogue:
    """What `name` stands for: the definitions of its tasks, and of the groups above them."""

    name: str
    tasks: dict[str, Definition] = field(default_factory=dict)
    groups: dict[str, Definition] = field(default_factory=dict)


def harness_folder() -> Path:
    """Where the harness keeps its tasks. Raises UsageError where it is not installed."""
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        raise UsageError("lm-evaluation-harness is not installed: pip install 'potstill[eval]'")
    return Path(found.origin).parent / "tasks"


def find(task: str, file: Path | None) -> Catalogue:
    """What `task`, a name, or the task file `file` stands for. Raises UsageError where it is none, or a list of tasks without a number."""
    harness_folder()
    index: dict[str, Any] = {}
    name = task
    if file is not None:
        name, index = _of_file(file)
    catalogue, waiting = Catalogue(name), [name]
    while waiting:
        wanted = waiting.pop(0)
        if wanted in catalogue.tasks or wanted in catalogue.groups:
            continue
        entry = _entry(wanted, index, None if file is None else file.parent)
        path = file if wanted == name and file is not None else entry.yaml_path
        if entry.kind.name == "TAG":
            if wanted == name:
                raise UsageError(f"{task}: is a list of tasks without one number; name one of them: {_some(sorted(entry.tags))}")
            waiting += sorted(entry.tags)
        elif entry.kind.name == "GROUP":
            catalogue.groups[wanted] = Definition(wanted, path, entry.cfg)
            waiting += _children(entry.cfg.get("task"))
        else:
            catalogue.tasks[wanted] = Definition(wanted, path, entry.cfg, is_class=entry.kind.name == "PY_TASK")
    if name in catalogue.groups and not catalogue.groups[name].values.get("aggregate_metric_list"):
        raise UsageError(f"{task}: is a group without one number; name one of its tasks: {_some(sorted(catalogue.tasks))}")
    return catalogue


def _entry(name: str, index: dict[str, Any], own: Path | None) -> Any:
    """The harness's entry of a name; the folders that may define it are indexed where it is not known yet."""
    if name not in index and own is not None:
        index.update(_indexed([own]) | index)
    if name not in index:
        defined, listed = _mentions(harness_folder())
        index.update(_indexed(sorted(defined.get(name) or listed.get(name) or ())) | index)
    if name not in index:
        near = difflib.get_close_matches(name, _mentions(harness_folder())[0], n=_NEAR, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "name one of them (lm-eval ls tasks), or a task file (.yaml)"
        raise UsageError(f"{name}: lm-evaluation-harness has no task of this name; {hint}")
    return index[name]


def _indexed(folders: list[Path]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return dict(TaskManager(include_path=list(folders), include_defaults=False).task_index) if folders else {}


def _of_file(file: Path) -> tuple[str, dict[str, Any]]:
    """The name that a task file gives itself, and the index that holds it alone: other files of its folder are none of our affair."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file; a task is a name of lm-evaluation-harness or a YAML file that describes one")
    with tempfile.TemporaryDirectory() as folder:
        storage.write_json(Path(folder) / "task.yaml", {"include": str(file.resolve())})
        index = _indexed([Path(folder)])
    names = [name for name, entry in index.items() if entry.kind.name != "TAG"]
    if not names:
        raise UsageError(f"{file}: describes no task: it is no YAML, names neither task nor group, or includes a file that is not there")
    return names[0], index


def _children(members: Any) -> list[str]:
    """The names that a group's list of tasks refers to; what is described in the list itself needs no definition."""
    found = []
    for member in [members] if isinstance(members, str) else members or []:
        if isinstance(member, str):
            found.append(member)
        elif isinstance(member.get("task"), list):
            found += _children(member["task"])
        else:
            found.append(str(member.get("task") or member.get("group")))
    return found


@lru_cache(maxsize=1)
def _mentions(root: Path) -> tuple[dict[str, set[Path]], dict[str, set[Path]]]:
    """For each name the folders in which a task or a group is called so, and those in which it stands as a tag or in a list."""
    defined: dict[str, set[Path]] = {}
    listed: dict[str, set[Path]] = {}
    for path in root.glob("*/**/*.yaml"):
        folder, text = root / path.relative_to(root).parts[0], path.read_bytes()
        for key, value in _INLINE.findall(text):
            for name in _NAME.findall(value):
                (listed if key == b"tag" else defined).setdefault(name.decode(), set()).add(folder)
        for name in _LISTED.findall(text):
            listed.setdefault(name.decode(), set()).add(folder)
    return defined, listed


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

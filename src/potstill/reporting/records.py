"""Evaluation records of every version as one shape, that of version 2 with every key present.

What does not read is left out with one line that names it: a page about twenty models must not fail for one damaged number.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from potstill.reporting.torn import json_object

NEWEST = 2
# What a model is judged by, where a record of version 1 does not say.
_PRIMARY = ("exact_match", "accuracy", "bits_per_byte")


def _known(value: Any) -> Any:
    """A number that is not finite is not known."""
    return None if isinstance(value, float) and not isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_known)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=False)


class _Metric(_Part):
    task: str = ""
    metric: str = ""
    label: str = ""
    unit: str = ""
    higher_is_better: bool | None = None
    value: Number
    standard_error: Number = None
    low: Number = None
    high: Number = None
    count: int | None = None
    counted: str = "items"
    num_clusters: int | None = None


class _Model(_Part):
    name: str
    num_parameters: int | None = None
    num_seeds: int = 1
    is_teacher: bool = False
    metrics: dict[str, Any] = Field(default_factory=dict)


class _Task(_Part):
    name: str
    kind: str = ""
    primary: str = ""
    role: Literal["target", "off_target"] = "target"
    data: dict[str, Any] = Field(default_factory=dict)


class _Pair(_Part):
    task: str = ""
    metric: str
    label: str = ""
    unit: str = ""
    higher_is_better: bool | None = None
    first: str
    second: str
    difference: Number
    standard_error: Number = None
    low: Number = None
    high: Number = None
    p_value: Number = None
    p_adjusted: Number = None
    family: str = "primary"
    family_size: int = 1
    smallest_visible: Number = None
    is_significant: bool = False
    method: str = ""
    verdict: str = ""


class _Answer(_Part):
    model: str
    text: str = ""
    right: bool | None = None


class _Sample(_Part):
    task: str = ""
    item: str = ""
    prompt: str = ""
    reference: str = ""
    answers: list[_Answer] = Field(default_factory=list)


class _Series(_Part):
    task: str = ""
    model: str = ""
    kind: str = ""
    label: str = ""
    x_label: str = ""
    y_label: str = ""
    x: list[Number]
    y: list[Number]


class _Recovered(_Part):
    task: str
    metric: str = ""
    model: str
    start: str = ""
    teacher: str = ""
    value: Number = None
    low: Number = None
    high: Number = None
    reason: str | None = None


_P = TypeVar("_P", bound=_Part)


def read_evaluations(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The records in `folder`/evaluation by file name without ending, and a line for each file or part of one that does not read."""
    found, warnings = {}, []
    for file in sorted((folder / "evaluation").glob("*.json")):
        record, lines = read_record(file)
        warnings += lines
        if record is not None:
            found[file.stem] = record
    return found, warnings


def read_record(file: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """One record, or None where the file holds none."""
    value, warnings = json_object(file)
    if not value:
        return None, [f"evaluation/{warning}" for warning in warnings]
    if value.get("kind") != "evaluation":
        return None, [f"evaluation/{file.name}: not one of Potstill's evaluations; it is left out"]
    version = value.get("version")
    if version not in (1, NEWEST):
        return None, [f"evaluation/{file.name}: version {str(version)[:20]!r}, this Potstill reads up to {NEWEST}; it is left out"]
    record, faults = normalise(value, file.stem)
    return record, [f"evaluation/{file.name}: {fault}" for fault in faults]


def normalise(value: Mapping[str, Any], name: str = "evaluation") -> tuple[dict[str, Any], list[str]]:
    """A record of version 1 or 2 in the shape of version 2, and what of it had to be left out. `name` calls a task that has none."""
    faults: list[str] = []
    value = _as_second_version(value, name) if value.get("version") == 1 else value
    models = _parts(_Model, value.get("models"), "model", faults)
    for model in models:
        model["metrics"] = {
            key: parts[0] for key, metric in model["metrics"].items()
            if (parts := _parts(_Metric, [metric], f"metric {key!r} of {model['name']!r}", faults))
        }  # fmt: skip
        for key, metric in model["metrics"].items():
            task, _, short = key.rpartition("/")
            metric["task"], metric["metric"] = metric["task"] or task or name, metric["metric"] or short
            metric["label"] = metric["label"] or short
    series = [one for one in _parts(_Series, value.get("series"), "series", faults) if len(one["x"]) == len(one["y"])]
    record = {
        "kind": "evaluation", "version": NEWEST, "title": str(value.get("title") or name),
        "data": value.get("data") if isinstance(value.get("data"), dict) else {},
        "warnings": [str(warning) for warning in _list(value.get("warnings"))],
        "baseline": _name(value.get("baseline")), "before": _name(value.get("before")),
        "tasks": _parts(_Task, value.get("tasks"), "task", faults), "models": models,
        "comparisons": _parts(_Pair, value.get("comparisons"), "comparison", faults),
        "samples": _parts(_Sample, value.get("samples"), "sample", faults), "series": series,
        "recovered": _parts(_Recovered, value.get("recovered"), "recovered gap", faults),
    }  # fmt: skip
    record["tasks"] = _complete(record["tasks"], models)
    return record, faults


def _complete(tasks: list[dict[str, Any]], models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tasks with those that only a model's metrics name, each with a metric that judges it."""
    named = {task["name"] for task in tasks}
    measured: dict[str, list[str]] = {}
    for model in models:
        for key, metric in model["metrics"].items():
            keys = measured.setdefault(metric["task"], [])
            keys += [] if key in keys else [key]
    tasks = [*tasks, *(_Task(name=task).model_dump() for task in measured if task not in named)]
    for task in tasks:
        keys = measured.get(task["name"], [])
        if task["primary"] not in keys and keys:
            wanted = (key for ending in _PRIMARY for key in keys if key.rpartition("/")[2] == ending)
            task["primary"] = next(wanted, keys[0])
    return tasks


def _as_second_version(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Version 1 had one nameless task, metrics by their bare names, and p-values that no family corrected."""

    def renamed(model: Any) -> Any:
        if not isinstance(model, dict) or not isinstance(model.get("metrics"), dict):
            return model
        metrics = {f"{name}/{key}": {"task": name, "metric": key, **metric} if isinstance(metric, dict) else metric
                   for key, metric in model["metrics"].items()}  # fmt: skip
        return {**model, "is_teacher": model.get("name") == "teacher", "metrics": metrics}

    def paired(pair: Any) -> Any:
        return {**pair, "task": name, "metric": f"{name}/{pair['metric']}"} if isinstance(pair, dict) and "metric" in pair else pair

    pairs = [paired(pair) for pair in _list(value.get("comparisons"))]
    seconds = {str(pair.get("second")) for pair in pairs if isinstance(pair, dict)}
    models = [renamed(model) for model in _list(value.get("models"))]
    data = value.get("data") if isinstance(value.get("data"), dict) else {}
    task = {"name": name, "kind": "", "primary": "", "role": "target", "data": data}
    return {**value, "data": {}, "tasks": [task], "models": models, "comparisons": pairs,
            "baseline": seconds.pop() if len(seconds) == 1 else None}  # fmt: skip


def _parts(kind: type[_P], values: Any, what: str, faults: list[str]) -> list[dict[str, Any]]:
    found = []
    for value in _list(values):
        try:
            found.append(kind.model_validate(value).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "value"
            fault = f"a {what} does not read ({where}: {first['msg'].lower()}); it is left out"
            faults += [] if fault in faults else [fault]
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None

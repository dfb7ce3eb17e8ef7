"""The tables of the page as plain data: models down, the tasks' metrics across, what each difference says, what was forgotten."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from potstill.reporting.wording import UNKNOWN, direction, interval, number, plus_minus, with_unit

Source = tuple[str, str, Mapping[str, Any]]   # run's name, file's name, record


@dataclass(frozen=True)
class Column:
    """One metric of one task."""

    key: str
    task: str
    label: str
    arrow: str
    is_primary: bool
    is_off_target: bool


@dataclass(frozen=True)
class Value:
    """One number of the table. `sort` orders the column; `sign` and `word` say how it compares with `against`."""

    text: str = ""
    interval: str = ""
    sort: float | None = None
    is_best: bool = False
    sign: str = ""
    word: str = ""
    tone: str = ""
    against: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    source: str
    seeds: int
    parameters: int | None
    is_teacher: bool
    is_baseline: bool
    values: tuple[Value, ...]


@dataclass(frozen=True)
class ResultsTable:
    """Records of the same tasks in one table. `facts`: what each task was measured on, in words."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    facts: tuple[tuple[str, str], ...]
    records: tuple[Mapping[str, Any], ...]
    is_corrected: bool

    @property
    def tasks(self) -> list[tuple[str, list[Column]]]:
        """Each task with its columns, in order."""
        names = dict.fromkeys(column.task for column in self.columns)
        return [(name, [column for column in self.columns if column.task == name]) for name in names]

    @property
    def has_secondary(self) -> bool:
        return any(not column.is_primary for column in self.columns)

    @property
    def comparisons(self) -> list[Mapping[str, Any]]:
        """Every comparison, those in the tasks' own metrics first."""
        pairs = [pair for record in self.records for pair in record["comparisons"]]
        primary = {column.key for column in self.columns if column.is_primary}
        return sorted(pairs, key=lambda pair: pair["metric"] not in primary)

    @property
    def judging(self) -> list[Mapping[str, Any]]:
        """The comparisons in the tasks' own metrics, else all."""
        primary = {column.key for column in self.columns if column.is_primary}
        return [pair for pair in self.comparisons if pair["metric"] in primary] or self.comparisons


def results_tables(sources: Sequence[Source]) -> list[ResultsTable]:
    """Evaluations of the same tasks on the same data stand in one table, others in one of their own."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        tasks = [[task["name"], task["kind"], task["data"]] for task in source[2]["tasks"]]
        groups.setdefault(json.dumps(tasks, sort_keys=True, default=str), []).append(source)
    return [_table(group) for group in groups.values()]


def _table(sources: Sequence[Source]) -> ResultsTable:
    records = [record for _, _, record in sources]
    columns = _columns(records)
    rows = [_row(source, model, columns, several=len(sources) > 1) for source in sources for model in source[2]["models"]]
    pairs = [pair for record in records for pair in record["comparisons"]]
    facts = tuple((task["name"], facts_in_words(task["data"])) for task in records[0]["tasks"] if task["data"])
    return ResultsTable(
        " · ".join(dict.fromkeys(record["title"] for record in records)) if len(records) < 4 else f"{len(records)} evaluations",
        tuple(columns), tuple(_with_best(rows, columns)), facts, tuple(records),
        len(pairs) < 2 or any(pair["p_adjusted"] is not None for pair in pairs),
    )  # fmt: skip


def facts_in_words(data: Mapping[str, Any]) -> str:
    """A record's data as "450 rows · 4 seeds"."""
    parts = []
    for key, value in data.items():
        name = key.replace("_", " ")
        parts.append(f"{value:,} {name}" if isinstance(value, int) and not isinstance(value, bool) else f"{name}: {value}")
    return " · ".join(parts)


def _columns(records: Sequence[Mapping[str, Any]]) -> list[Column]:
    tasks = {task["name"]: task for record in records for task in record["tasks"]}
    metrics: dict[str, Mapping[str, Any]] = {}
    for record in records:
        for model in record["models"]:
            for key, metric in model["metrics"].items():
                metrics.setdefault(key, metric)
    columns = []
    for name, task in tasks.items():
        own = [(key, metric) for key, metric in metrics.items() if metric["task"] == name]
        for key, metric in sorted(own, key=lambda one: one[0] != task["primary"]):
            columns.append(Column(key, name, with_unit(metric["label"], metric["unit"]), direction(metric["higher_is_better"]),
                                  key == task["primary"], task["role"] == "off_target"))  # fmt: skip
    return columns


def _row(source: Source, model: Mapping[str, Any], columns: Sequence[Column], *, several: bool) -> Row:
    run, _, record = source
    values = tuple(_value(record, model["name"], column.key, model["metrics"].get(column.key)) for column in columns)
    return Row(model["name"], run if several else "", model["num_seeds"], model["num_parameters"], model["is_teacher"],
               model["name"] == record["baseline"], values)  # fmt: skip


def _value(record: Mapping[str, Any], model: str, key: str, metric: Mapping[str, Any] | None) -> Value:
    if metric is None or metric["value"] is None:
        return Value()
    text, around = plus_minus(metric), interval(metric["low"], metric["high"], metric["standard_error"])
    around = "" if around == UNKNOWN else around
    pair = _pair(record, model, key)
    if pair is None:
        return Value(text, around, metric["value"])
    sign, word, tone = judged(pair)
    return Value(text, around, metric["value"], sign=sign, word=word, tone=tone, against=pair["second"], verdict=pair["verdict"])


def _pair(record: Mapping[str, Any], model: str, key: str) -> Mapping[str, Any] | None:
    """The comparison of `model` with the baseline, else with what it is compared with beside the student before training."""
    pairs = [pair for pair in record["comparisons"] if pair["first"] == model and pair["metric"] == key]
    pairs.sort(key=lambda pair: (pair["second"] != record["baseline"], pair["second"] == record["before"]))
    return pairs[0] if pairs and (pairs[0]["second"] != record["before"] or record["before"] == record["baseline"]) else None


def judged(pair: Mapping[str, Any]) -> tuple[str, str, str]:
    """A comparison as a sign, a word and a tone (good, bad, or neither)."""
    if not pair["is_significant"] or pair["difference"] is None:
        return "≈", "not told apart", ""
    if pair["higher_is_better"] is None:
        return ("▲", "higher", "") if pair["difference"] > 0 else ("▼", "lower", "")
    return ("▲", "better", "good") if (pair["difference"] > 0) == pair["higher_is_better"] else ("▼", "worse", "bad")


def _with_best(rows: Sequence[Row], columns: Sequence[Column]) -> list[Row]:
    """The same rows with the best student of each column marked, where there are several and one direction is good."""
    best: dict[int, float] = {}
    for place, column in enumerate(columns):
        values = [row.values[place].sort for row in rows if not row.is_teacher]
        known = [value for value in values if value is not None]
        if column.arrow and len(known) > 1 and min(known) < max(known):
            best[place] = max(known) if column.arrow == "↑" else min(known)
    marked = []
    for row in rows:
        values = tuple(
            replace(value, is_best=not row.is_teacher and value.sort is not None and best.get(place) == value.sort)
            for place, value in enumerate(row.values)
        )
        marked.append(replace(row, values=values))
    return marked


@dataclass(frozen=True)
class Changes:
    """Each student's change since before its training: the tasks that it was trained for first, others that it may have forgotten after."""

    title: str
    before: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    is_corrected: bool


def changes_since_before(record: Mapping[str, Any]) -> Changes | None:
    """What each student gained and lost in each task's own metric; None where no row of the record is `before`."""
    models = {model["name"]: model for model in record["models"]}
    start = models.get(record["before"] or "")
    judging = {task["primary"] for task in record["tasks"]}
    columns = [column for column in _columns([record]) if column.key in judging and start is not None and column.key in start["metrics"]]
    students = [model for model in record["models"] if model is not start and not model["is_teacher"]]
    if start is None or not columns or not students:
        return None
    columns.sort(key=lambda column: column.is_off_target)
    rows = [
        Row(model["name"], "", model["num_seeds"], model["num_parameters"], False, False,
            tuple(_change(record, start, model, column.key) for column in columns))
        for model in students
    ]  # fmt: skip
    is_corrected = any(pair["p_adjusted"] is not None for pair in record["comparisons"])
    return Changes(record["title"], start["name"], tuple(columns), tuple(rows), is_corrected)


def _change(record: Mapping[str, Any], start: Mapping[str, Any], model: Mapping[str, Any], key: str) -> Value:
    before, after = start["metrics"].get(key), model["metrics"].get(key)
    if before is None or after is None or before["value"] is None or after["value"] is None:
        return Value()
    around = f"{number(before['value'], before['standard_error'])} → {number(after['value'], after['standard_error'])}"
    wanted = (model["name"], start["name"], key)
    pair = next((pair for pair in record["comparisons"] if (pair["first"], pair["second"], pair["metric"]) == wanted), None)
    if pair is None or pair["difference"] is None:
        change = after["value"] - before["value"]
        return Value(signed(change, before["standard_error"]), around, change, word="not compared")
    sign, word, tone = judged(pair)
    text = signed(pair["difference"], pair["standard_error"])
    return Value(text, around, pair["difference"], sign=sign, word=word, tone=tone, against=start["name"], verdict=pair["verdict"])


@dataclass(frozen=True)
class Recovered:
    """How much of the way to the teacher each student went, by task; `reasons` say where there was no way to go."""

    starts: str
    teachers: str
    tasks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Value, ...]], ...]
    reasons: tuple[str, ...]


def recovered_gap(record: Mapping[str, Any]) -> Recovered | None:
    """The shares that a record states; None where it states none."""
    shares = record["recovered"]
    if not any(share["value"] is not None for share in shares):
        return None
    tasks = tuple(dict.fromkeys(share["task"] for share in shares))
    found: dict[str, dict[str, Value]] = {}
    for share in shares:
        found.setdefault(share["model"], {})[share["task"]] = _share(share)
    rows = tuple((model, tuple(values.get(task, Value()) for task in tasks)) for model, values in found.items())
    reasons = dict.fromkeys(f"{share['task']}: {share['reason']}" for share in shares if share["value"] is None and share["reason"])
    starts, teachers = (", ".join(dict.fromkeys(share[key] for share in shares)) for key in ("start", "teacher"))
    return Recovered(starts, teachers, tasks, rows, tuple(reasons))


def _share(share: Mapping[str, Any]) -> Value:
    if share["value"] is None:
        return Value(word="no gap")
    around = "" if share["low"] is None or share["high"] is None else f"{share['low']:.0%} to {share['high']:.0%}"
    return Value(f"{share['value']:.0%}", around, share["value"])


def signed(value: float | None, error: float | None) -> str:
    text = number(value, error)
    return text if value is None or value < 0 or text == UNKNOWN else f"+{text}"

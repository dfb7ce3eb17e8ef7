"""What a study found: the table of its cells, what each differs from its twin, and one honest sentence about all of it.

Reads study.json and evaluation/study.json and nothing else, so that it can be called again at any time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from potstill import storage
from potstill.errors import DataError
from potstill.reporting.dot_plot import Dot, dot_plot
from potstill.reporting.torn import json_object
from potstill.reporting.wording import direction, number, p_value, plus_minus, with_unit
from potstill.studies.steps import StepsFound, steps_to_accuracy

_MARK = "*"


@dataclass(frozen=True)
class Row:
    """One model of the table in one task: its value, and what it differs from the row that it is compared with."""

    name: str
    seeds: int
    value: Mapping[str, Any]
    pair: Mapping[str, Any] | None
    is_teacher: bool
    seconds: float | None

    @property
    def difference(self) -> str:
        """ "+0.0123 (+0.0010 to +0.0236)"; empty where the row is compared with none."""
        if self.pair is None:
            return ""
        value, low, high = (signed(self.pair[key], self.pair["standard_error"]) for key in ("difference", "low", "high"))
        return f"{value} ({low} to {high})"

    @property
    def mark(self) -> str:
        return _MARK if self.pair is not None and self.pair["is_significant"] else ""


@dataclass(frozen=True)
class TaskTable:
    """One task: the metric by which it is judged, and the rows."""

    task: str
    metric: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def head(self) -> str:
        return f"{with_unit(self.metric['label'], self.metric['unit'])} {direction(self.metric['higher_is_better'])}".rstrip()


@dataclass(frozen=True)
class Results:
    """A study with its record, as far as there is one."""

    study: Mapping[str, Any]
    record: Mapping[str, Any]
    tables: Sequence[TaskTable]
    steps: Sequence[StepsFound]

    @property
    def pairs(self) -> list[Mapping[str, Any]]:
        """The comparisons that the study was made for: those in the tasks' own metrics."""
        return [pair for pair in self.record.get("comparisons", ()) if pair["family"] == "primary"]


def read_results(folder: Path) -> Results:
    """Raises DataError where there is no study, or where a file of it does not read."""
    study, warnings = json_object(folder / "study.json")
    record, more = json_object(folder / "evaluation" / "study.json")
    if warnings or more:
        raise DataError(f"{folder}: {'; '.join([*warnings, *more])}; potstill study writes it again")
    if study.get("kind") != "study":
        raise DataError(f"{folder}: holds no study.json; name the folder of a study")
    return Results(study, record, _tables(study, record), steps_to_accuracy(study, record))


def show(folder: Path | str, *, console: Console | None = None) -> None:
    """Prints the study's tables and writes results.md and one plots/TASK.svg for each task into its folder."""
    from potstill.studies.results_markdown import results_markdown

    folder, console = Path(folder), console or Console()
    results = read_results(folder)
    for table in results.tables:
        console.print(_terminal_table(results, table))
    for found in results.steps:
        console.print(Text(found.sentence))
    console.print(Text(conclusion(results.pairs)))
    storage.make_folder(folder / "plots")
    pictures = {table.task: f"plots/{table.task}.svg" for table in results.tables}
    for table in results.tables:
        storage.write_text(folder / pictures[table.task], picture(table))
    storage.write_text(folder / "results.md", results_markdown(results, pictures))
    console.print(Text(f"{folder / 'results.md'} holds the tables, the differences in words, and what was held equal.", style="dim"))


def conclusion(pairs: Sequence[Mapping[str, Any]]) -> str:
    """How many comparisons are significant after Holm's correction, and what could not have been seen."""
    if not pairs:
        return "Nothing was compared."
    found = [pair for pair in pairs if pair["is_significant"]]
    sizes: dict[str, list[float]] = {}
    for pair in pairs:
        if pair["smallest_visible"] is not None:
            sizes.setdefault(with_unit(pair["label"], pair["unit"]), []).append(pair["smallest_visible"])
    visible = "; ".join(f"{label}: {_range(values)}" for label, values in sizes.items())
    seen = f" The smallest difference that each comparison alone finds four times in five: {visible}." if visible else ""
    if not found:
        many = "the one comparison" if len(pairs) == 1 else f"any of {len(pairs)} comparisons after Holm's correction"
        return f"No difference that this test can see, in {many}.{seen}"
    after = " after Holm's correction" if len(pairs) > 1 else ""
    finds = f"{len(found)} of {len(pairs)} comparisons {'finds' if len(found) == 1 else 'find'}"
    return f"{finds} a difference larger than its uncertainty{after}.{seen}"


def picture(table: TaskTable) -> str:
    """The differences as dots with their intervals, filled where significant; the values where nothing is compared."""
    pairs = [row for row in table.rows if row.pair is not None]
    if not pairs:
        dots = [
            Dot(row.name, row.value["value"], row.value["low"], row.value["high"]) for row in table.rows if row.value["value"] is not None
        ]
        return dot_plot(dots, title=table.task, x_label=f"{table.head}, 95 % intervals")
    dots = [Dot(row.name, row.pair["difference"], row.pair["low"], row.pair["high"], row.pair["is_significant"])
            for row in pairs if row.pair is not None and row.pair["difference"] is not None]  # fmt: skip
    against = dict.fromkeys(row.pair["second"] for row in pairs if row.pair is not None)
    name = next(iter(against)) if len(against) == 1 else "each one's own twin"
    return dot_plot(
        dots,
        title=table.task,
        x_label=f"difference in {table.head}; 95 % intervals, filled: significant after Holm",
        line_at=0.0,
        line_label=name,
    )


def signed(value: float | None, error: float | None) -> str:
    """A number with its sign, to the digits of its error."""
    return number(value, error) if value is None or value < 0 else f"+{number(value, error)}"


def _tables(study: Mapping[str, Any], record: Mapping[str, Any]) -> list[TaskTable]:
    seconds = {cell["name"]: _mean_seconds(cell) for cell in study.get("cells", ())}
    tables = []
    for task in record.get("tasks", ()):
        rows = []
        for model in record["models"]:
            value = model["metrics"].get(task["primary"])
            if value is None:
                continue
            pair = next(
                (pair for pair in record["comparisons"] if pair["metric"] == task["primary"] and pair["first"] == model["name"]), None
            )
            rows.append(Row(model["name"], model["num_seeds"], value, pair, model["is_teacher"], seconds.get(model["name"])))
        if rows:
            tables.append(TaskTable(task["name"], rows[0].value, rows))
    return tables


def _mean_seconds(cell: Mapping[str, Any]) -> float | None:
    known = [run["costs"]["seconds"] for run in cell.get("runs", ()) if (run.get("costs") or {}).get("seconds") is not None]
    return sum(known) / len(known) if known else None


def _terminal_table(results: Results, table: TaskTable) -> Table:
    compared = [row for row in table.rows if row.pair is not None]
    against = dict.fromkeys(row.pair["second"] for row in compared if row.pair is not None)
    other = next(iter(against)) if len(against) == 1 else "its twin"
    shown = Table(
        title=Text(f"{results.study.get('title', '')}: {table.task}"), title_justify="left", caption_justify="left",
        caption=Text(f"± is one standard error; {_MARK} larger than its uncertainty, after Holm's correction over the study"),
    )  # fmt: skip
    shown.add_column("", overflow="fold")
    for name in ("seeds", table.head, f"difference to {other} (95 % interval)", "p (Holm)", "seconds a run"):
        shown.add_column(Text(name), justify="right", overflow="fold")
    for row in table.rows:
        adjusted = "" if row.pair is None else f"{p_value(row.pair['p_adjusted'])} {row.mark}".rstrip()
        cost = "" if row.seconds is None else f"{row.seconds:,.0f}"
        cells = (row.name, str(row.seeds), plus_minus(row.value), row.difference, adjusted, cost)
        shown.add_row(*map(Text, cells), style="dim" if row.is_teacher else "")
    return shown


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values), min(values) / 2), number(max(values), min(values) / 2)
    return low if low == high else f"{low} to {high}"

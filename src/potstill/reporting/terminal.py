"""The same results in a terminal: a table of models by metrics, what was found in words, and the loss curves as a picture of dots."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from potstill.reporting.summary import Curve
from potstill.reporting.wording import count, direction, interval, number, plus_minus, with_unit

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
# Bit of each dot of a braille character, by row and column within it.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BRAILLE = 0x2800
_MOST_ACROSS = 5


def print_evaluation(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints an evaluation's table, its verdicts and its warnings; `record` is the JSON of evaluation/*.json."""
    console = console or Console()
    console.print(results_table(record))
    several = len(record.get("tasks", ())) > 1
    unclear = 0
    for pair in record["comparisons"]:
        if pair.get("family", "").startswith("secondary") and not pair["is_significant"]:
            unclear += 1
            continue
        task = f"{pair['task']}, " if several else ""
        console.print(Text(f"• {task}{pair['verdict']}", style="" if pair["is_significant"] else "dim"))
    if unclear:
        found = "comparison of a secondary metric finds" if unclear == 1 else "comparisons of secondary metrics find"
        console.print(Text(f"• {unclear} further {found} no difference that this test can see; the record holds them", style="dim"))
    for warning in record["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def results_table(record: Mapping[str, Any]) -> Table:
    """Metrics down, models across, each value with its standard error; a model that stands alone also shows its intervals."""
    models = record["models"]
    if len(models) > _MOST_ACROSS:
        return _models_down(record)
    alone = len(models) == 1
    rows = metric_rows(models)
    table = Table(title=Text(record["title"]), title_justify="left", caption=Text(_caption(rows)), caption_justify="left")
    table.add_column("")
    for model in models:
        seeds = f"\n{model['num_seeds']} seeds" if model["num_seeds"] > 1 else ""
        table.add_column(Text("value" if alone else model["name"] + seeds), justify="right")
    if alone:
        table.add_column("95 % interval", justify="right")
    if any(model["num_parameters"] is not None for model in models):
        table.add_row("parameters", *(count(model["num_parameters"]) for model in models))
    several = len({metric.get("task") for metric in rows.values()}) > 1
    task = None
    for name, metric in rows.items():
        if several and metric.get("task") != task:
            task = metric.get("task")
            table.add_section()
            table.add_row(Text(str(task), style="bold"))
        label = f"{with_unit(metric['label'], metric['unit'])} {direction(metric['higher_is_better'])}".rstrip()
        cells = [plus_minus(model["metrics"][name]) if name in model["metrics"] else "" for model in models]
        if alone:
            cells.append(interval(metric["low"], metric["high"], metric["standard_error"]))
        table.add_row(Text(label), *map(Text, cells))
    return table


def _models_down(record: Mapping[str, Any]) -> Table:
    """More models than fit side by side: each a row, each task's own metric a column."""
    rows = metric_rows(record["models"])
    chosen = [task["primary"] for task in record.get("tasks", ()) if task["primary"] in rows] or list(rows)[:4]
    caption = f"{_caption({name: rows[name] for name in chosen})}; other metrics are in the record"
    table = Table(title=Text(record["title"]), title_justify="left", caption=Text(caption), caption_justify="left")
    table.add_column("")
    for name in chosen:
        metric, task = rows[name], f"{rows[name]['task']}\n" if len(chosen) > 1 else ""
        label = f"{with_unit(metric['label'], metric['unit'])} {direction(metric['higher_is_better'])}".rstrip()
        table.add_column(Text(task + label), justify="right")
    for model in record["models"]:
        seeds = f", {model['num_seeds']} seeds" if model["num_seeds"] > 1 else ""
        cells = [plus_minus(model["metrics"][name]) if name in model["metrics"] else "" for name in chosen]
        table.add_row(Text(model["name"] + seeds), *map(Text, cells))
    return table


def _caption(rows: Mapping[str, Mapping[str, Any]]) -> str:
    counted = dict.fromkeys(f"{count(metric['count'])} {metric['counted']}" for metric in rows.values())
    return f"± is one standard error; over {', '.join(counted)}; ↑ more is better, ↓ less is better"


def metric_rows(models: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Every metric of any model, task by task in the order of first appearance, with one model's description of it."""
    rows: dict[str, Mapping[str, Any]] = {}
    for model in models:
        for name, metric in model["metrics"].items():
            rows.setdefault(name, metric)
    tasks = list(dict.fromkeys(metric.get("task") for metric in rows.values()))
    return dict(sorted(rows.items(), key=lambda row: tasks.index(row[1].get("task"))))


def curves_picture(curves: Mapping[str, Curve], *, title: str, width: int = 62, height: int = 12) -> RenderableType:
    """A picture of one or more curves over steps, two by four dots a character, each curve in its colour."""
    curves = {name: curve for name, curve in curves.items() if curve.steps}
    if not curves:
        return Text(f"{title}: nothing was logged", style="dim")
    steps = [step for curve in curves.values() for step in curve.steps]
    values = [value for curve in curves.values() for value in curve.values]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    for position, curve in enumerate(curves.values()):
        for x, y in _dots(curve, (first, max(last - first, 1), low, high - low or 1.0), 2 * width, 4 * height):
            bits = cells.get((x // 2, y // 4), (0, ""))[0]
            cells[x // 2, y // 4] = (bits | _DOTS[y % 4][x % 2], COLOURS[position % len(COLOURS)])
    labels = {0: number(high), height - 1: number(low)}
    margin = max(map(len, labels.values()))
    picture = Text()
    for row in range(height):
        picture.append(f"{labels.get(row, ''):>{margin}} │", style="dim")
        for column in range(width):
            bits, colour = cells.get((column, row), (0, ""))
            picture.append(chr(_BRAILLE + bits) if bits else " ", style=colour)
        picture.append("\n")
    begin, end = f"step {first:,}", f"step {last:,}"
    picture.append(f"{'':>{margin}} └{'─' * width}\n{'':>{margin}}  {begin}{end:>{width - len(begin)}}", style="dim")
    legend = Text("  ").join(Text(f"● {name}", style=COLOURS[i % len(COLOURS)]) for i, name in enumerate(curves))
    return Panel(Group(picture, legend), title=Text(title), title_align="left", expand=False)


def _dots(curve: Curve, frame: tuple[int, int, float, float], width: int, height: int) -> set[tuple[int, int]]:
    """Dots (from the left, from the top) of a curve joined by straight lines, in a picture of width x height dots."""
    first, num_steps, low, span = frame
    points = [
        ((step - first) / num_steps * (width - 1), (1 - (value - low) / span) * (height - 1))
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    dots = {(round(x), round(y)) for x, y in points}
    for (x, y), (next_x, next_y) in pairwise(points):
        num_dots = max(int(abs(next_x - x)), int(abs(next_y - y)), 1)
        dots |= {(round(x + (next_x - x) * i / num_dots), round(y + (next_y - y) * i / num_dots)) for i in range(num_dots)}
    return dots

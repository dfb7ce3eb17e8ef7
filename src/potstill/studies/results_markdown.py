"""A study's results as Markdown: the tables, the differences in words, what was held equal, and what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from potstill.reporting.markdown import escaped
from potstill.reporting.wording import number, p_value, plus_minus
from potstill.studies.results import Results, TaskTable, conclusion

_MOST_KEYS = 12


def results_markdown(results: Results, pictures: Mapping[str, str]) -> str:
    """`pictures`: for each task the file that shows it, relative to the text."""
    study = results.study
    parts = [f"# {escaped(str(study.get('title', '')))}", conclusion(results.pairs)]
    if study.get("published"):
        parts.append(f"Published: {escaped(study['published'])}")
    for table in results.tables:
        parts += [f"## {escaped(table.task)}", _table(table), f"![{escaped(table.task)}]({pictures[table.task]})"]
    parts += [escaped(found.sentence) for found in results.steps]
    parts += _section("In words", [f"{pair['task']}, {pair['verdict']}" for pair in results.pairs])
    parts += _section("The gap to the teacher", [_recovered(entry) for entry in results.record.get("recovered", ())])
    parts += _section("Held equal", _equal(study))
    parts += _section("Warnings", [*study.get("warnings", ()), *results.record.get("warnings", ())])
    parts += _section("Cost", _costs(study))
    return "\n\n".join(parts) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {escaped(line)}" for line in lines)] if lines else []


def _table(table: TaskTable) -> str:
    heads = ["", "seeds", table.head, "difference (95 % interval)", "p (Holm)", ""]
    lines = [heads, ["---", *["---:"] * 4, "---"]]
    for row in table.rows:
        against = "" if row.pair is None else f"to {escaped(row.pair['second'])}: "
        adjusted = "" if row.pair is None else escaped(p_value(row.pair["p_adjusted"]))
        said = against + escaped(row.difference) if row.difference else ""
        lines.append([escaped(row.name), str(row.seeds), plus_minus(row.value), said, adjusted, "significant" if row.mark else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _recovered(entry: Mapping[str, Any]) -> str:
    head = f"{entry['task']}: {entry['model']}, from {entry['start']} to {entry['teacher']}"
    if entry["value"] is None:
        return f"{head}: no share ({entry['reason']})"
    low, high = ("unbounded" if end is None else number(end, 0.01) for end in (entry["low"], entry["high"]))
    return f"{head}: {number(entry['value'], 0.01)} of the gap (95 % interval {low} to {high})"


def _equal(study: Mapping[str, Any]) -> list[str]:
    """What no cell differs in, and all that some do."""
    cells = study.get("cells", ())
    differing = list(dict.fromkeys(key for cell in cells for key in cell["differences"]))
    more = f" and {len(differing) - _MOST_KEYS} keys more" if len(differing) > _MOST_KEYS else ""
    lines = ["the order of the data and the initial weights, for each seed; every key of the recipe but "
             + (", ".join(differing[:_MOST_KEYS]) or "none") + more]  # fmt: skip
    for key, words in {"steps": "steps", "epochs": "epochs", "global_batch": "rows a step"}.items():
        values = list(dict.fromkeys(cell["budget"].get(key) for cell in cells))
        if len(values) == 1 and values[0] is not None:
            lines.append(f"{words}: {values[0]}")
    answers = sorted({cell["teacher_answers"] for cell in cells} - {"none"})
    return [*lines, f"the teacher's answers: {', '.join(answers)}"] if answers else lines


def _costs(study: Mapping[str, Any]) -> list[str]:
    lines = []
    for cell in study.get("cells", ()):
        costs = [run["costs"] for run in cell["runs"] if (run.get("costs") or {}).get("seconds") is not None]
        if costs:
            seconds = [cost["seconds"] for cost in costs]
            lines.append(f"{cell['name']}: {len(costs)} runs, {min(seconds):,.0f} to {max(seconds):,.0f} s each")
    return lines

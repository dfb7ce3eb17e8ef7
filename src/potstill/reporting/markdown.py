"""The same results as Markdown, for a model card: what was done, the table, the differences in words, the warnings."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.reporting.pipeline import cells, in_words, outcome_in_words
from potstill.reporting.study import Study
from potstill.reporting.summary import RunSummary, summarise_all
from potstill.reporting.wording import count, direction, interval, plus_minus, with_unit

# Brackets without parentheses suffice: a link and an image begin with one.
_SPECIAL = re.compile(r"([\\`*_\[\]#|~$])")
MOST_VERDICTS = 40
MOST_NAMES = 8


def markdown(paths: Sequence[Path | str]) -> str:
    """The runs in `paths` as one Markdown text. Raises RunFolderError where there is nothing to report on."""
    summaries = summarise_all(paths)
    if len(summaries) == 1:
        return f"# {escaped(summaries[0].name)}\n\n{results_markdown(summaries[0])}\n"
    title = next((summary.study.title for summary in summaries if summary.study is not None), None)
    parts = [f"# {escaped(title or ', '.join(cell.name for cell in cells(summaries)[:MOST_NAMES]) or summaries[0].name)}"]
    parts += [_unfinished(summary.study) for summary in summaries if summary.study is not None]
    for summary in summaries:
        parts += [_evaluations(summary)]
    for cell in cells(summaries):
        runs = [summaries[place] for place in cell.members]
        parts += [f"## {escaped(cell.name)}", _training(runs)]
    warnings = [f"- {escaped(summary.name)}: {escaped(warning)}" for summary in summaries for warning in summary.warnings]
    parts += ["## Warnings", "\n".join(warnings)] if warnings else []
    return "\n\n".join(part for part in parts if part) + "\n"


def results_markdown(summary: RunSummary) -> str:
    """One run: how it was trained, its evaluations with their uncertainty, and its warnings. Text of models and recipes is escaped."""
    parts = [_training([summary]) if summary.is_run else "", _evaluations(summary)]
    if summary.warnings:
        parts += ["### Warnings", "\n".join(f"- {escaped(warning)}" for warning in summary.warnings)]
    return "\n\n".join(part for part in parts if part)


def results_table(record: Mapping[str, Any]) -> str:
    """Metrics down, models across, value ± one standard error; a model that stands alone also shows its 95 % intervals."""
    models = record["models"]
    keys = list(dict.fromkeys(key for model in models for key in model["metrics"]))
    if not keys:
        return ""
    alone, several_tasks = len(models) == 1, len(record["tasks"]) > 1
    judging = {task["primary"] for task in record["tasks"]}
    heads = [escaped(model["name"]) + (f" ({model['num_seeds']} seeds)" if model["num_seeds"] > 1 else "") for model in models]
    rows = [["", *heads, *(["95 % interval"] if alone else [])]]
    if any(model["num_parameters"] is not None for model in models):
        rows.append(["parameters", *(count(model["num_parameters"]) for model in models), *([""] if alone else [])])
    for key in keys:
        found = [model["metrics"].get(key) for model in models]
        metric = next(one for one in found if one is not None)
        label = escaped((f"{metric['task']}: " if several_tasks else "") + with_unit(metric["label"], metric["unit"]))
        label = f"{label} {direction(metric['higher_is_better'])}".rstrip()
        cells = ["" if one is None else plus_minus(one) for one in found]
        cells += [interval(metric["low"], metric["high"], metric["standard_error"])] if alone else []
        rows.append([f"**{label}**" if key in judging else label, *cells])
    aligned = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], aligned, *rows[1:])]
    note = "± is one standard error; ↑ more is better, ↓ less is better; a bold metric is the one that its task is judged by."
    return "\n".join(lines) + f"\n\n{note}"


def _verdicts(record: Mapping[str, Any]) -> str:
    """The comparisons in the tasks' own metrics, else all of them, in words."""
    pairs = [pair for pair in record["comparisons"] if pair["family"] == "primary"] or record["comparisons"]
    lines = [f"- {escaped(pair['verdict'])}" for pair in pairs[:MOST_VERDICTS]]
    return "\n".join([*lines, *([f"- and {len(pairs) - MOST_VERDICTS} more"] if len(pairs) > MOST_VERDICTS else [])])


def _evaluations(summary: RunSummary) -> str:
    parts = []
    for record in summary.evaluations.values():
        parts += [f"### {escaped(record['title'])}", results_table(record), _verdicts(record)]
    return "\n\n".join(part for part in parts if part)


def _unfinished(study: Study) -> str:
    """The runs of a study that are not finished, as a table; empty where all are."""
    rows = [["run that is not finished", "seed", "state", "why"], ["---"] * 4, *([escaped(one) for one in row] for row in study.unfinished)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if study.unfinished else ""


def _training(runs: Sequence[RunSummary]) -> str:
    """How the runs of one cell were trained; what is counted is the first one's."""
    lines = [f"- {subject}: {escaped(words)}" for subject, words in in_words(runs[0].recipe).items()]
    seeds = [str(run.recipe["run.seed"]) for run in runs if "run.seed" in run.recipe]
    lines += [f"- {'seed' if len(seeds) == 1 else 'seeds'}: {escaped(', '.join(seeds))}"] if seeds else []
    result = outcome_in_words(runs[0].finished)
    lines += [f"- {'trained' if len(runs) == 1 else 'trained, the first of them'}: {escaped(result)}"] if result else []
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no emphasis, link, table cell, formula or tag comes of it."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)

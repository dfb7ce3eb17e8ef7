"""Numbers as one HTML file: what was done, results with intervals and in words, answers, pictures, recipe, surroundings, warnings.

The file asks the network for nothing (its own content policy forbids it) and escapes every text that came from a run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from potstill import storage
from potstill.reporting import figures as pictures
from potstill.reporting import wording
from potstill.reporting.answers import ALL_CHARACTERS, side_by_side
from potstill.reporting.markdown import markdown
from potstill.reporting.pipeline import OF_A_SEED, Cell, cells, in_words, outcome_in_words
from potstill.reporting.results import changes_since_before, judged, recovered_gap, results_tables, signed
from potstill.reporting.study_figures import study_figures
from potstill.reporting.summary import RunSummary, summarise_all

_TEMPLATE = "page.html.jinja"
_MOST_NAMES = 4
LARGEST = 8_000_000


def write_report(paths: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Writes one page about the runs in `paths` and returns where it is: `output`, else report.html in the first path.

    An output that ends in .md is written as Markdown. Raises RunFolderError where there is nothing to report on, StorageError where the
    page cannot be written.
    """
    first = Path(paths[0])
    target = Path(output) if output is not None else (first if first.is_dir() else first.parent) / "report.html"
    text = markdown(paths) if target.suffix.lower() == ".md" else render(summarise_all(paths))
    storage.make_folder(target.absolute().parent)
    storage.write_text(target.absolute(), text)
    return target


def render(summaries: Sequence[RunSummary], *, written: datetime | None = None, largest: int = LARGEST) -> str:
    """The page as text, with fewer points and answers until it has at most `largest` bytes. `written` is the date that it carries, by
    default now."""
    page = ""
    for share in (1.0, 0.5, 0.25, 0.1, 0.02):
        page = _render(summaries, written or datetime.now(UTC), share)
        if len(page.encode()) <= largest:
            break
    return page


def _render(summaries: Sequence[RunSummary], written: datetime, share: float) -> str:
    """The page with a share of the points and of the characters of answers that it may hold."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("potstill.reporting", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sources = [(summary.name, name, record) for summary in summaries for name, record in summary.evaluations.items()]
    records = [record for _, _, record in sources]
    found = cells(summaries)
    recipes = [(cell.name, recipe) for cell in found if (recipe := _recipe(summaries, cell))]
    studies = [summary.study for summary in summaries if summary.study is not None]
    drawn = [
        *(figure for study in studies for figure in study_figures(study, records)),
        *pictures.series_figures(records),
        *pictures.curve_figures(summaries, found, all_points=int(share * pictures.ALL_POINTS)),
    ]  # fmt: skip
    groups: dict[str, list[tuple[int, pictures.Figure]]] = {}
    for place, figure in enumerate(drawn):
        groups.setdefault(figure.group, []).append((place, figure))
    shared_words, own_words = _words(summaries, found)
    surrounded = _surroundings(summaries)
    with_pictures = pictures.has_plotly() and bool(drawn)
    page = {
        "title": _title(summaries), "status": _status(summaries), "written": written.strftime("%Y-%m-%d %H:%M UTC"),
        "summaries": summaries, "studies": studies, "cells": found, "warnings": _warnings(summaries),
        "shared_words": shared_words, "own_words": own_words,
        "own_subjects": list(dict.fromkeys(subject for _, words in own_words for subject in words)),
        "tables": results_tables(sources),
        "samples": side_by_side(records, all_characters=int(share * ALL_CHARACTERS)), "groups": groups, "has_plotly": pictures.has_plotly(),
        "changes": [changes for record in records if (changes := changes_since_before(record)) is not None],
        "recipe": recipe_rows([recipe for _, recipe in recipes]), "runs": [name for name, _ in recipes],
        "surroundings": recipe_rows([words for _, words in surrounded]), "surrounded": [name for name, _ in surrounded],
        "style": Markup(_asset("style.css")), "script": Markup(_asset("page.js")),
        "plotly_script": Markup(_plotly_script()) if with_pictures else "",
        "figure_data": Markup(safe_json([figure.to_json() for figure in drawn])),
    }  # fmt: skip
    names = ("interval", "number", "count", "p_value", "direction", "significance", "with_unit")
    words: dict[str, Any] = {name: getattr(wording, name) for name in names}
    words |= {"judged": judged, "recovered_gap": recovered_gap, "signed": signed, "place_in_words": _place}
    environment.globals |= {**words, **page, "sections": _sections(page)}
    return environment.get_template(_TEMPLATE).render()


def safe_json(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (files("potstill.reporting") / "templates" / name).read_text(encoding="utf-8")


def _plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _sections(page: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchor and name of each section that the page has."""
    wanted = [
        ("warnings", "Warnings", page["warnings"]), ("done", "What was done", page["cells"] or page["studies"]),
        ("results", "Results", True),
        ("forgotten", "Forgotten", page["changes"]), ("answers", "Answers", page["samples"]),
        ("series", "Calibration and lengths", "series" in page["groups"]), ("curves", "Curves", True),
        ("recipe", "Recipe", page["recipe"]), ("surroundings", "Surroundings", page["surroundings"]),
    ]  # fmt: skip
    return [(anchor, name) for anchor, name, is_there in wanted if is_there]


def _title(summaries: Sequence[RunSummary]) -> str:
    """A study's own title, a folder's name, or the names of the runs."""
    study = next((summary.study.title for summary in summaries if summary.study is not None), None)
    names = [summary.name for summary in summaries]
    if study or len(names) <= _MOST_NAMES:
        return study or " · ".join(names)
    return names[0] if not summaries[0].is_run else f"{', '.join(names[:3])} and {len(names) - 3} more runs"


def _status(summaries: Sequence[RunSummary]) -> str:
    runs = [summary for summary in summaries if summary.is_run]
    if len(runs) <= _MOST_NAMES:
        return ", ".join(f"{run.name}: {run.status}" for run in runs)
    states = dict.fromkeys(run.status for run in runs)
    return f"{len(runs)} runs: " + ", ".join(f"{sum(run.status == state for run in runs)} {state}" for state in states)


def _warnings(summaries: Sequence[RunSummary]) -> list[tuple[str, str]]:
    """Each warning once, with the names of the runs that it was raised in."""
    found: dict[str, list[str]] = {}
    for summary in summaries:
        for warning in summary.warnings:
            found.setdefault(warning, []).append(summary.name)
    return [(warning, ", ".join(dict.fromkeys(names))) for warning, names in found.items()]


def _words(summaries: Sequence[RunSummary], found: Sequence[Cell]) -> tuple[dict[str, str], list[tuple[str, dict[str, str]]]]:
    """What was done: what all cells share, and for each cell what is its own."""
    own = []
    for cell in found:
        members = [summaries[place] for place in cell.members]
        seeds = ", ".join(str(run.recipe["run.seed"]) for run in members if "run.seed" in run.recipe)
        words = in_words(members[0].recipe) | ({"seeds": seeds} if seeds else {})
        states = dict.fromkeys(run.status for run in members)
        result = outcome_in_words(members[0].finished)
        result = f"{result} (the first seed)" if result and len(members) > 1 else result
        own.append((cell.name, words | {"state": ", ".join(states)} | ({"outcome": result} if result else {})))
    if len(own) == 1:
        return own[0][1], []
    shared = {subject: words for subject, words in own[0][1].items() if all(other.get(subject) == words for _, other in own)} if own else {}
    return shared, [(name, {subject: text for subject, text in words.items() if subject not in shared}) for name, words in own]


@dataclass(frozen=True)
class KeyRow:
    """One key with its value in every run, and whether the runs differ in it."""

    key: str
    values: Sequence[Any]
    differs: bool


def recipe_rows(recipes: Sequence[Mapping[str, Any]]) -> list[KeyRow]:
    """Each key of any recipe; keys that differ come first."""
    keys = sorted({key for recipe in recipes for key in recipe})
    rows = [(key, [recipe.get(key) for recipe in recipes]) for key in keys]
    marked = [KeyRow(key, values, any(value != values[0] for value in values)) for key, values in rows]
    return sorted(marked, key=lambda row: not row.differs)


def _recipe(summaries: Sequence[RunSummary], cell: Cell) -> Mapping[str, Any]:
    """The recipe of a cell's runs, without what is a seed's own where there are several."""
    recipe = summaries[cell.members[0]].recipe
    return recipe if len(cell.members) == 1 else {key: value for key, value in recipe.items() if key not in OF_A_SEED}


def _surroundings(summaries: Sequence[RunSummary]) -> list[tuple[str, Mapping[str, str]]]:
    """Each set of surroundings once, with the names of the runs that had it: versions, platform, devices, command, and when."""
    found: dict[tuple[tuple[str, str], ...], list[RunSummary]] = {}
    for summary in summaries:
        if summary.sessions:
            found.setdefault(tuple(_session(summary).items()), []).append(summary)
    surroundings = []
    for stated, runs in found.items():
        began = sorted(str(run.sessions[-1].get("started", "")) for run in runs)
        names = ", ".join(run.name for run in runs[:_MOST_NAMES])
        names += f" and {len(runs) - _MOST_NAMES} more" if len(runs) > _MOST_NAMES else ""
        surroundings.append((names, {"started": " to ".join(dict.fromkeys([began[0], began[-1]])), **dict(stated)}))
    return surroundings


def _session(summary: RunSummary) -> dict[str, str]:
    """A run's last session in words."""
    session = summary.sessions[-1]
    versions = session.get("versions")
    apart = ("started", "versions", "recipe_changes")
    stated = {key: value for key, value in session.items() if key not in apart and value not in (None, [], "")}
    return {
        **{key.replace("_", " "): " ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in stated.items()},
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, Mapping) else "",
        "sessions": str(len(summary.sessions)),
    }


def _place(x: float | str) -> str:
    """A place on an axis: a step, a number or a label."""
    if isinstance(x, str):
        return x
    return wording.count(int(x)) if x == int(x) else wording.number(x)

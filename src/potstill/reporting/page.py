"""Numbers as one HTML file: results with intervals and in words, loss curves, recipe, surroundings, warnings.

The file asks the network for nothing (its own content policy forbids it) and escapes every text that came from a run.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potstill import storage
from potstill.reporting import wording
from potstill.reporting.figures import figures, has_plotly
from potstill.reporting.summary import RunSummary, summarise_all
from potstill.reporting.terminal import metric_rows

_TEMPLATE = "page.html.jinja"


def write_report(paths: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Writes one page about the runs in `paths` and returns where it is: `output`, else report.html in the first path.

    Raises RunFolderError for a path that holds no run, StorageError where the page cannot be written.
    """
    summaries = summarise_all(paths)
    target = Path(output) if output is not None else Path(paths[0]) / "report.html"
    storage.make_folder(target.absolute().parent)
    storage.write_text(target.absolute(), render(summaries))
    return target


def render(summaries: Sequence[RunSummary], *, written: datetime | None = None) -> str:
    """The page as text. `written` is the date that it carries, by default now."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("potstill.reporting", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "plus_minus": wording.plus_minus, "interval": wording.interval, "number": wording.number, "count": wording.count,
        "p_value": wording.p_value, "direction": wording.direction, "significance": wording.significance,
        "with_unit": wording.with_unit, "metric_rows": metric_rows,
    }  # fmt: skip
    drawn = figures(summaries)
    for entry in drawn:
        if "picture" in entry:
            entry["picture"] = Markup(entry["picture"])  # plotly's own markup; the names inside were escaped when it was drawn
    return environment.get_template(_TEMPLATE).render(
        title=" · ".join(summary.name for summary in summaries), summaries=summaries, figures=drawn, has_plotly=has_plotly(),
        recipe=recipe_rows(summaries), runs=[summary for summary in summaries if summary.recipe],
        written=(written or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
        results=[(summary, name, record) for summary in summaries for name, record in summary.evaluations.items()],
        warnings=[(summary.name, warning) for summary in summaries for warning in summary.warnings],
        surroundings=[(summary.name, _surroundings(summary)) for summary in summaries if summary.sessions],
    )  # fmt: skip


def recipe_rows(summaries: Sequence[RunSummary]) -> list[tuple[str, list[Any], bool]]:
    """Each recipe key with its value in every run, and whether the runs differ in it; keys that differ come first."""
    runs = [summary.recipe for summary in summaries if summary.recipe]
    keys = sorted({key for recipe in runs for key in recipe})
    rows = [(key, [recipe.get(key) for recipe in runs]) for key in keys]
    marked = [(key, values, any(value != values[0] for value in values)) for key, values in rows]
    return sorted(marked, key=lambda row: not row[2])


def _surroundings(summary: RunSummary) -> Mapping[str, str]:
    """The last session in words."""
    session = summary.sessions[-1]
    versions = session.get("versions", {})
    stated = {key: value for key, value in session.items() if key not in ("versions", "recipe_changes") and value not in (None, [], "")}
    return {
        **{key: " ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in stated.items()},
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "sessions": str(len(summary.sessions)),
    }

"""Curves as pictures for the page: plotly where it is installed, else a table of points. Colours suit a light and a dark page."""

import html
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from potstill.reporting.summary import EVALUATION_PREFIX, Curve, RunSummary, label_of, quantities, quantity_of

MOST_POINTS = 1000
MOST_TABLE_ROWS = 12
# Of middle lightness, so that they can be read on white and on near-black (Okabe and Ito's, safe for colour-blind eyes).
COLOURS = ("#0090d0", "#e07b00", "#00a078", "#cc6aa0", "#b5a000", "#8a7fd0", "#d05540", "#808080")
_GREY, _GRID, _CLEAR = "#8a8a8a", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)"


def has_plotly() -> bool:
    """Whether curves can be drawn; plotly comes with the extra `report`."""
    return importlib.util.find_spec("plotly") is not None


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn: its legend, the position of its run (which chooses the colour), and whether it is of validation."""

    legend: str
    run: int
    is_validation: bool
    curve: Curve


def lines_of(summaries: Sequence[RunSummary], quantity: str) -> list[Line]:
    """Every run's curves of one quantity, training and validation."""
    lines = []
    for run, summary in enumerate(summaries):
        for name, curve in summary.curves.items():
            if quantity_of(name) == quantity and curve.steps:
                is_validation = name.startswith(EVALUATION_PREFIX)
                kind = "validation" if is_validation else "training"
                lines.append(Line(f"{summary.name}, {kind}" if len(summaries) > 1 else kind, run, is_validation, curve))
    return lines


def figures(summaries: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """One dictionary a quantity for the page: its name, how many points were left out, and either `picture` (HTML) or `table`."""
    drawn = []
    with_plotly = has_plotly()
    for quantity in quantities(summaries):
        lines = lines_of(summaries, quantity)
        thin = [replace(line, curve=line.curve.thinned(MOST_POINTS)) for line in lines]
        entry: dict[str, Any] = {
            "quantity": label_of(quantity),
            "left_out": sum(len(line.curve.steps) for line in lines) - sum(len(line.curve.steps) for line in thin),
        }
        if with_plotly:
            entry["picture"] = _picture(thin, label_of(quantity), include_script=not drawn)
        else:
            entry["table"] = _table(lines)
        drawn.append(entry)
    return drawn


def _picture(lines: Sequence[Line], quantity: str, *, include_script: bool) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for line in lines:
        # Training is drawn thin and dotted, validation with its points: what counts is the text that was not trained on.
        style = {"width": 2, "dash": "solid"} if line.is_validation else {"width": 1, "dash": "dot"}
        figure.add_trace(
            go.Scatter(
                x=list(line.curve.steps), y=list(line.curve.values), name=html.escape(line.legend),
                mode="lines+markers" if line.is_validation else "lines", line={"color": COLOURS[line.run % len(COLOURS)], **style},
            )
        )  # fmt: skip
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GREY}
    figure.update_layout(
        template="none", paper_bgcolor=_CLEAR, plot_bgcolor=_CLEAR, font={"color": _GREY, "family": "system-ui, sans-serif"},
        xaxis={"title": {"text": "optimizer step"}, **axis}, yaxis={"title": {"text": html.escape(quantity)}, **axis},
        margin={"l": 70, "r": 20, "t": 20, "b": 50}, height=360, legend={"orientation": "h", "y": 1.12}, hovermode="x unified",
        hoverlabel={"bgcolor": "#333333", "font": {"color": "#ffffff"}}, showlegend=len(lines) > 1,
    )  # fmt: skip
    return figure.to_html(full_html=False, include_plotlyjs=include_script, config={"displayModeBar": False, "responsive": True})


def _table(lines: Sequence[Line]) -> dict[str, Any]:
    """Rows of evenly chosen steps, one column a curve; a curve without a value at a step leaves its cell empty."""
    steps = sorted({step for line in lines for step in line.curve.steps})
    stride = max(1, -(-len(steps) // MOST_TABLE_ROWS))
    chosen = sorted({*steps[::stride], steps[-1]})
    columns = [dict(zip(line.curve.steps, line.curve.values, strict=True)) for line in lines]
    return {"columns": [line.legend for line in lines], "rows": [(step, [column.get(step) for column in columns]) for step in chosen]}

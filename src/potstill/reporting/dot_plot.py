"""Values with their intervals as a picture that needs no program to be looked at: one row a value, a dot and its whiskers, as SVG.

The report's own plots are plotly's and live in its page. plotly writes a picture file by driving a browser that it would have to
download; a Markdown page needs no more than dots and lines, so they are written here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

from potstill.reporting.wording import number

_WIDTH, _ROW, _TOP, _BOTTOM, _CHARACTER = 760, 26, 44, 52, 7.2
_TICKS = 5


@dataclass(frozen=True)
class Dot:
    """One row: a value and the ends of its interval (None where that is not known)."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    is_marked: bool = False


def dot_plot(dots: Sequence[Dot], *, title: str, x_label: str, line_at: float | None = None, line_label: str = "") -> str:
    """The SVG text. Marked rows are filled, the others hollow; `line_at` is a value to compare with, as an upright line."""
    left = 24 + _CHARACTER * max((len(dot.label) for dot in dots), default=0)
    ends = [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None] + ([line_at] if line_at is not None else [])
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    height = _TOP + _ROW * len(dots) + _BOTTOM

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - 24)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="24" font-weight="bold" fill="#222">{escape(title)}</text>',
    ]
    bottom = _TOP + _ROW * len(dots)
    for tick in _ticks(low, high):
        x = across(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{escape(_tick_label(tick, high - low))}</text>')
    if line_at is not None:
        x = across(line_at)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}" stroke="#b00" stroke-dasharray="5 4"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{_TOP - 6}" fill="#b00" font-size="11">{escape(line_label)}</text>')
    for place, dot in enumerate(dots):
        y = _TOP + _ROW * (place + 0.5)
        parts.append(f'<text x="{left - 12:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="#222">{escape(dot.label)}</text>')
        if dot.low is not None and dot.high is not None:
            ends_at = f'x1="{across(dot.low):.1f}" x2="{across(dot.high):.1f}"'
            parts.append(f'<line {ends_at} y1="{y:.1f}" y2="{y:.1f}" stroke="#1f5fa8" stroke-width="2"/>')
        fill = "#1f5fa8" if dot.is_marked else "white"
        parts.append(f'<circle cx="{across(dot.value):.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="#1f5fa8" stroke-width="2">'
                     f"<title>{escape(dot.label)}: {escape(number(dot.value))}</title></circle>")  # fmt: skip
    parts.append(f'<text x="{(left + _WIDTH) / 2:.1f}" y="{bottom + 40}" text-anchor="middle" fill="#222">{escape(x_label)}</text></svg>')
    return "\n".join(parts) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between the two ends."""
    rough = (high - low) / _TICKS
    power = 10 ** floor(log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first = floor(low / step) + 1
    return [place * step for place in range(first, floor(high / step) + 1)]


def _tick_label(value: float, span: float) -> str:
    decimals = max(0, 1 - floor(log10(span / _TICKS)))
    return f"{value:.{decimals}f}"

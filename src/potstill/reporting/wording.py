"""How numbers are written for people: as many digits as their uncertainty allows."""

from collections.abc import Mapping
from math import floor, isfinite, log10
from typing import Any

UNKNOWN = "—"


def number(value: float | None, error: float | None = None) -> str:
    """A number with two digits of its error, or with four significant ones where the error is not known."""
    if value is None or not isfinite(value):
        return UNKNOWN
    if error:
        return f"{value:,.{_decimals(error)}f}"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(3 - floor(log10(abs(value))), 0)}f}" if value else "0"
    return f"{value:.3g}"


def plus_minus(metric: Mapping[str, Any]) -> str:
    """An estimate as "1.234 ± 0.056"; the error is a standard error."""
    value, error = metric["value"], metric["standard_error"]
    if value is None or error is None:
        return number(value)
    return f"{number(value, error)} ± {number(error, error)}"


def interval(low: float | None, high: float | None, error: float | None) -> str:
    """An interval as "1.12 to 1.35"."""
    return UNKNOWN if low is None or high is None else f"{number(low, error)} to {number(high, error)}"


def p_value(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def direction(higher_is_better: bool | None) -> str:
    """An arrow in the good direction; none where neither is good in itself."""
    return {True: "↑", False: "↓", None: ""}[higher_is_better]


def significance(is_significant: bool) -> str:
    return "larger than its uncertainty" if is_significant else "not larger than its uncertainty"


def with_unit(label: str, unit: str) -> str:
    """A metric's name with its unit, unless the name already says it ("bits per byte")."""
    return f"{label} ({unit})" if unit and unit not in label else label


def _decimals(error: float) -> int:
    return min(max(1 - floor(log10(error)), 0), 9)

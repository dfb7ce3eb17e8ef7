"""What a judge's text says: one verdict, or none. Nothing is guessed; a text that can be read in two ways has no verdict."""

import re
from typing import Literal

Choice = Literal["A", "B", "tie"]
_CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_GRADE = re.compile(r"\[\[\s*(\d{1,2}(?:\.\d{1,2})?)\s*\]\]")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_CHOICES: dict[str, Choice] = {"A": "A", "B": "B", "C": "tie"}
LOWEST, HIGHEST = 1.0, 10.0


def read_choice(text: str) -> Choice | None:
    """A, B or a tie ([[C]]); None where there is no verdict, or where there are several and none of them is the whole last line."""
    said = _said(_CHOICE, text)
    return None if said is None else _CHOICES[said]


def read_grade(text: str) -> float | None:
    """A grade from 1 to 10, by the same rule."""
    said = _said(_GRADE, text)
    return float(said) if said is not None and LOWEST <= float(said) <= HIGHEST else None


def _said(pattern: re.Pattern[str], text: str) -> str | None:
    text = _THOUGHT.sub("", text)
    found = set(pattern.findall(text))
    if len(found) == 1:
        return found.pop()
    lines = [line.strip(" \t*_`#>.") for line in text.splitlines() if line.strip(" \t*_`#>.")]
    alone = pattern.fullmatch(lines[-1]) if found and lines else None
    return alone[1] if alone is not None else None

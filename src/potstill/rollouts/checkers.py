"""Programs that say whether a written answer is right: it equals the reference, holds it, comes to its number, letter or
formula; or yours does.

They compare text with text. Where the answers come from and what becomes of a wrong one is not their affair.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from potstill.errors import ConfigError
from potstill.rollouts.named_function import NamedFunction, load_function

Checker = Callable[[str, str, Mapping[str, Any]], bool]
"""(answer, reference, row) -> whether the answer is right. The reference is the row's own answer, the row all its columns."""

_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d+)?(?![\w])")
_FRACTION = re.compile(r"\\d?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}|(?<![\w./])([-+]?\d+)\s*/\s*(\d+)(?![\w./])")
# 10,00 and 1,2: a decimal comma or a list, and nobody can say which.
_NO_NUMBER = re.compile(r"(?<![\d.,])(?!\d{1,3}(?:,\d{3})+(?![\d,]))\d+(?:,\d+)+")
_BOXED = "\\boxed"
_MARKS = re.compile(r"####|final answer(?:\s+is)?\s*:?|answer\s+is\s*:?|answer\s*:", re.IGNORECASE)
_LETTER = re.compile(r"\(\s*([A-Za-z])\s*\)|(?<![A-Za-z0-9'’])([A-Z])(?![A-Za-z0-9'’])|^\s*([a-z])\s*[).:]?\s*$")
# A longer text is no answer to be parsed, which takes worse than linear time; of one without a mark its end is read.
_MOST_PARSED = 4000
# Two numbers are the same within this share of the larger: what printing with six digits loses.
_TOLERANCE = 1e-6


def final_part(text: str) -> str:
    """What a text comes to: the content of its last \\boxed{...}, else the line after its last "####", "Answer:" or "answer is", else all.

    A full stop at the end is left out, and so are the dollar signs around a formula or at a price.
    """
    boxed = _last_boxed(text)
    if boxed is None:
        marks = list(_MARKS.finditer(text))
        rest = text[marks[-1].end() :].strip() if marks else ""
        boxed = rest.splitlines()[0] if rest else text
    part = boxed.strip().removesuffix(".").strip()
    inside = part.strip("$")
    if "$" not in inside and (part.startswith("$") or part.count("$") == 1):
        part = inside
    return part.strip().removesuffix(".").strip()


def _last_boxed(text: str) -> str | None:
    place = text.rfind(_BOXED)
    if place < 0:
        return None
    rest = text[place + len(_BOXED) :].lstrip()
    if not rest.startswith("{"):
        return None
    depth = 0
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:at]
    return None


def normalised(text: str) -> str:
    """Compatibility forms, case and runs of white space made alike."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact(answer: str, reference: str, row: Mapping[str, Any]) -> bool:
    """Both come to the same text."""
    return normalised(final_part(answer)) == normalised(final_part(reference))


def contains(answer: str, reference: str, row: Mapping[str, Any]) -> bool:
    """What the reference comes to stands in the answer, as whole words."""
    wanted = normalised(final_part(reference))
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalised(answer)) is not None


def numeric(answer: str, reference: str, row: Mapping[str, Any]) -> bool:
    """Both come to the same number, within a millionth; 1,234.50 is 1234.5, 3/4 and \\frac{3}{4} are 0.75, and 50 % is 50."""
    found, wanted = last_number(final_part(answer)), last_number(final_part(reference))
    return found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=_TOLERANCE, abs_tol=1e-12)


def last_number(text: str) -> float | None:
    """The last number of a text, or None."""
    found: list[tuple[int, float]] = []
    for match in _FRACTION.finditer(text):
        above, below = (float(part) for part in match.groups() if part is not None)
        if below:
            found.append((match.end(), above / below))
    covered = [match.span() for pattern in (_FRACTION, _NO_NUMBER) for match in pattern.finditer(text)]
    for match in _NUMBER.finditer(text):
        if match[0] and any(character.isdigit() for character in match[0]) and not any(a <= match.start() < b for a, b in covered):
            found.append((match.end(), float(match[0].replace(",", "").replace("−", "-"))))
    return max(found, default=(0, None))[1]


def choice(answer: str, reference: str, row: Mapping[str, Any]) -> bool:
    """Both come to the same letter of a choice: (B), "B. Paris", "the answer is B"."""
    found, wanted = chosen_letter(final_part(answer)), chosen_letter(final_part(reference))
    return found is not None and found == wanted


def chosen_letter(text: str) -> str | None:
    """The letter that a text names, in upper case: the first at its beginning ("B. Paris"), else the last one; None where it names none.

    "A" and "I" inside a sentence are words: they count only in brackets, before a mark at the beginning, and at the end.
    """
    opening = re.match(r"\s*\(?\s*([A-Za-z])\s*(?:[).:,]|$)", text)
    if opening:
        return opening[1].upper()
    end = len(text.rstrip(" .!"))
    letters = [match for match in _LETTER.finditer(text) if match[2] not in ("A", "I") or match.end() == end]
    return next(group for group in letters[-1].groups() if group).upper() if letters else None


def mathematical(answer: str, reference: str, row: Mapping[str, Any]) -> bool:
    """Both come to the same mathematical object, as math-verify reads LaTeX and expressions: 1/2 is \\frac{1}{2} and 0.5, (1, 2) an
    interval. What cannot be read, or takes longer than seconds, is right only if it is the reference to the letter."""
    from potstill.rollouts.math_checker import are_equal

    found, wanted = final_part(answer), final_part(reference)
    if not found or not wanted:
        return False
    return found == wanted or are_equal(found[-_MOST_PARSED:], wanted[-_MOST_PARSED:])


CHECKERS: dict[str, Checker] = {"exact": exact, "contains": contains, "numeric": numeric, "choice": choice, "math": mathematical}


def make_checker(name: str, key: str) -> Checker:
    """The checker that a recipe names: one of CHECKERS, or a function of the user's. Raises ConfigError naming the `key`."""
    if name == "math":
        from potstill.rollouts.math_checker import require_math_verify

        require_math_verify(key)
    if name in CHECKERS:
        return CHECKERS[name]
    if ":" not in name:
        raise ConfigError(f"{key}: {name}: no checker has this name; there is {', '.join(CHECKERS)}, or FILE.py:NAME of your own")
    return _guarded(load_function(name, key=key, arguments=("answer", "reference", "row")), key)


def fingerprint(checker: Checker) -> str:
    """What tells a checker from another of its name: a digest of the file that a function of the user's stands in, else nothing."""
    return getattr(checker, "fingerprint", "")


def _guarded(function: NamedFunction, key: str) -> Checker:
    """What a function of the user's says, if it is a truth value. A mistake in it ends the filtering, and drops no answer silently."""
    def check(answer: str, reference: str, row: Mapping[str, Any]) -> bool:
        where = f"{key}: {function.spec} of the answer {answer[:80]!r}"
        try:
            said = function(answer, reference, dict(row))
        except Exception as error:
            raise ConfigError(f"{where} failed: {type(error).__name__}: {error}; mend it, and give the same command again") from error
        if type(said).__name__ not in ("bool", "bool_"):
            raise ConfigError(f"{where} gave {said!r:.80}; it must return True or False")
        return bool(said)

    check.fingerprint = function.fingerprint  # type: ignore[attr-defined]
    return check

"""Preferences that were judged elsewhere: AlpacaEval's annotations.json, read as matches of the same two contestants."""

from collections.abc import Sequence
from numbers import Real

from potstill.data.config import MixtureItem
from potstill.data.lines import Rejects, Row
from potstill.data.sources import read_source
from potstill.errors import DataError
from potstill.evaluation.judging.answers import Answers
from potstill.evaluation.judging.matches import Match
from potstill.evaluation.judging.prompts import JudgedPrompt

_COLUMNS = ("output_1", "output_2", "preference")


def read_annotations(path: str, prompts: Sequence[JudgedPrompt], first: Answers, second: Answers) -> tuple[list[Match], str]:
    """One match a prompt, found by the two answers' own texts, and the annotator's name. Each was judged in one order alone.

    A preference is 1 where output_1 is better, 2 where output_2 is, between them where the annotator was not sure, 0 for a draw, and
    null without a verdict. Raises DataError where the file holds none of these pairs, or something else.
    """
    rows = read_source(MixtureItem(path=path), Rejects())
    shares: dict[tuple[str, str], float | None] = {}
    for row in rows:
        one, other, preference = _read(row)
        shares.setdefault((one, other), None if preference is None else 2 - preference)
        shares.setdefault((other, one), None if preference is None else preference - 1)
    found = []
    for prompt in prompts:
        texts = first.texts[prompt.item][0], second.texts[prompt.item][0]
        share = 0.5 if texts[0] == texts[1] else shares.get(texts)
        found.append(Match(prompt.item, 0, prompt.category, (share, share), (len(texts[0]), len(texts[1])), texts[0] != texts[1]))
    if not any(match.asked and match.counted for match in found):
        raise DataError(f"{path}: holds no preference between the answers of {first.name} and {second.name}; is it about these two files?")
    names = {str(row.values.get("annotator") or "") for row in rows}
    return found, (names.pop() if len(names) == 1 else "") or "recorded preferences"


def _read(row: Row) -> tuple[str, str, float | None]:
    one, other, preference = (row.values.get(column) for column in _COLUMNS)
    if not isinstance(one, str) or not isinstance(other, str):
        raise DataError(f"{row.origin}: no annotation of AlpacaEval: it needs the columns {', '.join(_COLUMNS)}")
    if preference is None:
        return one, other, None
    value = float(preference) if isinstance(preference, Real) and not isinstance(preference, bool) else -1.0
    if value != 0 and not 1 <= value <= 2:
        raise DataError(f"{row.origin}: preference is {preference!r}; it is a number from 1 to 2, 0 for a draw, or null")
    return one, other, value or 1.5

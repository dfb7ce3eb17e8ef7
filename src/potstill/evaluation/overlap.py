"""How much of a reference an answer has: ROUGE-L. Pure functions of texts.

Higher is closer to the reference, and not better: a right answer in other words has a low one.
"""

import re
from collections.abc import Hashable, Sequence

_ALPHANUMERIC = re.compile(r"[^\W_]+")


def longest_common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Its length, by whole rows of the table as bits of one number (Hyyrö 2004): a bit that turns 0 is a place that is matched."""
    places: dict[Hashable, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    every = (1 << len(first)) - 1
    open_places = every
    for token in second:
        matched = open_places & places.get(token, 0)
        open_places = ((open_places + matched) | (open_places - matched)) & every
    return len(first) - open_places.bit_count()


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin 2004) against the reference that it agrees with most; 0 where either side has no word.

    Words are lower-cased runs of letters and digits of any script; on ASCII text it is the rouge-score package's rougeL without stemming,
    which knows no other letters.
    """
    return max((_f1(_words(answer), _words(reference)) for reference in references), default=0.0)


def _words(text: str) -> list[str]:
    return _ALPHANUMERIC.findall(text.lower())


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return 0.0
    return 2 * longest_common_subsequence(reference, answer) / (len(answer) + len(reference))

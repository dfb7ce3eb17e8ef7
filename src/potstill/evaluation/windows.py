"""Text that is longer than a model's context, read in overlapping windows, so that evaluation cuts nothing off. Knows tokens alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from potstill.batch import Example


@dataclass(frozen=True)
class Window:
    """A part of an example, with its index and origin. `before`: how many targets of the answer that its first one goes on with were
    predicted in earlier windows."""

    example: Example
    before: int = 0


def windows(examples: Iterable[Example], max_tokens: int) -> Iterator[Window]:
    """Each example as windows of at most `max_tokens` tokens, every target in exactly one of them.

    A window overlaps the one before by half, and its targets are those that are new: they see at least `max_tokens // 2` tokens of
    context. All windows keep their example's index, so they count as one document. Windows without a target are left out.
    """
    if max_tokens < 2:
        raise ValueError(f"a window of {max_tokens} tokens predicts nothing; it needs at least 2")
    overlap = max_tokens // 2
    for example in examples:
        length = len(example.tokens)
        if length <= max_tokens:
            yield Window(example)
            continue
        first_new = 0
        for start in range(0, length - overlap, max_tokens - overlap):
            end = min(start + max_tokens, length)
            is_target = [False] * (first_new - start) + example.is_target[first_new:end]
            if any(is_target[1:]):
                before = _run_before(example.is_target, first_new) if example.is_target[first_new] else 0
                yield Window(Example(example.tokens[start:end], is_target, example.index, example.origin), before)
            first_new = end


def _run_before(is_target: list[bool], place: int) -> int:
    """Targets that stand without a gap directly before `place`; the very first token has no predictor and is none."""
    first = place
    while first > 1 and is_target[first - 1]:
        first -= 1
    return place - first if place > 0 else 0

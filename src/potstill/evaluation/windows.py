"""Text that is longer than a model's context, read in overlapping windows, so that evaluation cuts nothing off. Knows tokens alone."""

from collections.abc import Iterable, Iterator

from potstill.batch import Example


def windows(examples: Iterable[Example], max_tokens: int) -> Iterator[Example]:
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
            yield example
            continue
        first_new = 0
        for start in range(0, length - overlap, max_tokens - overlap):
            end = min(start + max_tokens, length)
            is_target = [False] * (first_new - start) + example.is_target[first_new:end]
            if any(is_target[1:]):
                yield Example(example.tokens[start:end], is_target, example.index, example.origin)
            first_new = end

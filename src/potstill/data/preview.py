"""One prepared example for human eyes: its text cut where its target marks change. Knows tokens; prints nothing."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from potstill.data.examples import ExampleSet
from potstill.data.lines import printable


@dataclass(frozen=True)
class Preview:
    """One rendered example for the eyes: pieces of text with their mark, in order. Control characters are escaped."""

    origin: str
    pieces: list[tuple[str, bool]]
    num_tokens: int
    num_targets: int


def preview(examples: ExampleSet, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> Preview:
    """The example at `index`, its runs of target and other tokens decoded apart."""
    example = examples[index]
    pieces: list[tuple[str, bool]] = []
    start = 0
    for position in range(1, len(example.tokens) + 1):
        if position == len(example.tokens) or example.is_target[position] != example.is_target[start]:
            pieces.append((printable(str(tokenizer.decode(example.tokens[start:position]))), example.is_target[start]))
            start = position
    return Preview(example.origin, pieces, len(example.tokens), example.num_targets)

"""Rows of examples become one Batch, padded to the right. Knows tensors; knows no tokenizer beyond the id that pads."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from potstill.batch import Batch, Example


def collate(
    rows: Sequence[Sequence[Example]], *, pad_token: int, multiple_of: int | None = 8, widest: int | None = None,
    widest_view: int | None = None,
) -> Batch:
    """One sequence a row, its examples one after the other; as wide as the longest, rounded up to a multiple.

    The rounding stops at `widest`: a model whose positions are learned has none beyond its context, not even for padding.
    `widest_view` is the same for what the teacher reads instead.

    Positions restart at every example, and padding belongs to no document, so the id that pads may be the EOS: nothing is
    masked by id.
    """
    longest = max((sum(len(example.tokens) for example in row) for row in rows), default=0)
    width = -(-longest // multiple_of) * multiple_of if multiple_of else longest
    if widest is not None:
        width = max(longest, min(width, widest))
    shape = (len(rows), width)
    tokens = torch.full(shape, pad_token, dtype=torch.long)
    # Positions go on into the padding: a restart there would look like one more document to a model.
    positions = torch.arange(width).repeat(len(rows), 1)
    documents = torch.full(shape, -1, dtype=torch.long)
    is_target = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for document, example in enumerate(row):
            end = start + len(example.tokens)
            tokens[number, start:end] = torch.tensor(example.tokens, dtype=torch.long)
            positions[number, start:] = torch.arange(width - start)
            documents[number, start:end] = document
            is_target[number, start:end] = torch.tensor(example.is_target, dtype=torch.bool)
            start = end
    inside = [example for row in rows for example in row]
    routes = tuple(example.route for example in inside) if any(example.route for example in inside) else ()
    batch = Batch(tokens, positions, documents, is_target, tuple(example.index for example in inside), routes)
    known = {name: _by_token(rows, shape, name) for name in ("log_probs", "rewards")}
    view = None
    if any(example.teacher_prompt is not None for example in inside):
        read = [[example.for_teacher() for example in row] for row in rows]
        view = collate(read, pad_token=pad_token, multiple_of=multiple_of, widest=widest_view)
        if view.is_packed:
            # Longer prompts make packed rows wider than any context: beside them, padding takes no position that no document has.
            longest = max(len(example.tokens) for row in read for example in row)
            view = replace(view, positions=view.positions.clamp_max(longest - 1))
        if view.num_targets != batch.num_targets:
            raise ValueError("the teacher's view of a batch has other targets than the student's")
    return replace(batch, **known, teacher_view=view) if view is not None or any(v is not None for v in known.values()) else batch


def _by_token(rows: Sequence[Sequence[Example]], shape: tuple[int, int], name: str) -> Tensor | None:
    """Log-probabilities or rewards laid out as the tokens are; None where no example has any."""
    own = "reward" if name == "rewards" else name
    if all(getattr(example, own) is None for row in rows for example in row):
        return None
    values = torch.zeros(shape)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.tokens)
            value = getattr(example, own)
            if value is not None:
                values[number, start:end] = torch.tensor(value)
            start = end
    return values


def empty_batch(*, pad_token: int, sequences: int = 1, width: int = 8) -> Batch:
    """Padding alone, without a target: what a rank computes on when the others still have rows."""
    shape = (sequences, width)
    return Batch(
        torch.full(shape, pad_token, dtype=torch.long), torch.arange(width).repeat(sequences, 1), torch.full(shape, -1, dtype=torch.long),
        torch.zeros(shape, dtype=torch.bool),
    )


def padding_id(pad_token_id: int | None, eos_token_id: int | None) -> int:
    """The id that fills a row; the EOS or 0 serve as well as any, since padding belongs to no document."""
    if pad_token_id is not None:
        return pad_token_id
    return eos_token_id if eos_token_id is not None else 0

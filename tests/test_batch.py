"""Laws of Batch: the one shift pairs each target with the position before it, within one document."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.batch import Batch, Example, sequence_key
from potstill.data.collation import collate

DOCUMENTS = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=6), min_size=0, max_size=4
)  # target marks of each document of a row


def _batch(rows: list[list[list[bool]]]) -> Batch:
    """A batch whose token at (row, column) is 100 * row + column, so that a token says where it stood."""
    width = max([sum(map(len, row)) for row in rows] + [1]) + 2
    tokens = torch.stack([100 * number + torch.arange(width) for number in range(len(rows))])
    positions, documents = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    is_target = torch.ones_like(tokens, dtype=torch.bool)  # padding too: what lies there must never matter
    for number, row in enumerate(rows):
        start = 0
        for document, marks in enumerate(row):
            end = start + len(marks)
            positions[number, start:end] = torch.arange(len(marks))
            documents[number, start:end] = document
            is_target[number, start:end] = torch.tensor(marks)
            start = end
    return Batch(tokens, positions, documents, is_target)


@settings(max_examples=300, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1, max_size=4))
def test_target_rows(rows):
    batch = _batch(rows)
    flat, targets = batch.target_rows()
    width = batch.tokens.shape[1]
    expected = []
    for number, row in enumerate(rows):
        start = 0
        for document, marks in enumerate(row):
            for place, marked in enumerate(marks):
                if marked and place > 0:  # the first token of a document is never a target: its predictor is another's
                    expected.append((number * width + start + place - 1, 100 * number + start + place, (number, document)))
            start += len(marks)
    assert flat.tolist() == [one for one, _, _ in expected]
    assert targets.tolist() == [one for _, one, _ in expected]
    owners = [owner for _, _, owner in expected]
    responses = batch.target_responses().tolist()
    assert len(set(zip(responses, owners, strict=True))) == len(set(responses)) == len(set(owners))  # one number a document
    assert batch.num_responses == len(set(owners))
    assert batch.num_targets == len(expected)
    for row, target in zip(flat.tolist(), targets.tolist(), strict=True):
        assert batch.documents.flatten()[row] == batch.documents.flatten()[row + 1] >= 0
        assert batch.tokens.flatten()[row] + 1 == target


def test_select_takes_the_rows_that_predict():
    batch = _batch([[[False, True, True], [True, True]], [[False, False, True]]])
    hidden = torch.arange(batch.tokens.numel() * 2, dtype=torch.float32).reshape(*batch.tokens.shape, 2)
    hidden[batch.documents < 0] = torch.nan  # no work and no NaN from positions outside
    assert torch.equal(batch.select(hidden), hidden.reshape(-1, 2)[batch.target_rows()[0]])
    assert batch.select(hidden).isfinite().all()


def test_examples_count_what_a_batch_counts():
    assert Example([1, 2, 3], [True, False, True], 0).num_targets == 1
    assert Example([1], [True], 0).num_targets == 0
    with pytest.raises(ValueError, match="here:3: 2 tokens but 1 target marks"):
        Example([1, 2], [True], 0, "here:3")


def test_packed_says_whether_a_row_holds_several_documents():
    assert not _batch([[[True, True]], [[True]]]).is_packed
    assert _batch([[[True, True]], [[True], [True]]]).is_packed
    assert not _batch([[]]).is_packed
    moved = _batch([[[True, True]]]).to("cpu")
    assert moved.num_targets == 1
    assert moved.num_tokens == 2


def test_the_documents_of_a_batch_are_its_examples_with_their_own_target_rows_and_keys():
    examples = [
        Example([5, 6, 7, 8], [True, False, True, True], 0, route="a"), Example([9, 9], [False, True], 1, route="b"),
        Example([3, 4, 5], [False, False, True], 2, route="a"),
    ]  # fmt: skip
    batch = collate([[examples[0], examples[1]], [examples[2]]], pad_token=0)
    rows, targets = batch.target_rows()
    documents = batch.sequences()
    assert [d.tokens.tolist() for d in documents] == [e.tokens for e in examples]
    assert [d.route for d in documents] == ["a", "b", "a"]
    assert [targets[d.rows].tolist() for d in documents] == [[7, 8], [9], [5]]
    for document, example in zip(documents, examples, strict=True):
        assert document.key == sequence_key(np.array(example.tokens), np.array(example.is_target))
    assert len({d.key for d in documents}) == 3
    assert documents[-1].rows.stop == len(rows)

"""A batch holds exactly its examples: positions restart, padding belongs to nobody, and targets are the examples' own."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.batch import Example
from potstill.data.collation import collate, empty_batch, padding_id

EXAMPLES = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=10).map(
    lambda pairs: ([token for token, _ in pairs], [marked for _, marked in pairs])
)
ROWS = st.lists(st.lists(EXAMPLES, min_size=1, max_size=4), min_size=1, max_size=4)


def _numbered(rows):
    index = iter(range(1000))
    return [[Example(tokens, marks, next(index)) for tokens, marks in row] for row in rows]


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from([None, 1, 8]), st.integers(0, 9))
def test_laws(rows, multiple_of, pad):
    examples = _numbered(rows)
    batch = collate(examples, pad_token=pad, multiple_of=multiple_of)
    width = batch.tokens.shape[1]
    assert width % (multiple_of or 1) == 0
    assert width - max(sum(len(e.tokens) for e in row) for row in examples) < (multiple_of or 1)
    assert batch.examples == tuple(e.index for row in examples for e in row)
    for number, row in enumerate(examples):
        start = 0
        for document, example in enumerate(row):
            part = slice(start, start + len(example.tokens))
            assert batch.tokens[number, part].tolist() == example.tokens
            assert batch.is_target[number, part].tolist() == example.is_target
            assert batch.positions[number, part].tolist() == list(range(len(example.tokens)))
            assert (batch.documents[number, part] == document).all()
            start = part.stop
        assert (batch.documents[number, start:] == -1).all()
        assert (batch.tokens[number, start:] == pad).all()
        assert not batch.is_target[number, start:].any()
    assert batch.num_targets == sum(e.num_targets for row in examples for e in row)
    assert batch.num_tokens == sum(len(e.tokens) for row in examples for e in row)
    expected = [
        token for row in examples for e in row for token, marked in list(zip(e.tokens, e.is_target, strict=True))[1:] if marked
    ]
    assert batch.target_rows()[1].tolist() == expected


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 60))
def test_padding_ends_where_the_context_does(rows, widest):
    examples = _numbered(rows)
    longest = max(sum(len(e.tokens) for e in row) for row in examples)
    batch, unbounded = collate(examples, pad_token=0, widest=max(widest, longest)), collate(examples, pad_token=0)
    assert batch.tokens.shape[1] == min(unbounded.tokens.shape[1], max(widest, longest))
    assert batch.target_rows()[1].tolist() == unbounded.target_rows()[1].tolist()
    assert int(batch.positions.max()) < batch.tokens.shape[1]


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_packed_and_apart_have_the_same_targets(rows):
    examples = _numbered(rows)
    together = collate(examples, pad_token=0)
    apart = collate([[e] for row in examples for e in row], pad_token=7, multiple_of=None)
    assert together.target_rows()[1].tolist() == apart.target_rows()[1].tolist()
    assert together.num_responses == apart.num_responses
    assert (
        together.target_responses().unique_consecutive(return_counts=True)[1].tolist()
        == apart.target_responses().unique_consecutive(return_counts=True)[1].tolist()
    )


def test_padding_continues_the_last_document_so_that_a_single_one_is_no_packing():
    batch = collate([[Example([5, 6, 7], [False, True, True], 0)], [Example([5], [False], 1)]], pad_token=0)
    assert batch.positions.tolist() == [list(range(8))] * 2
    assert not batch.is_packed


def test_an_empty_batch_has_no_targets_and_can_be_computed_with():
    for batch in (
        empty_batch(pad_token=3),
        empty_batch(pad_token=3, sequences=2, width=16),
        collate([[]], pad_token=0, multiple_of=8),
    ):
        assert (batch.num_targets, batch.num_responses, batch.num_tokens) == (0, 0, 0)
        assert batch.select(torch.ones(*batch.tokens.shape, 4)).shape == (0, 4)


def test_what_pads():
    assert [padding_id(*ids) for ids in [(5, 7), (0, 7), (None, 7), (None, None)]] == [5, 0, 7, 0]

"""The unit of work: every sequence once, within the budget; and an answer that does not know its neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.capture.units import Scorer, Share, sequences_of, units
from potstill.data.examples import ExampleSet, ExampleSetBuilder
from potstill.errors import DataError, TeacherError
from potstill.head import Head
from potstill.signals import FullOutcomes, TeacherSignal
from potstill.teachers.local import LocalTeacher
from small_captures import VOCABULARY, example_set, keys_of, make_format, make_teacher, tensors


@given(st.lists(st.integers(1, 60), max_size=50), st.integers(1, 300), st.booleans())
def test_units_hold_every_sequence_once_within_the_budget(lengths, budget, packed):
    sizes = np.array(lengths, dtype=np.int64)
    found = units(sizes, budget, packed_tokens=64 if packed else None)
    assert sorted(number for unit in found for number in unit.numbers) == list(range(len(lengths)))
    widths = [max(sum(lengths[n] for n in row) for row in unit.rows) for unit in found]
    assert widths == sorted(widths, reverse=True), "the longest first"
    for unit, width in zip(found, widths, strict=True):
        assert len(unit.rows) == 1 or len(unit.rows) * (-(-width // 8) * 8) <= budget


@pytest.mark.parametrize("of", [1, 2, 3])
def test_shares_are_every_sequence_once_and_split_again(of):
    sets = [example_set(40), example_set(30, seed=1)]
    shares = [Share(index, of) for index in range(of)]
    found = [sequences_of(sets, share).keys for share in shares]
    assert sorted(key for keys in found for key in keys) == sorted(keys_of(*sets))
    for share, keys in zip(shares, found, strict=True):
        parts = [sequences_of(sets, share.split(rank, 2)).keys for rank in range(2)]
        assert all(parts)
        assert sorted(key for part in parts for key in part) == sorted(keys)
    assert len({share.split(rank, 2).writer for share in shares for rank in range(2)}) == 2 * of


def test_equal_sequences_are_asked_once():
    examples = example_set(20)
    twice = [examples, examples.select([3, 3, 5])]
    assert sequences_of(twice, Share()).keys == keys_of(examples)


def routed_set(*rows: tuple[list[int], str]) -> ExampleSet:
    builder = ExampleSetBuilder(np.ones(VOCABULARY, np.int32))
    for number, (tokens, route) in enumerate(rows):
        builder.add(tokens, [(1, len(tokens))], "rows.jsonl", number, route)
    return builder.build()


def test_one_text_for_two_teachers_is_refused():
    """A record is found by its tokens: the first one's teacher would answer for both."""
    first, second = routed_set(([5, 6, 7], "a"), ([5, 6, 8], "b")), routed_set(([5, 6, 8], "b"), ([5, 6, 7], "b"))
    assert len(sequences_of([first, first], Share())) == 2
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row is for 'b', and rows.jsonl:0 with the same tokens for 'a'"):
        sequences_of([first, second], Share())


class Overflowing(LocalTeacher):
    """The third target row of what it says has overflowed, as in float16."""

    def score(self, batch, needs):
        outcomes = super().score(batch, needs).outcomes
        assert isinstance(outcomes, FullOutcomes)
        outcomes.hidden[2, 1] = self.wrong
        return TeacherSignal(outcomes)


@pytest.mark.parametrize("wrong", [torch.nan, -torch.inf])
@pytest.mark.parametrize("format", [
    *(make_format(outcomes) for outcomes in ("top_k", "sampled", "top_k_sampled", "hidden", "projected")), make_format("top_k", exact=True),
    make_format("sampled", proposal_exponent=0.8),
])  # fmt: skip
def test_an_answer_that_is_no_number_is_never_recorded(format, wrong):
    teacher = Overflowing(make_teacher().causal_lm)
    teacher.wrong = wrong  # type: ignore[attr-defined]
    head = Head(torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(1)))
    ask = Scorer(teacher, format, seed=5, pad_token=0, widest=80, project_on=head)
    examples = routed_set(([5, 6, 7], ""), ([5, 6, 8, 9], ""))
    with pytest.raises(TeacherError, match=r"its answer to rows.jsonl:1 is not a number"):
        ask([[examples[0]], [examples[1]]])


def scorer(format, **changes) -> Scorer:
    head = Head(torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(1)))
    return Scorer(make_teacher(), format, seed=5, pad_token=0, widest=80, project_on=head, **changes)


@pytest.mark.parametrize("outcomes", ["top_k", "sampled", "top_k_sampled", "hidden", "projected"])
def test_an_answer_does_not_know_its_neighbours(outcomes):
    """Alone, in a batch, packed, in another order: the same record, draw by draw."""
    examples, ask = example_set(9, longest=19), scorer(make_format(outcomes))
    alone = {answer.key: answer for n in range(9) for answer in ask([[examples[n]]])}
    assert set(alone) == set(keys_of(examples))
    layouts = [[[examples[n]] for n in range(9)], [[examples[n] for n in (8, 2, 5, 1)], [examples[n] for n in (0, 7)]]]
    for layout in layouts:
        for answer in ask(layout):
            expected = alone[answer.key]
            assert answer.rows == expected.rows == len(answer.record)
            for (name, one), other in zip(tensors(answer.record).items(), tensors(expected.record).values(), strict=True):
                if one.dtype.is_floating_point:
                    other = other[..., : one.shape[-1]] if one.ndim == 2 else other
                    assert torch.allclose(one[..., : other.shape[-1]] if one.ndim == 2 else one, other, atol=1e-5), name
                else:
                    width = max(one.shape[1], other.shape[1])
                    padded = [torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids in (one, other)]
                    assert torch.equal(*padded), name


def test_another_seed_draws_otherwise():
    examples, format = example_set(3), make_format("sampled")
    rows = [[examples[n]] for n in range(3)]
    left, right = scorer(format)(rows), Scorer(make_teacher(), format, seed=6, pad_token=0, widest=80)(rows)
    assert all(int(one.record.ids.sum()) != int(other.record.ids.sum()) for one, other in zip(left, right, strict=True) if one.rows)

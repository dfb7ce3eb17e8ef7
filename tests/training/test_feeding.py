"""Batches of a data set fit every model that its rows fit: padding never needs a position that no row needs."""

import pytest
import torch

from potstill.batch import Example
from potstill.models.causal_lm import CausalLM
from potstill.training.feeding import Rows


@pytest.mark.parametrize("max_tokens", [None, 21])
def test_a_context_that_is_no_multiple_of_8_is_not_left(max_tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    examples = [Example([3] * length, [True] * length, index) for index, length in enumerate([21, 4, 9, 13])]
    rows = Rows(examples, pad_token=0, seed=0, max_tokens=max_tokens)
    model = CausalLM(GPT2LMHeadModel(GPT2Config(n_positions=21, n_embd=8, n_layer=1, n_head=2, vocab_size=9)).eval(), 9)
    for chosen in ([], [0], range(len(rows))):
        batch = rows.batch(chosen)
        with torch.no_grad():
            assert torch.isfinite(model.rows(batch)).all()
    assert batch.num_targets == sum(length - 1 for length in (21, 4, 9, 13))


def test_a_batch_without_rows_is_no_wider_than_the_rows():
    rows = Rows([Example([3, 4, 5], [True] * 3, 0)], pad_token=0, seed=0, max_tokens=None)
    assert rows.batch([]).tokens.shape == (1, 3)


def test_what_the_teacher_reads_instead_does_not_leave_its_context_either():
    """Rows as they stand, and longer ones that were written behind the same prompts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    marks = [False, True, True, True]
    examples = [Example([3, 4, 5, 6], marks, 0, teacher_prompt=[7] * 14, prompt_length=1), Example([3, 4, 5, 6], marks, 1)]
    written = [Example([3, 4, 5, 6, 7, 8], [False, *[True] * 5], 0, teacher_prompt=[7] * 14, prompt_length=1)]
    rows = Rows(examples, pad_token=0, seed=0, max_tokens=None)
    teacher = CausalLM(GPT2LMHeadModel(GPT2Config(n_positions=19, n_embd=8, n_layer=1, n_head=2, vocab_size=9)).eval(), 9)
    for batch, width in ((rows.batch([0, 1]), 17), (rows.collated(written), 19)):
        view = batch.teacher_view
        assert view is not None
        assert view.tokens.shape[1] == width
        with torch.no_grad():
            assert len(teacher.rows(view)) == batch.num_targets


def test_packed_rows_that_the_teacher_reads_behind_longer_prompts_do_not_leave_its_context():
    """Three documents in one row, and beside them a single one with much padding: each is read as it would be alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_positions=11, n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    teacher = CausalLM(GPT2LMHeadModel(config).eval(), 9)
    told = [Example([3, 4, 5, 6], [False, True, True, True], index, teacher_prompt=[7] * 8, prompt_length=1) for index in range(4)]
    rows = Rows(told, pad_token=0, seed=0, max_tokens=12)
    assert len(rows) == 2
    view = rows.batch([0, 1]).teacher_view
    assert view is not None
    alone = Rows(told[:1], pad_token=0, seed=0, max_tokens=None).batch([0]).teacher_view
    assert alone is not None
    with torch.no_grad():
        found, expected = teacher.rows(view), teacher.rows(alone)
    torch.testing.assert_close(found, expected.repeat(4, 1))

"""Needs and answers: a teacher serves what it offers, and an answer is cut by rows without mixing them."""

import pytest
import torch

from potstill.head import Head
from potstill.signals import FullOutcomes, Needs, SampledOutcomes, TopKOutcomes

KINDS = ["nothing", "sampled", "top_k", "full"]


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_needs_unite_to_the_larger(first, second):
    united = Needs(first) | Needs(second)
    assert united == Needs(second) | Needs(first)
    assert united.outcomes == KINDS[max(KINDS.index(first), KINDS.index(second))]


def test_full_serves_everything_and_other_answers_serve_only_their_own_kind():
    served = {(need, offer) for need in KINDS for offer in KINDS if Needs(need).within(Needs(offer))}
    assert served == {("nothing", offer) for offer in KINDS} | {(need, "full") for need in KINDS} | {(kind, kind) for kind in KINDS}


def test_rows_cuts_every_field_alike():
    rows = torch.arange(12.0).reshape(6, 2)
    ids = torch.arange(12).reshape(6, 2)
    for signal in (FullOutcomes(rows, Head(torch.eye(2))), TopKOutcomes(ids, rows, rows[:, 0]), SampledOutcomes(ids, rows)):
        part = signal.rows(slice(2, 5))
        assert len(signal) == 6
        assert len(part) == 3
        for name in ("hidden", "ids", "log_probs", "log_tail", "weights"):
            if hasattr(part, name):
                assert torch.equal(getattr(part, name), getattr(signal, name)[2:5])

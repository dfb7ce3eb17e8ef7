"""Needs and answers: a teacher serves what it offers, and an answer is cut by rows without mixing them."""

import torch

from potstill.head import Head
from potstill.signals import FullOutcomes, Needs, Offers, SampledOutcomes, TopKOutcomes

KINDS = ["nothing", "sampled", "top_k", "projected", "full"]


def test_full_serves_everything_and_other_answers_serve_only_their_own_kind():
    served = {(need, offer) for need in KINDS for offer in KINDS if Offers(frozenset({offer})).lacks(Needs(need)) is None}
    assert served == {("nothing", offer) for offer in KINDS} | {(need, "full") for need in KINDS} | {(kind, kind) for kind in KINDS}


def test_a_record_serves_its_own_temperature_and_at_most_its_own_k():
    record = Offers(frozenset({"top_k"}), top_k=64, temperature=1.0)
    assert record.lacks(Needs("top_k", top_k=64, temperature=1.0)) is None
    assert record.lacks(Needs("top_k")) is None
    assert "64" in (record.lacks(Needs("top_k", top_k=65)) or "")
    assert "temperature" in (record.lacks(Needs("top_k", temperature=2.0)) or "")
    assert Offers(frozenset({"full"}), temperature=1.0).lacks(Needs("top_k", top_k=65, temperature=2.0)) is None


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

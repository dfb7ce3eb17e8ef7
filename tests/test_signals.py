"""Needs and answers: a teacher serves what it offers, and an answer is cut by rows without mixing them."""

import pytest
import torch

from potstill.errors import IncompatibleError
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


def test_a_top_k_that_is_cut_is_the_top_k_of_the_same_distribution():
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)

    def top(k: int) -> TopKOutcomes:
        kept, ids = rows.topk(k)
        return TopKOutcomes(ids, kept.float(), rows.scatter(-1, ids, -torch.inf).logsumexp(-1).float(), rows[:, 3].float())

    for k in (1, 7, 19):
        found, expected = top(20).cut(k), top(k)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.log_probs, expected.log_probs)
        assert torch.allclose(found.log_tail, expected.log_tail, atol=1e-6)
        assert found.target_log_probs is not None
    # Padding at log 0 and an order that is not falling change nothing.
    whole = top(20)
    turned = TopKOutcomes(whole.ids.flip(-1), whole.log_probs.flip(-1), whole.log_tail)
    assert torch.equal(turned.cut(7).ids, top(7).ids)
    nothing = torch.full((5, 1), -torch.inf)
    padded = TopKOutcomes(torch.cat([whole.ids, whole.ids[:, :1]], -1), torch.cat([whole.log_probs, nothing], -1), whole.log_tail)
    assert torch.allclose(padded.cut(20).log_tail, whole.log_tail, atol=1e-6)
    assert whole.cut(20) is whole
    for k in (0, 21):
        with pytest.raises(IncompatibleError, match=r"20 outcomes are kept"):
            whole.cut(k)

"""What a record loses, against a reference in probability space."""

import pytest
import torch

from potstill.batch import Batch
from potstill.cache.store import CacheReader
from potstill.capture.record_loss import divergence, record_loss
from potstill.data.collation import collate
from potstill.errors import CacheError
from potstill.signals import FullOutcomes, Needs, Offers, TeacherSignal, TopKOutcomes
from small_captures import VOCABULARY, example_set, make_format, make_teacher, run_capture

EXAMPLES = example_set(12)


def probabilities(batch: Batch) -> torch.Tensor:
    outcomes = make_teacher().score(batch, Needs("full")).outcomes
    return outcomes.head.logits(outcomes.hidden).double().softmax(-1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("outcomes", ["top_k", "top_k_sampled"])
def test_the_losses_of_a_sample(outcomes, exact, tmp_path):
    run_capture(tmp_path / "cache", [EXAMPLES], format=make_format(outcomes, k=8, exact=exact))
    reader = CacheReader(str(tmp_path / "cache"))
    found = record_loss(reader, make_teacher(), list(EXAMPLES), pad_token=0)
    assert found.rows == EXAMPLES.num_targets
    coding, tail, masses = [], [], []
    for number, example in enumerate(EXAMPLES):
        for p, row in zip(probabilities(collate([[example]], pad_token=0)), range(1000), strict=False):
            record = reader.read([EXAMPLES.digest(number)])
            record = record.top if outcomes == "top_k_sampled" else record
            q = record.log_probs[row].double().exp()
            kept, q_rest = p[record.ids[row]], record.log_tail[row].double().exp()
            rest = torch.ones(VOCABULARY, dtype=torch.bool).scatter(0, record.ids[row].long(), torch.zeros(8, dtype=torch.bool))
            mass = p[rest].sum()
            coding.append(float((kept * (kept / q).log()).sum() + mass * (mass / q_rest).log()))
            shape = p[rest] / mass
            tail.append(float(mass * (shape * (shape * (VOCABULARY - 8)).log()).sum()))
            masses.append(float(mass))
    assert found.coding_mean == pytest.approx(sum(coding) / len(coding), abs=1e-6)
    assert found.coding_max == pytest.approx(max(coding), abs=1e-6)
    assert found.coding_mean < (1e-6 if exact else 1e-3)
    assert found.tail_mean == pytest.approx(sum(tail) / len(tail), abs=1e-6)
    assert found.tail_max == pytest.approx(max(tail), abs=1e-6)
    assert found.tail_mass_mean == pytest.approx(sum(masses) / len(masses), abs=1e-6)


def test_another_teacher_is_seen(tmp_path):
    from potstill.models.causal_lm import CausalLM
    from potstill.teachers.local import LocalTeacher
    from tiny import tiny_llama

    run_capture(tmp_path / "cache", [EXAMPLES])
    other = LocalTeacher(CausalLM(tiny_llama(10, width=48, layers=1), VOCABULARY))
    assert record_loss(CacheReader(str(tmp_path / "cache")), other, list(EXAMPLES), pad_token=0).coding_mean > 1e-3


def test_what_cannot_be_compared_is_refused(tmp_path):
    run_capture(tmp_path / "drawn", [EXAMPLES], format=make_format("sampled"))
    with pytest.raises(CacheError, match="sampled outcomes"):
        record_loss(CacheReader(str(tmp_path / "drawn")), make_teacher(), list(EXAMPLES), pad_token=0)
    run_capture(tmp_path / "other", [example_set(3, seed=5)])
    with pytest.raises(CacheError, match="none of the 12 sequences"):
        record_loss(CacheReader(str(tmp_path / "other")), make_teacher(), list(EXAMPLES), pad_token=0)


class TopOfATeacher:
    """A teacher that says its top K alone, as a server does."""

    name, offers, identity = "a top K", Offers(frozenset({"top_k"}), top_k=8, temperature=1.0), {}

    def score(self, batch, needs):
        outcomes = make_teacher().score(batch, Needs("full")).outcomes
        assert isinstance(outcomes, FullOutcomes)
        log_probs = outcomes.head.logits(outcomes.hidden)[:, :VOCABULARY].double().log_softmax(-1)
        top, ids = log_probs.topk(8, dim=-1)
        return TeacherSignal(TopKOutcomes(ids, top.float(), torch.log1p(-top.exp().sum(-1)).float()))

    def close(self):
        pass


def test_a_teacher_that_says_its_top_k_alone_shows_what_the_coding_costs_and_nothing_of_the_tail(tmp_path):
    run_capture(tmp_path / "cache", [EXAMPLES], format=make_format("top_k", k=8))
    reader = CacheReader(str(tmp_path / "cache"))
    whole = record_loss(reader, make_teacher(), list(EXAMPLES), pad_token=0)
    found = record_loss(reader, TopOfATeacher(), list(EXAMPLES), pad_token=0)
    assert found.coding_mean == pytest.approx(whole.coding_mean, abs=1e-6)
    assert (found.rows, found.tail_mean) == (whole.rows, None)


def kept(log_probs: torch.Tensor, ids: list[int]) -> TopKOutcomes:
    rest = [number for number in range(log_probs.shape[1]) if number not in ids]
    return TopKOutcomes(torch.tensor([ids]).expand(len(log_probs), -1), log_probs[:, ids], log_probs[:, rest].logsumexp(1))


ROWS = torch.tensor([[0.05, 0.5, 0.3, 0.1, 0.05], [0.1, 0.4, 0.3, 0.1, 0.1]], dtype=torch.float64).log()


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [3, 1, 4, 2], [1, 2, 3, 0], [0, 1, 2, 3]])
def test_equal_answers_lose_nothing_whichever_of_tied_ids_is_kept(ids):
    assert float(divergence(kept(ROWS, [1, 2, 3, 4]), kept(ROWS, ids)).abs().max()) < 1e-12


def test_it_is_thedivergence_of_what_both_kept_and_the_rest():
    other = (ROWS + torch.tensor([[0.3, -0.2, 0.1, 0.0, 0.4], [0.0, 0.2, -0.1, 0.3, 0.1]])).log_softmax(1)
    p, q = (torch.cat([rows[:, [1, 2, 3]], rows[:, [0, 4]].logsumexp(1, keepdim=True)], 1) for rows in (ROWS, other))
    expected = (p.exp() * (p - q)).sum(1)
    found = divergence(kept(ROWS, [1, 2, 3, 4]), kept(other, [0, 3, 1, 2]))
    assert torch.allclose(found, expected, atol=1e-12)

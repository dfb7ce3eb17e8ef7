"""What `potstill cache inspect` says that a record loses, where the teacher's answer keeps another id than the record does."""

import pytest
import torch

from potstill.cache.records import DrawnTokens, TopKAndDrawn
from potstill.recipes.caches import _divergence
from potstill.signals import TopKOutcomes


def kept(log_probs: torch.Tensor, ids: list[int]) -> TopKOutcomes:
    rest = [number for number in range(log_probs.shape[1]) if number not in ids]
    return TopKOutcomes(torch.tensor([ids]).expand(len(log_probs), -1), log_probs[:, ids], log_probs[:, rest].logsumexp(1))


ROWS = torch.tensor([[0.05, 0.5, 0.3, 0.1, 0.05], [0.1, 0.4, 0.3, 0.1, 0.1]], dtype=torch.float64).log()


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [3, 1, 4, 2], [1, 2, 3, 0], [0, 1, 2, 3]])
def test_equal_answers_lose_nothing_whichever_of_tied_ids_is_kept(ids):
    assert float(_divergence(kept(ROWS, [1, 2, 3, 4]), kept(ROWS, ids)).abs().max()) < 1e-12


def test_it_is_the_divergence_of_what_both_kept_and_the_rest():
    other = (ROWS + torch.tensor([[0.3, -0.2, 0.1, 0.0, 0.4], [0.0, 0.2, -0.1, 0.3, 0.1]])).log_softmax(1)
    p, q = (torch.cat([rows[:, [1, 2, 3]], rows[:, [0, 4]].logsumexp(1, keepdim=True)], 1) for rows in (ROWS, other))
    expected = (p.exp() * (p - q)).sum(1)
    found = _divergence(kept(ROWS, [1, 2, 3, 4]), kept(other, [0, 3, 1, 2]))
    assert torch.allclose(found, expected, atol=1e-12)
    drawn = DrawnTokens(torch.zeros(2, 0).long(), torch.zeros(2, 0).long(), torch.zeros(2, 0))
    assert torch.equal(_divergence(TopKAndDrawn(kept(ROWS, [1, 2, 3, 4]), drawn), kept(other, [0, 3, 1, 2])), found)

"""Synthetic answers of a teacher for tests of records and codecs: Zipf rows over a vocabulary, with the kept ids' masses and the rest."""

import torch

from potstill.cache.records import DrawnTokens
from potstill.signals import TopKOutcomes


def zipf_logits(n: int, vocabulary: int, *, sharpness: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Float64. Frequent ids are frequent in all rows and each row has favourites of its own, as a language model's have."""
    generator = torch.Generator().manual_seed(seed)
    frequency = -torch.log(torch.arange(1, vocabulary + 1).double())[torch.randperm(vocabulary, generator=generator)]
    own = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) * 1.5
    return (frequency + own) * sharpness


def top_k(logits: torch.Tensor, k: int, *, targets: bool = True, seed: int = 0) -> TopKOutcomes:
    log_probs = logits.double().log_softmax(1)
    kept, ids = log_probs.topk(k, dim=1)
    tail = log_probs.scatter(1, ids, -torch.inf).logsumexp(1)
    generator = torch.Generator().manual_seed(seed)
    came = torch.multinomial(log_probs.exp(), 1, generator=generator) if len(logits) else torch.zeros(0, 1, dtype=torch.long)
    known = log_probs.float().gather(1, came)[:, 0] if targets else None
    return TopKOutcomes(ids, kept.float(), tail.float(), known)


def draws(logits: torch.Tensor, n: int, *, seed: int = 0) -> DrawnTokens:
    """n draws a row, the rows padded to the longest with count 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.multinomial(row.softmax(0), n, replacement=True, generator=generator).unique(return_counts=True) for row in logits]
    width = max((len(ids) for ids, _ in rows), default=0)
    ids, counts = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (own_ids, own_counts) in enumerate(rows):
        ids[row, : len(own_ids)], counts[row, : len(own_ids)] = own_ids, own_counts
    return DrawnTokens(ids, counts, (counts > 0) / torch.tensor(n).float())


def kl_by_row(exact: TopKOutcomes, decoded: TopKOutcomes) -> torch.Tensor:
    """KL(exact || decoded) of the K + 1 outcomes, in float64 and in probability space; the same ids in any order."""
    by_id, by_id_decoded = exact.ids.argsort(1), decoded.ids.argsort(1)
    assert torch.equal(exact.ids.gather(1, by_id), decoded.ids.gather(1, by_id_decoded))
    p = torch.cat([exact.log_probs.gather(1, by_id), exact.log_tail[:, None]], 1).double().exp()
    q = torch.cat([decoded.log_probs.gather(1, by_id_decoded), decoded.log_tail[:, None]], 1).double().exp()
    return torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0.0).sum(1) + q.sum(1) - p.sum(1)

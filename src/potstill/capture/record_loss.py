"""What a record of the top K loses against the teacher itself, on a sample: by its coding, and by keeping K outcomes only.

It asks a live teacher once more for sequences that a cache holds. What is shown of the numbers is not its affair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from potstill.batch import Example, sequence_key
from potstill.cache.records import RecordFormat, TopKAndDrawn
from potstill.cache.store import CacheReader
from potstill.capture.units import Scorer
from potstill.errors import CacheError
from potstill.signals import TopKOutcomes
from potstill.teachers.teacher import Teacher


@dataclass(frozen=True)
class RecordLoss:
    """Nats over the rows of a sample."""

    rows: int
    coding_mean: float
    """KL(exact top K and tail || decoded top K and tail): what quantising the record costs."""
    coding_max: float
    tail_mass_mean: float
    """The teacher's mass outside the kept ids."""
    tail_mean: float
    """(1 - a) KL(tail || even over the rest): what a dense forward KL would still have to say of the tail to a student that knows its mass
    and nothing of its shape. A student that knows more loses less."""
    tail_max: float


def record_loss(
    reader: CacheReader, teacher: Teacher, examples: Sequence[Example], *, pad_token: int, device: str = "cpu"
) -> RecordLoss:
    """Compares what `reader` holds of the examples with what a live teacher says of them now; those that it does not hold are passed over.

    Raises CacheError for a cache without a top K, and where it holds none of the examples.
    """
    if reader.format.outcomes not in ("top_k", "top_k_sampled"):
        raise CacheError(f"{reader.name}: it holds {reader.format.outcomes} outcomes; what a record loses is measured of a top K alone")
    held = [example for example in examples if _key(example) in reader]
    if not held:
        raise CacheError(f"{reader.name}: it holds none of the {len(examples)} sequences of the sample; take the data that was captured")
    whole = replace(reader.format, outcomes="top_k", k=reader.format.vocabulary_size, num_samples=0, proposal_exponent=1.0)
    scorer = Scorer(teacher, whole, 0, pad_token, max(len(example.tokens) for example in held), device)
    coding, tail, mass = [], [], []
    for example in held:
        (answer,) = scorer([[example]])
        record = reader.read([answer.key])
        decoded = record.top if isinstance(record, TopKAndDrawn) else record
        assert isinstance(decoded, TopKOutcomes)
        assert isinstance(answer.record, TopKOutcomes)
        for part, value in zip((coding, tail, mass), _losses(answer.record, decoded, reader.format), strict=True):
            part.append(value)
    of_coding, of_tail, of_mass = torch.cat(coding), torch.cat(tail), torch.cat(mass)
    return RecordLoss(
        len(of_coding), float(of_coding.mean()), float(of_coding.max()), float(of_mass.mean()), float(of_tail.mean()), float(of_tail.max())
    )


def _key(example: Example) -> bytes:
    return sequence_key(np.asarray(example.tokens), np.asarray(example.is_target))


def _losses(live: TopKOutcomes, decoded: TopKOutcomes, format: RecordFormat) -> tuple[Tensor, Tensor, Tensor]:
    """By row, in float64: the KL of the coding, the tail's part, and the tail's mass. `live` keeps the whole vocabulary."""
    exact = torch.empty(live.ids.shape, dtype=torch.float64).scatter_(-1, live.ids, live.log_probs.double())
    ids = decoded.ids.long()
    kept = exact.gather(-1, ids)
    rest = exact.scatter(-1, ids, -torch.inf)
    log_mass = rest.logsumexp(-1)
    coding = _terms(kept, decoded.log_probs.double()).sum(-1) + _terms(log_mass, decoded.log_tail.double())
    even = log_mass - torch.tensor(float(max(format.vocabulary_size - ids.shape[-1], 1)), dtype=torch.float64).log()
    return coding, _terms(rest, even.unsqueeze(-1)).sum(-1), log_mass.exp()


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), 0 where p is 0."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)

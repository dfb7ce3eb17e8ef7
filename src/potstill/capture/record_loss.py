"""What a record of the top K loses against the teacher itself, on a sample: by its coding, and by keeping K outcomes only.

It asks a live teacher once more for sequences that a cache holds. What is shown of the numbers is not its affair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.batch import Example
from potstill.cache.records import RecordFormat, TopKAndDrawn
from potstill.cache.store import CacheReader
from potstill.capture.scoring import needs_of
from potstill.capture.tiles import LogitTiles
from potstill.data.collation import collate
from potstill.errors import CacheError
from potstill.signals import FullOutcomes, MixtureOutcomes, RoutedOutcomes, TeacherOutcomes, TopKOutcomes
from potstill.teachers.teacher import Teacher, require


@dataclass(frozen=True)
class RecordLoss:
    """Nats over the rows of a sample. What lies in the tail is None for a teacher that says nothing of it."""

    rows: int
    coding_mean: float
    """KL(exact top K and tail || decoded top K and tail): what quantising the record costs."""
    coding_max: float
    tail_mass_mean: float | None = None
    """The teacher's mass outside the kept ids."""
    tail_mean: float | None = None
    """(1 - a) KL(tail || even over the rest): what a dense forward KL would still have to say of the tail to a student that knows its mass
    and nothing of its shape. A student that knows more loses less."""
    tail_max: float | None = None


@torch.no_grad()
def record_loss(
    reader: CacheReader, teacher: Teacher, examples: Sequence[Example], *, pad_token: int, device: str = "cpu"
) -> RecordLoss:
    """Compares what `reader` holds of the examples with what a live teacher says of them now; those that it does not hold are passed over.

    Raises CacheError for a cache without a top K, and where it holds none of the examples.
    """
    if reader.format.outcomes not in ("top_k", "top_k_sampled"):
        raise CacheError(f"{reader.name}: it holds {reader.format.outcomes} outcomes; what a record loses is measured of a top K alone")
    needs = needs_of(reader.format, teacher.offers)
    require(teacher, needs, "the comparison with a cache")
    found: list[tuple[Tensor, ...]] = []
    for example in examples:
        batch = collate([[example]], pad_token=pad_token).to(device)
        (document,) = batch.sequences()
        if not batch.num_targets or document.key not in reader:
            continue
        record = reader.read([document.key])
        decoded = record.top if isinstance(record, TopKAndDrawn) else record
        assert isinstance(decoded, TopKOutcomes)
        outcomes = teacher.score(batch, needs).outcomes
        assert outcomes is not None
        found += _losses(outcomes.to("cpu"), decoded, reader.format)
    if not found:
        raise CacheError(f"{reader.name}: it holds none of the {len(examples)} sequences of the sample; take the data that was captured")
    coding, *of_tail = (torch.cat(column) for column in zip(*found, strict=True))
    whole = RecordLoss(len(coding), float(coding.mean()), float(coding.max()))
    if not of_tail:
        return whole
    tail, mass = of_tail
    return RecordLoss(whole.rows, whole.coding_mean, whole.coding_max, float(mass.mean()), float(tail.mean()), float(tail.max()))


def _losses(live: TeacherOutcomes, decoded: TopKOutcomes, format: RecordFormat) -> Iterator[tuple[Tensor, ...]]:
    """In float64, some rows at a time: (KL of the coding,), and of a whole distribution also the tail's part and the tail's mass."""
    parts = live.parts if isinstance(live, RoutedOutcomes) else ((torch.arange(len(decoded)), live),)
    for numbers, part in parts:
        if isinstance(part, TopKOutcomes):
            yield (divergence(part.cut(min(format.k, part.ids.shape[-1])), decoded.rows(numbers)),)
            continue
        assert isinstance(part, FullOutcomes | MixtureOutcomes)
        for rows, tile in LogitTiles(part, vocabulary_size=format.vocabulary_size, temperature=format.temperature):
            exact = tile[:, : format.vocabulary_size].double().log_softmax(-1)
            yield _against(exact, decoded.rows(numbers[rows]), format.vocabulary_size)


def _against(exact: Tensor, decoded: TopKOutcomes, vocabulary_size: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = decoded.ids.long()
    kept, rest = exact.gather(-1, ids), exact.scatter(-1, ids, -torch.inf)
    log_mass = rest.logsumexp(-1)
    coding = _term(kept, decoded.log_probs.double()).sum(-1) + _term(log_mass, decoded.log_tail.double())
    even = log_mass - torch.tensor(float(max(vocabulary_size - ids.shape[-1], 1)), dtype=torch.float64).log()
    return coding, _term(rest, even.unsqueeze(-1)).sum(-1), log_mass.exp()


def divergence(live: TopKOutcomes, stored: TopKOutcomes) -> Tensor:
    """KL of what a teacher says now and of the stored record, row by row, over the ids that both kept and the rest.

    Both keep the same ids but for those that a tie, or a rounding that hangs on the batch, puts just inside or just outside.
    """
    places, common = _places(stored.ids, live.ids)
    mine, kept = live.log_probs.double(), stored.log_probs.double().gather(1, places)
    rest, other = _rest(live, common), _rest(stored, _places(live.ids, stored.ids)[1])
    return torch.where(common, _term(mine, kept), 0.0).sum(1) + _term(rest, other)


def _places(ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row: where each of `wanted` stands in `ids`, and whether it does."""
    ordered, order = ids.sort(dim=1, stable=True)
    places = torch.searchsorted(ordered, wanted.contiguous()).clamp_max(ids.shape[1] - 1)
    return order.gather(1, places), ordered.gather(1, places) == wanted


def _rest(top: TopKOutcomes, common: Tensor) -> Tensor:
    """The log of the mass of all but the common ids."""
    alone = top.log_probs.double().masked_fill(common, -torch.inf)
    return torch.cat([alone, top.log_tail.double().unsqueeze(1)], 1).logsumexp(1)


def _term(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), 0 where p is 0."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)

"""From a teacher's outcomes for n target rows to the record that a cache holds of them, a tile of logits at a time.

It knows outcomes and records. How a record is coded, and which sequence it belongs to, is not its affair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import log

import torch
from torch import Tensor
from torch.nn.functional import pad

from potstill.cache.records import DrawnTokens, HiddenRows, Record, RecordFormat, TopKAndDrawn
from potstill.capture import selecting
from potstill.capture.tiles import LogitTiles
from potstill.errors import IncompatibleError
from potstill.head import Head
from potstill.objectives.projection import project
from potstill.signals import FullOutcomes, MixtureOutcomes, Needs, Offers, RoutedOutcomes, TeacherOutcomes, TopKOutcomes

# Bytes of one block of a tile: the exponentials of a block are a second copy of it.
_BLOCK_BYTES = 8 * 2**20


def needs_of(format: RecordFormat, offers: Offers) -> Needs:
    """What a teacher is asked for: everything where it can give it, else the record itself. `require` then says whether it can."""
    if format.outcomes == "top_k" and "full" not in offers.outcomes:
        return Needs("top_k", top_k=format.k, temperature=format.temperature)
    return Needs("full")


@dataclass(frozen=True)
class Asked:
    """The target rows: their targets and, for kinds that draw, numbers in [0, 1) that decide the draws, [N, num_samples] in float64."""

    targets: Tensor
    uniforms: Tensor | None = None

    def rows(self, part: slice | Tensor) -> "Asked":
        return Asked(self.targets[part], None if self.uniforms is None else self.uniforms[part])


def record_of(outcomes: TeacherOutcomes, asked: Asked, format: RecordFormat, *, project_on: Head | None = None) -> Record:
    """The record of N rows, in their order. Raises IncompatibleError where the answer cannot be made such a record."""
    if isinstance(outcomes, RoutedOutcomes):
        return _routed(outcomes, asked, format, project_on)
    if isinstance(outcomes, TopKOutcomes) and format.outcomes == "top_k":
        return _cut(outcomes, format)
    if isinstance(outcomes, FullOutcomes) and format.outcomes == "hidden":
        return _hidden(outcomes, format)
    if not isinstance(outcomes, FullOutcomes | MixtureOutcomes) or format.outcomes == "hidden":
        raise IncompatibleError(
            f"capture.outcomes: {format.outcomes} cannot be recorded of {type(outcomes).__name__}, which is what the teacher answers; "
            "choose top_k, or another teacher"
        )
    if format.outcomes == "projected":
        if project_on is None:
            raise IncompatibleError("capture.outcomes: projected needs the head of a student that does not learn it; there is none")
        return project(outcomes, project_on, temperature=format.temperature, vocabulary_size=format.vocabulary_size)
    return _selected(outcomes, asked, format)


# ---------------------------------------------------------------- kinds that select


def _selected(outcomes: FullOutcomes | MixtureOutcomes, asked: Asked, format: RecordFormat) -> Record:
    k, select = min(format.k, format.vocabulary_size), _SELECTORS[format.outcomes]
    tiles = LogitTiles(
        outcomes, vocabulary_size=format.vocabulary_size, temperature=format.temperature,
        multiple_of=selecting.width_multiple(format.vocabulary_size, max(k, 1)),
    )  # fmt: skip
    most = max(1, _BLOCK_BYTES // (4 * tiles.width))
    scratch = torch.empty(min(most, tiles.num_rows), tiles.width, device=tiles.device)
    found: list[Record] = [] if tiles.num_rows else [select(scratch, scratch, asked, format)]
    for rows, tile in tiles:
        for start in range(rows.start, rows.stop, most):
            here = slice(start, min(start + most, rows.stop))
            block = tile[here.start - rows.start : here.stop - rows.start]
            found.append(select(block, scratch[: len(block)], asked.rows(here), format))
    return concatenate(found)


def _top_k(block: Tensor, scratch: Tensor, asked: Asked, format: RecordFormat) -> TopKOutcomes:
    return _top_k_and_rest(block, scratch, asked, format)[0]


def _top_k_and_rest(block: Tensor, scratch: Tensor, asked: Asked, format: RecordFormat) -> tuple[TopKOutcomes, Tensor]:
    """The kept, and the logsumexp of the whole rows. `block` loses the kept ids; `scratch` holds the exponentials of the rest."""
    of_targets = block.gather(1, asked.targets.unsqueeze(-1))
    kept, ids = selecting.top_k(block, min(format.k, format.vocabulary_size))
    # A row with fewer than K outcomes of any probability: the rest of it is nothing, and no column of filling is an id.
    smallest = kept[:, -1].masked_fill(kept[:, -1] == -torch.inf, 0.0)
    ids = torch.where(ids < format.vocabulary_size, ids, ids[:, :1])
    log_rest = selecting.log_sum(*selecting.exponentials(block.scatter_(1, ids, -torch.inf), smallest, scratch))
    total = torch.logaddexp(kept.double().logsumexp(-1), log_rest)
    top = TopKOutcomes(
        ids=ids, log_probs=_normalised(kept, total), log_tail=(log_rest - total).float(),
        target_log_probs=_normalised(of_targets, total).squeeze(-1), temperature=format.temperature,
    )  # fmt: skip
    return top, total


def _normalised(logits: Tensor, total: Tensor) -> Tensor:
    return (logits.double() - total.unsqueeze(-1)).float()


def _drawn(block: Tensor, scratch: Tensor, asked: Asked, format: RecordFormat) -> DrawnTokens:
    reference = block.amax(-1)
    total = selecting.log_sum(*selecting.exponentials(block, reference, scratch))
    return _draw(block, scratch, reference, total, asked, format)


def _top_k_drawn(block: Tensor, scratch: Tensor, asked: Asked, format: RecordFormat) -> TopKAndDrawn:
    top, total = _top_k_and_rest(block, scratch, asked, format)
    reference = block.amax(-1)
    reference = torch.where(reference == -torch.inf, 0.0, reference)
    return TopKAndDrawn(top, _draw(block, scratch, reference, total, asked, format))


def _draw(block: Tensor, scratch: Tensor, reference: Tensor, total: Tensor, asked: Asked, format: RecordFormat) -> DrawnTokens:
    """Draws from p^tau over what is left of `block`, made to add up to 1 (r); the weight of one draw is p / (r n), under the whole p.

    The weights are never made to add up to 1: that would be biased. A row that has nothing left draws nothing.
    """
    assert asked.uniforms is not None
    tau = format.proposal_exponent
    proposal, factor = selecting.exponentials(block, reference, scratch, power=tau)
    of_proposal = selecting.log_sum(proposal, factor)
    ids, counts = selecting.count(selecting.draw(proposal, asked.uniforms))
    log_weights = ((1 - tau) * block.gather(1, ids).double() - total.unsqueeze(-1)) + of_proposal.unsqueeze(-1)
    weights = (log_weights - log(format.num_samples)).exp().float()
    empty = (of_proposal == -torch.inf).unsqueeze(-1) | (counts == 0)
    return DrawnTokens(ids.masked_fill(empty, 0), counts.masked_fill(empty, 0), weights.masked_fill(empty, 0.0))


_SELECTORS = {"top_k": _top_k, "sampled": _drawn, "top_k_sampled": _top_k_drawn}


# ---------------------------------------------------------------- kinds that take what is there


def _cut(outcomes: TopKOutcomes, format: RecordFormat) -> TopKOutcomes:
    """As the teacher gave them; what it gave beyond K goes into the tail."""
    width, k = outcomes.ids.shape[-1], min(format.k, format.vocabulary_size)
    if width < k or outcomes.temperature != format.temperature:
        raise IncompatibleError(
            f"capture.k: {k} outcomes at temperature {format.temperature} are to be recorded, and the teacher answered "
            f"{width} at temperature {outcomes.temperature}; lower capture.k, or let the teacher give more"
        )
    return outcomes.cut(k)


def _hidden(outcomes: FullOutcomes, format: RecordFormat) -> HiddenRows:
    found = f"{outcomes.hidden.shape[-1]} wide in {str(outcomes.hidden.dtype).removeprefix('torch.')}"
    if found != (stated := f"{format.width} wide in {format.dtype}"):
        raise IncompatibleError(f"hidden rows of the teacher are {found}, and the cache holds rows {stated}; capture into another cache")
    return HiddenRows(outcomes.hidden.clone())


# ---------------------------------------------------------------- joining


def _routed(outcomes: RoutedOutcomes, asked: Asked, format: RecordFormat, project_on: Head | None) -> Record:
    parts = [record_of(part, asked.rows(rows), format, project_on=project_on) for rows, part in outcomes.parts]
    return concatenate(parts).rows(torch.cat([rows for rows, _ in outcomes.parts]).argsort())


def concatenate(records: Sequence[Record]) -> Record:
    """Rows one after the other; draws are padded to the widest. The records are of one kind, and there is at least one."""
    first = records[0]
    if isinstance(first, TopKAndDrawn):
        both = [record for record in records if isinstance(record, TopKAndDrawn)]
        tops, drawn = concatenate([record.top for record in both]), concatenate([record.drawn for record in both])
        assert isinstance(tops, TopKOutcomes)
        assert isinstance(drawn, DrawnTokens)
        return TopKAndDrawn(tops, drawn)
    joined = {}
    for name in (field.name for field in fields(first)):
        values = [getattr(record, name) for record in records]
        if isinstance(values[0], Tensor):
            if isinstance(first, DrawnTokens):
                width = max(value.shape[1] for value in values)
                values = [pad(value, (0, width - value.shape[1])) for value in values]
            joined[name] = torch.cat(values)
    return replace(first, **joined)

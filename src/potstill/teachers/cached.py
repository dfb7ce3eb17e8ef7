"""A teacher that was asked once: its recorded answers, found by each sequence's own key.

Packing, order, batch size and epochs are free. It knows the cache and outcomes; the model that was asked is not here, but for the
head of one whose hidden rows were recorded.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from potstill.batch import Batch
from potstill.cache.provenance import Difference, Provenance
from potstill.cache.records import DrawnTokens, HiddenRows, Record, RecordFormat, TopKAndDrawn
from potstill.cache.store import CacheReader
from potstill.data.examples import ExampleSet
from potstill.errors import CacheError, IncompatibleError, StorageError
from potstill.head import Head, LowRank
from potstill.signals import (
    FullOutcomes,
    Needs,
    Offers,
    Outcomes,
    ProjectedOutcomes,
    SampledOutcomes,
    TeacherSignal,
    TopKOutcomes,
    WholeOutcomes,
)

HEAD_FILE = "head.safetensors"
"""The extra file of a cache of hidden rows: the teacher's head."""
HEAD_FIELD = "student head"
"""The field of a cache's provenance that names the head which projected outcomes were projected on."""

_SERVES: dict[str, frozenset[Outcomes]] = {
    "top_k": frozenset({"top_k"}), "sampled": frozenset({"sampled"}), "top_k_sampled": frozenset({"top_k", "sampled"}),
    "hidden": frozenset({"full"}), "projected": frozenset({"projected"}),
}  # fmt: skip
# Fields that decide which tokens a row becomes, and so which key it is looked up by.
_OF_THE_TOKENS = ("tokenizer", "template", "truncation")


def offers_of(format: RecordFormat) -> Offers:
    """What records of a format can serve."""
    serves = _SERVES[format.outcomes]
    return Offers(serves, format.k if "top_k" in serves else None, None if "full" in serves else format.temperature)


def refuse_foreign(provenance: Provenance, wanted: Mapping[str, Any], name: str) -> None:
    """Raises CacheError naming every field of `wanted` that the cache `name` states otherwise, with both values."""
    found = Provenance(wanted).differences(provenance, only=wanted)
    if found:
        raise CacheError(
            f"{name}: the cache was made with another {_joined(found)}. Train with what it was captured with, or capture into another path"
        )


def _joined(differences: list[Difference]) -> str:
    return "; another ".join(map(str, differences))


class CachedTeacher:
    """Answers from a cache. `wanted` is what this run states of its tokenizer, template and truncation, to explain what is missing."""

    def __init__(self, reader: CacheReader, *, vocabulary_size: int, wanted: Mapping[str, Any] | None = None):
        if reader.format.vocabulary_size != vocabulary_size:
            raise CacheError(
                f"{reader.name}: its answers are over {reader.format.vocabulary_size:,} tokens, and this run knows {vocabulary_size:,}; "
                "train a student with the tokenizer that it was captured with"
            )
        self._reader, self._wanted = reader, dict(wanted or {})
        self._head = head_from_bytes(reader.file(HEAD_FILE)) if reader.format.outcomes == "hidden" else None

    @property
    def name(self) -> str:
        return f"the cache {self._reader.name}"

    @property
    def offers(self) -> Offers:
        return offers_of(self._reader.format)

    @property
    def identity(self) -> Mapping[str, str]:
        return {"teacher cache": self._reader.identity}

    def score(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """The recorded answers of the batch's sequences, as the outcomes that are asked for."""
        if needs.outcomes == "nothing":
            return TeacherSignal()
        record = self._read(batch)
        if len(record) != batch.num_targets:
            raise CacheError(
                f"{self._reader.name}: it has {len(record)} answers for the {batch.num_targets} targets of a batch; "
                "the cache does not belong to this version of the data: capture into another path"
            )
        outcomes = self._outcomes(record, needs).to(batch.tokens.device)
        if isinstance(outcomes, FullOutcomes):
            self._head = _head_on(outcomes.head, outcomes.hidden.device)
            outcomes = replace(outcomes, head=self._head)
        return TeacherSignal(outcomes)

    def _read(self, batch: Batch) -> Record:
        documents = batch.to("cpu").sequences()
        asked = [number for number, document in enumerate(documents) if document.rows.start < document.rows.stop]
        keys = [documents[number].key for number in asked]
        here = self._held(keys)
        if not here.all():
            numbers = [batch.examples[number] for number, found in zip(asked, here, strict=True) if not found] if batch.examples else []
            which = f" (examples {', '.join(map(str, numbers[:5]))}{', ...' if len(numbers) > 5 else ''})" if numbers else ""
            raise CacheError(
                f"{self._reader.name}: {int((~here).sum())} of {len(keys)} sequences of a batch{which} have no answer; {self._cause()}"
            )
        return self._reader.read(keys)

    def _held(self, keys: list[bytes]) -> np.ndarray:
        """Which answers are there; where one is not, what was committed meanwhile is looked at once."""
        here = self._reader.holds(keys)
        if not here.all():
            self._reader.refresh()
            here = self._reader.holds(keys)
        return here

    def _outcomes(self, record: Record, needs: Needs) -> WholeOutcomes:
        if isinstance(record, HiddenRows):
            assert self._head is not None
            return FullOutcomes(record.hidden, self._head)
        if isinstance(record, ProjectedOutcomes):
            stated = self._reader.provenance.fields.get(HEAD_FIELD, "")
            return replace(record, head_digest=record.head_digest or str(stated))
        if isinstance(record, DrawnTokens):
            return SampledOutcomes(record.ids, _mass(record), self._reader.format.temperature)
        if isinstance(record, TopKAndDrawn):
            if needs.outcomes == "sampled":
                ids = torch.cat([record.top.ids, record.drawn.ids], dim=1)
                weights = torch.cat([record.top.log_probs.exp(), _mass(record.drawn)], dim=1)
                return SampledOutcomes(ids, weights, record.top.temperature)
            record = record.top
        return most_likely(record, needs.top_k)

    # ---------------------------------------------------------------- before training

    def projected_on(self) -> ProjectedOutcomes | None:
        """Of projected answers a record of no rows, which names the head that they were made on; None for any other."""
        form = self._reader.format
        if form.outcomes != "projected":
            return None
        none, stated = torch.zeros(0), str(self._reader.provenance.fields.get(HEAD_FIELD, ""))
        return ProjectedOutcomes(none.reshape(0, form.width), none, none, stated, form.temperature)

    def missing(self, examples: ExampleSet) -> list[int]:
        """The examples with targets whose answers are not in the cache, ascending."""
        asked = np.flatnonzero(examples.target_counts)
        here = self._held([examples.digest(int(index)) for index in asked])
        return asked[~here].tolist()

    def refuse_missing(self, examples: ExampleSet) -> None:
        """Raises CacheError naming how many answers are missing, the first row, and the likely cause."""
        missing = self.missing(examples)
        if missing:
            raise CacheError(
                f"{self._reader.name}: {len(missing):,} of {len(examples):,} sequences have no answer in the cache, the first is "
                f"{examples.origin(missing[0])}; {self._cause()}"
            )

    def _cause(self) -> str:
        states = self._reader.provenance.compared
        fields = [field for field in _OF_THE_TOKENS if field in self._wanted and field in states]
        different = Provenance(self._wanted).differences(self._reader.provenance, only=fields)
        if different:
            return f"the likely cause is another {_joined(different)}. Train with what it was captured with, or capture into another path"
        same = f"the {', '.join(fields)} are those of the cache, so these rows" if fields else "these rows"
        return f"{same} are new or changed, or their capture is not finished: run `potstill capture` again, which asks only what is missing"

    def close(self) -> None:
        """Nothing is held open."""


def _mass(drawn: DrawnTokens) -> Tensor:
    """What all draws of an id weigh together; 0 is padding."""
    return drawn.counts.to(drawn.weights.dtype) * drawn.weights


def most_likely(top: TopKOutcomes, k: int | None) -> TopKOutcomes:
    """The k most likely of the kept, of equally likely ones those with the smaller ids; the others' mass goes into the tail.

    On the CPU: one sort of integers that hold both, six times as fast as sorting by one and gathering by the other.
    """
    if k is None or k == top.ids.shape[1]:
        return top
    if not 0 < k < top.ids.shape[1]:
        raise IncompatibleError(f"{top.ids.shape[1]} outcomes are kept and {k} are asked for; lower objective.top_k")
    keys = np.sort((_falling(top.log_probs.float().contiguous().view(torch.int32)).long() << 32 | top.ids).numpy(), axis=1)
    log_probs = _rising(torch.from_numpy((keys >> 32).astype(np.int32))).view(torch.float32)
    log_tail = log_probs[:, k:].double().logsumexp(1).logaddexp(top.log_tail.double()).to(top.log_tail.dtype)
    ids = torch.from_numpy(keys[:, :k] & 0xFFFFFFFF)
    return replace(top, ids=ids, log_probs=log_probs[:, :k].contiguous(), log_tail=log_tail)


def _falling(bits: Tensor) -> Tensor:
    """Of the bits of float32 numbers, integers that fall where the numbers rise."""
    return ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))


def _rising(falling: Tensor) -> Tensor:
    """The bits back."""
    return ~falling ^ ((~falling >> 31) & 0x7FFFFFFF)


# ---------------------------------------------------------------- the head beside hidden rows


def _head_on(head: Head, device: torch.device) -> Head:
    if head.weight.device == device:
        return head
    low_rank = tuple(replace(delta, down=delta.down.to(device), up=delta.up.to(device)) for delta in head.low_rank)
    return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device), low_rank=low_rank)


def head_to_bytes(head: Head) -> bytes:
    """A head as a safetensors file: its tensors, and its scale and soft-cap in the metadata."""
    tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    for number, delta in enumerate(head.low_rank):
        tensors |= {f"low_rank.{number}.down": delta.down, f"low_rank.{number}.up": delta.up}
    stated = {"scale": head.scale, "softcap": head.softcap, "low_rank": [delta.scaling for delta in head.low_rank]}
    # A clone each: tensors that share memory, such as a tied embedding, are not saved together.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, {"head": json.dumps(stated)})


def head_from_bytes(data: bytes) -> Head:
    """The head that `head_to_bytes` wrote. Raises StorageError for bytes that are none."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stated = json.loads(header["__metadata__"]["head"])
        low_rank = tuple(
            LowRank(tensors[f"low_rank.{number}.down"], tensors[f"low_rank.{number}.up"], float(scaling))
            for number, scaling in enumerate(stated["low_rank"])
        )
        return Head(tensors["weight"], tensors.get("bias"), float(stated["scale"]), stated["softcap"], low_rank)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{HEAD_FILE} does not hold a teacher's head: {error}") from error

"""What a cache holds, in numbers for people: answers, bytes a token, how much of the teacher's mass was kept, provenance, what is damaged.

It asks no teacher: what a record loses against one is measured by who has one at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.cache.catalogue import Damage
from potstill.cache.provenance import NOTES, Provenance, shown
from potstill.cache.records import DrawnTokens, Record, RecordFormat, TopKAndDrawn
from potstill.cache.segments import INDEX, key_list, segment_of
from potstill.cache.store import CacheReader
from potstill.cache.verify import counted, unfinished
from potstill.errors import StorageError
from potstill.signals import ProjectedOutcomes, TopKOutcomes

_SEQUENCES_AT_ONCE = 64


@dataclass(frozen=True)
class Contents:
    """Of a sample of rows. What a kind of record does not say is None.

    `worst_mass` is the mean over the tenth of the rows that keep least; `entropy` is in nats, for a top K that of its K + 1 outcomes,
    which is at most the teacher's; `target_share` is the share of rows whose target is among the kept ids.
    """

    rows: int
    mean_mass: float | None = None
    worst_mass: float | None = None
    entropy: float | None = None
    target_share: float | None = None
    ids_a_row: float | None = None


@dataclass(frozen=True)
class Inspection:
    """`data_bytes` and `bytes` count the files: the data of the committed segments, and all that lies there."""

    name: str
    format: RecordFormat
    provenance: Provenance
    sequences: int
    rows: int
    segments: int
    writers: tuple[str, ...]
    data_bytes: int
    bytes: int
    contents: Contents
    damage: tuple[Damage, ...]
    unfinished: tuple[str, ...]

    @property
    def bytes_a_token(self) -> float:
        """Of data and indices, for each target whose answer is recorded."""
        return self.bytes / self.rows if self.rows else 0.0


def inspect(path: str, *, sample_rows: int = 200_000, seed: int = 0) -> Inspection:
    """Counts everything and decodes a sample of about `sample_rows` rows, drawn evenly over the sequences.

    Raises CacheError where there is no cache, StorageError where its description is damaged; other damage is said, not raised.
    """
    reader = CacheReader(path)
    rows = sum(int(entries["rows"].sum()) for _, _, entries in reader.catalogue.by_segment())
    contents = _contents(reader, _sample(reader, rows, sample_rows, seed))
    sizes = reader.place.sizes()
    parts = [(parts[0], parts[1], size) for name, size in sizes.items() if (parts := segment_of(name)) is not None]
    committed = [(kind, size) for name, kind, size in parts if name in reader.catalogue.facts]
    return Inspection(
        reader.name, reader.format, reader.provenance, len(reader), rows, len(reader.segments),
        tuple(sorted({name.writer for name in reader.catalogue.facts})),
        sum(size for kind, size in committed if kind != INDEX), sum(size for _, size in committed), contents,
        tuple(reader.damage), unfinished(reader),
    )  # fmt: skip


def _sample(reader: CacheReader, rows: int, wanted: int, seed: int) -> list[bytes]:
    keys = reader.catalogue.keys()
    if rows > wanted:
        share = max(1, round(len(keys) * wanted / rows))
        keys = keys[np.random.default_rng(seed).permutation(len(keys))[:share]]
    return key_list(keys)


def _contents(reader: CacheReader, keys: Sequence[bytes]) -> Contents:
    found: list[dict[str, Tensor]] = []
    for first in range(0, len(keys), _SEQUENCES_AT_ONCE):
        part = keys[first : first + _SEQUENCES_AT_ONCE]
        try:
            found.append(measures(reader.read(part)))
        except StorageError:  # some of them are damaged; the rest is looked at
            payloads, _ = reader.whole_payloads(part)
            whole = [key for key, payload in zip(part, payloads, strict=True) if payload is not None]
            found += [measures(reader.read(whole))] if whole else []
    columns = {name: torch.cat([part[name] for part in found]).double() for name in (found[0] if found else {})}
    if not columns or not len(columns["rows"]):
        return Contents(0)
    mass = columns.get("mass")
    return Contents(
        rows=len(columns["rows"]),
        mean_mass=_mean(mass),
        worst_mass=None if mass is None else float(mass.sort().values[: max(1, len(mass) // 10)].mean()),
        entropy=_mean(columns.get("entropy")), target_share=_mean(columns.get("target")), ids_a_row=_mean(columns.get("ids")),
    )  # fmt: skip


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def measures(record: Record) -> dict[str, Tensor]:
    """What a record says of each of its rows, by name; "rows" is there for every kind."""
    measured = {"rows": torch.ones(len(record))}
    if isinstance(record, TopKAndDrawn):
        return measured | _of_top_k(record.top)
    if isinstance(record, TopKOutcomes):
        return measured | _of_top_k(record)
    if isinstance(record, DrawnTokens):
        return measured | {"ids": (record.counts > 0).sum(1).float()}
    if isinstance(record, ProjectedOutcomes):
        return measured | {"entropy": record.entropy}
    return measured


def _of_top_k(record: TopKOutcomes) -> dict[str, Tensor]:
    log_probs, tail = record.log_probs.double(), record.log_tail.double()
    probabilities, rest = log_probs.exp(), tail.exp()
    entropy = -(torch.special.xlogy(probabilities, probabilities).sum(1) + torch.special.xlogy(rest, rest))
    measured = {"mass": probabilities.sum(1), "entropy": entropy}
    if record.target_log_probs is not None:
        # Of a target it is known how probable it was, not where it stands: it is kept where it is as probable as the last that is.
        least = torch.where(log_probs.isfinite(), log_probs, torch.inf).min(1).values
        measured["target"] = (record.target_log_probs.double() >= least - 1e-6).double()
    return measured


# ---------------------------------------------------------------- in words


def inspection_text(found: Inspection, lost: Sequence[tuple[str, str]] = ()) -> str:
    """The same as lines of text; field by field the provenance, one line for each thing that is damaged.

    `lost` are names and words for what the records lose against a teacher.
    """
    kind = found.format
    number = {"top_k": f"k = {kind.k}", "sampled": f"{kind.num_samples} draws", "top_k_sampled": f"k = {kind.k}, {kind.num_samples} draws"}
    said = number.get(kind.outcomes, f"width {kind.width}, {kind.dtype}")
    lines = [
        ("cache", found.name), ("records", f"{kind.outcomes}, {said}, temperature {kind.temperature:g}{', exact' if kind.exact else ''}"),
        ("answers", f"{counted(found.sequences, 'sequence')}, {counted(found.rows, 'token')}"),
        ("size", f"{found.bytes:,} bytes in {counted(found.segments, 'segment')}, {found.bytes_a_token:.1f} bytes a token"),
        ("writers", ", ".join(found.writers) or "none"), *_contents_lines(found.contents),
    ]  # fmt: skip
    lines += lost
    lines += [(name, shown(value)) for name, value in found.provenance.compared.items() if name != "record"]
    lines += [(f"note: {name}", shown(value)) for name, value in (found.provenance.fields.get(NOTES) or {}).items()]
    lines += [("damaged", str(damage)) for damage in found.damage]
    lines += [("not committed", name) for name in found.unfinished]
    width = max(len(name) for name, _ in lines) + 2
    return "".join(f"{name:<{width}}{text}\n" for name, text in lines)


def _contents_lines(contents: Contents) -> list[tuple[str, str]]:
    over = f"over {contents.rows:,} tokens"
    lines = []
    if contents.mean_mass is not None and contents.worst_mass is not None:
        mass = f"{contents.mean_mass:.4f} in the mean, {contents.worst_mass:.4f} in the worst tenth, {over}"
        lines.append(("mass of the kept ids", mass))
    at_least = "at least " if contents.mean_mass is not None else ""  # the tail counts as one outcome
    if contents.entropy is not None:
        lines.append(("teacher's entropy", f"{at_least}{contents.entropy:.4f} nats a token, {over}"))
    if contents.target_share is not None:
        lines.append(("targets among the kept", f"{100 * contents.target_share:.2f} %"))
    if contents.ids_a_row is not None:
        lines.append(("distinct ids a token", f"{contents.ids_a_row:.1f}"))
    return lines

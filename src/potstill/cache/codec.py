"""Records as bytes: which coder a cache's format asks for. A payload is one sequence and stands on its own; it says nothing of keys.

The coders: topk_codec.py (quantised), plain_codec.py (exact top-K, hidden and projected rows), drawn_codec.py, and the pair of two here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from potstill.cache.drawn_codec import DrawnCodec
from potstill.cache.plain_codec import ExactTopKCodec, HiddenCodec, ProjectedCodec
from potstill.cache.records import Record, RecordFormat, TopKAndDrawn
from potstill.cache.streams import damaged
from potstill.cache.topk_codec import TopKCodec
from potstill.errors import ConfigError

VERSION = 1
"""Part of a cache's provenance: caches of another version are refused, not misread."""


class Codec(Protocol):
    def encode(self, record: Any) -> bytes:
        """One sequence's record of n rows (n may be 0), CPU tensors."""
        ...

    def decode(self, payloads: Sequence[bytes], rows: Sequence[int]) -> Record:
        """Several sequences at once, their rows concatenated in that order. Raises StorageError for bytes that do not parse."""
        ...


class _TopKAndDrawnCodec:
    """The one payload in front of the other, with the length of the first before it.

    Draws of the rest at a proposal exponent of 1 weigh the tail's mass over n each, which the first payload says.
    """

    def __init__(self, format: RecordFormat):
        self._top, self._drawn = _top_k_codec(format), DrawnCodec(format)
        self._even = format.proposal_exponent == 1.0

    def encode(self, record: TopKAndDrawn) -> bytes:
        top = self._top.encode(record.top)
        return len(top).to_bytes(4, "little") + top + self._drawn.encode(record.drawn)

    def decode(self, payloads: Sequence[bytes], rows: Sequence[int]) -> TopKAndDrawn:
        lengths = [int.from_bytes(payload[:4], "little") for payload in payloads]
        if any(length + 4 > len(payload) for length, payload in zip(lengths, payloads, strict=True)):
            raise damaged("its first part is longer than the whole")
        top = [payload[4 : 4 + length] for length, payload in zip(lengths, payloads, strict=True)]
        drawn = [payload[4 + length :] for length, payload in zip(lengths, payloads, strict=True)]
        kept, rest = self._top.decode(top, rows), self._drawn.decode(drawn, rows)
        if self._even:
            rest = replace(rest, weights=rest.weights * kept.log_tail.exp().unsqueeze(-1))
        return TopKAndDrawn(kept, rest)


def _top_k_codec(format: RecordFormat):
    return ExactTopKCodec(format) if format.exact else TopKCodec(format)


def make_codec(format: RecordFormat) -> Codec:
    match format.outcomes:
        case "top_k":
            return _top_k_codec(format)
        case "sampled":
            return DrawnCodec(format)
        case "top_k_sampled":
            return _TopKAndDrawnCodec(format)
        case "hidden":
            return HiddenCodec(format)
        case "projected":
            return ProjectedCodec(format)
    raise ConfigError(f"capture.outcomes: no codec for {format.outcomes!r}")

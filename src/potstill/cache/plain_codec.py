"""Records kept bit for bit: exact top-K rows, hidden rows, projected rows. Numbers lie in byte planes, so that zstd finds what is alike.

Which sequences and files they belong to is not known here.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.cache.records import HiddenRows, RecordFormat
from potstill.cache.streams import damaged, join, numbers, split
from potstill.signals import ProjectedOutcomes, TopKOutcomes

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def id_bytes(vocabulary_size: int) -> int:
    """Bytes that hold every id."""
    return max(1, (max(vocabulary_size - 1, 1).bit_length() + 7) // 8)


def planes(values: np.ndarray, bytes_each: int) -> list[np.ndarray]:
    """Little-endian numbers as one stream a byte place."""
    places = values.reshape(-1, 1).view(np.uint8)
    return [places[:, place] for place in range(bytes_each)]


def from_planes(streams: list[np.ndarray], count: int, dtype: str) -> np.ndarray:
    places = np.zeros((count, np.dtype(dtype).itemsize), np.uint8)
    for place, stream in enumerate(streams):
        places[:, place] = numbers(stream, "u1", count)
    return places.view(dtype).reshape(count)


def _float32(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy(), dtype=np.float32)


def _words(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """A tensor's own bits as unsigned words, since numpy has no bfloat16."""
    bits = tensor.contiguous().to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)
    return bits.numpy()


def _from_words(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(words).view(dtype)


class ExactTopKCodec:
    """Ids in as many bytes as the vocabulary needs, everything else float32 as it came, order kept, nothing renormalised."""

    def __init__(self, format: RecordFormat):
        self._k, self._temperature, self._vocabulary = format.k, format.temperature, format.vocabulary_size
        self._id_bytes = id_bytes(format.vocabulary_size)

    def encode(self, record: TopKOutcomes) -> bytes:
        streams = planes(record.ids.numpy().astype("<u4"), self._id_bytes)
        for tensor in (record.log_probs, record.log_tail, record.target_log_probs):
            streams += planes(_float32(tensor), 4) if tensor is not None else []
        return join(record.target_log_probs is not None, streams)

    def _one(self, payload: bytes, rows: int) -> tuple[np.ndarray, ...]:
        kept = rows * self._k
        known, streams = split(payload, [kept] * (self._id_bytes + 4) + [rows] * 8)
        if known > 1:
            raise damaged("its first byte is unknown")
        ids = from_planes(streams[: self._id_bytes], kept, "<u4")
        if ids.size and ids.max() >= self._vocabulary:
            raise damaged("an id lies outside the vocabulary")
        starts = range(self._id_bytes, self._id_bytes + 8 + 4 * known, 4)
        floats = [from_planes(streams[start : start + 4], count, "<f4") for start, count in zip(starts, [kept, rows, rows], strict=False)]
        return ids.reshape(rows, self._k), floats[0].reshape(rows, self._k), *floats[1:]

    def decode(self, payloads: Sequence[bytes], rows: Sequence[int]) -> TopKOutcomes:
        parts = [self._one(payload, n) for payload, n in zip(payloads, rows, strict=True)]
        return join_top_k(parts, self._k, self._temperature)


def join_top_k(parts: list[tuple[np.ndarray, ...]], k: int, temperature: float) -> TopKOutcomes:
    """Parts of (ids, log-probs, log-tail) or with the targets' log-probabilities: all parts that have rows, or none."""
    parts = [part for part in parts if len(part[0])] or parts[:1]
    if not parts:
        nothing = torch.zeros(0, k)
        return TopKOutcomes(nothing.long(), nothing, torch.zeros(0), torch.zeros(0), temperature)
    if len({len(part) for part in parts}) > 1:
        raise damaged("some sequences know their targets' log-probabilities and others do not")
    ids, log_probs, log_tail, *target = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return TopKOutcomes(ids.long(), log_probs, log_tail, target[0] if target else None, temperature)


class HiddenCodec:
    """The rows' own bytes in the format's dtype."""

    def __init__(self, format: RecordFormat):
        self._width, self._dtype = format.width, _TORCH[format.dtype]

    def encode(self, record: HiddenRows) -> bytes:
        return _words(record.hidden, self._dtype).tobytes()

    def decode(self, payloads: Sequence[bytes], rows: Sequence[int]) -> HiddenRows:
        size = self._dtype.itemsize * self._width
        for payload, n in zip(payloads, rows, strict=True):
            if len(payload) != n * size:
                raise damaged(f"{len(payload)} bytes are not {n} rows of {size}")
        words = np.frombuffer(b"".join(payloads), np.int32 if size == 4 * self._width else np.int16)
        return HiddenRows(_from_words(words.copy(), self._dtype).view(sum(rows), self._width))


class ProjectedCodec:
    """Projected rows in the format's dtype; bias and entropy in float32. Which head they belong to is the provenance's to say."""

    def __init__(self, format: RecordFormat):
        self._format, self._dtype = format, _TORCH[format.dtype]

    def encode(self, record: ProjectedOutcomes) -> bytes:
        parts = [_words(record.projection, self._dtype), _float32(record.bias), _float32(record.entropy)]
        return b"".join(part.tobytes() for part in parts)

    def decode(self, payloads: Sequence[bytes], rows: Sequence[int]) -> ProjectedOutcomes:
        width, word = self._format.width, np.int32 if self._dtype == torch.float32 else np.int16
        parts = []
        for payload, n in zip(payloads, rows, strict=True):
            if len(payload) != n * (width * self._dtype.itemsize + 8):
                raise damaged(f"{len(payload)} bytes are not {n} projected rows")
            split = len(payload) - 8 * n
            parts.append((np.frombuffer(payload[:split], word), np.frombuffer(payload[split:], np.float32).reshape(2, n)))
        projection = np.concatenate([part for part, _ in parts] or [np.zeros(0, word)])
        bias, entropy = np.concatenate([part for _, part in parts] or [np.zeros((2, 0), np.float32)], axis=1)
        return ProjectedOutcomes(
            _from_words(projection, self._dtype).view(sum(rows), width), torch.from_numpy(bias.copy()), torch.from_numpy(entropy.copy()),
            temperature=self._format.temperature,
        )  # fmt: skip

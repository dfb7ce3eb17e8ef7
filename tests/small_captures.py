"""Whole captures of a second: real models, real caches, real processes, made from one description each."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.cache.provenance import Provenance
from potstill.cache.records import Record, RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.capture.capture import CaptureSummary, capture
from potstill.capture.config import CaptureConfig
from potstill.capture.units import Share
from potstill.data.examples import ExampleSet, ExampleSetBuilder
from potstill.models.causal_lm import CausalLM
from potstill.teachers.local import LocalTeacher
from tiny import tiny_llama

VOCABULARY = 320


def example_set(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 21, source: str = "rows.jsonl") -> ExampleSet:
    """Sequences of unequal lengths; the first third of each is a prompt."""
    numbers, builder = random.Random(seed), ExampleSetBuilder(np.ones(VOCABULARY, np.int32))
    for number in range(count):
        length = numbers.randint(shortest, longest)
        builder.add([numbers.randrange(3, VOCABULARY) for _ in range(length)], [(length // 3, length)], source, number)
    return builder.build()


class CountingTeacher(LocalTeacher):
    """Writes down the key of every sequence that it is asked, in a file that outlives the process."""

    def __init__(self, causal_lm: CausalLM, counter: Path | None = None):
        super().__init__(causal_lm)
        self.counter = counter

    def score(self, batch, needs):
        if self.counter is not None:
            with self.counter.open("a") as file:
                file.write("".join(f"{document.key.hex()}\n" for document in batch.sequences()))
        return super().score(batch, needs)


def make_teacher(counter: Path | None = None) -> CountingTeacher:
    return CountingTeacher(CausalLM(tiny_llama(9, width=48, layers=1), VOCABULARY), counter)


def make_teacher_on(device: str, counter: Path | None = None) -> CountingTeacher:
    """As an actor on another machine makes it."""
    torch.set_num_threads(1)
    return make_teacher(counter)


def make_format(outcomes: str = "top_k", **changes: Any) -> RecordFormat:
    given = {
        "top_k": {"k": 16}, "sampled": {"num_samples": 20}, "top_k_sampled": {"k": 4, "num_samples": 20},
        "hidden": {"width": 48}, "projected": {"width": 32},
    }  # fmt: skip
    return RecordFormat(outcomes, VOCABULARY, **{**given[outcomes], **changes})  # type: ignore[arg-type]


PROVENANCE = Provenance({"teacher weights": "of the tests"})


def run_capture(
    path: Path | str, sets: Sequence[ExampleSet], *, format: RecordFormat | None = None, teacher=None, share: Share = Share(),  # noqa: B008
    config: dict[str, Any] | None = None, shard_bytes: int = 2**20, **given: Any,
) -> CaptureSummary:  # fmt: skip
    """One process's share, with units of about 8 sequences and a commit after each."""
    format = format or make_format()
    settings = CaptureConfig(**{"path": str(path), "batch_tokens": 128, "commit_seconds": 1e-6, **(config or {})})
    with CacheWriter(str(path), PROVENANCE, format, writer=share.writer, shard_bytes=shard_bytes) as writer:
        return capture(
            teacher or make_teacher(), sets, writer, format, settings, **{"seed": 5, "pad_token": 0, "share": share, "quiet": True, **given}
        )


def keys_of(*sets: ExampleSet) -> list[bytes]:
    """Of every sequence once, in their order."""
    return list(dict.fromkeys(examples.digest(number) for examples in sets for number in range(len(examples))))


def held(path: Path | str) -> list[str]:
    """The keys that are committed, in hexadecimal, sorted."""
    return sorted(map(bytes.hex, CacheReader(str(path)).keys()))


def tensors(record: Record) -> dict[str, torch.Tensor]:
    if hasattr(record, "top"):
        return {f"{part}.{name}": tensor for part in ("top", "drawn") for name, tensor in getattr(record, part)._tensors().items()}
    return record._tensors()


def require_same(left: CacheReader, right: CacheReader, keys: Sequence[bytes], *, atol: float = 0.0) -> None:
    """Record by record; draws as they are, numbers to `atol`."""
    for key in keys:
        one, other = tensors(left.read([key])), tensors(right.read([key]))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.shape == other[name].shape, name
            if tensor.dtype.is_floating_point and atol:
                assert torch.allclose(tensor, other[name], rtol=0, atol=atol), name
            else:
                assert torch.equal(tensor, other[name]), name

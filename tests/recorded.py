"""A cache made in a moment: real sequences, a real tiny teacher, the real scoring, codec and writer, one sequence after the other."""

import random
from dataclasses import replace

import numpy as np
import torch

from potstill.cache.codec import make_codec
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.capture.scoring import Asked, record_of
from potstill.capture.selecting import uniforms
from potstill.data.collation import collate
from potstill.data.examples import ExampleSet, ExampleSetBuilder
from potstill.models.causal_lm import CausalLM
from potstill.signals import Needs
from potstill.teachers.cached import HEAD_FILE, head_to_bytes
from potstill.teachers.local import LocalTeacher
from tiny import tiny_llama

VOCABULARY = 320
PROVENANCE = {
    "teacher weights": "w", "adapter weights": "none", "quantisation": "none", "teacher dtype": "float32", "vocabulary size": VOCABULARY,
    "tokenizer": "t", "template": "c", "truncation": {"max_tokens": 64, "too_long": "error"}, "notes": {"path": "/somewhere"},
}  # fmt: skip


def example_set(count: int = 9, *, seed: int = 0, routes: tuple[str, ...] = ("",), source: str = "train.jsonl") -> ExampleSet:
    """Sequences of unequal lengths whose first third is no target, and one whose only target stands in first place."""
    numbers = random.Random(seed)
    builder = ExampleSetBuilder(np.zeros(VOCABULARY, dtype=np.int64))
    for index in range(count):
        length = numbers.randint(4, 17)
        tokens = [numbers.randrange(3, VOCABULARY) for _ in range(length)]
        span = (0, 1) if index == 3 else (length // 3, length)
        builder.add(tokens, [span], source, index + 1, routes[index % len(routes)])
    return builder.build()


def local_teacher(seed: int = 5, **model) -> LocalTeacher:
    # Ten times the usual start: a teacher whose rows are far from uniform.
    return LocalTeacher(CausalLM(tiny_llama(seed, initializer_range=0.2, **model), VOCABULARY))


def record(path, teacher, examples, format: RecordFormat, *, project_on=None, seed: int = 0, **provenance) -> CacheReader:
    """Asks `teacher` for every example alone and writes its answers."""
    codec, extra = make_codec(format), {}
    if format.outcomes == "hidden":
        extra = {HEAD_FILE: head_to_bytes(teacher.causal_lm.head())}
    with CacheWriter(str(path), Provenance({**PROVENANCE, **provenance}), format, extra_files=extra) as writer:
        for index in range(len(examples)):
            key, batch = examples.digest(index), collate([[replace(examples[index], route="")]], pad_token=0)
            if not batch.num_targets:
                continue  # nothing is asked of it, so nothing is recorded
            outcomes = teacher.score(batch, Needs("full")).outcomes
            draws = torch.from_numpy(uniforms(seed, key, batch.num_targets, format.num_samples)) if format.num_samples else None
            answer = record_of(outcomes, Asked(batch.target_rows()[1], draws), format, project_on=project_on)
            writer.add(key, batch.num_targets, codec.encode(answer))
    return CacheReader(str(path))

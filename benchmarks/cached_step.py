"""A training step from recorded answers: against plain fine-tuning of the same student, and against the live teacher, in one run.

    python benchmarks/cached_step.py [--threads 1] [--steps 7] [--only sft,cached,live] [--sequences 64]

Each contender is our whole Trainer in a process of its own and takes an optimizer step whenever it is told to, as in training_step.py.
The student has 8M parameters, the teacher 30M, its final norm made loud, so that its answers are about as sharp as a language
model's; batch 8 x 512, vocabulary 32,000, K = 64, float32, AdamW. The cache is made by the real capture, which is timed too. Then
shuffled records are read and decoded on one core, eight sequences at a time, as fast as it goes.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from training_step import BATCH, TOKENS, VOCABULARY, Contender, Gate, _gated, make_models, measure

CONTENDERS = {
    "sft": "plain fine-tuning", "cached": "from the cache, top-64 and tail", "live_top_k": "live teacher, top-64 and tail",
    "live": "live teacher, all outcomes",
}  # fmt: skip
KEPT = 64


def make_examples(count: int):
    from potstill.data.examples import ExampleSetBuilder

    drawn = np.random.default_rng(2).integers(3, VOCABULARY, (count, TOKENS))
    builder = ExampleSetBuilder(np.zeros(VOCABULARY, dtype=np.int64))
    for number, tokens in enumerate(drawn):
        builder.add(tokens.tolist(), [(0, TOKENS)], "rows", number)
    return builder.build()


def make_teacher():
    from potstill.models.causal_lm import CausalLM
    from potstill.teachers.local import LocalTeacher

    _, teacher = make_models()
    teacher.model.norm.weight.fill_(10.0)
    return LocalTeacher(CausalLM(teacher, VOCABULARY))


def record(path: str, count: int) -> None:
    """The real capture of the rows that all train on; its speed beside the bare forward pass's."""
    import torch

    from potstill.cache.provenance import Provenance
    from potstill.cache.records import RecordFormat
    from potstill.cache.store import CacheWriter
    from potstill.capture.capture import capture
    from potstill.capture.config import CaptureConfig

    teacher, examples, form = make_teacher(), make_examples(count), RecordFormat("top_k", VOCABULARY, k=KEPT)
    tokens = torch.tensor([examples[index].tokens for index in range(BATCH)])
    with torch.no_grad():
        begun = time.process_time()
        teacher.causal_lm.inner(input_ids=tokens)
        bare = BATCH * TOKENS / (time.process_time() - begun)
    with CacheWriter(path, Provenance({"teacher weights": "of a benchmark"}), form) as writer:
        begun = time.process_time()
        made = capture(
            teacher, [examples], writer, form, CaptureConfig(path=path, k=KEPT, batch_tokens=BATCH * TOKENS), seed=0, pad_token=0,
            quiet=True,
        )  # fmt: skip
        rate = made.tokens / (time.process_time() - begun)
    print(f"captured {made.tokens:,} tokens at {made.bytes_per_row:.1f} bytes a token; {rate:,.0f} tokens a second of processor time")
    print(f"(the forward pass to whole logits alone, once: {bare:,.0f})", flush=True)


def reading_rate(path: str, seconds: float = 10.0) -> float:
    """Target rows a second of processor time: shuffled sequences, eight at a time, checked and decoded."""
    from potstill.cache.store import CacheReader

    reader = CacheReader(path)
    keys = list(reader.keys())
    random.Random(0).shuffle(keys)
    rows, begun, place = 0, time.process_time(), 0
    while time.process_time() - begun < seconds:
        rows += len(reader.read([keys[(place + offset) % len(keys)] for offset in range(BATCH)]))
        place += BATCH
    return rows / (time.process_time() - begun)


def contend(name: str, threads: int, path: str, count: int) -> None:
    import torch

    from potstill.cache.store import CacheReader
    from potstill.models.causal_lm import CausalLM
    from potstill.objectives.distribution import DistributionMatching
    from potstill.objectives.execution import Execution
    from potstill.objectives.likelihood import Likelihood
    from potstill.run_folder import RunFolder
    from potstill.teachers.cached import CachedTeacher
    from potstill.training import trainer
    from potstill.training.config import TrainingConfig
    from potstill.training.distiller import Distiller

    torch.set_num_threads(threads)
    gate, execution = Gate(), Execution(compile="on")
    if name == "sft":
        objective, teacher = Likelihood(vocabulary_size=VOCABULARY, execution=execution), None
    else:
        of_top = {} if name == "live" else {"support": "top_k_tail", "parameters": {"top_k": KEPT}}
        objective = DistributionMatching(kd_ratio=0.5, vocabulary_size=VOCABULARY, execution=execution, **of_top)
        teacher = CachedTeacher(CacheReader(path), vocabulary_size=VOCABULARY) if name == "cached" else make_teacher()
    config = TrainingConfig(
        steps=1000, batch_size=BATCH, precision="float32", learning_rate=1e-4, scheduler="constant", save_steps=1000, logging_steps=1
    )
    make = trainer.MetricsToFolder
    trainer.MetricsToFolder = lambda folder: _gated(gate, make(folder))
    student, _ = make_models()
    with tempfile.TemporaryDirectory() as scratch, RunFolder.open(Path(scratch) / "run", {}) as folder:
        trainer.train(
            Distiller(CausalLM(student, VOCABULARY), objective), teacher, make_examples(count), None, config, folder, seed=0,
            pad_token=0, quiet=True,
        )  # fmt: skip


def table(found: dict[str, dict[str, float]]) -> str:
    floor = found.get("sft", next(iter(found.values())))
    lines = ["| | processor time | ratio to plain fine-tuning | peak beyond, MiB | ratio |", "|---|---|---|---|---|"]
    for name, row in found.items():
        time_ratio, memory_ratio = row["cpu"] / floor["cpu"], row["peak"] / floor["peak"]
        lines.append(f"| {CONTENDERS[name]} | {row['cpu']:.2f} s | {time_ratio:.3f} | {row['peak']:,.0f} | {memory_ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each contender")
    parser.add_argument("--sequences", type=int, default=64, help="recorded sequences of 512 tokens")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, separated by commas")
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contend:
        contend(given.contend, given.threads, given.cache, given.sequences)
        return
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "cache")
        record(path, given.sequences)
        words = ["--cache", path, "--sequences", str(given.sequences)]
        found = measure(
            given.only.split(","), given.threads, given.steps, lambda name, threads: Contender(name, threads, script=__file__, words=words)
        )
        rate = reading_rate(path)
    print(f"batch {BATCH} x {TOKENS}, vocabulary {VOCABULARY:,}, K = {KEPT}, float32, {given.threads} thread(s), torch {torch.__version__}")
    print(f"medians of {given.steps} interleaved steps\n\n{table(found)}\n")
    step = found.get("sft", found.get("cached"))
    if step:
        appetite = BATCH * (TOKENS - 1) / step["cpu"]
        print(f"reading: {rate:,.0f} rows a second on one core, {rate / appetite:.0f} times the {appetite:,.0f} that a step takes")


if __name__ == "__main__":
    sys.exit(main())

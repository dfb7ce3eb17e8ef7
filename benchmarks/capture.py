"""Capture's tokens a second against the teacher's bare forward pass on the same batches, in one interleaved run.

    python benchmarks/capture.py [--threads 1] [--rounds 5] [--k 64]

Bare is what a capture cannot avoid: the trunk and the whole head over every target row, in float32, and nothing kept. A capture does
the same and the rest: the top K, the mass outside it, records, coding and commits to a disk. All take turns in one process on the
same batches; the time is the processor's, of all threads, so that the recorder's own thread is on the clock too. Peak memory is the
highest resident memory of one round in a fresh process beyond what stood before it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

from measuring import peak

VOCABULARY, WIDTH, LAYERS, HEADS = 32_000, 512, 4, 8
SEQUENCES, SHORTEST, LONGEST = 16, 128, 512
BATCH_TOKENS = 2048
CONTENDERS = {
    "bare": "trunk and whole head (bare)",
    "top_k": "capture, top_k",
    "sampled": "capture, sampled, 50 draws",
    "top_k_sampled": "capture, top_k_sampled, K = 16 and 50 draws",
    "whole": "trunk, whole head, log_softmax, topk",
}


class Bench:
    """The teacher, the data, and one round of each contender."""

    def __init__(self, k: int):
        import numpy as np
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from potstill.capture.units import Share, sequences_of, units
        from potstill.data.collation import collate
        from potstill.data.examples import ExampleSetBuilder
        from potstill.models.causal_lm import CausalLM
        from potstill.teachers.local import LocalTeacher

        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=int(8 * WIDTH / 3) // 64 * 64, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=LONGEST, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=1, pad_token_id=0, use_cache=False,
        ))  # fmt: skip
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model = CausalLM(model.eval().requires_grad_(False), VOCABULARY)
        self.teacher, self.k = LocalTeacher(self.model), k
        numbers, builder = random.Random(2), ExampleSetBuilder(np.ones(VOCABULARY, np.int32))
        for number in range(SEQUENCES):
            length = numbers.randint(SHORTEST, LONGEST)
            builder.add([numbers.randrange(3, VOCABULARY) for _ in range(length)], [(0, length)], "rows", number)
        self.examples = builder.build()
        sequences = sequences_of([self.examples], Share())
        planned = units(sequences.lengths, BATCH_TOKENS)
        self.batches = [collate(sequences.examples(unit), pad_token=0, widest=LONGEST) for unit in planned]
        self.tokens = int(sequences.lengths.sum())

    def round(self, name: str) -> None:
        import torch

        if name not in ("bare", "whole"):
            return self._capture(name)
        with torch.inference_mode():
            for batch in self.batches:
                logits = self.model.head().logits(self.model.rows(batch))
                if name == "whole":
                    logits.log_softmax(-1).topk(self.k, -1)
        return None

    def _capture(self, outcomes: str) -> None:
        from potstill.cache.provenance import Provenance
        from potstill.cache.records import RecordFormat
        from potstill.cache.store import CacheWriter
        from potstill.capture.capture import capture
        from potstill.capture.config import CaptureConfig

        sizes = {"top_k": {"k": self.k}, "sampled": {"num_samples": 50}, "top_k_sampled": {"k": 16, "num_samples": 50}}
        format = RecordFormat(outcomes, VOCABULARY, **sizes[outcomes])
        with tempfile.TemporaryDirectory() as folder:
            config = CaptureConfig(path=folder, batch_tokens=BATCH_TOKENS)
            with CacheWriter(folder, Provenance({}), format) as writer:
                capture(self.teacher, [self.examples], writer, format, config, seed=0, pad_token=0, quiet=True)


def print_peak(name: str, k: int) -> None:
    """The memory of the second round in this process: the first loads and allocates what stays."""
    bench = Bench(k)
    print(json.dumps(peak(lambda: bench.round(name))))


def measure(names: list[str], rounds: int, k: int) -> tuple[Bench, dict[str, list[float]]]:
    bench = Bench(k)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):  # the first warms up
        for name in names:
            began = time.process_time()
            bench.round(name)
            if number:
                seconds[name].append(time.process_time() - began)
    return bench, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, separated by commas")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    import torch

    torch.set_num_threads(given.threads)
    if given.peak:
        print_peak(given.peak, given.k)
        return
    names = given.only.split(",")
    bench, seconds = measure(names, given.rounds, given.k)
    print(f"{bench.parameters / 1e6:.1f}M parameters, vocabulary {VOCABULARY:,}, K = {given.k}, {bench.tokens:,} tokens in "
          f"{len(bench.batches)} batches, float32, {given.threads} thread(s), torch {version('torch')}")  # fmt: skip
    print(f"medians of {given.rounds} interleaved rounds\n")
    print("| | tokens a second of processor time | ratio to bare | peak beyond, MiB |\n|---|---|---|---|")
    for name in names:
        ratios = [bare / own for bare, own in zip(seconds["bare"], seconds[name], strict=True)]
        command = [sys.executable, __file__, "--peak", name, "--threads", str(given.threads), "--k", str(given.k)]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        memory = json.loads(child.stdout.splitlines()[-1])
        speed = bench.tokens / statistics.median(seconds[name])
        print(f"| {CONTENDERS[name]} | {speed:,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
              f"| {memory:,.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()

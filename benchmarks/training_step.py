"""A training step as a whole: our Trainer against a bare loop and against installed TRL, in one interleaved run.

    python benchmarks/training_step.py [--threads 1] [--steps 5] [--only floor,ours]

Each contender lives in a process of its own and takes one optimizer step whenever it is told to, so that all of them meet the same
noise; the time is the processor's, the memory is the highest resident memory of a step beyond what stood before it. All train the
same student (8M parameters, vocabulary 32,000) on the same rows against the same teacher (30M), forward KL, float32, AdamW.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

VOCABULARY, BATCH, TOKENS = 32_000, 8, 512
CONTENDERS = {
    "floor": "bare loop, compiled fused loss (the floor)",
    "eager": "bare loop, fused loss, not compiled",
    "ours": "Potstill: the whole Trainer",
    "whole": "bare loop, whole logits",
    "gkd": "TRL GKDTrainer, lmbda 0",
    "distillation": "TRL DistillationTrainer, its generation left out",
}


# ---------------------------------------------------------------- one contender, in its own process


def _status(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


class Gate:
    """Between two steps: says how the last one went and waits for the word to take the next."""

    def __init__(self):
        self.began: tuple[float, float, float] | None = None

    def wait(self) -> None:
        if self.began is not None:
            print(json.dumps(self.report()), flush=True)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.began = (time.perf_counter(), time.process_time(), _status("VmRSS"))

    def report(self) -> dict[str, float]:
        """How the step went: seconds and MiB by name, the first of them "wall"."""
        assert self.began is not None
        wall, processor, before = self.began
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - processor, "peak": _status("VmHWM") - before}


def _model(width: int, layers: int, heads: int, seed: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=int(8 * width / 3) // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=TOKENS, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, use_cache=False,
    ))  # fmt: skip


def make_models():
    """Student of about 8M parameters and teacher of about 30M, tied heads."""
    return _model(192, 4, 6, 0), _model(512, 4, 8, 1).eval().requires_grad_(False)


def make_rows() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (4 * BATCH, TOKENS), generator=generator).tolist()


def run_bare(gate: Gate, *, whole: bool = False, compile: str = "off") -> None:
    """What a careful person writes by hand."""
    import torch
    from torch.nn import functional

    from potstill.objectives.execution import Execution
    from potstill.objectives.fused import fused_distillation_loss

    student, teacher = make_models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    rows, execution, step = torch.tensor(make_rows()), Execution(compile=compile), 0
    student.train()
    while True:
        gate.wait()
        tokens = rows[(step * BATCH) % len(rows) :][:BATCH]
        if whole:
            with torch.no_grad():
                aims = functional.log_softmax(teacher(input_ids=tokens).logits[:, :-1].float(), -1)
            found = functional.log_softmax(student(input_ids=tokens).logits[:, :-1].float(), -1)
            loss = functional.kl_div(found, aims, log_target=True, reduction="sum") / (BATCH * (TOKENS - 1))
            del aims, found
        else:
            with torch.no_grad():
                aims = teacher.model(input_ids=tokens).last_hidden_state[:, :-1]
            hidden = student.model(input_ids=tokens).last_hidden_state[:, :-1]
            total, count = fused_distillation_loss(
                hidden, student.lm_head.weight, aims, teacher.lm_head.weight, tokens[:, 1:], kd_ratio=1.0, execution=execution
            )
            loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def run_ours(gate: Gate) -> None:
    from potstill.batch import Example
    from potstill.models.causal_lm import CausalLM
    from potstill.objectives.distribution import DistributionMatching
    from potstill.objectives.execution import Execution
    from potstill.run_folder import RunFolder
    from potstill.teachers.local import LocalTeacher
    from potstill.training import trainer
    from potstill.training.config import TrainingConfig
    from potstill.training.distiller import Distiller

    student, teacher = make_models()
    objective = DistributionMatching(kd_ratio=1.0, vocabulary_size=VOCABULARY, execution=Execution(compile="on"))
    config = TrainingConfig(
        steps=1000, batch_size=BATCH, precision="float32", learning_rate=1e-4, scheduler="constant", save_steps=1000, logging_steps=1
    )
    examples = [Example(row, [True] * TOKENS, index) for index, row in enumerate(make_rows())]
    make = trainer.MetricsToFolder
    trainer.MetricsToFolder = lambda folder: _gated(gate, make(folder))
    with tempfile.TemporaryDirectory() as scratch, RunFolder.open(Path(scratch) / "run", {}) as folder:
        trainer.train(
            Distiller(CausalLM(student, VOCABULARY), objective), LocalTeacher(CausalLM(teacher, VOCABULARY)), examples, None, config,
            folder, seed=0, pad_token=0, quiet=True,
        )  # fmt: skip


def _gated(gate: Gate, callback):
    """Waits where a step ends, which is where the next begins: everything that the Trainer does in between is on the clock."""
    callback.on_train_begin = callback.on_step_end = lambda *_, **__: gate.wait()
    return callback


def run_trl(gate: Gate, name: str) -> None:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    student, teacher = make_models()
    vocabulary = {f"<{index}>": index for index in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, "<2>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<1>", unk_token="<2>")
    rows = torch.tensor(make_rows())
    shared = {
        "max_steps": 1000, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "use_cpu": True,
        "lr_scheduler_type": "constant", "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "output_dir": tempfile.mkdtemp(), "beta": 0.0,
    }  # fmt: skip
    data = Dataset.from_list([{"prompt": "<3>", "messages": [], "number": index} for index in range(len(rows))])
    callbacks = [_gated(gate, TrainerCallback())]
    if name == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        def collate(examples):
            tokens = rows[[example["number"] for example in examples]]
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens, "prompts": tokens[:, :1]}

        arguments = GKDConfig(**shared, lmbda=0.0, seq_kd=False, max_length=TOKENS, remove_unused_columns=False)
        GKDTrainer(
            student, teacher, arguments, data_collator=collate, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
        ).train()
        return
    from trl import DistillationConfig, DistillationTrainer

    class OffPolicy(DistillationTrainer):
        """The rows of the others in the place of the student's own text, whose writing is not what is measured."""

        def _prepare_inputs(self, generation_batch):
            tokens = rows[(self.state.global_step * BATCH) % len(rows) :][:BATCH]
            mask = torch.ones_like(tokens)
            return {
                "prompt_ids": tokens[:, :1], "prompt_mask": mask[:, :1], "completion_ids": tokens[:, 1:], "completion_mask": mask[:, 1:],
                "num_items_in_batch": mask[:, 1:].sum().float(),
            }  # fmt: skip

    OffPolicy(student, teacher, DistillationConfig(**shared), train_dataset=data, processing_class=tokenizer, callbacks=callbacks).train()


def contend(name: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    gate = Gate()
    if name in ("floor", "eager", "whole"):
        run_bare(gate, whole=name == "whole", compile="on" if name == "floor" else "off")
    elif name == "ours":
        run_ours(gate)
    else:
        run_trl(gate, name)


# ---------------------------------------------------------------- the run that holds them together


class Contender:
    """A process that takes steps when told to; `measured` grows by one a step. None for a peer that is not installed."""

    def __init__(self, name: str, threads: int, script: str = __file__, words: Sequence[str] = (), python: str = sys.executable):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [python, script, "--contend", name, "--threads", str(threads), *words]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, **pipes, text=True, env=environment)
        self.measured: list[dict[str, float]] = []

    def step(self) -> dict[str, float] | None:
        """One optimizer step; None where the process has died."""
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in self._process.stdout:
            if line.startswith('{"wall"'):  # TRL prints its own lines, in Python's quotes
                return json.loads(line)
        return None

    def last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else "no word"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(
    names: list[str], threads: int, steps: int, contender_of: Callable[[str, int], Contender] = Contender
) -> dict[str, dict[str, float]]:
    contenders = {name: contender_of(name, threads) for name in names}
    try:
        for name in list(contenders):  # the first steps compile, allocate and make the optimizer's state
            if any(contenders[name].step() is None for _ in range(2)):
                print(f"{name}: does not run here: {contenders.pop(name).last_words()}", file=sys.stderr)
        for _ in range(steps):
            for contender in contenders.values():
                if (report := contender.step()) is not None:
                    contender.measured.append(report)
        return {
            name: {key: statistics.median(row[key] for row in contender.measured) for key in contender.measured[0]}
            for name, contender in contenders.items()
        }
    finally:
        for contender in contenders.values():
            contender.end()


def table(found: dict[str, dict[str, float]]) -> str:
    floor = found.get("floor", next(iter(found.values())))["cpu"]
    lines = ["| | processor time | ratio to the floor | peak beyond, MiB |", "|---|---|---|---|"]
    lines += [f"| {CONTENDERS[name]} | {row['cpu']:.2f} s | {row['cpu'] / floor:.2f} | {row['peak']:,.0f} |" for name, row in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each contender")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, separated by commas")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contend:
        contend(given.contend, given.threads)
        return
    found = measure(given.only.split(","), given.threads, given.steps)
    print(f"batch {BATCH} x {TOKENS}, vocabulary {VOCABULARY:,}, float32, {given.threads} thread(s)")
    print(f"medians of {given.steps} interleaved steps, torch {version('torch')}, trl {version('trl') if find_spec('trl') else 'absent'}\n")
    print(table(found))


if __name__ == "__main__":
    main()

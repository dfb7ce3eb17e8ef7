"""An on-policy step as a whole: the student writes, the teacher reads, the student learns. Ours against a bare loop and installed TRL.

    python benchmarks/on_policy_step.py [--threads 1] [--steps 5] [--only floor,generate,ours,gkd,distillation] [--peers PYTHON]

As in training_step.py each contender has a process of its own and takes a step when it is told to. Student 8M, teacher 30M, vocabulary
32,000, 8 prompts of 128 tokens and 128 new ones at temperature 1, reverse KL on the new ones, float32, AdamW. Ours also says where its
time goes: what is outside of writing, of the teacher's forward and of the student's forward, loss and backward is what a trainer costs.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from training_step import BATCH, VOCABULARY, Contender, Gate, _gated, make_models, measure

PROMPT, NEW = 128, 128
CONTENDERS = {
    "floor": "bare loop, a decoding loop of ten lines (the floor)",
    "generate": "bare loop, transformers' generate",
    "ours": "Potstill: the whole Trainer",
    "gkd": "TRL GKDTrainer, lmbda 1",
    "distillation": "TRL DistillationTrainer",
}
PEERS = ("gkd", "distillation")
PARTS = {"writing": "writing", "teacher": "teacher's forward", "student": "student's forward, loss and backward"}


# ---------------------------------------------------------------- one contender, in its own process


class Watch(Gate):
    """A gate that also sends how long the parts of the step took, in processor seconds, each without the parts inside it."""

    def __init__(self):
        super().__init__()
        self.parts: dict[str, float] = {}
        self._inside = 0.0

    def report(self) -> dict[str, float]:
        parts, self.parts = self.parts, {}
        return {**super().report(), **parts}

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        began, before, self._inside = time.process_time(), self._inside, 0.0
        yield
        whole = time.process_time() - began
        self.parts[part] = self.parts.get(part, 0.0) + whole - self._inside
        self._inside = before + whole

    def timing(self, part: str, function: Callable) -> Callable:
        def run(*arguments, **named):
            with self.timed(part):
                return function(*arguments, **named)

        return run


def make_prompts() -> list[list[int]]:
    import torch

    return torch.randint(3, VOCABULARY, (4 * BATCH, PROMPT), generator=torch.Generator().manual_seed(2)).tolist()


def _written(student, prompts):
    """A decoding loop: nothing ends early, so that every contender writes as much."""
    import torch

    rows, drawn, cache = [prompts], prompts, None
    with torch.no_grad():
        for _ in range(NEW):
            output = student.model(input_ids=drawn, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            drawn = student.lm_head(output.last_hidden_state[:, -1]).softmax(-1).multinomial(1)
            rows.append(drawn)
    return torch.cat(rows, 1)


def run_bare(gate: Gate, *, generate: bool) -> None:
    """What a careful person writes by hand."""
    import torch

    from potstill.objectives.execution import Execution
    from potstill.objectives.fused import fused_distillation_loss

    student, teacher = make_models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    rows, execution, step = torch.tensor(make_prompts()), Execution(compile="on"), 0
    given = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "temperature": 1.0, "eos_token_id": None, "use_cache": True}
    while True:
        gate.wait()
        prompts = rows[(step * BATCH) % len(rows) :][:BATCH]
        student.eval()
        mask = torch.ones_like(prompts)
        tokens = student.generate(input_ids=prompts, attention_mask=mask, **given) if generate else _written(student, prompts)
        student.train()
        with torch.no_grad():
            aims = teacher.model(input_ids=tokens).last_hidden_state[:, PROMPT - 1 : -1]
        hidden = student.model(input_ids=tokens).last_hidden_state[:, PROMPT - 1 : -1]
        total, count = fused_distillation_loss(
            hidden, student.lm_head.weight, aims, teacher.lm_head.weight, tokens[:, PROMPT:], divergence="reverse_kl", kd_ratio=1.0,
            execution=execution,
        )  # fmt: skip
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def run_ours(gate: Watch) -> None:
    from accelerate import Accelerator

    from potstill.batch import Example
    from potstill.models.causal_lm import CausalLM
    from potstill.objectives.distribution import DistributionMatching
    from potstill.objectives.execution import Execution
    from potstill.rollouts.authors import OneAuthor
    from potstill.rollouts.endings import Endings
    from potstill.rollouts.local import LocalGenerator
    from potstill.rollouts.prompts import Prompts
    from potstill.rollouts.writer import Writer
    from potstill.rollouts.writing import Sampling
    from potstill.run_folder import RunFolder
    from potstill.teachers.local import LocalTeacher
    from potstill.training import trainer
    from potstill.training.config import TrainingConfig
    from potstill.training.distiller import Distiller

    student, teacher = (CausalLM(model, VOCABULARY) for model in make_models())
    examples = [Example([*row, 3], [False] * PROMPT + [True], index) for index, row in enumerate(make_prompts())]
    generator = LocalGenerator(student, stop_ids=(), pad_token=0)
    writer = Writer(
        Prompts(examples, max_tokens=PROMPT + NEW, max_new_tokens=NEW), generator, Sampling(max_new_tokens=NEW), Endings(()), seed=0,
        by="student",
    )  # fmt: skip
    objective = DistributionMatching(divergence="reverse_kl", kd_ratio=1.0, vocabulary_size=VOCABULARY, execution=Execution(compile="on"))
    config = TrainingConfig(
        steps=1000, batch_size=BATCH, precision="float32", learning_rate=1e-4, scheduler="constant", save_steps=1000, logging_steps=1
    )
    local, distiller = LocalTeacher(teacher), Distiller(student, {"dataset": objective, "student": objective})
    generator.generate = gate.timing("writing", generator.generate)
    local.score = gate.timing("teacher", local.score)
    distiller.forward = gate.timing("student", distiller.forward)
    Accelerator.backward = gate.timing("student", Accelerator.backward)
    make = trainer.MetricsToFolder
    trainer.MetricsToFolder = lambda folder: _gated(gate, make(folder))
    with tempfile.TemporaryDirectory() as scratch, RunFolder.open(Path(scratch) / "run", {}) as folder:
        trainer.train(
            distiller, local, examples, None, config, folder, seed=0, pad_token=0, quiet=True, author=OneAuthor("student", writer)
        )


def run_trl(gate: Gate, name: str) -> None:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    student, teacher = make_models()
    vocabulary = {f"<{index}>": index for index in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, "<2>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<1>", unk_token="<2>")
    rows = make_prompts()
    shared = {
        "max_steps": 1000, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "use_cpu": True,
        "lr_scheduler_type": "constant", "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "output_dir": tempfile.mkdtemp(), "beta": 1.0, "temperature": 1.0,
    }  # fmt: skip
    # The end-of-text id comes once in 32,000 draws; nothing else ends an answer.
    prompts = [" ".join(f"<{token}>" for token in row) for row in rows]
    data = Dataset.from_list([{"prompt": prompt, "messages": [], "number": index} for index, prompt in enumerate(prompts)])
    callbacks = [_gated(gate, TrainerCallback())]
    if name == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        def collate(examples):
            tokens = torch.tensor([rows[example["number"]] for example in examples])
            mask = torch.ones_like(tokens)
            return {"input_ids": tokens, "attention_mask": mask, "labels": tokens, "prompts": tokens, "prompt_attention_mask": mask}

        arguments = GKDConfig(
            **shared, lmbda=1.0, seq_kd=False, max_new_tokens=NEW, max_length=PROMPT + NEW, remove_unused_columns=False
        )
        GKDTrainer(
            student, teacher, arguments, data_collator=collate, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
        ).train()
        return
    from trl import DistillationConfig, DistillationTrainer

    arguments = DistillationConfig(**shared, max_completion_length=NEW)
    DistillationTrainer(
        student, teacher, arguments, train_dataset=data.select_columns(["prompt"]), processing_class=tokenizer, callbacks=callbacks
    ).train()


def contend(name: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    gate = Watch()
    if name in ("floor", "generate"):
        run_bare(gate, generate=name == "generate")
    elif name == "ours":
        run_ours(gate)
    else:
        run_trl(gate, name)


# ---------------------------------------------------------------- the run that holds them together


def table(found: dict[str, dict[str, float]]) -> str:
    floor = found.get("floor", next(iter(found.values())))["cpu"]
    lines = ["| | processor time | ratio to the floor | peak beyond, MiB |", "|---|---|---|---|"]
    lines += [f"| {CONTENDERS[name]} | {row['cpu']:.2f} s | {row['cpu'] / floor:.2f} | {row['peak']:,.0f} |" for name, row in found.items()]
    return "\n".join(lines)


def shares(row: dict[str, float]) -> str:
    """Where our time goes, in percent of the step."""
    parts = {PARTS[part]: row[part] for part in PARTS}
    parts["everything else"] = row["cpu"] - sum(parts.values())
    return "\n".join(["| of our step | share |", "|---|---|", *(f"| {name} | {100 * s / row['cpu']:.1f} % |" for name, s in parts.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each contender")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, separated by commas")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter in which TRL is installed, where it is another one")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contend:
        contend(given.contend, given.threads)
        return

    def contender(name: str, threads: int) -> Contender:
        return Contender(name, threads, __file__, python=given.peers if name in PEERS else sys.executable)

    found = measure(given.only.split(","), given.threads, given.steps, contender)
    print(f"batch {BATCH}, {PROMPT} + {NEW} tokens, vocabulary {VOCABULARY:,}, float32, {given.threads} thread(s)")
    print(f"medians of {given.steps} interleaved steps, torch {version('torch')}\n")
    print(table(found))
    if "ours" in found:
        print(f"\n{shares(found['ours'])}")


if __name__ == "__main__":
    main()

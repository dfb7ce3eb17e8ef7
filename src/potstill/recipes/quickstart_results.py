"""What the quickstart measures on its test tasks, and how it says it: a table, the differences in words, a picture.

Every number comes from the models in the folder; nothing here knows which of them should be better.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from potstill.batch import Example
from potstill.data import tasks
from potstill.data.collation import collate
from potstill.data.config import DataConfig
from potstill.data.lines import parse_json_line
from potstill.data.prepare import prepare
from potstill.evaluation.agreement import measure_documents
from potstill.evaluation.exact_match import EXACT_MATCH, Question, exact_match
from potstill.evaluation.record import EvaluationRecord, ModelRecord, TaskRecord, compare_models
from potstill.evaluation.scores import Scores
from potstill.evaluation.task import Outcome
from potstill.models.causal_lm import CausalLM
from potstill.models.config import ModelConfig
from potstill.models.loading import load_model, load_tokenizer
from potstill.reporting.summary import summarise
from potstill.reporting.terminal import curves_picture, print_evaluation

METRICS = ("bits_per_byte", "top1_agreement", "forward_kl", "acceptance_rate")
SFT, KD = "student, SFT", "student, KD"
TASK = "test-tasks"
_MOST_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Contestants:
    """The teacher's folder, and by seed the run folders of the students without and with it."""

    teacher: Path
    without: Mapping[int, Path]
    taught: Mapping[int, Path]
    is_scrambled: bool


class Exam:
    """The test tasks as one tokenizer writes them: sequences to be predicted and questions to be answered."""

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        self.tokenizer = tokenizer
        self.rows = [parse_json_line(line) for line in file.read_bytes().splitlines()]
        config = DataConfig(train=str(file), format="instruct", max_tokens=max_tokens, packing=False)
        self.examples: list[Example] = list(prepare(config, tokenizer, seed=0, progress=False).train)
        self.questions = [self._question(example) for example in self.examples]

    def _question(self, example: Example) -> Question:
        row = {name: str(value) for name, value in self.rows[example.index].items()}
        return Question(example.tokens[: example.is_target.index(True)], lambda text: tasks.check(row, text), example.index)

    def take(self, model: CausalLM, teacher: CausalLM | None) -> Outcome:
        answers = exact_match(model, self.tokenizer, self.questions, max_new_tokens=_MOST_ANSWER_TOKENS, batch_size=150)
        batches = (collate([[example] for example in self.examples[start : start + 50]], pad_token=0)
                   for start in range(0, len(self.examples), 50))  # fmt: skip
        distances = measure_documents(model, batches, teacher, tokenizer=self.tokenizer)
        right = answers.scores()
        if right.items != distances.items:
            raise AssertionError("questions and texts are the same rows")
        metrics = {**right.metrics, **{name: distances.metrics[name] for name in METRICS if name in distances.metrics}}
        totals = np.concatenate([right.totals, distances.totals], axis=1)
        return Outcome(Scores(right.items, (*right.columns, *distances.columns), totals, metrics, EXACT_MATCH))


def measure(contestants: Contestants, folder: Path, *, max_tokens: int, console: Console, quiet: bool) -> dict[str, Any]:
    """The record of the evaluation: teacher, students without it and students with it, on the test tasks."""
    tokenizer = load_tokenizer(ModelConfig(path=str(contestants.teacher)))
    exam = Exam(folder / "data" / "test.jsonl", tokenizer, max_tokens)
    teacher = load_for_exam(contestants.teacher, tokenizer)
    students = [*contestants.without.values(), *contestants.taught.values()]
    with Progress(console=console, disable=quiet, transient=True) as progress:
        bar = progress.add_task("Answering the test tasks", total=len(students) + 1)
        of_teacher = exam.take(teacher, None)
        progress.advance(bar)
        measured, parameters = [], 0
        for run in students:
            student = load_for_exam(run / "student", tokenizer)
            parameters = student.inner.num_parameters()
            measured.append(exam.take(student, teacher))
            progress.advance(bar)
    task = TaskRecord(TASK, "quickstart", EXACT_MATCH, data={"rows": len(exam.rows), "seeds": len(contestants.without)})
    sft = ModelRecord(SFT, {TASK: measured[: len(contestants.without)]}, parameters)
    kd = ModelRecord(KD, {TASK: measured[len(contestants.without) :]}, parameters)
    return EvaluationRecord(
        title="A scrambled teacher and its students" if contestants.is_scrambled else "A teacher and its students",
        tasks=[task], models=[ModelRecord("teacher", {TASK: [of_teacher]}, teacher.inner.num_parameters(), is_teacher=True), sft, kd],
        comparisons=compare_models([task], [(kd, sft)]), baseline=SFT,
        warnings=["the teacher's weights are scrambled: it knows nothing"] if contestants.is_scrambled else [],
    ).to_json()


def load_for_exam(folder: Path, tokenizer: PreTrainedTokenizerBase) -> CausalLM:
    return CausalLM(load_model(ModelConfig(path=str(folder)), precision="float32"), len(tokenizer))


def show(record: Mapping[str, Any], contestants: Contestants, console: Console) -> None:
    """The table with the differences in words, and the students' validation curves as a picture."""
    print_evaluation(record, console)
    seed = min(contestants.without)
    curves = {
        name: summarise(run).curves["eval_loss/ce"]
        for name, run in ((SFT, contestants.without[seed]), (KD, contestants.taught[seed]))
    }
    console.print(curves_picture(curves, title=f"cross-entropy on the validation tasks, nats per target, seed {seed}"))

"""What a model chose or wrote for each question, for human eyes, and how well its probabilities over choices are calibrated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from potstill.evaluation.agreement import calibration_bin
from potstill.evaluation.harness.building import Questions
from potstill.evaluation.harness.scoring import Answered, Table
from potstill.evaluation.metrics import NUM_CALIBRATION_BINS
from potstill.evaluation.scores import Formula, Metric
from potstill.evaluation.task import Sample, Series

KEPT = 100
"""So many answers are kept for human eyes."""


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: log-probabilities of its choices, and which of them are right."""

    texts: Sequence[str]
    log_probs: np.ndarray
    right: frozenset[int]

    @property
    def probabilities(self) -> np.ndarray:
        """Made to add up to 1 over the choices."""
        shifted = np.exp(self.log_probs - self.log_probs.max())
        return shifted / shifted.sum()

    def picked(self, normalised: bool) -> int:
        """The likeliest choice, by characters where the accuracy is normalised by length."""
        lengths = np.array([float(len(text)) for text in self.texts]) if normalised else 1.0
        return int(np.argmax(self.log_probs / lengths))


def choice_of(task: Any, sample: Mapping[str, Any]) -> Choice | None:
    """None for what is no question with choices, or has its own way of saying what is right."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return None
    doc = sample["doc"]
    texts = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    places = [texts.index(one) if isinstance(one, str) and one in texts else one for one in (gold if isinstance(gold, list) else [gold])]
    log_probs = np.array([answer[0] for answer in sample["filtered_resps"][: len(texts)]], dtype=np.float64)
    return Choice(texts, log_probs, frozenset(one for one in places if isinstance(one, int)))


def add_calibration(table: Table, choices: Sequence[Choice | None]) -> Series | None:
    """The expected calibration error of the likeliest choice, and its curve; nothing where a question has no choices."""
    known = [choice for choice in choices if choice is not None]
    if len(known) != len(choices) or not known:
        return None
    top = np.array([choice.probabilities.max() for choice in known])
    right = np.array([choice.picked(normalised=False) in choice.right for choice in known], dtype=np.float64)
    bins = calibration_bin(torch.from_numpy(top), NUM_CALIBRATION_BINS).numpy()
    names = [f"calibration {number}" for number in range(NUM_CALIBRATION_BINS)]
    for number, name in enumerate(names):
        table.columns[name] = list(np.where(bins == number, right - top, 0.0))
    table.columns.setdefault("questions", [1.0] * len(known))
    table.metrics["choice_calibration_error"] = Metric(
        "calibration error of the choices", "", Formula("calibration", ("questions", *names)), False, "questions"
    )
    filled = [number for number in range(NUM_CALIBRATION_BINS) if (bins == number).any()]
    return Series(
        "calibration", "probability of the likeliest choice", "probability given", "share that was right",
        tuple(float(top[bins == number].mean()) for number in filled), tuple(float(right[bins == number].mean()) for number in filled),
    )  # fmt: skip


def samples_of(
    questions: Questions, answered: Sequence[Answered], choices: Sequence[Choice | None], table: Table, primary: str
) -> list[Sample]:
    """The first answers, as texts: what was written, or which choice was the likeliest."""
    shown = []
    for row, (one, choice) in enumerate(zip(answered[:KEPT], choices[:KEPT], strict=True)):
        task, sample = questions.tasks[one.task], one.first
        right = _verdict(table, primary, row)
        if choice is not None:
            picked = choice.texts[choice.picked(normalised=primary.startswith("acc_norm"))]
            reference = " / ".join(choice.texts[place] for place in sorted(choice.right) if place < len(choice.texts))
            prompt = sample["arguments"][0][1].strip() if task.multiple_input else sample["arguments"][0][0]
            shown.append(Sample(one.item, str(prompt), str(picked), reference, right))
        elif task.OUTPUT_TYPE == "generate_until":
            reference = sample["target"]
            reference = " / ".join(map(str, reference)) if isinstance(reference, list) else str(reference)
            shown.append(Sample(one.item, str(sample["arguments"][0][0]), str(sample["resps"][0][0]), reference, right))
        elif task.OUTPUT_TYPE == "multiple_choice":
            best = int(np.argmax([answer[0] for answer in sample["filtered_resps"]]))
            prompt, picked = sample["arguments"][best][:2]
            shown.append(Sample(one.item, str(prompt), str(picked).strip(), "", right))
    return shown


def _verdict(table: Table, primary: str, row: int) -> bool | None:
    """Whether the answer is right, where the metric by which the task is judged says yes or no."""
    if primary not in table.columns:
        return None
    value = table.columns[primary][row]
    return bool(value) if all(one in (0.0, 1.0) for one in table.columns[primary]) else None

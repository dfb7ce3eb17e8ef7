"""The task of questions: written answers that a program checks.

With one answer a question each is right or wrong, and two models are compared by McNemar's exact test; with several, accuracy is the mean
over them, and pass@k, the majority's vote and consistency say what more answers are worth.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from potstill.errors import DataError
from potstill.evaluation.answers import agreeing_pairs, comes_to, majority, modal_share, pass_at
from potstill.evaluation.asked_rows import AskedRows, Written, read_rows
from potstill.evaluation.lengths import histogram
from potstill.evaluation.questions_config import QuestionsTaskConfig
from potstill.evaluation.scores import Metric, Scores, mean
from potstill.evaluation.task import Advance, Exam, Outcome, Sample, Subject, Task
from potstill.models.config import LoadingConfig
from potstill.rollouts.checkers import CHECKERS, Checker, fingerprint, make_checker

_TRIED = 200


class QuestionsTask(Task):
    kind = "questions"

    def __init__(self, config: QuestionsTaskConfig):
        self.config, self.name, self.role = config, config.label, config.role
        self._checker = make_checker(config.checker, self._key)
        self._warnings: dict[tuple, list[str]] = {}

    @property
    def _key(self) -> str:
        return f"{self.name}: checker"

    def prepare(self, model: LoadingConfig, teacher: LoadingConfig | None) -> "QuestionsExam":
        asked = read_rows(self.config, model)
        without = [row.name for row in asked.rows if not row.reference.strip()]
        if without and self.config.checker in CHECKERS:
            raise DataError(
                f"{self._key}: {self.config.checker} compares with the own answer of a row, and {len(without):,} of {len(asked.rows):,} "
                f"rows have none, the first is {without[0]}; leave these rows out, or name a function of yours"
            )
        return QuestionsExam(self.config, asked, self._checker, tuple(self._tried(asked)))

    def _tried(self, asked: AskedRows) -> list[str]:
        """What the checker says of the rows' own answers: a mistake in it, or in the data, is seen before any model answers."""
        first = asked.rows[:_TRIED]
        names = tuple(row.name for row in first)
        if names not in self._warnings:
            wrong = [row.name for row in first if row.reference.strip() and not self._checker(row.reference, row.reference, row.values)]
            self._warnings[names] = [
                f"the checker calls the own answer of {len(wrong)} of {len(first)} rows wrong, the first is {wrong[0]}"
            ] if wrong else []  # fmt: skip
        return self._warnings[names]


@dataclass(frozen=True)
class QuestionsExam(Exam):
    config: QuestionsTaskConfig
    asked: AskedRows
    checker: Checker
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> Mapping[str, Any]:
        libraries = {name: version(name) for name in ("math-verify", "sympy")} if self.config.checker == "math" else {}
        return {
            **self.asked.identity, "checker": [self.config.checker.rpartition(":")[2], fingerprint(self.checker)],
            "libraries": libraries, "pass_at": list(self.config.ks),
        }  # fmt: skip

    @property
    def size(self) -> int:
        return self.asked.size

    def measure(self, subject: Subject, teacher: Subject | None, advance: Advance) -> Outcome:
        written = self.asked.write(subject, advance)
        right = [
            [bool(self.checker(answer.text, row.reference, row.values)) for answer in answers]
            for row, answers in zip(self.asked.rows, written, strict=True)
        ]
        samples = tuple(
            Sample(row.name, row.prompt, answers[0].text, row.reference, verdicts[0])
            for row, answers, verdicts in zip(self.asked.rows, written, right, strict=True)
        )
        lengths = [len(answer.tokens) for answers in written for answer in answers]
        series = (histogram("answers", lengths, self.config.max_new_tokens),)
        facts = {**self.asked.facts, "checker": self.config.checker}
        return Outcome(self._scores(written, right), samples, series, (*self.notes, *self.asked.warnings), facts)

    def _scores(self, written: Sequence[Sequence[Written]], right: Sequence[Sequence[bool]]) -> Scores:
        columns = {
            "questions": np.ones(len(written)),
            "answers": np.array([len(answers) for answers in written]),
            "right": np.array([sum(verdicts) for verdicts in right]),
            "cut": np.array([sum(not answer.ended for answer in answers) for answers in written]),
            "tokens": np.array([sum(len(answer.tokens) for answer in answers) for answers in written]),
        }
        metrics: dict[str, Metric] = {"accuracy": mean("exact-match accuracy", "right", counted="answers")}
        if self.config.samples > 1:
            keys = [[comes_to(answer.text, self.config.checker) for answer in answers] for answers in written]
            more, columns_of_more = _of_several(keys, right, self.config.ks)
            metrics |= more
            columns |= columns_of_more
        metrics |= {
            "cut": mean("answers cut at the limit", "cut", counted="answers", higher_is_better=False),
            "answer_tokens": mean("answer length", "tokens", counted="answers", unit="tokens", higher_is_better=None),
        }
        names = tuple(row.name for row in self.asked.rows)
        return Scores(names, tuple(columns), np.stack([*columns.values()], axis=1), metrics, "accuracy")


def _of_several(
    keys: Sequence[Sequence[Hashable | None]], right: Sequence[Sequence[bool]], ks: Sequence[int]
) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
    """What several answers to each question show: metrics, and their columns."""
    number = len(keys[0])
    pairs = np.array([agreeing_pairs(answers) for answers in keys])
    columns = {f"pass@{k}": np.array([pass_at(k, number, sum(verdicts)) for verdicts in right]) for k in ks}
    columns |= {
        f"maj@{number}": np.array([majority(answers, verdicts) for answers, verdicts in zip(keys, right, strict=True)]),
        "modal": np.array([modal_share(answers) for answers in keys]), "agreeing": pairs[:, 0], "pairs": pairs[:, 1],
    }  # fmt: skip
    metrics = {f"pass@{k}": mean(f"pass@{k}", f"pass@{k}") for k in ks}
    metrics |= {
        f"maj@{number}": mean(f"majority of {number} answers is right", f"maj@{number}"),
        "modal_share": mean("share of the most frequent answer", "modal", higher_is_better=None),
        "pairwise_agreement": mean("pairs of answers that agree", "agreeing", counted="pairs", higher_is_better=None),
    }
    return metrics, columns

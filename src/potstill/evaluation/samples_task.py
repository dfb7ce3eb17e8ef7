"""The task of samples: several answers to each prompt, drawn from the model's own distribution.

It says how diverse, how long and how repetitive they are, how they end and how close they come to the references; not whether they are
good. What is normal is seen in the teacher's row of the table, which is measured as every other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.errors import DataError
from potstill.evaluation.answers import agreeing_pairs, comes_to
from potstill.evaluation.asked_rows import AskedRow, AskedRows, Written, read_rows
from potstill.evaluation.diversity import SelfBleu, distinct, distinct_over_set, ngrams, words
from potstill.evaluation.lengths import histogram, quantiles
from potstill.evaluation.overlap import rouge_l
from potstill.evaluation.samples_config import SamplesTaskConfig
from potstill.evaluation.scores import Formula, Metric, Scores, mean
from potstill.evaluation.task import Advance, Exam, Outcome, Sample, Series, Subject, Task
from potstill.models.config import LoadingConfig
from potstill.rollouts.watch import repeated

_ORDERS = (1, 2, 3)


class SamplesTask(Task):
    kind = "samples"

    def __init__(self, config: SamplesTaskConfig):
        self.config, self.name, self.role = config, config.label, config.role
        self._bleu = SelfBleu(f"{self.name}: self-BLEU")

    def prepare(self, model: LoadingConfig, teacher: LoadingConfig | None) -> "SamplesExam":
        asked = read_rows(self.config, model, prompt_tokens=self.config.prompt_tokens)
        return SamplesExam(self.config, asked, tuple(self._references(row) for row in asked.rows), self._bleu)

    def _references(self, row: AskedRow) -> tuple[str, ...]:
        further = [] if self.config.references is None else row.values.get(self.config.references)
        if not isinstance(further, list) or not all(isinstance(one, str) for one in further):
            raise DataError(f"{self.name}: {row.name}: references: {self.config.references} must be a list of texts, not {further!r:.50}")
        return tuple(one for one in (row.reference, *further) if one.strip())


@dataclass(frozen=True)
class SamplesExam(Exam):
    config: SamplesTaskConfig
    asked: AskedRows
    references: tuple[tuple[str, ...], ...]
    bleu: SelfBleu

    @property
    def identity(self) -> Mapping[str, Any]:
        budgets = [self.config.budget, self.config.prompt_budget]
        return {**self.asked.identity, "references": self.config.references, "budgets": budgets, "self-BLEU": self.bleu.stated}

    @property
    def size(self) -> int:
        return self.asked.size

    def measure(self, subject: Subject, teacher: Subject | None, advance: Advance) -> Outcome:
        written = self.asked.write(subject, advance)
        scores, short = self._scores(written)
        warnings = [f"{subject.name}: {warning}" for warning in short]
        samples = tuple(
            Sample(row.name, row.prompt, answers[0].text, row.reference)
            for row, answers in zip(self.asked.rows, written, strict=True)
        )  # fmt: skip
        facts = {
            **self.asked.facts, "distinct_over": f"{self.config.budget:,} n-grams of words", "self_bleu": self.bleu.stated,
            "distinct_of_a_prompt_over": f"{self.config.prompt_budget:,} n-grams of words",
        }  # fmt: skip
        return Outcome(scores, samples, self._series(written), (*self.asked.warnings, *warnings), facts)

    def _series(self, written: Sequence[Sequence[Written]]) -> tuple[Series, ...]:
        lengths = {"answers": [len(answer.tokens) for answers in written for answer in answers]}
        if referred := [row.reference_tokens for row in self.asked.rows if row.reference_tokens]:
            lengths["references"] = referred
        longest = self.config.max_new_tokens
        return (
            *(histogram(label, values, longest) for label, values in lengths.items()),
            *(quantiles(label, values) for label, values in lengths.items()),
        )

    def _scores(self, written: Sequence[Sequence[Written]]) -> tuple[Scores, list[str]]:
        columns: dict[str, np.ndarray] = {"questions": np.ones(len(written))}
        metrics: dict[str, Metric] = {}
        for more, values in (self._likeness(written), self._closeness(written), self._form(written)):
            metrics |= more
            columns |= values
        more, values, warnings = self._distinct(written)
        metrics |= more
        columns |= values
        table = np.stack([*columns.values()], axis=1)
        return Scores(tuple(row.name for row in self.asked.rows), tuple(columns), table, metrics, "self_bleu"), warnings

    def _likeness(self, written: Sequence[Sequence[Written]]) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
        """How alike the answers to one prompt are."""
        pairs = np.array([agreeing_pairs([comes_to(answer.text) for answer in answers]) for answers in written])
        bleu = np.array([sum(self.bleu.scores([answer.text for answer in answers])) for answers in written])
        columns = {"answers": _each(written, lambda answer: 1), "bleu": bleu, "agreeing": pairs[:, 0], "pairs": pairs[:, 1]}
        metrics = {
            "self_bleu": mean("self-BLEU", "bleu", counted="answers", higher_is_better=None),
            "pairwise_agreement": mean("pairs of answers that agree", "agreeing", counted="pairs", higher_is_better=None),
        }
        return metrics, columns

    def _closeness(self, written: Sequence[Sequence[Written]]) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
        """How close the answers are to the references, in words and in length; nothing where no row has one."""
        rouge = [sum(rouge_l(answer.text, texts) for answer in answers) for answers, texts in zip(written, self.references, strict=True)]
        referred = np.array([len(answers) * bool(texts) for answers, texts in zip(written, self.references, strict=True)])
        lengths = np.array([row.reference_tokens for row in self.asked.rows])
        tokens = _each(written, lambda answer: len(answer.tokens))
        columns = {
            "rouge": np.array(rouge), "answers with a reference": referred, "reference_tokens": lengths * self.config.samples,
            "tokens_beside": tokens * (lengths > 0),
        }  # fmt: skip
        if not referred.any():
            return {}, columns
        drift = Formula("gap", ("tokens_beside", "reference_tokens", "reference_tokens"))
        metrics = {"rouge_l": mean("ROUGE-L F1", "rouge", counted="answers with a reference", higher_is_better=None)}
        if lengths.any():
            metrics["length_drift"] = Metric("length beyond the references, as a share", "", drift, None, "answers")
        return metrics, columns

    def _form(self, written: Sequence[Sequence[Written]]) -> tuple[dict[str, Metric], dict[str, np.ndarray]]:
        """How long the answers are, how they end, how they repeat themselves, and how sure of each token the model was."""
        again = np.array([np.sum([repeated(answer.tokens) for answer in answers], axis=0) for answers in written])
        columns = {
            "tokens": _each(written, lambda answer: len(answer.tokens)), "ended": _each(written, lambda answer: answer.ended),
            "repeated": again[:, 0], "4-grams": again[:, 1], "surprise": _each(written, lambda answer: -sum(answer.log_probs)),
            "written tokens": _each(written, lambda answer: len(answer.log_probs)),
        }  # fmt: skip
        metrics = {
            "answer_tokens": mean("answer length", "tokens", counted="answers", unit="tokens", higher_is_better=None),
            "ended": mean("answers that ended by themselves", "ended", counted="answers", higher_is_better=None),
            "entropy": mean("entropy of the text written", "surprise", counted="written tokens", unit="nats", higher_is_better=None),
        }
        if columns["4-grams"].any():
            metrics["repeated"] = mean("4-grams that repeat", "repeated", counted="4-grams", higher_is_better=False)
        return metrics, columns

    def _distinct(self, written: Sequence[Sequence[Written]]) -> tuple[dict[str, Metric], dict[str, np.ndarray], list[str]]:
        """distinct-n over the set and within prompts, as far as the answers fill the budgets."""
        texts = [[words(answer.text) for answer in answers] for answers in written]
        metrics: dict[str, Metric] = {}
        columns: dict[str, np.ndarray] = {}
        warnings: list[str] = []
        nothing, left_out = np.zeros(len(written)), []
        for n in _ORDERS:
            grams = [[ngrams(answer, n) for answer in answers] for answers in texts]
            over_set = distinct_over_set(grams, self.config.budget)
            columns[f"distinct_{n}"], columns[f"{n}-grams"] = over_set or (nothing, nothing)
            if over_set is not None:
                metrics[f"distinct_{n}"] = mean(f"distinct-{n}", f"distinct_{n}", counted=f"{n}-grams", higher_is_better=None)
            else:
                held = sum(len(answer) for answers in grams for answer in answers)
                warnings.append(f"distinct-{n}: all answers hold {held:,} n-grams, fewer than budget: {self.config.budget}; not measured")
            within = [distinct(answers, self.config.prompt_budget) or (0, 0) for answers in grams]
            columns[f"distinct_{n}_within"], columns[f"{n}-grams within prompts"] = np.array(within, dtype=np.float64).T
            if columns[f"{n}-grams within prompts"].any():
                metrics[f"distinct_{n}_within"] = mean(
                    f"distinct-{n} within a prompt", f"distinct_{n}_within", counted=f"{n}-grams within prompts", higher_is_better=None
                )
            left_out.append(sum(looked_at == 0 for _, looked_at in within))
        if any(left_out):
            said = ", ".join(f"distinct-{n} {number}" for n, number in zip(_ORDERS, left_out, strict=True))
            few = f"prompts with fewer n-grams than prompt_budget: {self.config.prompt_budget}"
            warnings.append(f"{few} are left out: {said} of {len(written)}")
        return metrics, columns, warnings


def _each(written: Sequence[Sequence[Written]], value) -> np.ndarray:
    """The sum of a value over each prompt's answers [I]."""
    return np.array([sum(value(answer) for answer in answers) for answers in written], dtype=np.float64)

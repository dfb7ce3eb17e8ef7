"""The task on speculative decoding: the teacher writes, and the student is its draft."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation.prompted import Pair, Pen, Prompted, PromptReader, Written
from potstill.evaluation.scores import Formula, Metric, Scores, mean
from potstill.evaluation.speculation import ACCEPTED, KEPT, MATCHED, accept_batch, expected_rounds, seconds_of_tokens
from potstill.evaluation.speculation_config import SpeculationTaskConfig
from potstill.evaluation.task import Advance, Exam, Outcome, Series, Subject, Task
from potstill.models.config import LoadingConfig
from potstill.rollouts.writing import Completion, Sampling

PRIMARY = "acceptance_rate"
# Enough tokens for a steady median, few enough to take no time.
_TIMED_PROMPTS, _TIMED_TOKENS = 8, 32


class SpeculationTask(Task):
    kind = "speculation"
    uses_teacher = True

    def __init__(self, config: SpeculationTaskConfig):
        self.config, self.name, self.role = config, config.label, config.role
        self._reader, self._written = PromptReader(config, config.max_new_tokens), Written()

    def prepare(self, model: LoadingConfig, teacher: LoadingConfig | None) -> "SpeculationExam | None":
        """None for the teacher itself: a model is no draft of its own."""
        return None if teacher is None else SpeculationExam(self.config, *self._reader.prepare(model, teacher), self._written)


@dataclass(frozen=True)
class SpeculationExam(Exam):
    config: SpeculationTaskConfig
    prompted: Prompted
    pair: Pair
    written: Written

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "prompts": self.prompted.digest, "vocabulary size": self.pair.vocabulary_size, "drafts": [*self.config.drafts],
            "temperature": self.config.temperature, "max new tokens": self.config.max_new_tokens, "seed": self.config.seed,
            "teacher's ends": [*self.pair.teacher_ends],
        }  # fmt: skip

    @property
    def size(self) -> int:
        return 2 * len(self.prompted.prompts)

    def measure(self, subject: Subject, teacher: Subject | None, advance: Advance) -> Outcome:
        assert teacher is not None
        pen = Pen(self.pair.teacher_ends, Sampling(self.config.temperature, max_new_tokens=self.config.max_new_tokens), self.config.seed)
        answers = self.written.take(
            teacher, self.identity, lambda: pen.write(teacher, self.prompted, advance), advance, len(self.prompted.prompts)
        )
        rows: dict[int, np.ndarray] = {}
        for batch in self.prompted.batches([one.tokens for one in answers], subject.batch_size):
            rows.update(accept_batch(subject.model, batch, teacher.model, self.config.temperature))
            advance(len(batch.examples))
        scores = self._scores(rows, self._seconds(subject, teacher, answers))
        facts = {"rows": self.prompted.rows, "prompts": len(answers), "text": ", ".join(one.path for one in self.config.data.sources),
                 "written": f"by the teacher, temperature {self.config.temperature:g}", "timed": "one text at a time"}  # fmt: skip
        return Outcome(scores, series=self._series(scores), warnings=self.prompted.warnings, data=facts)

    def _seconds(self, subject: Subject, teacher: Subject, answers: list[Completion]) -> dict[int, tuple[float, float]]:
        """Student's and teacher's seconds for the same tokens, of a few answers; the longest tell most."""
        longest = sorted(range(len(answers)), key=lambda place: -len(answers[place].tokens))[:_TIMED_PROMPTS]
        found = {}
        for place in (longest[0], *longest):  # the first is timed twice: what is slow only once does not count
            prompt, tokens = self.prompted.prompts[place], answers[place].tokens[:_TIMED_TOKENS]
            found[place] = tuple(
                seconds_of_tokens(one.model, prompt, tokens, self.pair.vocabulary_size) for one in (subject, teacher)
            )  # fmt: skip
        return found

    def _scores(self, rows: Mapping[int, np.ndarray], seconds: Mapping[int, tuple[float, float]]) -> Scores:
        places = range(len(self.prompted.prompts))
        taken = np.array([seconds.get(place, (0.0, 0.0)) for place in places])
        cost = taken[:, 0].sum() / taken[:, 1].sum()
        positions = np.array([len(rows[place]) for place in places], dtype=np.float64)
        columns = {
            "targets": positions,
            "accepted": np.array([rows[place][:, ACCEPTED].sum() for place in places]),
            "matches": np.array([rows[place][:, MATCHED].sum() for place in places]),
            "student_seconds": taken[:, 0], "teacher_seconds": taken[:, 1],
        }  # fmt: skip
        for drafts in self.config.drafts:
            rounds = np.array([expected_rounds(rows[place][:, KEPT], drafts) for place in places])
            columns[f"rounds of {drafts}"] = rounds
            # Says to the formula how many are drafted, whichever items are drawn.
            columns[f"drafts of {drafts}"] = drafts * positions
            # A round in tokens of the teacher: the drafts, and one look at all of them.
            columns[f"time of {drafts}"] = rounds * (drafts * cost + 1)
        totals = np.stack(list(columns.values()), axis=1)
        return Scores(self.prompted.names, tuple(columns), totals, metrics_of(tuple(self.config.drafts)), PRIMARY)

    def _series(self, scores: Scores) -> tuple[Series, ...]:
        drafts = tuple(sorted(set(self.config.drafts)))
        names = (
            ("tokens_per_round", "tokens a round", "tokens"), ("predicted_speedup", "predicted speed-up", "times as fast"),
            ("independent_tokens_per_round", "tokens a round, places independent", "tokens"),
        )  # fmt: skip
        return tuple(
            Series("speculation", label, "drafted tokens a round", y_label, tuple(map(float, drafts)),
                   tuple(scores.estimate(f"{name}_{number}").value for number in drafts))
            for name, label, y_label in names
        )  # fmt: skip


def metrics_of(drafts: tuple[int, ...]) -> dict[str, Metric]:
    """The metrics of the task; what hangs on a clock is not compared between students."""
    metrics = {
        "acceptance_rate": mean("acceptance rate on the teacher's text", "accepted", counted="targets"),
        "greedy_match": mean("same most likely token on the teacher's text", "matches", counted="targets"),
    }
    for number in drafts:
        metrics |= {
            f"tokens_per_round_{number}": Metric(
                f"tokens a round of {number} drafts", "", Formula("ratio", ("targets", f"rounds of {number}")), True, "targets"
            ),
            f"independent_tokens_per_round_{number}": Metric(
                f"tokens a round of {number} drafts, places independent", "",
                Formula("drafting", ("accepted", f"drafts of {number}", "targets")), True, "targets",
            ),
            f"predicted_speedup_{number}": Metric(
                f"predicted speed-up of {number} drafts", "", Formula("ratio", ("targets", f"time of {number}")), True, "targets",
                compared=False,
            ),
        }  # fmt: skip
    cost = Metric("cost of a student's token in teacher's tokens", "", Formula("ratio", ("student_seconds", "teacher_seconds")), False,
                  "targets", compared=False)  # fmt: skip
    return metrics | {"cost_ratio": cost}

"""The task on the student's own text: it answers prompts, and student and teacher are compared on the prefixes that it made itself.

In training and on a data set both models see prefixes that the student did not write. Where it writes, it sees its own, and may go where it
never learned to be: exposure bias. Here it is the mean forward KL over the positions of the student's answers divided by the mean over the
positions of other answers to the same prompts, in the spirit of the accumulated error of Arora et al. (2022) and MiniLLM (2306.08543).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation.agreement import measure_documents
from potstill.evaluation.by_position import X_LABEL, ByPosition
from potstill.evaluation.own_text_config import OwnTextTaskConfig
from potstill.evaluation.prompted import Pair, Pen, Prompted, PromptReader, Written
from potstill.evaluation.scores import Formula, Metric, Scores
from potstill.evaluation.task import Advance, Exam, Outcome, Sample, Series, Subject, Task
from potstill.models.config import LoadingConfig
from potstill.rollouts.writing import Completion, Sampling

_OF_OWN_TEXT = ("targets", "forward_kl", "reverse_kl", "jsd", "tvd", "agreements", "overlaps", "entropy", "teacher_entropy", "teacher_nats")
_POSITIONS, _BESIDE_POSITIONS, _BESIDE = "targets", "targets of other text", "forward_kl of other text"
COLUMNS = (*_OF_OWN_TEXT, "answers", "ended", _BESIDE_POSITIONS, _BESIDE)
PRIMARY = "reverse_kl"


def _mean(label: str, column: str, unit: str = "", higher_is_better: bool | None = False) -> Metric:
    return Metric(label, unit, Formula("ratio", (column, _POSITIONS)), higher_is_better)


def _metrics(whose: str) -> dict[str, Metric]:
    return {
        "reverse_kl": _mean("reverse KL on its own text", "reverse_kl", "nats"),
        "forward_kl": _mean("forward KL on its own text", "forward_kl", "nats"),
        "jsd": _mean("Jensen-Shannon divergence on its own text", "jsd", "nats"),
        "total_variation": _mean("total variation on its own text", "tvd"),
        "acceptance_rate": Metric("acceptance rate on its own text", "", Formula("complement", ("tvd", _POSITIONS)), True),
        "top1_agreement": _mean("top-1 agreement on its own text", "agreements", higher_is_better=True),
        "overlap_at_5": _mean("overlap of the 5 most likely tokens on its own text", "overlaps", higher_is_better=True),
        "entropy": _mean("entropy on its own text", "entropy", "nats", None),
        "entropy_gap": Metric("entropy gap to the teacher on its own text", "nats",
                              Formula("gap", ("entropy", "teacher_entropy", _POSITIONS)), None, _POSITIONS),
        "teacher_perplexity": Metric("its text's perplexity to the teacher", "", Formula("perplexity", ("teacher_nats", _POSITIONS)), None),
        "forward_kl_beside": Metric(f"forward KL on {whose} text", "nats", Formula("ratio", (_BESIDE, _BESIDE_POSITIONS))),
        "exposure_bias": Metric(f"exposure bias (own text / {whose} text)", "",
                                Formula("quotient", ("forward_kl", _POSITIONS, _BESIDE, _BESIDE_POSITIONS)), None),
        "answer_tokens": Metric("length of its answers", "tokens", Formula("ratio", (_POSITIONS, "answers")), None),
        "ended": Metric("answers that ended by themselves", "", Formula("ratio", ("ended", "answers")), None),
    }  # fmt: skip


class OwnTextTask(Task):
    kind = "own_text"
    uses_teacher = True

    def __init__(self, config: OwnTextTaskConfig):
        self.config, self.name, self.role = config, config.label, config.role
        self._reader, self._written = PromptReader(config, config.sampling.max_new_tokens), Written()

    def prepare(self, model: LoadingConfig, teacher: LoadingConfig | None) -> "OwnTextExam | None":
        """None for the teacher itself, which has nobody to be compared with."""
        if teacher is None:
            return None
        prompted, pair = self._reader.prepare(model, teacher)
        if self.config.prefixes == "dataset":
            kept = [place for place, answer in enumerate(prompted.answers) if answer]
            if not kept:
                self._reader.refuse("its rows have no answers of their own to hold the student's against; set prefixes: teacher")
            if missing := len(prompted.answers) - len(kept):
                prompted = prompted.select(kept, f"{missing} of {prompted.rows} rows have no answer of their own and were not asked")
        return OwnTextExam(self.config, prompted, pair, self._written)


@dataclass(frozen=True)
class OwnTextExam(Exam):
    config: OwnTextTaskConfig
    prompted: Prompted
    pair: Pair
    written: Written

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "prompts": self.prompted.digest, "vocabulary size": self.pair.vocabulary_size, "prefixes": self.config.prefixes,
            "sampling": self.config.sampling.model_dump(), "seed": self.config.seed, "ends": [*self.pair.student_ends],
            "teacher's ends": [*self.pair.teacher_ends],
        }  # fmt: skip

    @property
    def size(self) -> int:
        return len(self.prompted.prompts) * (3 if self.config.prefixes == "dataset" else 4)

    def measure(self, subject: Subject, teacher: Subject | None, advance: Advance) -> Outcome:
        assert teacher is not None
        own = self._pen(self.pair.student_ends, self.config.seed).write(subject, self.prompted, advance)
        ours, theirs = ByPosition(), ByPosition()
        on_own = self._agreement(subject, teacher, [completion.tokens for completion in own], ours, advance)
        beside = self._agreement(subject, teacher, self._beside(teacher, advance), theirs, advance)
        scores = self._scores(own, on_own, beside)
        facts = {"rows": self.prompted.rows, "prompts": len(own), "text": ", ".join(one.path for one in self.config.data.sources),
                 "written": _said(self.config.sampling.temperature), "held against": f"{self._whose} text"}  # fmt: skip
        return Outcome(scores, self._samples(subject, own), self._series(ours, theirs), self.prompted.warnings, facts)

    @property
    def _whose(self) -> str:
        return "the teacher's" if self.config.prefixes == "teacher" else "the data set's"

    def _pen(self, ends: tuple[int, ...], seed: int) -> Pen:
        return Pen(ends, Sampling(**self.config.sampling.model_dump()), seed)

    def _beside(self, teacher: Subject, advance: Advance) -> list[tuple[int, ...]]:
        """The answers that the student did not write."""
        if self.config.prefixes == "dataset":
            return list(self.prompted.answers)
        # Another seed: the two texts are to be independent.
        pen = self._pen(self.pair.teacher_ends, self.config.seed + 1)
        found = self.written.take(
            teacher, self.identity, lambda: pen.write(teacher, self.prompted, advance), advance, len(self.prompted.prompts)
        )
        return [completion.tokens for completion in found]

    def _agreement(self, subject: Subject, teacher: Subject, answers: list[tuple[int, ...]], by_position: ByPosition, advance: Advance):
        return measure_documents(
            subject.model, self.prompted.batches(answers, subject.batch_size), teacher.model, by_position=by_position,
            names=dict(enumerate(self.prompted.names)), on_batch=lambda batch: advance(len(batch.examples)),
        )  # fmt: skip

    def _scores(self, own: list[Completion], on_own: Scores, beside: Scores) -> Scores:
        if on_own.items != beside.items:
            raise AssertionError("every prompt has an answer of each kind")
        columns = [on_own.column(name) for name in _OF_OWN_TEXT]
        columns += [np.ones(len(own)), np.array([completion.ended for completion in own], dtype=np.float64)]
        columns += [beside.column("targets"), beside.column("forward_kl")]
        return Scores(on_own.items, COLUMNS, np.stack(columns, axis=1), _metrics(self._whose), PRIMARY)

    def _series(self, ours: ByPosition, theirs: ByPosition) -> tuple[Series, ...]:
        """The forward KL along the student's answers and along the others, and their ratio where both go on."""
        lines = {label: dict(zip(*one.means("forward_kl"), strict=True))
                 for label, one in (("on the student's own text", ours), (f"on {self._whose} text", theirs))}  # fmt: skip
        first, second = lines.values()
        ratio = {x: first[x] / second[x] for x in first if second.get(x)}
        drawn = [*((label, "forward KL (nats)", points) for label, points in lines.items()), ("ratio", "own / other", ratio)]
        return tuple(
            Series("exposure_bias", label, X_LABEL, y_label, tuple(points), tuple(points.values())) for label, y_label, points in drawn
        )

    def _samples(self, subject: Subject, own: list[Completion]) -> tuple[Sample, ...]:
        def text(tokens) -> str:
            return str(subject.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        rows = zip(self.prompted.names, self.prompted.prompts, own, self.prompted.answers, strict=True)
        return tuple(Sample(name, text(prompt), text(written.tokens), text(answer)) for name, prompt, written, answer in rows)


def _said(temperature: float) -> str:
    return f"at temperature {temperature:g}" if temperature else "greedily"

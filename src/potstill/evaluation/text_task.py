"""The task on a text: next-token distributions on its own prefixes, alone and beside a teacher's.

Text and tokenizers are read and compared before any weights are loaded, so that what cannot work is refused at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from potstill.batch import Batch, Example, sequence_key
from potstill.data.collation import collate
from potstill.data.prepare import PreparedData, prepare
from potstill.evaluation.agreement import measure_documents
from potstill.evaluation.by_position import ByPosition
from potstill.evaluation.items import item_names
from potstill.evaluation.metrics import NUM_CALIBRATION_BINS
from potstill.evaluation.scores import Scores
from potstill.evaluation.task import Advance, Exam, Outcome, Series, Subject, Task
from potstill.evaluation.task_config import TextTaskConfig
from potstill.evaluation.windows import windows
from potstill.models.config import LoadingConfig
from potstill.models.identity import template_digest, tokenizer_digest
from potstill.models.loading import load_tokenizer, longest_context, read_model_config, stop_ids
from potstill.models.tokenizers import compare_tokenizers, refuse_different, vocabulary_size

# Longer than any text: in evaluation nothing is cut, windows read on.
_NO_LIMIT = 2**31 - 1
_ALONG_AN_ANSWER = {"nats": ("cross-entropy", "nats"), "entropy": ("entropy", "nats")}
_BESIDE_A_TEACHER = {"forward_kl": ("forward KL", "nats"), "agreements": ("top-1 agreement", "share of tokens")}


class TextTask(Task):
    kind = "text"
    uses_teacher = True

    def __init__(self, config: TextTaskConfig):
        self.config, self.name, self.role = config, config.label, config.role
        self._prepared: dict[tuple, PreparedData] = {}

    def prepare(self, model: LoadingConfig, teacher: LoadingConfig | None) -> "TextExam":
        tokenizer = load_tokenizer(model)
        size, notes, compared = vocabulary_size(tokenizer), tuple[str, ...](), teacher is not None
        configs = [read_model_config(model).get_text_config()]
        if teacher is not None:
            beside = read_model_config(teacher).get_text_config()
            comparison = compare_tokenizers(
                tokenizer, load_tokenizer(teacher), student_width=configs[0].vocab_size, teacher_width=beside.vocab_size
            )
            compared = comparison.same
            if compared:
                configs.append(beside)
                size, notes = comparison.vocabulary_size, comparison.notes
            else:
                if configs[0].vocab_size < size:
                    refuse_different(comparison, model.path, teacher.path)
                notes = (_apart(model, teacher, comparison.refusals[0]),)
        data = self._read(tokenizer, stop_ids(model, read_model_config(model)))
        window = min([self.config.data.max_tokens, *(context for one in configs if (context := longest_context(one)) is not None)])
        return TextExam.of(self.config, data, window, size, notes, compared=compared, tokenizer=tokenizer_digest(tokenizer))

    def _read(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]) -> PreparedData:
        """The text as this tokenizer reads it; models that read alike share it."""
        key = tokenizer_digest(tokenizer), template_digest(tokenizer), stops
        if key not in self._prepared:
            whole = self.config.data.model_copy(update={"max_tokens": _NO_LIMIT, "packing": False, "too_long": "error"})
            self._prepared[key] = prepare(whole, tokenizer, seed=0, end_of_text=stops)
        return self._prepared[key]


def _apart(model: LoadingConfig, teacher: LoadingConfig, refusal: str) -> str:
    return (
        f"{model.path} and the teacher {teacher.path} do not read the same tokens ({refusal}); no distance between them was measured, "
        "and bits per byte compare them"
    )


@dataclass(frozen=True)
class TextExam(Exam):
    """`windows` are numbered in order; `names` says which item each belongs to, `before` which go on with an answer (see `windows`).
    `compared`: a teacher that is there reads the same tokens."""

    config: TextTaskConfig
    data: PreparedData
    windows: tuple[Example, ...]
    names: tuple[str, ...]
    before: Mapping[int, int]
    window: int
    vocabulary_size: int
    notes: tuple[str, ...]
    compared: bool
    tokenizer: str

    @classmethod
    def of(
        cls, config: TextTaskConfig, data: PreparedData, window: int, vocabulary_size: int, notes: Sequence[str], *, compared: bool,
        tokenizer: str,
    ) -> "TextExam":
        cut = list(windows(data.train, window))
        names = item_names([data.train.origin(index) for index in range(len(data.train))])
        return cls(
            config, data, tuple(Example(one.example.tokens, one.example.is_target, number) for number, one in enumerate(cut)),
            tuple(names[one.example.index] for one in cut), {number: one.before for number, one in enumerate(cut)}, window,
            vocabulary_size, tuple(notes), compared, tokenizer,
        )  # fmt: skip

    @property
    def identity(self) -> Mapping[str, Any]:
        """The sequences themselves, where their windows begin, what the items are called, and how many bytes a token has."""
        digest = xxhash.xxh3_128()
        for example, name in zip(self.windows, self.names, strict=True):
            digest.update(sequence_key(np.asarray(example.tokens), np.asarray(example.is_target)) + name.encode() + b"\0")
        stated = {"vocabulary size": self.vocabulary_size, "compared": self.compared, "tokenizer": self.tokenizer}
        return {"sequences": digest.hexdigest(), **stated}

    @property
    def size(self) -> int:
        return sum(example.num_targets for example in self.windows)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Sequences of like length together, the longest first: little padding, and what does not fit in memory fails at once."""
        ordered = sorted(self.windows, key=lambda example: -len(example.tokens))
        for start in range(0, len(ordered), batch_size):
            yield collate([[example] for example in ordered[start : start + batch_size]], pad_token=0, widest=self.window)

    def measure(self, subject: Subject, teacher: Subject | None, advance: Advance) -> Outcome:
        beside = teacher if self.compared else None
        by_position = ByPosition(self.before)
        scores = measure_documents(
            subject.model, self.batches(subject.batch_size), None if beside is None else beside.model, tokenizer=subject.tokenizer,
            on_batch=lambda batch: advance(batch.num_targets), names=dict(enumerate(self.names)), by_position=by_position,
        )  # fmt: skip
        drawn = _ALONG_AN_ANSWER | (_BESIDE_A_TEACHER if beside is not None else {})
        return Outcome(
            scores, series=(*calibration_series(scores), *by_position.series(drawn)), warnings=tuple(self._warnings(scores)),
            data=self._facts(scores),
        )  # fmt: skip

    def _warnings(self, scores: Scores) -> list[str]:
        counts, warnings = self.data.counts, list(self.notes)
        for name, number in (("empty", counts.empty), ("unfinished", counts.unfinished), ("malformed", counts.rejected)):
            if number:
                warnings.append(f"{number} of {counts.rows} rows were {name} and are not in the numbers")
        if len(scores.items) < 2:
            warnings.append("all targets are in one document: how sure the numbers are is not known")
        return warnings

    def _facts(self, scores: Scores) -> dict[str, Any]:
        return {
            "text": ", ".join(source.path for source in self.config.data.sources), "format": self.config.data.format,
            "rows": self.data.counts.rows, "documents": len(scores.items), "longest_row": self.data.counts.longest, "window": self.window,
        }  # fmt: skip


def calibration_series(scores: Scores) -> tuple[Series, Series]:
    """How often the most likely token was right against how likely it was, by bin of the latter, and how many tokens each bin holds."""
    held, confidence, accuracy = [], [], []
    for number in range(NUM_CALIBRATION_BINS):
        count, sure, gap = (float(scores.column(f"{name} {number}").sum()) for name in ("confident", "confidence", "calibration"))
        if count:
            held.append(count)
            confidence.append(sure / count)
            accuracy.append((sure + gap) / count)
    x_label = "probability of the most likely token"
    return (
        Series("calibration", "calibration", x_label, "share of these that were right", tuple(confidence), tuple(accuracy)),
        Series("calibration_count", "calibration: tokens by bin", x_label, "tokens", tuple(confidence), tuple(held)),
    )

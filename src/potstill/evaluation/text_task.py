"""The task on a text: next-token distributions on its own prefixes, alone and beside a teacher's.

Text and tokenizers are read and compared before any weights are loaded, so that what cannot work is refused at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedConfig

from potstill.batch import Batch, Example, sequence_key
from potstill.data.collation import collate
from potstill.data.prepare import PreparedData, prepare
from potstill.evaluation.agreement import measure_documents
from potstill.evaluation.task import Advance, Exam, Outcome, Subject, Task
from potstill.evaluation.task_config import TextTaskConfig
from potstill.evaluation.windows import windows
from potstill.models.config import LoadingConfig
from potstill.models.loading import load_tokenizer, longest_context, read_model_config
from potstill.models.tokenizers import compare_tokenizers, refuse_different, vocabulary_size

# Longer than any text: in evaluation nothing is cut, windows read on.
_NO_LIMIT = 2**31 - 1


class TextTask(Task):
    kind = "text"
    uses_teacher = True

    def __init__(self, config: TextTaskConfig):
        self.config, self.name, self.role = config, config.label, config.role

    def prepare(self, model: LoadingConfig, teacher: LoadingConfig | None) -> "TextExam":
        tokenizer = load_tokenizer(model)
        size, notes = vocabulary_size(tokenizer), tuple[str, ...]()
        configs = [read_model_config(model).get_text_config()]
        if teacher is not None:
            configs.append(read_model_config(teacher).get_text_config())
            comparison = compare_tokenizers(
                tokenizer, load_tokenizer(teacher), student_width=configs[0].vocab_size, teacher_width=configs[1].vocab_size
            )
            refuse_different(comparison, model.path, teacher.path)
            size, notes = comparison.vocabulary_size, comparison.notes
        whole = self.config.data.model_copy(update={"max_tokens": _NO_LIMIT, "packing": False})
        data = prepare(whole, tokenizer, seed=0, end_of_text=_stops(configs[0]))
        window = min([self.config.data.max_tokens, *(context for one in configs if (context := longest_context(one)) is not None)])
        return TextExam(self.config, data, tuple(windows(data.train, window)), window, size, notes)


def _stops(model_config: PreTrainedConfig) -> list[int]:
    """The ids at which a model stops, of which a configuration names one, several or none."""
    named = model_config.to_dict().get("eos_token_id")
    return named if isinstance(named, list) else [] if named is None else [named]


@dataclass(frozen=True)
class TextExam(Exam):
    config: TextTaskConfig
    data: PreparedData
    windows: tuple[Example, ...]
    window: int
    vocabulary_size: int
    notes: tuple[str, ...]

    @property
    def identity(self) -> Mapping[str, Any]:
        """The sequences themselves, and where their windows begin."""
        digest = xxhash.xxh3_128()
        for example in self.windows:
            key = sequence_key(np.asarray(example.tokens), np.asarray(example.is_target))
            digest.update(key + int(example.index).to_bytes(8, "little"))
        return {"sequences": digest.hexdigest(), "vocabulary size": self.vocabulary_size}

    @property
    def size(self) -> int:
        return sum(example.num_targets for example in self.windows)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Sequences of like length together, the longest first: little padding, and what does not fit in memory fails at once."""
        ordered = sorted(self.windows, key=lambda example: -len(example.tokens))
        for start in range(0, len(ordered), batch_size):
            yield collate([[example] for example in ordered[start : start + batch_size]], pad_token=0, widest=self.window)

    def measure(self, subject: Subject, teacher: Subject | None, advance: Advance) -> Outcome:
        scores = measure_documents(
            subject.model, self.batches(subject.batch_size), None if teacher is None else teacher.model, tokenizer=subject.tokenizer,
            on_batch=lambda batch: advance(batch.num_targets),
        )  # fmt: skip
        counts = self.data.counts
        warnings = list(self.notes)
        for name, number in (("empty", counts.empty), ("unfinished", counts.unfinished), ("malformed", counts.rejected)):
            if number:
                warnings.append(f"{number} of {counts.rows} rows were {name} and are not in the numbers")
        if len(scores.items) < 2:
            warnings.append("all targets are in one document: how sure the numbers are is not known")
        facts = {
            "text": ", ".join(source.path for source in self.config.data.sources), "format": self.config.data.format, "rows": counts.rows,
            "documents": len(scores.items), "longest_row": counts.longest, "window": self.window,
        }  # fmt: skip
        return Outcome(scores, warnings=tuple(warnings), data=facts)

"""`potstill evaluate`: loads what it is told, measures, and writes one record. The seam between evaluation and the rooms below.

Text and tokenizers are read and compared before any weights are loaded, so that what cannot work is refused at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from potstill import storage
from potstill.batch import Batch, Example
from potstill.data.collation import collate
from potstill.data.prepare import PreparedData, prepare
from potstill.errors import ConfigError
from potstill.evaluation.agreement import measure_documents
from potstill.evaluation.config import EvaluationConfig, refuse_output
from potstill.evaluation.metrics import Measurement
from potstill.evaluation.record import EvaluationRecord, ModelRecord
from potstill.evaluation.windows import windows
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.loading import Precision, load_model, load_tokenizer, longest_context, read_model_config
from potstill.models.tokenizers import compare_tokenizers, refuse_different, vocabulary_size

# Longer than any text: in evaluation nothing is cut, windows read on.
_NO_LIMIT = 2**31 - 1


def evaluate(config: EvaluationConfig, *, output: Path | str | None = None, console: Console | None = None) -> EvaluationRecord:
    """Measures `config.model` on `config.data`, against `config.teacher` if there is one, and writes the record to `output`.

    A bar is shown on `console` (by default stderr). Raises UsageError and its kinds for what cannot be measured.
    """
    refuse_output(output)
    prepared = _prepare(config)
    device, precision = _where(config)
    student = CausalLM(load_model(config.model, precision=precision, device=device), prepared.vocabulary_size)
    teacher = None
    if config.teacher is not None:
        teacher = CausalLM(load_model(config.teacher, precision=precision, device=device), prepared.vocabulary_size)
    measurement = _measure(config, prepared, student, teacher, console or Console(stderr=True))
    record = _record(config, prepared, measurement, student, f"{device}, {precision}")
    if output is not None:
        storage.make_folder(Path(output).absolute().parent)
        storage.write_json(Path(output).absolute(), record.to_json())
    return record


@dataclass(frozen=True)
class _Prepared:
    """What is known before any weights are loaded."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    data: PreparedData
    windows: list[Example]
    window: int
    notes: tuple[str, ...]


def _prepare(config: EvaluationConfig) -> _Prepared:
    tokenizer = load_tokenizer(config.model)
    size, notes = vocabulary_size(tokenizer), tuple[str, ...]()
    configs = [read_model_config(config.model).get_text_config()]
    if config.teacher is not None:
        configs.append(read_model_config(config.teacher).get_text_config())
        comparison = compare_tokenizers(
            tokenizer, load_tokenizer(config.teacher), student_width=configs[0].vocab_size, teacher_width=configs[1].vocab_size
        )
        refuse_different(comparison, config.model.path, config.teacher.path)
        size, notes = comparison.vocabulary_size, comparison.notes
    whole = config.data.model_copy(update={"max_tokens": _NO_LIMIT, "packing": False})
    data = prepare(whole, tokenizer, seed=0, end_of_text=_stops(configs[0]))
    window = min([config.data.max_tokens, *(context for one in configs if (context := longest_context(one)) is not None)])
    return _Prepared(tokenizer, size, data, list(windows(data.train, window)), window, notes)


def _stops(model_config: PreTrainedConfig) -> list[int]:
    """The ids at which a model stops, of which a configuration names one, several or none."""
    named = model_config.to_dict().get("eos_token_id")
    return named if isinstance(named, list) else [] if named is None else [named]


def _where(config: EvaluationConfig) -> tuple[str, Precision]:
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device: {device!r} is no device; say cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device} is asked for, but torch sees no GPU; say cpu")
    return device, config.precision or ("bf16" if kind == "cuda" else "float32")


def _batches(prepared: _Prepared, batch_size: int) -> Iterator[Batch]:
    """Sequences of like length together, the longest first: little padding, and what does not fit in memory fails at once."""
    ordered = sorted(prepared.windows, key=lambda example: -len(example.tokens))
    for start in range(0, len(ordered), batch_size):
        yield collate([[example] for example in ordered[start : start + batch_size]], pad_token=0, widest=prepared.window)


def _measure(
    config: EvaluationConfig, prepared: _Prepared, student: CausalLM, teacher: CausalLM | None, console: Console
) -> Measurement:
    with Progress(console=console) as progress:
        task = progress.add_task("Measuring", total=sum(example.num_targets for example in prepared.windows))
        return measure_documents(
            student, _batches(prepared, config.batch_size), teacher, tokenizer=prepared.tokenizer,
            on_batch=lambda batch: progress.advance(task, batch.num_targets),
        )  # fmt: skip


def _record(config: EvaluationConfig, prepared: _Prepared, measurement: Measurement, student: CausalLM, computed: str) -> EvaluationRecord:
    counts = prepared.data.counts
    title = config.model.path if config.teacher is None else f"{config.model.path} against {config.teacher.path}"
    warnings = list(prepared.notes)
    for name, number in (("empty", counts.empty), ("unfinished", counts.unfinished), ("malformed", counts.rejected)):
        if number:
            warnings.append(f"{number} of {counts.rows} rows were {name} and are not in the numbers")
    if len(measurement.documents) < 2:
        warnings.append("all targets are in one document: how sure the numbers are is not known")
    origin = prepared.data.train.origin
    documents = [{"origin": origin(int(one["document"])), **one} for one in measurement.by_document()] if config.documents else []
    return EvaluationRecord(
        title=f"Evaluation of {title}",
        models=[ModelRecord(_name(config.model), measurement.estimates(), student.inner.num_parameters())],
        data={
            "text": ", ".join(source.path for source in config.data.sources), "format": config.data.format, "rows": counts.rows,
            "documents": len(measurement.documents), "longest_row": counts.longest, "window": prepared.window, "computed": computed,
        },
        warnings=warnings, documents=documents,
    )  # fmt: skip


def _name(model: LoadingConfig) -> str:
    return model.path if model.adapter is None else f"{model.path} with {model.adapter}"

"""Measures a student's next-token distributions, and how far they are from a teacher's, on text that neither wrote here.

Rows pass through both heads a chunk at a time, so that no [N, V] logits of a batch exist; distances are the objectives' own row
functions, in float32, on the tokenizer's vocabulary (padded columns are cropped before the softmax). Sums are kept by document,
in float64, because the tokens of one document are not independent. Knows nothing of files and formats.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.batch import Batch
from potstill.data.token_bytes import token_bytes
from potstill.errors import DataError, NonFiniteError
from potstill.evaluation.by_position import ByPosition
from potstill.evaluation.metrics import (
    CALIBRATION,
    COLUMN,
    CONFIDENCE,
    CONFIDENT,
    FORWARD_KL_ROWS,
    NUM_CALIBRATION_BINS,
    NUM_COLUMNS,
    NUM_OVERLAP,
    scores_of,
)
from potstill.evaluation.row_quantiles import EDGES
from potstill.evaluation.scores import Scores
from potstill.evaluation.statistics import Estimate
from potstill.head import Head
from potstill.models.causal_lm import CausalLM
from potstill.objectives import DIVERGENCES

CHUNK_BYTES = 256 * 2**20
_TENSORS_ALIVE = 8
"""Vocabulary-wide float32 tensors that exist at once for a chunk: logits, log-probabilities, probabilities of two models, temporaries."""


def measure(
    student: CausalLM, batches: Iterable[Batch], teacher: CausalLM | None = None, *,
    tokenizer: PreTrainedTokenizerBase | None = None, on_batch: Callable[[Batch], None] | None = None,
) -> dict[str, Estimate]:  # fmt: skip
    """Every metric of `metrics.METRICS` that can be had, each a mean over target tokens with its standard error by document.

    With a `tokenizer` the bytes of the targets are counted and bits per byte are among them; with a `teacher`, the distances.
    `on_batch` is called after each batch (a progress bar). Raises DataError where nothing is a target.
    """
    return measure_documents(student, batches, teacher, tokenizer=tokenizer, on_batch=on_batch).estimates()


@torch.no_grad()
def measure_documents(
    student: CausalLM, batches: Iterable[Batch], teacher: CausalLM | None = None, *,
    tokenizer: PreTrainedTokenizerBase | None = None, on_batch: Callable[[Batch], None] | None = None, chunk_rows: int | None = None,
    names: Mapping[int, str] | None = None, by_position: ByPosition | None = None,
) -> Scores:  # fmt: skip
    """As `measure`, with the sums of every document, for comparisons and seeds.

    Documents are told apart by Example.index (`batch.examples`), or by what `names` calls it: several windows of one document are one
    cluster. `chunk_rows` is how many positions pass through the heads at once; by default as many as fit `CHUNK_BYTES`. Rows are
    counted in `by_position` too, where it is given.
    """
    bytes_of = None if tokenizer is None else torch.from_numpy(token_bytes(tokenizer))
    models = [student] if teacher is None else [student, teacher]
    was_training = [model.training for model in models]
    sums: dict[int, np.ndarray] = {}
    try:
        for model in models:
            model.eval()
        for number, batch in enumerate(batches):
            for document, row in zip(*_measure_batch(student, batch, teacher, bytes_of, chunk_rows, by_position), strict=True):
                # Without Example.index every document is its own cluster, numbered by batch so that none meet.
                key = document if batch.examples else number * 2**32 + document
                sums[key] = sums.get(key, 0) + row
            if on_batch is not None:
                on_batch(batch)
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)
    if not sums:
        raise DataError("nothing to measure: no batch holds a target token; check the data's format and its targets")
    items, totals = _joined(sums, names)
    if not np.isfinite(totals).all():
        broken = items[int(np.flatnonzero(~np.isfinite(totals).all(axis=1))[0])]
        raise NonFiniteError(f"document {broken}: its measurement is not finite: check the weights of the model for NaN")
    return scores_of(items, totals, has_teacher=teacher is not None, has_bytes=tokenizer is not None)


def _joined(sums: Mapping[int, np.ndarray], names: Mapping[int, str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """The items, in the order of their first document, and their totals [items, NUM_COLUMNS]."""
    joined: dict[str, np.ndarray] = {}
    for document in sorted(sums):
        name = str(document) if names is None else names[document]
        joined[name] = joined.get(name, 0) + sums[document]
    return tuple(joined), np.stack(list(joined.values()))


def _measure_batch(
    student: CausalLM, batch: Batch, teacher: CausalLM | None, bytes_of: Tensor | None, chunk_rows: int | None,
    by_position: ByPosition | None,
) -> tuple[list[int], np.ndarray]:
    """The documents of a batch that hold targets, and their sums [documents, NUM_COLUMNS]."""
    batch = batch.to(student.device)
    if batch.num_targets == 0:
        return [], np.zeros((0, NUM_COLUMNS))
    _, targets = batch.target_rows()
    responses, owner = batch.target_responses().unique(return_inverse=True)
    documents = _documents(batch, responses)
    buckets = None if by_position is None else by_position.buckets(batch, documents, owner)
    sums = torch.zeros(responses.shape[0], NUM_COLUMNS, dtype=torch.float64)
    for part, student_log_probs, teacher_log_probs in side_by_side(student, batch, teacher, chunk_rows):
        measured = measure_rows(student_log_probs, teacher_log_probs, targets[part])
        # Float64 stays on the processor: some accelerators have none.
        sums.index_add_(0, owner[part].cpu(), measured.cpu().double())
        if by_position is not None and buckets is not None:
            by_position.add(buckets[part], measured)
    if bytes_of is not None:
        sums[:, COLUMN["bytes"]].index_add_(0, owner.cpu(), bytes_of[targets.cpu()].double())
    return documents, sums.numpy()


def side_by_side(
    student: CausalLM, batch: Batch, teacher: CausalLM | None, chunk_rows: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The target rows of a batch a chunk at a time: which, and what student and teacher think of each, log-probabilities [n, V] of the
    tokens that both know."""
    student_rows, student_head = student(batch)
    teacher_rows, teacher_head = (None, None) if teacher is None else teacher(batch.to(teacher.device))
    vocabulary_size = student.vocabulary_size if teacher is None else min(student.vocabulary_size, teacher.vocabulary_size)
    step = chunk_rows or max(16, CHUNK_BYTES // (4 * _TENSORS_ALIVE * vocabulary_size))
    for start in range(0, student_rows.shape[0], step):
        part = slice(start, start + step)
        student_log_probs = log_probs(student_head, student_rows[part], vocabulary_size)
        teacher_log_probs = None
        if teacher_rows is not None and teacher_head is not None:
            teacher_log_probs = log_probs(teacher_head, teacher_rows[part], vocabulary_size).to(student_log_probs.device)
        yield part, student_log_probs, teacher_log_probs


def log_probs(head: Head, rows: Tensor, vocabulary_size: int) -> Tensor:
    """float32 log-probabilities [n, vocabulary_size] of hidden rows [n, D]; columns beyond the tokenizer get no mass."""
    return torch.log_softmax(head.logits(rows)[:, :vocabulary_size].float(), dim=-1)


def measure_rows(student_log_probs: Tensor, teacher_log_probs: Tensor | None, targets: Tensor) -> Tensor:
    """The columns of `metrics` for each row, [n, NUM_COLUMNS]."""
    measured = student_log_probs.new_zeros(targets.shape[0], NUM_COLUMNS)

    def put(column: str, values: Tensor) -> None:
        measured[:, COLUMN[column]] = values.to(measured.dtype)

    probabilities = student_log_probs.exp()
    of_target = student_log_probs.gather(1, targets[:, None]).squeeze(1)
    confidence, choice = probabilities.max(dim=-1)
    correct = (choice == targets).to(measured.dtype)
    put("targets", torch.ones_like(of_target))
    put("nats", -of_target)
    put("entropy", _entropy(student_log_probs))
    # The sum over outcomes of (probability - outcome) squared, without the one-hot outcome.
    put("brier", probabilities.square().sum(dim=-1) - 2 * of_target.exp() + 1)
    bins = calibration_bin(confidence, NUM_CALIBRATION_BINS)[:, None]
    for first, values in ((CALIBRATION, correct - confidence), (CONFIDENCE, confidence), (CONFIDENT, torch.ones_like(confidence))):
        measured.scatter_(1, first + bins, values[:, None].to(measured.dtype))
    if teacher_log_probs is not None:
        put("teacher_nats", -teacher_log_probs.gather(1, targets[:, None]).squeeze(1))
        put("teacher_entropy", _entropy(teacher_log_probs))
        put("overlaps", _overlap(student_log_probs, teacher_log_probs))
        wanted = teacher_log_probs.argmax(dim=-1)
        put("agreements", choice == wanted)
        # Tokens that the student finds exactly as likely do not stand before it.
        put("teacher_ranks", 1 + (student_log_probs > student_log_probs.gather(1, wanted[:, None])).sum(dim=-1))
        for column in ("forward_kl", "reverse_kl", "tvd"):
            put(column, DIVERGENCES[column](student_log_probs, teacher_log_probs))
        edges = torch.from_numpy(EDGES).to(measured)
        measured.scatter_(1, FORWARD_KL_ROWS + torch.bucketize(measured[:, [COLUMN["forward_kl"]]].contiguous(), edges, right=True), 1.0)
        put("jsd", DIVERGENCES["jsd"](student_log_probs, teacher_log_probs, beta=0.5))
    return measured


def _overlap(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """The share [n] of the teacher's `NUM_OVERLAP` most likely tokens that are among the student's."""
    most = min(NUM_OVERLAP, student_log_probs.shape[-1])
    ours, theirs = (log_probs.topk(most, dim=-1).indices for log_probs in (student_log_probs, teacher_log_probs))
    return (theirs[:, :, None] == ours[:, None, :]).any(dim=-1).double().mean(dim=-1)


def calibration_bin(confidence: Tensor, num_bins: int) -> Tensor:
    """The equal-width, right-closed bin of each confidence: bin b is (b / num_bins, (b + 1) / num_bins]."""
    edges = torch.arange(1, num_bins, dtype=torch.float64, device=confidence.device) / num_bins
    return torch.bucketize(confidence.double(), edges)


def expected_calibration_error(confidence: Tensor, correct: Tensor, num_bins: int = NUM_CALIBRATION_BINS) -> float:
    """`sum_b n_b / N * |accuracy_b - confidence_b|` over equal-width right-closed bins (Guo et al. 2017); confidence and correct [N]."""
    gaps = torch.zeros(num_bins, dtype=torch.float64)
    gaps.index_add_(0, calibration_bin(confidence, num_bins), correct.double() - confidence.double())
    return float(gaps.abs().sum() / confidence.shape[0])


def _entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row; an outcome of no mass adds nothing, also where its log-probability is -inf."""
    return -torch.where(log_probabilities.isfinite(), log_probabilities.exp() * log_probabilities, 0.0).sum(dim=-1)


def _documents(batch: Batch, responses: Tensor) -> list[int]:
    """For each response number of the batch its document: Example.index, or the number itself where the batch does not know."""
    if not batch.examples:
        return responses.tolist()
    width = int(batch.documents.max()) + 1
    present = (batch.documents[:, :, None] == torch.arange(width, device=batch.documents.device)).any(dim=1)
    numbers = [sequence * width + document for sequence, document in present.nonzero().tolist()]
    named = dict(zip(numbers, batch.examples, strict=True))
    return [named[number] for number in responses.tolist()]

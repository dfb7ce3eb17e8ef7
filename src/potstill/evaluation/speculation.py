"""What a draft model is worth to a teacher in speculative decoding (Leviathan, Kalman and Matias 2023, 2211.17192). Knows tensors alone.

A round: the student drafts g tokens, the teacher checks them all at once. A drafted x ~ q is kept with probability min(1, p(x) / q(x));
at the first that is not, the teacher draws from what of p is left over, (p - q)+ normalised, and after g kept ones it adds one of its own.
What comes out is distributed as the teacher's own text. So it can be turned around: on text that the teacher wrote, a token y was a kept
draft with probability min(p(y), q(y)) / p(y) = min(1, q(y) / p(y)), whatever came before, and how rounds fall on that text follows without
any further drawing.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.batch import Batch
from potstill.evaluation.agreement import side_by_side
from potstill.models.causal_lm import CausalLM, evaluating
from potstill.rollouts.reading import Reader, Voice

ACCEPTED, MATCHED, KEPT = range(3)
"""Columns of `accept_rows`: sum of min(p, q); whether both find the same token most likely; how likely the token that came was a kept
draft."""


def accept_rows(student_log_probs: Tensor, teacher_log_probs: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """float64 [n, 3]: ACCEPTED, MATCHED and KEPT of rows [n, V] whose text went on with `tokens` [n]. At temperature 0 both choose their
    most likely token, and accepted is what matches."""
    matched = (student_log_probs.argmax(-1) == teacher_log_probs.argmax(-1)).double()
    if temperature == 0:
        return torch.stack([matched, matched, (student_log_probs.argmax(-1) == tokens).double()], dim=1)
    q, p = ((log_probs.double() / temperature).log_softmax(-1) for log_probs in (student_log_probs, teacher_log_probs))
    kept = (q - p).gather(1, tokens[:, None]).squeeze(1).clamp_max(0).exp()
    return torch.stack([torch.minimum(p, q).exp().sum(-1), matched, kept], dim=1)


@torch.no_grad()
def accept_batch(student: CausalLM, batch: Batch, teacher: CausalLM, temperature: float) -> list[tuple[int, np.ndarray]]:
    """For each document of the batch its Example.index and `accept_rows` of its targets, in their order."""
    batch = batch.to(student.device)
    targets = batch.target_rows()[1]
    with evaluating(student, teacher):
        rows = torch.cat([
            accept_rows(ours, theirs, targets[part], temperature).cpu()
            for part, ours, theirs in side_by_side(student, batch, teacher) if theirs is not None
        ])  # fmt: skip
    return [(index, rows[one.rows].numpy()) for index, one in zip(batch.examples, batch.sequences(), strict=True)]


def expected_rounds(kept: np.ndarray, drafts: int) -> float:
    """Rounds of `drafts` drafted tokens that it takes, on average, to write a text whose token t is a kept draft with probability kept[t],
    kept [T]; exact, by going through the places at which a round can begin. The last round is cut where the text ends."""
    begins = np.zeros(len(kept) + drafts + 1)
    begins[0] = 1.0
    for start in range(len(kept)):
        going = begins[start]
        if going == 0:
            continue
        for drafted, keep in enumerate(kept[start : start + drafts], start=1):
            # This draft is refused: the teacher's own token stands in its place, and the next round begins behind it.
            begins[start + drafted] += going * (1 - keep)
            going *= keep
        # All were kept: the teacher adds a token of its own.
        begins[start + drafts + 1] += going
    return float(begins[: len(kept)].sum())


@torch.no_grad()
def seconds_of_tokens(model: CausalLM, prompt: Sequence[int], tokens: Sequence[int], vocabulary_size: int) -> float:
    """Seconds that a model takes to read `tokens` one after another behind a prompt, each with the distribution of the next: the median
    over them times their number."""
    taken = []
    with evaluating(model):
        reader = Reader(Voice(model, vocabulary_size), pad_token=0)
        reader.begin([prompt])
        for token in tokens:
            _wait(model)
            began = time.perf_counter()
            reader.read(torch.tensor([token], device=model.device))
            _wait(model)
            taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * len(taken)


def _wait(model: CausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

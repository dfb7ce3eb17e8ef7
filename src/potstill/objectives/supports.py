"""Puts student and teacher on the same outcomes: the whole vocabulary, the teacher's top K and the rest, K alone, or samples.

A support knows nothing of the distance that follows. `compare` gives log-probabilities of both sides over O outcomes; `spread`
carries a gradient with respect to outcome logits back to the student's V logits (it is exact for every divergence on them).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.errors import IncompatibleError
from potstill.signals import FullOutcomes, SampledOutcomes, TeacherOutcomes, TopKOutcomes

_ACCEPTS = {
    "full": (FullOutcomes,),
    "top_k_tail": (FullOutcomes, TopKOutcomes),
    "top_k_renormalised": (FullOutcomes, TopKOutcomes),
    "samples": (FullOutcomes, SampledOutcomes),
}


@dataclass(frozen=True)
class Compared:
    """Both sides on O outcomes; the first `num_tokens` outcomes are single tokens (a tail bucket is not).

    `ids` are the tokens of the outcomes where they are not the whole vocabulary; `rest` is the student's distribution [n, V] with
    those tokens excluded, where a tail bucket stands for it.
    """

    student: Float[Tensor, "n O"]
    teacher: Float[Tensor, "n O"]
    num_tokens: int
    ids: Int[Tensor, "n K"] | None = None
    rest: Float[Tensor, "n V"] | None = None


def check_support(support: str, outcomes: TeacherOutcomes, temperature: float) -> None:
    """Raises IncompatibleError where a teacher's answer cannot be put on a support."""
    if not isinstance(outcomes, _ACCEPTS[support]):
        takes = " or ".join(kind.__name__ for kind in _ACCEPTS[support])
        found = type(outcomes).__name__
        raise IncompatibleError(f"support {support!r} takes {takes}; the teacher answered {found}; change objective.support")
    if support == "samples" and isinstance(outcomes, SampledOutcomes) and temperature != 1:
        raise IncompatibleError(f"recorded samples were drawn at temperature 1; found temperature {temperature}; set it to 1.0")
    if support == "top_k_tail" and isinstance(outcomes, TopKOutcomes) and temperature != 1:
        raise IncompatibleError(
            f"the mass outside a recorded top K is known at temperature 1 alone; found temperature {temperature}; "
            "set it to 1.0 or say support: top_k_renormalised"
        )


def reduce_teacher(support: str, log_probs: Float[Tensor, "n V"], size: int) -> tuple[Tensor, ...]:
    """A live teacher's distribution cut down to what a record of it would hold: (ids, log_probs, log_tail) or (ids, weights)."""
    if support == "samples":
        ids = torch.multinomial(log_probs.exp(), size, replacement=True)
        return ids, torch.full_like(ids, 1 / size, dtype=log_probs.dtype)
    kept, ids = log_probs.topk(min(size, log_probs.shape[-1]), dim=-1)
    return ids, kept, log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)


def compare(support: str, student: Float[Tensor, "n V"], ids: Tensor, kept: Tensor, log_tail: Tensor | None) -> Compared:
    """Student log-probs [n, V] against a teacher's K kept log-probs, with the tail bucket or renormalised on the K.

    An id that stands twice in a row counts once.
    """
    repeated = _repeated(ids)
    on_ids = student.gather(-1, ids).masked_fill(repeated, -torch.inf)
    kept = kept.to(student.dtype).masked_fill(repeated, -torch.inf)
    if support == "top_k_renormalised":
        return Compared(on_ids.log_softmax(-1), kept.log_softmax(-1), ids.shape[-1], ids)
    assert log_tail is not None
    rest = student.scatter(-1, ids, -torch.inf)
    tail = rest.logsumexp(-1, keepdim=True)
    teacher = torch.cat([kept, log_tail.to(kept.dtype).unsqueeze(-1)], -1)
    return Compared(torch.cat([on_ids, tail], -1), teacher, ids.shape[-1], ids, rest)


def spread(compared: Compared, gradient: Float[Tensor, "n O"], student: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """The gradient with respect to V logits of one with respect to outcome logits.

    The tail bucket's logit is the logsumexp of the logits inside it, so its gradient is shared out by the student's shape there.
    """
    if compared.ids is None:
        return gradient
    on_ids = gradient[..., : compared.num_tokens]
    if compared.rest is None:
        return torch.zeros_like(student).scatter_add(-1, compared.ids, on_ids)
    # A tail without mass is log 0 - log 0: there is nothing to share out.
    shape = (compared.rest - compared.student[..., -1:].clamp_min(torch.finfo(student.dtype).min)).exp()
    return (shape * gradient[..., -1:]).scatter_add(-1, compared.ids, on_ids)


def sampled_value(student: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], weights: Float[Tensor, "n K"]) -> Float[Tensor, "n"]:
    """sum_i w_i (-log q_i): forward KL plus the teacher's entropy in expectation, without bias (2503.16870)."""
    chosen = torch.where(weights > 0, student.gather(-1, ids), 0.0)
    return -(weights.to(student.dtype) * chosen).sum(-1)


def sampled_gradient(student: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], weights: Float[Tensor, "n K"]) -> Float[Tensor, "n V"]:
    """(sum w) q - w. The factor stays: weights need not sum to one."""
    weights = weights.to(student.dtype)
    return (student.exp() * weights.sum(-1, keepdim=True)).scatter_add(-1, ids, -weights)


def _repeated(ids: Tensor) -> Tensor:
    """Marks every occurrence of an id in its row but the first."""
    ordered, order = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return torch.zeros_like(again).scatter(-1, order, again)

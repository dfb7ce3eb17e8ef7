"""Which outcomes student and teacher are compared on: the whole vocabulary, the teacher's top K or the student's and the rest, K alone,
or samples.

A support knows nothing of the distance that follows, nor of how the student comes by its probabilities of these outcomes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.errors import IncompatibleError
from potstill.objectives.catalogue import ONE_TOKEN
from potstill.objectives.plan import Plan
from potstill.signals import FullOutcomes, MixtureOutcomes, ProjectedOutcomes, SampledOutcomes, TopKOutcomes, WholeOutcomes

_LIVE = (FullOutcomes, MixtureOutcomes)
_ACCEPTS = {
    "full": _LIVE,
    "top_k_tail": (*_LIVE, TopKOutcomes),
    "top_k_renormalised": (*_LIVE, TopKOutcomes),
    "samples": (*_LIVE, SampledOutcomes),
    "projected": (*_LIVE, ProjectedOutcomes),
    "student_top_k_tail": _LIVE,
}
_MORE = {
    TopKOutcomes: "say objective.support: top_k_tail or top_k_renormalised",
    SampledOutcomes: "say objective.support: samples, with divergence: forward_kl",
    ProjectedOutcomes: "say objective.support: projected, with divergence: forward_kl",
}


@dataclass(frozen=True)
class Compared:
    """Both sides on O outcomes; the first `num_tokens` outcomes are single tokens (a tail bucket is not)."""

    student: Float[Tensor, "n O"]
    teacher: Float[Tensor, "n O"]
    num_tokens: int


def check_support(plan: Plan, outcomes: WholeOutcomes) -> None:
    """Raises IncompatibleError where a teacher's answer cannot be put on the plan's support, naming the way out."""
    support, temperature = plan.support, plan.temperature
    if not isinstance(outcomes, _ACCEPTS[support]):
        takes = " or ".join(kind.__name__ for kind in _ACCEPTS[support])
        way = _MORE.get(type(outcomes), "change objective.support")
        raise IncompatibleError(f"support {support!r} takes {takes}; the teacher answered {type(outcomes).__name__}; {way}")
    if isinstance(outcomes, MixtureOutcomes):
        _check_mixture(outcomes)
    if isinstance(outcomes, _LIVE):
        return
    assert not isinstance(outcomes, FullOutcomes | MixtureOutcomes)
    if support != "top_k_renormalised" and outcomes.temperature != temperature:
        way = ", or say support: top_k_renormalised" if support == "top_k_tail" else ""
        raise IncompatibleError(
            f"this record was made at temperature {outcomes.temperature:g} and holds for no other on support {support!r}; found "
            f"temperature {temperature:g}; set objective.temperature to {outcomes.temperature:g}{way}, or record it again"
        )
    if isinstance(outcomes, TopKOutcomes):
        _check_top_k(plan, outcomes)


def _check_top_k(plan: Plan, outcomes: TopKOutcomes) -> None:
    if plan.support == "top_k_renormalised" and outcomes.ids.shape[-1] < 2:
        raise IncompatibleError(f"this record keeps {outcomes.ids.shape[-1]} token a row, and {ONE_TOKEN}")
    if plan.token_weight != "position":
        return
    if outcomes.target_log_probs is None:
        raise IncompatibleError(
            "token_weight 'position' needs the teacher's probability of each written token; this record does not hold it; "
            "record it with the targets, or say objective.token_weight: none"
        )
    if outcomes.temperature != plan.temperature:
        raise IncompatibleError(
            f"token_weight 'position' needs the teacher's probability of each written token at temperature {plan.temperature:g}; this "
            f"record knows it at {outcomes.temperature:g}; set objective.temperature to that"
        )


def _check_mixture(outcomes: MixtureOutcomes) -> None:
    rows = {len(member) for member in outcomes.members}
    if len(outcomes.members) != len(outcomes.weights) or len(rows) != 1:
        raise IncompatibleError(
            f"a mixture has one weight for each teacher, and all answer the same rows; found {len(outcomes.members)} teachers, "
            f"{len(outcomes.weights)} weights and rows {sorted(rows)}"
        )
    if any(weight < 0 for weight in outcomes.weights) or abs(sum(outcomes.weights) - 1) > 1e-6:
        raise IncompatibleError(
            f"the weights of a mixture are at least 0 and add up to 1; found {', '.join(f'{weight:g}' for weight in outcomes.weights)}"
        )


def reduce_teacher(
    support: str, log_probs: Float[Tensor, "n V"], size: int, picked: Int[Tensor, "n 1"], student: Float[Tensor, "n V"] | None = None
) -> tuple[Tensor, ...]:
    """A live teacher's distribution cut down to what a record of it would hold.

    (ids, weights); or (ids, log_probs, log_tail [n, 1], log-probability of the `picked` token [n, 1]). The ids are the teacher's most
    likely ones, or those of the `student`'s logits where they are given.
    """
    if support == "samples":
        ids = torch.multinomial(log_probs.exp(), size, replacement=True)
        return ids, torch.full_like(ids, 1 / size, dtype=log_probs.dtype)
    ids = (log_probs if student is None else student).topk(min(size, log_probs.shape[-1]), dim=-1).indices
    kept = log_probs.gather(-1, ids)
    return ids, kept, log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True), log_probs.gather(-1, picked)


def repeated_ids(ids: Int[Tensor, "n K"]) -> Bool[Tensor, "n K"]:
    """Marks every occurrence of an id in its row but the first: a token is one outcome however often it is named."""
    ordered, order = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return torch.zeros_like(again).scatter(-1, order, again)

"""What every tile is made of: the end of a head's arithmetic, the rows that come in, and a weighted divergence with its gradient.

It knows distributions over outcomes and their weights; which outcomes, and how a gradient over them reaches V logits, is a tile's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.objectives.divergences import DIVERGENCES, GRADIENTS
from potstill.objectives.pair import LOG_ZERO, Pair, make_pair
from potstill.objectives.plan import Plan
from potstill.objectives.supports import Compared
from potstill.objectives.weights import cap_weight, entropy, position_weight


@dataclass(frozen=True)
class Finish:
    """The end of a head's arithmetic: logits = softcap * tanh(scale * linear / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, linear: Tensor) -> Tensor:
        logits = linear * self.scale if self.scale != 1.0 else linear
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap is not None else logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """What a gradient over the finished logits is multiplied by, beside the scale; None for 1."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()

    def back(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """The gradient over the linear part of one over the finished logits, which is given up."""
        if slope is not None:
            gradient = gradient.mul_(slope)
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


@dataclass(frozen=True)
class TileInput:
    """n rows. `teacher` is what `TeacherAnswers` says of them: (linear logits [n, V],) of a live teacher, a record's tensors, or ().

    `row_weights` multiply both losses, `divergence_weights` the divergence alone, `text_weights` the cross-entropy alone.
    """

    targets: Tensor
    teacher: tuple[Tensor, ...]
    row_weights: Tensor
    divergence_weights: Tensor | None
    text_weights: Tensor | None = None


def wide(linear: Tensor) -> Tensor:
    """At least float32, and log 0 as a number: log-probabilities and sums are never narrower. May work in place."""
    return (linear if linear.dtype == torch.float64 else linear.float()).clamp_min_(LOG_ZERO)


def weigh(
    plan: Plan, compared: Compared | None, rows: TileInput, student_share: Tensor | None
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The weights of the divergence by row; the token weight alone, for the log; and the divergence's parameters under these weights.

    `student_share` is the student's entropy over all tokens by the largest possible one, where the plan weighs by it.
    """
    weights, token_weights = rows.row_weights, rows.divergence_weights
    parameters: dict[str, Any] = dict(plan.parameters)
    if plan.divergence in ("dkd", "cross_entropy"):
        parameters["targets"] = rows.targets
    if plan.weighs_tokens_itself:
        forward, reverse = position_weight(plan.token_weight, dict(plan.weight_parameters), compared, student_share)
        if token_weights is not None:
            forward, reverse = forward * token_weights, reverse * token_weights
        token_weights = forward if plan.divergence != "reverse_kl" else reverse
        if plan.divergence == "mixed_kl":
            # w F + (1 - w) R with two weights is one weight and another share of the forward direction.
            share = parameters["forward_weight"]
            token_weights = share * forward + (1 - share) * reverse
            parameters["forward_weight"] = share * forward / token_weights.clamp_min(torch.finfo(forward.dtype).tiny)
    return weights if token_weights is None else weights * token_weights, token_weights, parameters


def weighted_divergence(
    plan: Plan, compared: Compared, rows: TileInput, student_probs: Tensor | None, student_share: Tensor | None, *, training: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The divergence and its token weight by row; and, with `training`, the weighted gradient over the outcomes' logits.

    `student_probs` are those of `compared`, where they are at hand.
    """
    weights, token_weights, parameters = weigh(plan, compared, rows, student_share)
    value, gradient = _value_and_gradient(plan.divergence, parameters, compared, student_probs, training)
    found = {"divergence": value}
    if plan.row_cap is not None:
        cap = cap_weight(value, plan.row_cap)
        weights, token_weights = weights * cap, cap if token_weights is None else token_weights * cap
    if token_weights is not None:
        found["token_weight"] = token_weights
    return found, None if gradient is None else gradient.mul_(gradient_scale(plan, weights))


def seen(student: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
    """By row, from log-probabilities [n, V] at temperature 1: entropies in nats, and 1 where the most likely tokens are the same one."""
    found = {"student_entropy": entropy(student)}
    if teacher is not None:
        found["teacher_entropy"] = entropy(teacher)
        found["top1_agreement"] = (teacher.argmax(-1) == student.argmax(-1)).to(student.dtype)
    return found


def text_scale(plan: Plan, rows: TileInput) -> Tensor:
    """What multiplies the gradient of the cross-entropy; [n, 1]."""
    weights = rows.row_weights if rows.text_weights is None else rows.row_weights * rows.text_weights
    return (weights * plan.sft_weight).unsqueeze(-1)


def gradient_scale(plan: Plan, weights: Tensor) -> Tensor:
    """What multiplies the gradient over tempered logits, to be one over the logits themselves; [n, 1]."""
    return (weights * (plan.divergence_factor / plan.temperature)).unsqueeze(-1)


def _value_and_gradient(
    name: str, parameters: dict, compared: Compared, student_probs: Tensor | None, training: bool
) -> tuple[Tensor, Tensor | None]:
    """In closed form where one is known, else by autograd over these rows alone."""
    if not training:
        return DIVERGENCES[name](compared.student, compared.teacher, **parameters), None
    if name in GRADIENTS:
        if student_probs is None:
            pair = make_pair(compared.student, compared.teacher)
        else:
            pair = Pair(compared.student, compared.teacher, student_probs, compared.teacher.exp())
        return GRADIENTS[name](pair, **parameters)
    with torch.enable_grad():
        outcome_logits = compared.student.detach().requires_grad_()
        values = DIVERGENCES[name](outcome_logits.log_softmax(-1), compared.teacher, **parameters)
        (gradient,) = torch.autograd.grad(values.sum(), outcome_logits)
    return values.detach(), gradient

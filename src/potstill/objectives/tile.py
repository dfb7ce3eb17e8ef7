"""One block of rows: from raw logits of student and teacher to each row's losses, and the gradient over the student's logits.

Everything vocabulary-wide and elementwise is here, once, for every divergence and support; run as it stands or compiled. It knows
nothing of hidden rows, of head weights, or of how many blocks there are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.objectives.divergences import DIVERGENCES, GRADIENTS
from potstill.objectives.pair import LOG_ZERO, Pair, make_pair, nats
from potstill.objectives.plan import Plan
from potstill.objectives.supports import Compared, compare, reduce_teacher, sampled_gradient, sampled_value, spread
from potstill.objectives.weights import entropy, position_weight


@dataclass(frozen=True)
class Finish:
    """The end of a head's arithmetic: logits = softcap * tanh(scale * linear / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, linear: Tensor) -> Tensor:
        logits = linear * self.scale if self.scale != 1.0 else linear
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap is not None else logits

    def back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient over the linear part of one over the finished logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient * self.scale if self.scale != 1.0 else gradient


@dataclass(frozen=True)
class TileInput:
    """n rows. `teacher` is (linear logits [n, V],) of a live teacher, (ids, log_probs, log_tail), (ids, weights), or ().

    `row_weights` multiply both losses, `divergence_weights` the divergence alone.
    """

    targets: Tensor
    teacher: tuple[Tensor, ...]
    row_weights: Tensor
    divergence_weights: Tensor | None


def _wide(linear: Tensor) -> Tensor:
    """At least float32, and log 0 as a number: log-probabilities and sums are never narrower. May work in place."""
    return (linear if linear.dtype == torch.float64 else linear.float()).clamp_min_(LOG_ZERO)


def tile_step(plan: Plan, finishes: tuple[Finish, Finish], linear: Tensor, rows: TileInput, *, training: bool, details: bool = False):
    """Losses by row (a dict of [n] tensors). `linear` is given up: with `training` the gradient over it is written over it."""
    logits = finishes[0].logits(_wide(linear))
    log_probs = logits.log_softmax(-1)
    picked = rows.targets.unsqueeze(-1)
    found = {"cross_entropy": nats(-log_probs.gather(-1, picked).squeeze(-1))}
    probs = log_probs.exp() if training else None
    gradient: Tensor | None = None
    if plan.has_teacher:
        tempered = log_probs if plan.temperature == 1 else (logits / plan.temperature).log_softmax(-1)
        teacher, compared = _compared(plan, finishes[1], tempered, rows.teacher)
        tempered_probs = probs if plan.temperature == 1 or probs is None else tempered.exp()
        more, gradient = _divergence(plan, tempered, tempered_probs, teacher, compared, rows)
        found.update(more)
        if plan.token_weight == "position":
            assert compared is not None
            found["disagreement"] = (compared.teacher.gather(-1, picked) - tempered.gather(-1, picked)).squeeze(-1)
        if details and compared is not None:
            found["teacher_entropy"] = entropy(compared.teacher)
            best = compared.teacher[..., : compared.num_tokens].argmax(-1, keepdim=True)
            best = best if compared.ids is None else compared.ids.gather(-1, best)
            found["top1_agreement"] = (best.squeeze(-1) == log_probs.argmax(-1)).to(log_probs.dtype)
    if details:
        found["student_entropy"] = entropy(log_probs)
    if probs is not None and plan.kd_ratio < 1:
        weights = (rows.row_weights * (1 - plan.kd_ratio)).unsqueeze(-1)
        gradient = probs * weights if gradient is None else gradient.addcmul_(probs, weights)
        gradient.scatter_add_(-1, picked, -weights)
    if training:
        assert gradient is not None
        linear.copy_(finishes[0].back(gradient, logits))
    return found


def _compared(plan: Plan, finish: Finish, student: Tensor, teacher: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Compared | None]:
    """The teacher's record on this support, and both sides on its outcomes (None for samples: they have no distribution)."""
    if len(teacher) == 1:
        logits = finish.logits(_wide(teacher[0]))
        log_probs = (logits if plan.temperature == 1 else logits / plan.temperature).log_softmax(-1)
        if plan.support == "full":
            return teacher, Compared(student, log_probs, student.shape[-1])
        teacher = reduce_teacher(plan.support, log_probs, plan.support_size)
    elif plan.temperature != 1:
        teacher = (teacher[0], teacher[1] / plan.temperature, *teacher[2:])
    if plan.support == "samples":
        return teacher, None
    ids, kept, log_tail = teacher
    return teacher, compare(plan.support, student, ids, kept, log_tail)


def _divergence(
    plan: Plan, student: Tensor, student_probs: Tensor | None, teacher: tuple[Tensor, ...], compared: Compared | None, rows: TileInput
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The divergence and its token weight by row; and, where `student_probs` say so, the weighted gradient over the logits [n, V]."""
    weights = rows.row_weights if rows.divergence_weights is None else rows.row_weights * rows.divergence_weights
    token_weights = rows.divergence_weights
    parameters: dict = dict(plan.parameters)
    if plan.divergence in ("dkd", "cross_entropy"):
        parameters["targets"] = rows.targets
    if plan.weighs_tokens_itself:
        compared_or_student = compared if compared is not None else Compared(student, student, student.shape[-1])
        forward, reverse = position_weight(plan.token_weight, dict(plan.weight_parameters), plan.divergence, student, compared_or_student)
        token_weights = forward if plan.divergence != "reverse_kl" else reverse
        if plan.divergence == "mixed_kl":
            # w F + (1 - w) R with two weights is one weight and another share of the forward direction.
            share = parameters["forward_weight"]
            token_weights = share * forward + (1 - share) * reverse
            parameters["forward_weight"] = share * forward / token_weights.clamp_min(torch.finfo(forward.dtype).tiny)
        weights = weights * token_weights
    scale = (weights * (plan.divergence_factor / plan.temperature)).unsqueeze(-1)
    if compared is None:
        ids, sample_weights = teacher
        value = sampled_value(student, ids, sample_weights)
        over_logits = sampled_gradient(student, ids, sample_weights).mul_(scale) if student_probs is not None else None
    else:
        value, gradient = _value_and_gradient(plan.divergence, parameters, compared, student_probs)
        over_logits = None if gradient is None else spread(compared, gradient.mul_(scale), student)
    found = {"divergence": value}
    if token_weights is not None:
        found["token_weight"] = token_weights
    return found, over_logits


def _value_and_gradient(name: str, parameters: dict, compared: Compared, student_probs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """In closed form where one is known, else by autograd over these rows alone."""
    if student_probs is None:
        return DIVERGENCES[name](compared.student, compared.teacher, **parameters), None
    if name in GRADIENTS:
        if compared.ids is None:
            pair = Pair(compared.student, compared.teacher, student_probs, compared.teacher.exp())
        else:
            pair = make_pair(compared.student, compared.teacher)
        return GRADIENTS[name](pair, **parameters)
    with torch.enable_grad():
        outcome_logits = compared.student.detach().requires_grad_()
        rows = DIVERGENCES[name](outcome_logits.log_softmax(-1), compared.teacher, **parameters)
        (gradient,) = torch.autograd.grad(rows.sum(), outcome_logits)
    return rows.detach(), gradient

"""One block of rows: from raw logits of student and teacher to each row's losses, and the gradient over the student's logits.

Everything vocabulary-wide and elementwise is here, once, for every divergence and support; run as it stands or compiled. It knows
nothing of hidden rows, of head weights, or of how many blocks there are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.objectives.divergences import DIVERGENCES, GRADIENTS
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


def wide(tensor: Tensor) -> Tensor:
    """At least float32: log-probabilities and sums are never narrower."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tile_step(plan: Plan, finishes: tuple[Finish, Finish], linear: Tensor, rows: TileInput, *, training: bool, details: bool = False):
    """Losses by row (a dict of [n] tensors); with `training` the gradient over `linear` is written over `linear`."""
    logits = finishes[0].logits(wide(linear))
    log_probs = logits.log_softmax(-1)
    picked = rows.targets.unsqueeze(-1)
    found = {"cross_entropy": -log_probs.gather(-1, picked).squeeze(-1)}
    gradient: Tensor | None = None
    if training and plan.kd_ratio < 1:
        ce_weights = (rows.row_weights * (1 - plan.kd_ratio)).unsqueeze(-1)
        gradient = (log_probs.exp() * ce_weights).scatter_add(-1, picked, -ce_weights)
    if plan.has_teacher:
        tempered = log_probs if plan.temperature == 1 else (logits / plan.temperature).log_softmax(-1)
        teacher, compared = _compared(plan, finishes[1], tempered, rows.teacher)
        more, over_logits = _divergence(plan, tempered, teacher, compared, rows, training)
        found.update(more)
        if over_logits is not None:
            gradient = over_logits if gradient is None else gradient + over_logits
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
    if training:
        assert gradient is not None
        linear.copy_(finishes[0].back(gradient, logits))
    return found


def _compared(plan: Plan, finish: Finish, student: Tensor, teacher: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Compared | None]:
    """The teacher's record on this support, and both sides on its outcomes (None for samples: they have no distribution)."""
    if len(teacher) == 1:
        logits = finish.logits(wide(teacher[0]))
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
    plan: Plan, student: Tensor, teacher: tuple[Tensor, ...], compared: Compared | None, rows: TileInput, training: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
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
        over_logits = sampled_gradient(student, ids, sample_weights) * scale if training else None
    else:
        value, gradient = _value_and_gradient(plan.divergence, parameters, compared, training)
        over_logits = None if gradient is None else spread(compared, gradient * scale, student)
    found = {"divergence": value}
    if token_weights is not None:
        found["token_weight"] = token_weights
    return found, over_logits


def _value_and_gradient(name: str, parameters: dict, compared: Compared, training: bool) -> tuple[Tensor, Tensor | None]:
    """In closed form where one is known, else by autograd over these rows alone."""
    value = DIVERGENCES[name]
    if not training:
        return value(compared.student, compared.teacher, **parameters), None
    if name in GRADIENTS:
        return value(compared.student, compared.teacher, **parameters), GRADIENTS[name](compared.student, compared.teacher, **parameters)
    with torch.enable_grad():
        outcome_logits = compared.student.detach().requires_grad_()
        rows = value(outcome_logits.log_softmax(-1), compared.teacher, **parameters)
        (gradient,) = torch.autograd.grad(rows.sum(), outcome_logits)
    return rows.detach(), gradient

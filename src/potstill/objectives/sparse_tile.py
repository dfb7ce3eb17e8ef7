"""One block of rows where the teacher knows K tokens and the rest, K alone, samples, or a projection: no log-softmax over all tokens.

The student's logits become, in place, the exponentials of the rest of the vocabulary; every row's divergence is between K + 1 numbers,
and its gradient over V logits is one coefficient a row times those exponentials, with the K tokens and the target written in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.objectives.pair import LOG_ZERO, nats
from potstill.objectives.plan import Plan
from potstill.objectives.supports import Compared, reduce_teacher, repeated_ids
from potstill.objectives.tile_parts import Finish, TileInput, gradient_scale, seen, text_scale, weigh, weighted_divergence, wide
from potstill.objectives.weights import entropy_share


@dataclass(frozen=True)
class _Parted:
    """The student's distribution as log-probabilities of the K ids (a repeated one counts once), of the rest, and of the target.

    `total` is the logsumexp of the logits. `shape [n, V]`, 0 at the ids, is proportional to the probabilities of the rest and adds up
    to `mass`.
    """

    on_ids: Tensor
    raw_on_ids: Tensor
    tail: Tensor
    at_target: Tensor
    total: Tensor
    shape: Tensor
    mass: Tensor

    def spread(self, over_tail: Tensor) -> Tensor:
        """A gradient over the logit of the rest, shared out by the student's own shape there; `shape` is given up."""
        return self.shape.mul_(torch.where(self.mass > 0, over_tail / self.mass, 0.0))


def _part(logits: Tensor, ids: Tensor, repeated: Tensor, picked: Tensor) -> _Parted:
    """`logits [n, V]` are given up. The rest is summed by itself: one minus the mass of the ids would cancel.

    Where nothing is kept, all of a row being padding, the rest is everything.
    """
    on_ids, at_target = logits.gather(-1, ids), logits.gather(-1, picked)
    rest = logits.scatter_(-1, ids, on_ids.masked_fill(~repeated.all(-1, keepdim=True), -torch.inf))
    top = rest.amax(-1, keepdim=True).clamp_min(LOG_ZERO)
    shape = rest.sub_(top).exp_()
    mass = shape.sum(-1, keepdim=True)
    tail = top + mass.log()
    once = on_ids.masked_fill(repeated, -torch.inf)
    total = torch.cat([once, tail], -1).logsumexp(-1, keepdim=True)
    return _Parted(once - total, on_ids - total, tail - total, at_target - total, total, shape, mass)


def sparse_step(plan: Plan, finishes: tuple[Finish, Finish], linear: Tensor, rows: TileInput, *, training: bool, details: bool):
    """As `tile_step`, for records and for live teachers that are cut down to what a record would hold."""
    logits = finishes[0].logits(wide(linear))
    picked = rows.targets.unsqueeze(-1)
    teacher = _record(plan, finishes[1], rows, picked, logits)
    found, share = _whole_looks(plan, finishes[1], logits, rows, teacher, details)
    slope = finishes[0].slope(logits) if training else None
    ids, repeated = _one_each(plan, teacher)
    tempered = None
    if plan.temperature != 1 and (plan.support != "top_k_renormalised" or plan.token_weight == "position"):
        tempered = _part(logits / plan.temperature, ids, repeated, picked)
    plain = _part(logits, ids, repeated, picked)
    found["cross_entropy"] = nats(-plain.at_target.squeeze(-1))
    parted = plain if tempered is None else tempered
    if plan.support == "samples":
        more, gradient = _sampled(plan, parted, teacher[1], rows, share, training)
    elif plan.support == "projected":
        more, gradient = _projected(plan, parted, teacher, rows, training)
    else:
        compared = _compared(plan, plain, parted, teacher, repeated)
        more, gradient = weighted_divergence(plan, compared, rows, None, share, training=training)
        if plan.token_weight == "position":
            found["disagreement"] = (teacher[3] - parted.at_target).squeeze(-1)
    found.update(more)
    if gradient is not None:
        over_logits = _over_logits(plan, gradient, tempered, plain, rows, ids)
        linear.copy_(finishes[0].back(over_logits, slope))  # the same tensor where nothing had to be widened or capped
    return found


def _record(plan: Plan, finish: Finish, rows: TileInput, picked: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    """(ids, weights), or (ids, log_probs, log_tail [n, 1]) and, where it is known, the target's log-probability [n, 1].

    `student` are the student's logits: where the support is of its own most likely tokens, it names the ids.
    """
    dtype = student.dtype
    if len(rows.teacher) == 1:
        logits = finish.logits(wide(rows.teacher[0]))
        log_probs = (logits if plan.temperature == 1 else logits / plan.temperature).log_softmax(-1)
        of_student = student if plan.support == "student_top_k_tail" else None
        return reduce_teacher(plan.support, log_probs, plan.support_size, picked, of_student)
    named = plan.support != "projected"
    ids = rows.teacher[0] if named else picked[:, :0]
    known = rows.teacher[1:] if named else rows.teacher
    columns = [tensor.to(dtype) if tensor.dim() == 2 else tensor.to(dtype).unsqueeze(-1) for tensor in known]
    return ids, *columns


def _one_each(plan: Plan, teacher: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Ids to gather at, and which of them do not count: repetitions and padding (log-probability -inf, pointing at a kept id)."""
    if plan.support in ("samples", "projected"):
        return teacher[0], repeated_ids(teacher[0])
    ids, kept = teacher[0], teacher[1]
    padding = kept == -torch.inf
    kept_id = ids.gather(-1, kept.argmax(-1, keepdim=True))
    places = torch.arange(ids.shape[-1], device=ids.device)
    return torch.where(padding, kept_id, ids), repeated_ids(torch.where(padding, -1 - places, ids)) | padding


def _whole_looks(
    plan: Plan, finish: Finish, logits: Tensor, rows: TileInput, teacher: tuple[Tensor, ...], details: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What must be seen of all the logits before they are given up: for the log, and for the one weight that asks it.

    What a record does not say of its teacher is left out: its entropy, where it kept some tokens, and its best token, where it kept none.
    """
    found = {}
    if details:
        live = len(rows.teacher) == 1
        found = seen(logits.log_softmax(-1), finish.logits(wide(rows.teacher[0])).log_softmax(-1) if live else None)
        if not live and plan.support in ("top_k_tail", "top_k_renormalised"):
            best = teacher[0].gather(-1, teacher[1].argmax(-1, keepdim=True)).squeeze(-1)
            found["top1_agreement"] = (best == logits.argmax(-1)).to(logits.dtype)
        elif not live and plan.support == "projected" and plan.temperature == 1:
            found["teacher_entropy"] = teacher[2].squeeze(-1)
    if plan.token_weight != "student_entropy":
        return found, None
    return found, entropy_share((logits / plan.temperature).log_softmax(-1))


def _compared(plan: Plan, plain: _Parted, parted: _Parted, teacher: tuple[Tensor, ...], repeated: Tensor) -> Compared:
    """Both sides on the K ids renormalised, or on the K ids and the rest."""
    kept = teacher[1].masked_fill(repeated, -torch.inf)
    if plan.support == "top_k_renormalised":
        # The teacher's log-probabilities came tempered; a common constant is free on both sides.
        return Compared((plain.on_ids / plan.temperature).log_softmax(-1), kept.log_softmax(-1), kept.shape[-1])
    student = torch.cat([parted.on_ids, parted.tail], -1)
    return Compared(student, torch.cat([kept, teacher[2]], -1), kept.shape[-1])


def _sampled(
    plan: Plan, parted: _Parted, weights: Tensor, rows: TileInput, share: Tensor | None, training: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """sum_i w_i (-log q_i): forward KL plus the teacher's entropy in expectation, without bias (2503.16870).

    Its gradient is (sum w) q - w. The factor stays: weights need not sum to one.
    """
    row_weights, token_weights, _ = weigh(plan, None, rows, share)
    found = {"divergence": nats(-(weights * torch.where(weights > 0, parted.raw_on_ids, 0.0)).sum(-1))}
    if token_weights is not None:
        found["token_weight"] = token_weights
    if not training:
        return found, None
    sums = weights.sum(-1, keepdim=True)
    gradient = torch.cat([parted.on_ids.exp() * sums - weights, parted.tail.exp() * sums], -1)
    return found, gradient.mul_(gradient_scale(plan, row_weights))


def _projected(
    plan: Plan, parted: _Parted, teacher: tuple[Tensor, ...], rows: TileInput, training: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Forward KL from the teacher's mean of the student's logits: no token is named, and all of them are the rest.

    The gradient is q alone; what the teacher's probabilities take from it is taken from the gradient over the hidden rows.
    """
    _, mean_logit, teacher_entropy = teacher
    weights, token_weights, _ = weigh(plan, None, rows, None)
    found = {"divergence": (parted.total - mean_logit / plan.temperature - teacher_entropy).squeeze(-1)}
    if token_weights is not None:
        found["token_weight"] = token_weights
    return found, gradient_scale(plan, weights).to(parted.total.dtype) if training else None


def _over_logits(plan: Plan, gradient: Tensor, tempered: _Parted | None, plain: _Parted, rows: TileInput, ids: Tensor) -> Tensor:
    """The gradient over V logits of one over the outcomes' logits [n, K] or [n, K + 1], cross-entropy's added to it."""
    over_ids = gradient[:, : ids.shape[-1]]
    over_tail = gradient[:, ids.shape[-1] :] if plan.support != "top_k_renormalised" else torch.zeros_like(plain.tail)
    if plan.sft_weight == 0:
        return (plain if tempered is None else tempered).spread(over_tail).scatter_add_(-1, ids, over_ids)
    weights = text_scale(plan, rows).to(gradient.dtype)
    over_ids = over_ids + weights * plain.on_ids.exp()
    own_tail = weights * plain.tail.exp()
    whole = plain.spread(own_tail + over_tail) if tempered is None else plain.spread(own_tail).add_(tempered.spread(over_tail))
    return whole.scatter_add_(-1, ids, over_ids).scatter_add_(-1, rows.targets.unsqueeze(-1), -weights)

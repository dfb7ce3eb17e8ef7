"""The fused loss: any divergence on any support, group of rows by group of rows through both LM heads.

The gradient is made in the forward pass, so neither model's [N, V] logits ever exist; backward only scales what was computed. It
knows hidden rows and heads, and nothing of models, batches or recipes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.errors import IncompatibleError, UsageError
from potstill.head import Head
from potstill.objectives.answers import finish_of
from potstill.objectives.catalogue import SEQUENCE_WEIGHTS, Value
from potstill.objectives.execution import Execution
from potstill.objectives.passes import Job, run
from potstill.objectives.plan import Plan, likelihood_plan, make_plan
from potstill.objectives.projection import check_projected
from potstill.objectives.supports import check_support
from potstill.objectives.tile_parts import Finish
from potstill.signals import (
    FullOutcomes,
    MixtureOutcomes,
    ProjectedOutcomes,
    RoutedOutcomes,
    SampledOutcomes,
    TeacherOutcomes,
    TopKOutcomes,
    WholeOutcomes,
)  # fmt: skip


@dataclass(frozen=True)
class FusedLoss:
    """Sums over rows, never means. `total` carries the gradient; the rest is detached, for the log.

    `cross_entropy` and `divergence` are weighted by the row weights alone: neither kd_weight nor sft_weight, no squared temperature,
    no token weight. `by_row` holds what was found for each of the N rows: "cross_entropy", "divergence", "token_weight" where there
    is one, and with details "student_entropy", "teacher_entropy" and "top1_agreement", at temperature 1, as far as they are known.
    """

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    by_row: dict[str, Tensor]


class _Fused(torch.autograd.Function):
    """Gradients for the bias and for both factors of every product of the student's head; `found` is filled with losses by row."""

    @staticmethod
    def forward(ctx, job: Job, found: dict[str, Tensor], *tensors: Tensor | None):
        total, by_row, ctx.gradients = run(job, tensors, ctx.needs_input_grad[2:])
        found.update(by_row)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the fused loss makes its gradients in the forward pass and gives them away in the first backward; "
                "found a second backward through the same loss; call the loss again, or add the losses up and go back once"
            )
        # As a Python number: a tensor would be rounded to the gradient's own, narrower dtype first.
        scale = grad_outputs[0].item()
        for gradient in gradients:
            if gradient is not None and scale != 1.0:
                gradient.mul_(scale)
        return (None, None, *gradients)


def fused_loss(
    student_rows: Float[Tensor, "N D"],
    student_head: Head,
    teacher: TeacherOutcomes | None,
    targets: Int[Tensor, "N"],
    *,
    divergence: str = "forward_kl",
    parameters: dict[str, Value] | None = None,
    kd_ratio: float | None = None,
    kd_weight: float | None = None,
    sft_weight: float | None = None,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool | None = None,
    vocabulary_size: int | None = None,
    row_weights: Float[Tensor, "N"] | None = None,
    token_weight: str = "none",
    support: str = "full",
    training: bool = True,
    execution: Execution | None = None,
) -> FusedLoss:
    """sum over rows of row_weight * (sft_weight CE + kd_weight [T^2] token_weight D), and its gradient for the student.

    `kd_ratio`, 0.5 where nothing is said, stands for kd_weight and one minus it for sft_weight.

    `student_rows [N, D]` are the hidden states that predict `targets [N]`, prompt and padding removed. `teacher` answers the same N
    rows; None is cross-entropy alone. `vocabulary_size` crops padded rows from both heads: they get no mass and a gradient of 0.
    `training` is for dropout on a LoRA of the head; gradients are made where autograd is on and something asks for them.
    Raises ConfigError for choices that do not fit, IncompatibleError for a teacher that does not.
    """
    if teacher is None:
        plan = likelihood_plan()
    else:
        plan = make_plan(
            divergence, parameters, kd_ratio=kd_ratio, kd_weight=kd_weight, sft_weight=sft_weight, temperature=temperature,
            scale_by_temperature_squared=scale_by_temperature_squared, support=support, token_weight=token_weight,
        )
    return run_plan(
        plan, student_rows, student_head, teacher, targets,
        vocabulary_size=vocabulary_size, row_weights=row_weights, training=training, execution=execution,
    )


def run_plan(
    plan: Plan,
    student_rows: Float[Tensor, "N D"],
    student_head: Head,
    teacher: TeacherOutcomes | None,
    targets: Int[Tensor, "N"],
    *,
    vocabulary_size: int | None = None,
    row_weights: Float[Tensor, "N"] | None = None,
    divergence_weights: Float[Tensor, "N"] | None = None,
    text_weights: Float[Tensor, "N"] | None = None,
    training: bool = True,
    details: bool = False,
    execution: Execution | None = None,
) -> FusedLoss:
    """`fused_loss` for choices that have been checked; `divergence_weights` and `text_weights` multiply one of the two losses alone.

    They are constants; `text_weights` may be negative.
    """
    if isinstance(teacher, RoutedOutcomes):

        def part(rows: Tensor, answer: WholeOutcomes) -> FusedLoss:
            weights = [None if tensor is None else tensor[rows] for tensor in (row_weights, divergence_weights, text_weights)]
            return run_plan(
                plan, student_rows.index_select(0, rows), student_head, answer, targets[rows], vocabulary_size=vocabulary_size,
                row_weights=weights[0], divergence_weights=weights[1], text_weights=weights[2], training=training, details=details,
                execution=execution,
            )

        return _routed(teacher, student_rows, len(targets), part)
    vocabulary = common_vocabulary(student_head, teacher, vocabulary_size)
    _check_targets(targets, vocabulary)
    if teacher is not None:
        plan = _fitted(plan, student_head, teacher, len(targets), vocabulary)
    narrow = torch.float64 if student_rows.dtype == torch.float64 else torch.float32
    job = Job(
        plan=plan,
        finishes=(Finish(student_head.scale, student_head.softcap), finish_of(teacher)),
        vocabulary=vocabulary,
        teacher=teacher,
        targets=targets,
        row_weights=torch.ones_like(targets, dtype=narrow) if row_weights is None else row_weights.to(narrow),
        divergence_weights=None if divergence_weights is None else divergence_weights.to(narrow),
        text_weights=None if text_weights is None else text_weights.to(narrow),
        execution=execution or Execution(),
        details=details,
    )
    return _differentiated(job, _operands(student_head, student_rows, training))


def _operands(head: Head, rows: Tensor, training: bool) -> list[Tensor | None]:
    """(bias, left, right, left, right, ...), in the dtype that the products are made in."""
    device = rows.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    tensors: list[Tensor | None] = [head.bias]
    for left, right in head.factors(rows, training):
        right = right if autocast is None or right.dtype == torch.float64 else right.to(autocast)
        tensors += [left.to(right.dtype), right]
    return tensors


def _differentiated(job: Job, tensors: list[Tensor | None]) -> FusedLoss:
    found: dict[str, Tensor] = {}
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        total = _Fused.apply(job, found, *tensors)
    else:
        with torch.no_grad():
            total, found, _ = run(job, tuple(tensors), (False,) * len(tensors))
    zero = job.row_weights.new_zeros(())
    sums = [(job.row_weights * found[name]).sum() if name in found else zero for name in ("cross_entropy", "divergence")]
    return FusedLoss(total, *sums, by_row=found)


def _routed(
    teacher: RoutedOutcomes, student_rows: Tensor, num_rows: int, part: Callable[[Tensor, WholeOutcomes], FusedLoss]
) -> FusedLoss:
    """Every part by itself; totals and sums are added, what was found by row is put back in the order of the rows."""
    numbers = torch.cat([rows for rows, _ in teacher.parts]) if teacher.parts else torch.empty(0, dtype=torch.long)
    if len(numbers) != num_rows or not torch.equal(numbers.sort().values.cpu(), torch.arange(num_rows)):
        raise IncompatibleError(
            f"the teachers together answered {len(numbers)} rows for {num_rows} targets; each row is answered by exactly one of them"
        )
    losses = [part(rows, answer) for rows, answer in teacher.parts if len(rows)]
    by_row: dict[str, Tensor] = {}
    for (rows, _), loss in zip([place for place in teacher.parts if len(place[0])], losses, strict=True):
        for name, values in loss.by_row.items():
            by_row.setdefault(name, values.new_full((num_rows,), torch.nan))[rows] = values
    if not losses:
        zero = (student_rows * 0.0).sum()  # keeps the graph
        return FusedLoss(zero, zero.detach(), zero.detach(), by_row)
    totals, entropies, divergences = ([getattr(loss, name) for loss in losses] for name in ("total", "cross_entropy", "divergence"))
    return FusedLoss(torch.stack(totals).sum(), torch.stack(entropies).sum(), torch.stack(divergences).sum(), by_row)


def _fitted(plan: Plan, student_head: Head, teacher: WholeOutcomes, num_targets: int, vocabulary: int) -> Plan:
    """The plan for this teacher, once its answer has been looked at. Raises IncompatibleError."""
    check_support(plan, teacher)
    _check_ids(teacher, vocabulary)
    if len(teacher) != num_targets:
        raise IncompatibleError(f"the teacher answered {len(teacher)} rows for {num_targets} targets; score the same batch")
    if plan.support == "projected":
        if not isinstance(teacher, ProjectedOutcomes):
            return replace(plan, support="full")  # a live teacher projects on the spot, which is the same sum
        check_projected(student_head, teacher, vocabulary)
    return plan


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.device.type == "cpu" and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IncompatibleError(
            f"targets lie in {int(targets.min())}..{int(targets.max())}; the vocabulary has {vocabulary} tokens; "
            "remove ignored rows before the loss, and compare tokenizer and model"
        )


def _check_ids(teacher: WholeOutcomes, vocabulary: int) -> None:
    if not isinstance(teacher, TopKOutcomes | SampledOutcomes) or teacher.ids.device.type != "cpu" or not teacher.ids.numel():
        return
    if not 0 <= int(teacher.ids.min()) <= int(teacher.ids.max()) < vocabulary:
        raise IncompatibleError(
            f"the teacher's record names tokens {int(teacher.ids.min())}..{int(teacher.ids.max())}; the vocabulary has {vocabulary}; "
            "record it with this tokenizer"
        )


def common_vocabulary(student_head: Head, teacher: WholeOutcomes | None, vocabulary_size: int | None) -> int:
    """The number of real tokens, which all heads must at least cover."""
    widths = [student_head.vocabulary_size]
    if isinstance(teacher, FullOutcomes):
        widths.append(teacher.head.vocabulary_size)
    elif isinstance(teacher, MixtureOutcomes):
        widths += [member.head.vocabulary_size for member in teacher.members]
    if vocabulary_size is None:
        if len(set(widths)) > 1:
            raise IncompatibleError(
                f"the student's head has {widths[0]} rows and the teacher's {', '.join(map(str, widths[1:]))}; "
                "if one tokenizer serves both, give its number of tokens as vocabulary_size"
            )
        return widths[0]
    if not 0 < vocabulary_size <= min(widths):
        raise IncompatibleError(f"vocabulary_size {vocabulary_size} does not fit heads of {widths} rows; it is the number of real tokens")
    return vocabulary_size


def fused_distillation_loss(
    student_hidden: Float[Tensor, "*B D"],
    student_head_weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "*B E"],
    teacher_head_weight: Float[Tensor, "W E"],
    targets: Int[Tensor, "*B"],
    *,
    divergence: str = "forward_kl",
    kd_ratio: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    scale_by_temperature_squared: bool | None = None,
    vocabulary_size: int | None = None,
    support: str = "full",
    token_weight: str = "none",
    execution: Execution | None = None,
    **divergence_parameters: Value,
) -> tuple[Float[Tensor, ""], int]:
    """(total, count): the summed distillation loss of hidden states through two LM heads, and the number of targets.

    Position by position `student_hidden` and `teacher_hidden` predict `targets`: shift before the call. Rows whose target is
    `ignore_index` are removed first, so what stands in them cannot matter. Divide by the count of the whole optimizer step
    (all micro-batches and ranks), then go backward once. `divergence_parameters` are those of the catalogue, such as `beta` of jsd.

        total, count = fused_distillation_loss(hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, targets)
        (total / count).backward()
    """
    if token_weight in SEQUENCE_WEIGHTS:
        raise UsageError(f"token_weight {token_weight!r} compares tokens of one response; use DistributionMatching, which knows them")
    flat = targets.reshape(-1)
    valid = (flat != ignore_index).nonzero().squeeze(-1)
    student_rows = student_hidden.reshape(-1, student_hidden.shape[-1]).index_select(0, valid)
    with torch.no_grad():
        teacher_rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]).index_select(0, valid)
    loss = fused_loss(
        student_rows, Head(student_head_weight), FullOutcomes(teacher_rows, Head(teacher_head_weight.detach())),
        flat.index_select(0, valid), divergence=divergence, parameters=divergence_parameters, kd_ratio=kd_ratio, temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared, vocabulary_size=vocabulary_size, support=support,
        token_weight=token_weight, execution=execution,
    )
    return loss.total, int(valid.numel())

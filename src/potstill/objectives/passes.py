"""The loop under the fused loss: groups of rows, slices of a group, blocks of a slice; and the gradients that they leave.

It works on plain tensors outside of autograd. It knows the products of a head and the tile's step, and no formula.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.objectives.answers import Products, TeacherAnswers, is_live, linear_into
from potstill.objectives.execution import Execution, Sizes, choose_sizes, compiled_step
from potstill.objectives.plan import Plan
from potstill.objectives.projection import widened_product
from potstill.objectives.tile import tile_step
from potstill.objectives.tile_parts import Finish, TileInput, gradient_scale
from potstill.signals import ProjectedOutcomes, WholeOutcomes

# The head's gradient is added up in float32 through a window of this many rows of the head.
_WINDOW = 4096
_SEEN_BYTES = 24 * 2**20


@dataclass(frozen=True)
class Job:
    """What a pass needs beside the tensors that are differentiated. `finishes` are the student's and the teacher's."""

    plan: Plan
    finishes: tuple[Finish, Finish]
    vocabulary: int
    teacher: WholeOutcomes | None
    targets: Tensor
    row_weights: Tensor
    divergence_weights: Tensor | None
    text_weights: Tensor | None
    execution: Execution
    details: bool


def run(
    job: Job, tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """`tensors` are (bias, left, right, left, right, ...). Returns the total, the losses by row, and the gradients that are wanted."""
    bias, products = tensors[0], _pairs(tensors[1:])
    num_rows, width = products[0][0].shape
    device = products[0][0].device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        dtype = products[0][0].dtype
        for tensor in tensors:
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        head_gradient = any(wanted[2::2])
        sizes = choose_sizes(
            job.execution, num_rows, job.vocabulary, width, dtype.itemsize, head_gradient=head_gradient, device=device,
            sparse=job.plan.has_teacher and job.plan.support != "full", live=is_live(job.teacher),
        )
        gradients = _Gradients(
            tensors, wanted, job.vocabulary, num_groups=-(-num_rows // sizes.group), subtracts=isinstance(job.teacher, ProjectedOutcomes)
        )
        by_row = _run_groups(job, sizes, products, bias, gradients, torch.empty(sizes.group, job.vocabulary, dtype=dtype, device=device))
        return _total(job, by_row), by_row, gradients.finish()


def _run_groups(
    job: Job, sizes: Sizes, products: Products, bias: Tensor | None, gradients: "_Gradients", tile: Tensor
) -> dict[str, Tensor]:
    """Every row once; `tile` serves every group in turn."""
    _keep_small_buffers(tile.device)
    asked = job.teacher if job.plan.has_teacher else None
    teacher = TeacherAnswers(
        asked, temperature=job.plan.temperature, vocabulary=job.vocabulary, slice_rows=sizes.slice, student_rows=products[0][0]
    )
    found: dict[str, Tensor] = {}
    for start in range(0, len(job.targets), sizes.group):
        group = slice(start, min(start + sizes.group, len(job.targets)))
        part = tile[: group.stop - group.start]
        _run_group(job, sizes, products, bias, teacher, group, part, gradients.wanted, found)
        gradients.add(products, group, part)
        if isinstance(asked, ProjectedOutcomes):
            gradients.subtract(group, _over_projection(job, asked, group))
    return found


def _over_projection(job: Job, teacher: ProjectedOutcomes, group: slice) -> Tensor:
    """What the teacher's probabilities have of the gradient over the hidden rows; the student's came through its logits."""
    weights = job.row_weights if job.divergence_weights is None else job.row_weights * job.divergence_weights
    return gradient_scale(job.plan, weights[group]) * teacher.projection[group]


def _keep_small_buffers(device: torch.device) -> None:
    """Teaches glibc to keep what blocks free: it hands a freed buffer back to the system, to be paged in again at the next block,
    until it has seen a larger one come and go. Nothing is written, so this costs two system calls."""
    if device.type == "cpu":
        torch.empty(_SEEN_BYTES, dtype=torch.uint8)


def _pairs(tensors: tuple[Tensor | None, ...]) -> Products:
    return [(left, right) for left, right in zip(tensors[::2], tensors[1::2], strict=True) if left is not None and right is not None]


def _run_group(
    job: Job, sizes: Sizes, products: Products, bias: Tensor | None, teacher: TeacherAnswers, group: slice, tile: Tensor,
    training: bool, found: dict[str, Tensor],
) -> None:
    """Losses of a group of rows; with `training` the gradient over the linear part of the student's head replaces the tile."""
    compiles = job.execution.compiles(tile.device)
    linear_into(tile, [(left[group], right) for left, right in products], bias)
    for start in range(group.start, group.stop, sizes.slice):
        rows = slice(start, min(start + sizes.slice, group.stop))
        linear = tile[rows.start - group.start : rows.stop - group.start]
        answers = teacher.of(rows)
        for first in range(0, rows.stop - rows.start, sizes.block):
            block = slice(first, min(first + sizes.block, rows.stop - rows.start))
            here = slice(rows.start + block.start, rows.start + block.stop)
            inputs = TileInput(
                targets=job.targets[here],
                teacher=tuple(answer[block] for answer in answers),
                row_weights=job.row_weights[here],
                divergence_weights=None if job.divergence_weights is None else job.divergence_weights[here],
                text_weights=None if job.text_weights is None else job.text_weights[here],
            )
            if compiles and block.stop - block.start == sizes.block:
                step = compiled_step(job.plan, job.finishes, training, job.details)
                losses = step(linear[block], inputs)
            else:
                losses = tile_step(job.plan, job.finishes, linear[block], inputs, training=training, details=job.details)
            for name, values in losses.items():
                # Into tensors made once: a small one kept from every block would sit in the gaps of the heap and make it grow.
                if name not in found:
                    found[name] = values.new_empty(len(job.targets))
                found[name][here] = values


class _Gradients:
    """Gradients of the bias and of each product's factors, group by group; rows of a head beyond the vocabulary keep 0."""

    def __init__(
        self, tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...], vocabulary: int, num_groups: int, subtracts: bool
    ):
        self.wanted = any(wanted)
        self._tensors, self._vocabulary, self._single, self._subtracts = tensors, vocabulary, num_groups <= 1, subtracts
        self._gradients: list[Tensor | None] = []
        for place, (tensor, want) in enumerate(zip(tensors, wanted, strict=True)):
            if tensor is None or not want:
                self._gradients.append(None)
            elif place % 2 == 1:
                # A difference of two nearly equal sums is not taken of rounded ones.
                dtype = torch.promote_types(tensor.dtype, torch.float32) if subtracts else tensor.dtype
                self._gradients.append(torch.empty_like(tensor, dtype=dtype))
            else:
                gradient = torch.empty_like(tensor, dtype=self._sum_dtype(tensor))
                gradient[0 if num_groups == 0 else vocabulary :] = 0
                self._gradients.append(gradient)
        self._started = False

    def _sum_dtype(self, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if self._single else torch.promote_types(tensor.dtype, torch.float32)

    def add(self, products: Products, group: slice, over_linear: Tensor) -> None:
        """`over_linear [n, V]` is the gradient over the student's linear logits for the rows of `group`."""
        bias = self._gradients[0]
        if bias is not None:
            total = over_linear.sum(0, dtype=torch.promote_types(bias.dtype, torch.float32))
            bias[: self._vocabulary] = total if not self._started else bias[: self._vocabulary] + total
        for number, (left, right) in enumerate(products):
            over_left, over_right = self._gradients[1 + 2 * number], self._gradients[2 + 2 * number]
            if over_left is None and over_right is None:
                continue
            same = over_linear.to(left.dtype)
            if over_left is not None:
                if self._subtracts:
                    over_left[group] = widened_product(over_linear, right[: self._vocabulary])
                else:
                    torch.mm(same, right[: self._vocabulary], out=over_left[group])
            if over_right is not None:
                self._add_product(over_right[: self._vocabulary], same, left[group])
        self._started = True

    def subtract(self, group: slice, over_rows: Tensor) -> None:
        """From the gradient over the rows of the first product, where that is wanted."""
        if self._gradients[1] is not None:
            self._gradients[1][group] -= over_rows

    def _add_product(self, total: Tensor, over_linear: Tensor, left: Tensor) -> None:
        if not self._started and total.dtype == left.dtype:
            torch.mm(over_linear.T, left, out=total)
        elif total.dtype == left.dtype:
            total.addmm_(over_linear.T, left)
        else:
            for start in range(0, total.shape[0], _WINDOW):
                window = slice(start, start + _WINDOW)
                product = over_linear[:, window].T @ left
                if self._started:
                    total[window] += product
                else:
                    total[window] = product

    def finish(self) -> list[Tensor | None]:
        """In each tensor's own dtype."""
        pairs = zip(self._gradients, self._tensors, strict=True)
        return [None if gradient is None or tensor is None else gradient.to(tensor.dtype) for gradient, tensor in pairs]


def _total(job: Job, by_row: dict[str, Tensor]) -> Tensor:
    """A weight of zero takes an infinite divergence out, as a masked row would."""
    total = job.row_weights.new_zeros(())
    if job.plan.sft_weight > 0 and "cross_entropy" in by_row:
        weights = job.row_weights if job.text_weights is None else job.row_weights * job.text_weights
        total = total + job.plan.sft_weight * weighted_sum(weights, by_row["cross_entropy"])
    if job.plan.divergence_factor > 0 and "divergence" in by_row:
        weights = job.row_weights * by_row["token_weight"] if "token_weight" in by_row else job.row_weights
        total = total + job.plan.divergence_factor * weighted_sum(weights, by_row["divergence"])
    return total


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    return torch.where(weights != 0, weights * values, 0.0).sum()

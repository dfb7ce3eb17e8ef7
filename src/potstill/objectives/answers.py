"""What a teacher says of a slice of rows, as the tensors that a tile takes; a live teacher's logits exist for one slice at a time.

It knows every kind of outcomes, and no formula of a loss.
"""

import math

import torch
from torch import Tensor

from potstill.objectives.pair import LOG_ZERO
from potstill.objectives.tile_parts import Finish, wide
from potstill.signals import FullOutcomes, MixtureOutcomes, ProjectedOutcomes, SampledOutcomes, TopKOutcomes, WholeOutcomes

Products = list[tuple[Tensor, Tensor]]
# Rows of a member's softmax at once: a handful of temporaries of that size stays in the cache.
_MIXED = 2**19


class TeacherAnswers:
    """`of(rows)` gives: (linear logits [n, V],) of a live teacher or a mixture, or the tensors of a record, or () where none is asked.

    A live teacher's logits, `finish_of` still to come, go into one buffer that every slice reuses. `student_rows` are what a projected
    record is multiplied with.
    """

    def __init__(
        self, teacher: WholeOutcomes | None, *, temperature: float, vocabulary: int, slice_rows: int, student_rows: Tensor | None = None
    ):
        self._teacher, self._temperature, self._student_rows = teacher, temperature, student_rows
        self._members: list[_Logits] = []
        if isinstance(teacher, FullOutcomes):
            self._members = [_Logits(teacher, vocabulary, slice_rows)]
        elif isinstance(teacher, MixtureOutcomes):
            self._members = [_Logits(member, vocabulary, slice_rows) for member in teacher.members]
            first = self._members[0].buffer
            dtype = torch.float64 if any(member.buffer.dtype == torch.float64 for member in self._members) else torch.float32
            self._mixed = torch.empty(first.shape, dtype=dtype, device=first.device)
            for member in self._members:
                if member.buffer.dtype == first.dtype:
                    member.buffer = first  # one member at a time

    def of(self, rows: slice) -> tuple[Tensor, ...]:
        teacher = self._teacher
        if isinstance(teacher, TopKOutcomes):
            log_probs = teacher.log_probs[rows]
            if self._temperature != teacher.temperature:
                log_probs = log_probs * (teacher.temperature / self._temperature)
            known = () if teacher.target_log_probs is None else (teacher.target_log_probs[rows],)
            return teacher.ids[rows].long(), log_probs, teacher.log_tail[rows], *known
        if isinstance(teacher, SampledOutcomes):
            return teacher.ids[rows].long(), teacher.weights[rows]
        if isinstance(teacher, ProjectedOutcomes) and self._student_rows is not None:
            # sum_i p_i z_i, without z.
            dtype = torch.promote_types(teacher.projection.dtype, torch.float32)
            mean_logit = (self._student_rows[rows].to(dtype) * teacher.projection[rows].to(dtype)).sum(-1)
            return mean_logit + teacher.bias[rows], teacher.entropy[rows]
        if isinstance(teacher, FullOutcomes):
            return (self._members[0].of(rows),)
        if isinstance(teacher, MixtureOutcomes):
            return (self._mix(teacher.weights, rows),)
        return ()

    def _mix(self, weights: tuple[float, ...], rows: slice) -> Tensor:
        """log sum_i w_i p_i, which any softmax leaves as it is."""
        mixed = self._mixed[: rows.stop - rows.start].fill_(LOG_ZERO)
        step = max(1, _MIXED // mixed.shape[1])
        for member, weight in zip(self._members, weights, strict=True):
            if weight == 0:
                continue
            linear = member.of(rows)
            for start in range(0, len(mixed), step):
                part = slice(start, start + step)
                log_probs = member.finish.logits(wide(linear[part])).log_softmax(-1).add_(math.log(weight))
                torch.logaddexp(mixed[part], log_probs.to(mixed.dtype), out=mixed[part])
        return mixed


class _Logits:
    """The linear part of one live teacher's logits."""

    def __init__(self, outcomes: FullOutcomes, vocabulary: int, slice_rows: int):
        self._bias = outcomes.head.bias
        self._products: Products = [(left.to(right.dtype), right) for left, right in outcomes.head.factors(outcomes.hidden)]
        self.finish = finish_of(outcomes)
        dtype = self._products[0][0].dtype
        for _, right in self._products:
            dtype = torch.promote_types(dtype, right.dtype)
        self.buffer = torch.empty(slice_rows, vocabulary, dtype=dtype, device=outcomes.hidden.device)

    def of(self, rows: slice) -> Tensor:
        linear = self.buffer[: rows.stop - rows.start]
        linear_into(linear, [(left[rows], right) for left, right in self._products], self._bias)
        return linear


def finish_of(teacher: WholeOutcomes | None) -> Finish:
    """The end of a live teacher's head; a mixture's members are finished before they are mixed."""
    return Finish(teacher.head.scale, teacher.head.softcap) if isinstance(teacher, FullOutcomes) else Finish()


def is_live(teacher: WholeOutcomes | None) -> bool:
    """Whether the teacher's whole distribution is made here, from hidden rows."""
    return isinstance(teacher, FullOutcomes | MixtureOutcomes)


def linear_into(out: Tensor, products: Products, bias: Tensor | None) -> None:
    """out = sum of left @ right.T, plus the bias, without a second vocabulary-wide tensor where the dtypes agree."""
    for number, (left, right) in enumerate(products):
        right = right[: out.shape[1]]
        if left.dtype == out.dtype:
            if number == 0:
                torch.mm(left, right.T, out=out)
            else:
                out.addmm_(left, right.T)
        elif number == 0:
            out.copy_(left @ right.T)
        else:
            out.add_(left @ right.T)
    if bias is not None:
        out.add_(bias[: out.shape[1]])

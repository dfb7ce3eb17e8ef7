"""The module that is wrapped and trained: a student and its objective, with the loss inside its forward.

DDP and FSDP2 hook the forward of what they wrap, so everything that touches a parameter must happen in there: trunk, head and
loss. It knows no teacher (it gets the answer), no optimizer and no denominator: it returns sums.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from potstill.batch import Batch
from potstill.head import Head, LowRank
from potstill.models.causal_lm import CausalLM
from potstill.objectives.distribution import DistributionMatching
from potstill.objectives.likelihood import Likelihood
from potstill.signals import TeacherSignal

# What the distiller asks of an objective: `needs`, `count(batch)` and `total(student_rows, student_head, signal, batch)`.
Objective = DistributionMatching | Likelihood


def _cast(head: Head, dtype: torch.dtype) -> Head:
    low_rank = tuple(LowRank(d.down.to(dtype), d.up.to(dtype), d.scaling, d.dropout) for d in head.low_rank)
    bias = None if head.bias is None else head.bias.to(dtype)
    return replace(head, weight=head.weight.to(dtype), bias=bias, low_rank=low_rank)


class Distiller(nn.Module):
    """`objective` is an `nn.Module` of `potstill.objectives`; what it learns itself is trained with the student."""

    def __init__(self, student: CausalLM, objective: Objective):
        super().__init__()
        self.student = student
        self.objective: Objective = objective

    def forward(self, batch: Batch, signal: TeacherSignal) -> tuple[Tensor, Tensor, Tensor]:
        """Total (with a gradient), cross-entropy and divergence: sums over the batch's targets, in nats."""
        rows = self.student.rows(batch)
        head = self.student.head()
        kind = rows.device.type
        if torch.is_autocast_enabled(kind):
            # The vocabulary-wide weight is cast once here; inside the loss autocast would cast it for every chunk.
            dtype = torch.get_autocast_dtype(kind)
            rows, head = rows.to(dtype), _cast(head, dtype)
        with torch.autocast(kind, enabled=False):
            loss = self.objective.total(rows, head, signal, batch)
        return loss.total, loss.cross_entropy, loss.divergence

"""The module that is wrapped and trained: a student and its objective, with the loss inside its forward.

DDP and FSDP2 hook the forward of what they wrap, so everything that touches a parameter must happen in there: trunk, head and
loss. It knows no teacher (it gets the answer), no optimizer and no denominator: it returns sums.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from potstill.batch import Batch
from potstill.models.causal_lm import CausalLM
from potstill.objectives.distribution import DistributionMatching
from potstill.objectives.likelihood import Likelihood
from potstill.objectives.policy import PolicyGradient
from potstill.signals import TeacherSignal

# What the distiller asks of an objective: `needs`, `reduction`, `count(batch)` and `total(student_rows, student_head, signal, batch,
# details=...)`.
Objective = DistributionMatching | Likelihood | PolicyGradient


DATASET = "dataset"
# What validation says beside the loss, as the objectives name it for each row.
SEEN = ("top1_agreement", "student_entropy", "teacher_entropy")


def without_dropout(module: nn.Module) -> None:
    """From here to the next `train()` nothing in it drops anything out: text was drawn without, and a ratio to that compares like with
    like. It holds through the backward pass, where activation checkpointing computes anew; what acts on that stays in its mode.
    """
    for part in module.modules():
        part.training = part.training and bool(getattr(part, "gradient_checkpointing", False))


def sums_of(by_row: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """The sum of each of `SEEN` over the rows [N, D], in float64 on the CPU; NaN where it is not known of every row."""
    unknown = torch.full((len(rows),), torch.nan)
    return torch.stack([by_row.get(name, unknown).detach().cpu().double().sum() for name in SEEN])


class Distiller(nn.Module):
    """An objective is an `nn.Module` of `potstill.objectives`; what it learns itself is trained with the student.

    Where several write the text, `objective` maps each stream to its own; that of the data set is also what is measured on the
    validation set.
    """

    def __init__(self, student: CausalLM, objective: Objective | Mapping[str, Objective]):
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleDict(dict(objective) if isinstance(objective, Mapping) else {DATASET: objective})

    def objective_of(self, stream: str) -> Objective:
        return cast(Objective, self.objectives[stream])

    @property
    def objective(self) -> Objective:
        """That of the data set."""
        return self.objective_of(DATASET)

    def forward(
        self, batch: Batch | None, signal: TeacherSignal | None, stream: str = DATASET, write: Callable[[], None] | None = None
    ) -> tuple[Tensor, ...]:
        """Total (with a gradient), cross-entropy and divergence: sums over the batch's targets, in nats. In evaluation mode a fourth
        tensor follows, the sums of what is `SEEN`.

        With `write` there is no batch, and three zeros come back: it is called here, where the root's parameters are whole.
        """
        if write is not None:
            write()
            nothing = torch.zeros(())
            return nothing, nothing, nothing
        assert batch is not None
        assert signal is not None
        if isinstance(self.objective_of(stream), PolicyGradient):
            without_dropout(self.student)
        rows = self.student.rows(batch)
        head = self.student.head()
        kind = rows.device.type
        if torch.is_autocast_enabled(kind):
            # The vocabulary-wide weight is cast once here; inside the loss autocast would cast it for every chunk.
            dtype = torch.get_autocast_dtype(kind)
            rows, head = rows.to(dtype), head.each(lambda tensor: tensor.to(dtype))
        with torch.autocast(kind, enabled=False):
            loss = self.objective_of(stream).total(rows, head, signal, batch, details=not self.training)
        sums = loss.total, loss.cross_entropy, loss.divergence
        return sums if self.training else (*sums, sums_of(loss.by_row, rows))

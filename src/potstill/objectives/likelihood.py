"""Learning from text: cross-entropy of the targets (SFT, sequence-level distillation). No teacher is asked."""

from torch import Tensor, nn

from potstill.batch import Batch
from potstill.head import Head
from potstill.objectives.execution import Execution
from potstill.objectives.fused import FusedLoss, run_plan
from potstill.objectives.plan import likelihood_plan
from potstill.objectives.reduction import check_reduction, count, row_weights
from potstill.signals import Needs, TeacherSignal


class Likelihood(nn.Module):
    """sum of -log q[target] over the target rows, through the head in chunks.

    `reduction`: "token_mean" counts targets; "seq_mean" weighs a row by one over its response's length and counts responses.
    `sft_weight` multiplies the total, as it does beside a divergence.
    """

    def __init__(
        self, *, reduction: str = "token_mean", vocabulary_size: int | None = None, execution: Execution | None = None,
        sft_weight: float = 1.0,
    ):
        super().__init__()
        self.plan = likelihood_plan(sft_weight)
        self.needs = Needs("nothing")
        self.reduction = check_reduction(reduction)
        self.vocabulary_size = vocabulary_size
        self.execution = execution or Execution()

    def count(self, batch: Batch) -> int:
        """What the total of the whole optimizer step is divided by, summed over its micro-batches and ranks."""
        return count(self.reduction, batch)

    def total(
        self, student_rows: Tensor, student_head: Head, signal: TeacherSignal | None, batch: Batch, *, details: bool = False
    ) -> FusedLoss:
        """`student_rows [N, D]` are the rows of `batch.target_rows()`; `signal` is not read."""
        return run_plan(
            self.plan, student_rows, student_head, None, batch.target_rows()[1],
            vocabulary_size=self.vocabulary_size, row_weights=row_weights(self.reduction, batch), training=self.training,
            details=details, execution=self.execution,
        )

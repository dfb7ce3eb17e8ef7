"""Matching next-token distributions: which outcomes, which distance, which weights, mixed with cross-entropy as the recipe says."""

import torch
from torch import Tensor, nn

from potstill.batch import Batch
from potstill.errors import ConfigError, IncompatibleError
from potstill.head import Head
from potstill.objectives.catalogue import SEQUENCE_WEIGHTS, Value
from potstill.objectives.execution import Execution
from potstill.objectives.fused import FusedLoss, run_plan
from potstill.objectives.plan import make_plan
from potstill.objectives.reduction import check_reduction, count, row_weights
from potstill.objectives.weights import sequence_weight
from potstill.signals import Needs, Outcomes, TeacherSignal

_OUTCOMES: dict[str, Outcomes] = {
    "full": "full", "top_k_tail": "top_k", "top_k_renormalised": "top_k", "samples": "sampled", "projected": "projected",
    "student_top_k_tail": "full", "written": "target",
}  # fmt: skip
# Here a record is exact at any temperature; elsewhere it stands at its own.
_AT_ANY_TEMPERATURE = ("full", "top_k_renormalised", "student_top_k_tail")


def needs_of(support: str, parameters: dict[str, Value] | None, *, temperature: float = 1.0, token_weight: str = "none") -> Needs:
    """What a teacher is asked for."""
    outcomes = _OUTCOMES[support]
    # How many outcomes a live teacher is cut down to is no wish of a record, unless somebody said so.
    top_k = (parameters or {}).get("top_k") if outcomes == "top_k" else None
    at_any = support in _AT_ANY_TEMPERATURE and token_weight != "position"
    return Needs(outcomes, None if top_k is None else int(top_k), None if at_any else temperature)


class DistributionMatching(nn.Module):
    """sft_weight cross-entropy + kd_weight divergence, summed over target rows, through both heads in chunks.

    `kd_ratio` stands for a kd_weight of so much and a sft_weight of one minus it; 0.5 where none of the three is given.
    `parameters` is flat: those of the divergence, of the support and of the token weight, as a recipe has them; see the catalogue.
    `row_cap` weighs a position of divergence D with the constant min(1, row_cap / D).
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        parameters: dict[str, Value] | None = None,
        kd_ratio: float | None = None,
        kd_weight: float | None = None,
        sft_weight: float | None = None,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool | None = None,
        support: str = "full",
        token_weight: str = "none",
        row_cap: float | None = None,
        reduction: str = "token_mean",
        vocabulary_size: int | None = None,
        execution: Execution | None = None,
    ):
        super().__init__()
        self.plan = make_plan(
            divergence, parameters, kd_ratio=kd_ratio, kd_weight=kd_weight, sft_weight=sft_weight, temperature=temperature,
            scale_by_temperature_squared=scale_by_temperature_squared, support=support, token_weight=token_weight, row_cap=row_cap,
        )
        if support == "written":
            raise ConfigError("objective.support: written learns from tokens that the student drew itself; use PolicyGradient for it")
        self.needs = needs_of(support, parameters, temperature=temperature, token_weight=token_weight)
        self.reduction = check_reduction(reduction)
        self.vocabulary_size = vocabulary_size
        self.execution = execution or Execution()

    def count(self, batch: Batch) -> int:
        """What the total of the whole optimizer step is divided by, summed over its micro-batches and ranks."""
        return count(self.reduction, batch)

    def total(
        self, student_rows: Tensor, student_head: Head, signal: TeacherSignal | None, batch: Batch, *, details: bool = False
    ) -> FusedLoss:
        """`student_rows [N, D]` and `signal` answer the rows of `batch.target_rows()`, in their order."""
        if signal is None or signal.outcomes is None:
            raise IncompatibleError(
                f"{self.plan.divergence} needs the teacher's {self.needs.outcomes} outcomes; found none; score the batch first"
            )
        outcomes = signal.outcomes
        targets = batch.target_rows()[1]
        weights = row_weights(self.reduction, batch)
        of_divergence = None
        if self.plan.token_weight in SEQUENCE_WEIGHTS and len(targets):
            with torch.no_grad():
                first_look = run_plan(
                    self.plan, student_rows, student_head, outcomes, targets,
                    vocabulary_size=self.vocabulary_size, training=False, execution=self.execution,
                ).by_row
            of_divergence = sequence_weight(
                self.plan.token_weight, dict(self.plan.weight_parameters), batch.target_responses(), first_look["divergence"],
                first_look.get("disagreement", first_look["divergence"]),
            )
        return run_plan(
            self.plan, student_rows, student_head, outcomes, targets,
            vocabulary_size=self.vocabulary_size, row_weights=weights, divergence_weights=of_divergence, training=self.training,
            details=details, execution=self.execution,
        )

"""The teacher's log-probability of the tokens that came, out of whatever it answered. It knows no loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.errors import IncompatibleError
from potstill.head import Head
from potstill.objectives.execution import Execution
from potstill.objectives.fused import common_vocabulary, run_plan
from potstill.objectives.plan import likelihood_plan
from potstill.signals import FullOutcomes, MixtureOutcomes, RoutedOutcomes, TargetOutcomes, TeacherOutcomes, TopKOutcomes


@torch.no_grad()
def teacher_log_probs(
    outcomes: TeacherOutcomes, targets: Int[Tensor, "N"], student_head: Head, *, vocabulary_size: int | None = None,
    execution: Execution | None = None,
) -> Float[Tensor, "N"]:
    """log p(target) in nats at temperature 1. `student_head` is asked for its width alone.

    Raises IncompatibleError for an answer that does not say it.
    """
    if len(outcomes) != len(targets):
        raise IncompatibleError(f"the teacher answered {len(outcomes)} rows for {len(targets)} targets; score the same batch")
    if isinstance(outcomes, RoutedOutcomes):
        found = torch.full(targets.shape, torch.nan, dtype=torch.float64, device=targets.device)
        for rows, answer in outcomes.parts:
            part = teacher_log_probs(answer, targets[rows], student_head, vocabulary_size=vocabulary_size, execution=execution)
            found[rows] = part.to(found.dtype)
        return found
    if isinstance(outcomes, FullOutcomes | MixtureOutcomes):
        size = common_vocabulary(student_head, outcomes, vocabulary_size)
        members = outcomes.members if isinstance(outcomes, MixtureOutcomes) else (outcomes,)
        log_weights = torch.tensor(outcomes.weights if isinstance(outcomes, MixtureOutcomes) else (1.0,), device=targets.device).log()
        said = [
            run_plan(likelihood_plan(), one.hidden, one.head, None, targets, vocabulary_size=size, training=False, execution=execution)
            for one in members
        ]
        log_probs = torch.stack([-one.by_row["cross_entropy"] for one in said]) if len(targets) else targets.new_zeros(1, 0).float()
        return log_probs[0] if len(members) == 1 else (log_probs + log_weights.to(log_probs.dtype).unsqueeze(-1)).logsumexp(0)
    known = outcomes.log_probs if isinstance(outcomes, TargetOutcomes) else None
    if isinstance(outcomes, TopKOutcomes):
        known = outcomes.target_log_probs
    if known is None:
        raise IncompatibleError(
            f"the teacher's probability of each token is needed; its answer, {type(outcomes).__name__}, does not hold it; "
            "choose a local teacher or a server, or say objective.policy.future: none"
        )
    assert isinstance(outcomes, TargetOutcomes | TopKOutcomes)
    if outcomes.temperature != 1:
        raise IncompatibleError(
            f"the teacher's probability of each token is needed at temperature 1; this answer knows it at {outcomes.temperature:g}; "
            "record it again, or choose another teacher"
        )
    return known

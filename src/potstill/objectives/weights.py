"""Token weights: how much each position's divergence counts. All are constants in the gradient.

A weight multiplies the divergence of its position and never the cross-entropy, and the denominator stays the number of targets, so
that the update does not depend on how a batch was split. A weight knows nothing of the divergence that it multiplies.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.objectives.catalogue import Value
from potstill.objectives.pair import LOG_ZERO
from potstill.objectives.supports import Compared


def entropy(log_probs: Float[Tensor, "*N O"]) -> Float[Tensor, "*N"]:
    """-sum p log p in nats; impossible outcomes count 0."""
    return -(log_probs.exp() * log_probs.clamp_min(LOG_ZERO)).sum(-1)


def entropy_share(log_probs: Float[Tensor, "*N O"]) -> Float[Tensor, "*N"]:
    """The entropy by the largest that so many outcomes can have."""
    return entropy(log_probs) / math.log(max(log_probs.shape[-1], 2))


def position_weight(
    name: str, parameters: dict[str, Value], compared: Compared | None, student_share: Float[Tensor, "n"] | None
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """The weights of the forward and of the reverse direction at each position, from that position alone.

    They are the same tensor but for `entropy_gap` (BDKD): more on forward KL where the teacher is the less certain, more on reverse
    KL where the student is. `student_share` is the student's over all tokens, whatever the outcomes that are compared.
    """
    if name == "student_entropy" and student_share is not None:
        return student_share, student_share
    if compared is None:
        raise ValueError(f"{name!r} needs the teacher's probabilities")
    if name == "entropy_gap":
        gap = entropy(compared.teacher) - entropy(compared.student)
        extra = float(parameters["gap_weight"])
        return torch.where(gap > 0, extra, 1.0).to(gap.dtype), torch.where(gap < 0, extra, 1.0).to(gap.dtype)
    if name == "teacher_entropy":
        weight = entropy_share(compared.teacher)
    elif name == "teacher_confidence":
        largest = compared.teacher[..., : compared.num_tokens].amax(-1)
        weight = (largest >= math.log(max(float(parameters["min_confidence"]), 1e-30))).to(compared.student.dtype)
    else:
        raise ValueError(f"{name!r} is not a weight of one position")
    return weight, weight


def cap_weight(divergence: Float[Tensor, "*N"], cap: float) -> Float[Tensor, "*N"]:
    """min(1, cap / divergence): no position counts more than `cap` nats, and none is pushed away from the teacher.

    A clamp of single outcomes would leave the gradient of the small ones alone, which points elsewhere.
    """
    return (cap / divergence.clamp_min(torch.finfo(divergence.dtype).tiny)).clamp_max(1.0)


def sequence_weight(
    name: str,
    parameters: dict[str, Value],
    responses: Int[Tensor, "N"],
    divergence: Float[Tensor, "N"],
    disagreement: Float[Tensor, "N"],
) -> Float[Tensor, "N"]:
    """Weights that compare a position with the others of its response; rows of a response stand together and in order.

    `position`: 1 + gain (1 - share of |log p - log q| of the written tokens that came before), so that tokens on drifted prefixes
    get less (IW-OPD, 2606.22600). `top_share`: 1 on that share of a response's positions with the largest divergence, else 0; at
    least one position of each response stays.
    """
    if name == "position":
        totals, before = _sums_and_sums_before(responses, disagreement.abs())
        share = torch.where(totals > 0, before / totals.clamp_min(torch.finfo(totals.dtype).tiny), 0.0)
        return 1 + float(parameters["position_gain"]) * (1 - share)
    if name == "top_share":
        _, group, counts = responses.unique(return_inverse=True, return_counts=True)
        by_size = divergence.argsort(descending=True, stable=True)
        order = by_size[group[by_size].argsort(stable=True)]
        starts = (counts.cumsum(0) - counts)[group[order]]
        rank = torch.arange(len(order), device=order.device) - starts
        kept = (counts * float(parameters["share"])).ceil().clamp_min(1)[group[order]]
        return torch.zeros_like(divergence).scatter(0, order, (rank < kept).to(divergence.dtype))
    raise ValueError(f"{name!r} is not a weight within a response")


def _sums_and_sums_before(responses: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the sum of its response's values, and the sum of those that stand before it."""
    _, group = responses.unique(return_inverse=True)
    num_groups = int(group.max()) + 1 if group.numel() else 0
    sums = torch.zeros(num_groups, dtype=values.dtype, device=values.device).index_add(0, group, values)
    order = group.argsort(stable=True)
    running = values[order].cumsum(0) - values[order]
    first = torch.zeros_like(sums).scatter_reduce(0, group[order], running, "amin", include_self=False)
    before = torch.zeros_like(values).scatter(0, order, running - first[group[order]])
    return sums[group], before

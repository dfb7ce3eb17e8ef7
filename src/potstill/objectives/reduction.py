"""What a total is divided by, and how rows count in it. Nobody divides here: the counts of a whole optimizer step are summed first."""

import torch
from torch import Tensor

from potstill.batch import Batch
from potstill.errors import ConfigError
from potstill.objectives.catalogue import REDUCTIONS


def check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ConfigError(f"objective.reduction is one of {', '.join(REDUCTIONS)}; found {reduction!r}")
    return reduction


def count(reduction: str, batch: Batch) -> int:
    """Target tokens, or responses that have one: "seq_sum" divides the sum over every response by their number."""
    return batch.num_targets if reduction == "token_mean" else batch.num_responses


def row_weights(reduction: str, batch: Batch) -> Tensor | None:
    """One over the number of targets in the row's response for "seq_mean" (GKD's definition), else None."""
    if reduction != "seq_mean":
        return None
    _, response, lengths = batch.target_responses().unique(return_inverse=True, return_counts=True)
    return (1 / lengths.to(torch.float32))[response] if response.numel() else response.to(torch.float32)

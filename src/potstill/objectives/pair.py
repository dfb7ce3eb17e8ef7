"""Two next-token distributions over the same outcomes, and the few operations that every distance is made of.

It knows how to keep log 0 harmless and how a gradient passes through the softmax, and no distance.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LogProbs = Float[Tensor, "*N O"]
Nats = Float[Tensor, "*N"]
# Stands for log 0, so that 0 * log 0 is 0 without a mask over the vocabulary (masks cost more than exponentials on a CPU).
LOG_ZERO = -1e37
# What lies below it is a log 0.
EXCLUDED = -1e30
# No expectation of a log-ratio comes near it where no outcome has mass against a log 0.
_INFINITE = 1e6


class Pair(NamedTuple):
    """Log-probabilities of both sides, LOG_ZERO in place of -inf, and their exponentials."""

    student: LogProbs
    teacher: LogProbs
    student_probs: LogProbs
    teacher_probs: LogProbs


def make_pair(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Pair:
    student, teacher = finite(student_log_probs, teacher_log_probs)
    return Pair(student, teacher, student.exp(), teacher.exp())


def finite(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> tuple[LogProbs, LogProbs]:
    return student_log_probs.clamp_min(LOG_ZERO), teacher_log_probs.clamp_min(LOG_ZERO)


def nats(values: Nats, infinite: float = _INFINITE) -> Nats:
    """A row that had mass against a log 0 is infinite, and says so. Sums over outcomes without a probability need a larger `infinite`."""
    return torch.where(values > infinite, torch.inf, values)


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    return (probs * values).sum(-1)


def mixture(first: Tensor, second: Tensor, first_share: float) -> Tensor:
    """share * first + (1 - share) * second, safe to take the logarithm of and to divide by.

    In float32 its logarithm is as exact as logaddexp wherever an outcome has mass, at a fraction of the time.
    """
    return torch.lerp(second, first, first_share).clamp_min(torch.finfo(first.dtype).tiny)


def through_softmax(probs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(E[values], probs * (values - E[values])): what the softmax makes of a gradient with respect to probabilities."""
    weighted = probs * values
    mean = weighted.sum(-1, keepdim=True)
    return mean.squeeze(-1), weighted.addcmul_(probs, mean, value=-1)

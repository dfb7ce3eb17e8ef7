"""The distribution that MiniLLM draws its text from: share * teacher + (1 - share) * student, token by token (2306.08543, sec. 2.2).

It knows logits of both over the same tokens; no model.
"""

import math

import torch
from torch import Tensor

from potstill.rollouts.writing import Sampling


def mixture(student: Tensor, teacher: Tensor, share: float, sampling: Sampling) -> Tensor:
    """float32 [B, V] log-probabilities of the mixture, before truncation, from the logits of both.

    The temperature is each writer's own, so it is applied before they are mixed; what is returned is to be drawn from at
    temperature 1. At temperature 0 the most likely token of the mixture at temperature 1 comes.
    """
    temperature = sampling.temperature or 1.0
    q = torch.log_softmax(student.float() / temperature, -1)
    if share == 0:
        return q
    p = torch.log_softmax(teacher.float() / temperature, -1)
    if share == 1:
        return p
    return torch.logaddexp(p + math.log(share), q + math.log1p(-share))

"""What a token that the student wrote is credited with: importance ratios, and what follows it in its response.

Plain tensors of N target rows, all constants in the gradient. It knows neither models nor heads nor how a log-probability was found.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def importance(name: str, limit: float, log_ratio: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The weight of a token under today's student, of log q(y) - log mu(y), mu being what it was drawn from.

    `none`: 1. `truncate`: cut at `limit`. `mask`: 0 outside [1 / limit, limit] (ICE-POP's gate, 2601.02780). `clip`: held within them.
    """
    ratio = log_ratio.exp()
    if name == "none":
        return torch.ones_like(ratio)
    if name == "truncate":
        return ratio.clamp_max(limit)
    if name == "mask":
        return torch.where((ratio >= 1 / limit) & (ratio <= limit), ratio, 0.0)
    if name == "clip":
        return ratio.clamp(1 / limit, limit)
    raise ValueError(f"{name!r} is not a treatment of importance ratios")


def credited(name: str, limit: float, log_ratio: Float[Tensor, "N"], advantage: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The coefficient of log q(y): the importance weight times the advantage.

    For `clip` it is the slope of PPO's min(ratio A, clip(ratio) A) (1707.06347): nothing where the ratio has already gone beyond the
    limit in the direction in which the advantage pulls, the plain ratio times A elsewhere.
    """
    if name != "clip":
        return importance(name, limit, log_ratio) * advantage
    ratio = log_ratio.exp()
    done = ((advantage > 0) & (ratio > limit)) | ((advantage < 0) & (ratio < 1 / limit))
    return torch.where(done, 0.0, ratio * advantage)


def following(name: str, discount: float, values: Float[Tensor, "N"], responses: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """For each row what comes after it in its response; 0 for the last. Rows of a response stand together and in order.

    `discounted`: sum over s > t of discount^(s - t) values[s]. `mean`: the mean of values[s] over s > t (MiniLLM, 2306.08543, eq. 8).
    """
    if name == "none" or not len(values):
        return torch.zeros_like(values)
    lengths = torch.unique_consecutive(responses, return_counts=True)[1]
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    left = (starts + lengths.repeat_interleave(lengths)) - torch.arange(len(values), device=values.device) - 1
    if name == "mean" or discount == 1:
        wide = values.double()
        running = wide.cumsum(0)
        last = (starts + lengths.repeat_interleave(lengths) - 1).long()
        sums = running[last] - running
        return (sums / left.clamp_min(1) if name == "mean" else sums).to(values.dtype)
    if name != "discounted":
        raise ValueError(f"{name!r} is not a return")
    # A table of responses, gone through from the back: powers of the discount would leave the range of a float.
    longest = int(lengths.max())
    row = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    table = torch.zeros(longest, len(lengths), dtype=values.dtype, device=values.device)
    table[left, row] = values
    found = torch.zeros_like(table)
    for place in range(1, longest):
        found[place] = discount * (table[place - 1] + found[place - 1])
    return found[left, row]

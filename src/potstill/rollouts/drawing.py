"""A next token drawn from logits: temperature, truncation, and one uniform number a row that is a function of (seed, position) alone.

It knows tensors and `Sampling`; no model, and no random state of torch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.rollouts.writing import Sampling

# SplitMix64 (Steele, Lea and Flood 2014): a counter times an odd constant, and two rounds that mix its bits.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
# A share of the mass is first looked for among so many most likely tokens; ordering a whole vocabulary takes ten times as long.
_FIRST = 1024
# Weights are summed in runs of so many, and the running sum is taken over the runs alone.
_RUN = 256


def _mixed(words: np.ndarray) -> np.ndarray:
    for shift, factor in _ROUNDS:
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> np.uint64(31))


def uniforms(seeds: Sequence[int], position: int) -> np.ndarray:
    """float64 [B] in [0, 1): for each seed the number that draws its token at `position`, whatever else is drawn beside it."""
    with np.errstate(over="ignore"):
        streams = _mixed(np.asarray(seeds, dtype=np.uint64) + _STEP)
        words = _mixed(streams + np.uint64(position + 1) * _STEP)
    return (words >> np.uint64(11)) * 2.0**-53


def truncated(logits: Tensor, sampling: Sampling) -> Tensor:
    """float32 [B, V] after temperature, then top-k, then top-p, what cannot come being -inf. At temperature 0 they are left alone.

    Ties with the k-th stay. top-p keeps the fewest most likely tokens that reach the share, the most likely one always
    (Holtzman et al., 1904.09751).
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return logits
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return logits if sampling.top_p == 1 else _nucleus(logits, sampling.top_p, min(sampling.top_k or _FIRST, _FIRST))


def _nucleus(logits: Tensor, share: float, first: int) -> Tensor:
    """The fewest most likely tokens that hold `share`, looked for among the `first` of them before all."""
    total = logits.logsumexp(-1, keepdim=True)
    for count in (first, logits.shape[-1]):
        likely, places = logits.topk(min(count, logits.shape[-1]), dim=-1)
        weights = (likely - total).exp().double()
        # What more likely tokens hold already (nothing, for the first): where that reaches the share, nothing is missing any more.
        kept = weights.cumsum(-1) - weights < share
        if count >= logits.shape[-1] or not kept[:, -1].any():
            break
    return torch.full_like(logits, -torch.inf).scatter(1, places, likely.masked_fill(~kept, -torch.inf))


def draw(logits: Tensor, numbers: np.ndarray, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(tokens [B] int64, log-probabilities [B] float32) from `logits [B, V]` and one uniform number a row.

    The log-probability is that of the distribution that was drawn from, temperature and truncation included: 0 at temperature 0,
    where the most likely token is certain.
    """
    logits = truncated(logits, sampling)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros(len(tokens), dtype=torch.float32, device=logits.device)
    most = logits.amax(-1, keepdim=True)
    weights = (logits - most).exp_()
    tokens, totals = _picked(weights, torch.from_numpy(numbers).to(logits.device))
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    return tokens, chosen - most[:, 0] - totals.log().float()


def _picked(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose running sum passes number x total, and the totals (float64); a token of weight 0 never comes."""
    size = weights.shape[1]
    whole = size // _RUN * _RUN
    runs = weights[:, :whole].unflatten(1, (-1, _RUN)).sum(-1)
    if whole < size:
        runs = torch.cat([runs, weights[:, whole:].sum(-1, keepdim=True)], 1)
    sums = runs.double().cumsum(1)
    aims = numbers * sums[:, -1]
    run = _first_beyond(sums, aims)[:, None]
    before = torch.where(run > 0, sums.gather(1, (run - 1).clamp_min(0)), 0.0)
    places = run * _RUN + torch.arange(_RUN, device=weights.device)
    parts = weights.gather(1, places.clamp_max(size - 1)).double().masked_fill(places >= size, 0.0)
    within = _first_beyond(parts.cumsum(1), aims - before[:, 0])
    return run[:, 0] * _RUN + within, sums[:, -1]


def _first_beyond(sums: Tensor, aims: Tensor) -> Tensor:
    """[B]: where the running sums first pass the aim; where rounding has put it beyond them all, the last that adds anything."""
    return torch.minimum((sums <= aims[:, None]).sum(1), (sums < sums[:, -1:]).sum(1))

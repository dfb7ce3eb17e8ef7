"""What is kept of a block of logits: the K largest with the mass of the rest, or draws by inverse CDF. Knows numbers alone.

Every vocabulary-wide pass counts: together they must cost less than a tenth of the teacher's own forward pass.
"""

import math

import numpy as np
import torch
import xxhash
from torch import Tensor

LOG2_E = math.log2(math.e)
# Columns that share one maximum at each level of the search, and one sum in the inverse CDF.
_FOLD = 8
_SUMMED = 64


def levels(vocabulary_size: int, k: int) -> int:
    """How many times the search for the K largest folds the columns; the width of a block must be a multiple of _FOLD ** levels."""
    count = 0
    while vocabulary_size // _FOLD ** (count + 1) >= 2 * k:
        count += 1
    return count


def width_multiple(vocabulary_size: int, k: int) -> int:
    """What the width of a block must be a multiple of: for the search and for the inverse CDF."""
    return math.lcm(_FOLD ** levels(vocabulary_size, k), _SUMMED)


def top_k(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first, and their columns: what torch.topk finds, in half of its time on a CPU.

    The columns are folded to maxima over groups, level by level. Whatever is among the k largest lies in one of the k groups with
    the largest maxima, so each level on the way back looks at k groups alone.
    """
    if block.device.type != "cpu":
        return block.topk(k, -1)
    folded = [block]
    for _ in range(levels(block.shape[1], k)):
        former = folded[-1]
        folded.append(former.view(len(former), _FOLD, former.shape[1] // _FOLD).amax(1))
    values, columns = folded[-1].topk(k, -1, sorted=len(folded) == 1)
    for number in range(len(folded) - 2, -1, -1):
        level = folded[number]
        steps = torch.arange(_FOLD).view(1, _FOLD, 1) * (level.shape[1] // _FOLD)
        candidates = (columns.unsqueeze(1) + steps).flatten(1)
        values, places = level.gather(1, candidates).topk(k, -1, sorted=number == 0)
        columns = candidates.gather(1, places)
    return values, columns


def exponentials(block: Tensor, reference: Tensor, out: Tensor, *, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """out = exp(power * block - factor), `factor` (float64 [n]) being power * reference to float32's precision; both are returned.

    exp2 takes half of the time of exp on a CPU.
    """
    scale = float(np.float32(LOG2_E * power))
    shift = (reference.double() * scale).float()
    torch.add(-shift.unsqueeze(-1), block, alpha=scale, out=out)
    return out.exp2_(), shift.double() / LOG2_E


def log_sum(exponentials_of: Tensor, factor: Tensor) -> Tensor:
    """The log of a row's sum of exponentials, float64 [n]; -inf for a row of zeros."""
    return exponentials_of.sum(-1).double().log() + factor


def uniforms(seed: int, key: bytes, rows: int, num_samples: int) -> np.ndarray:
    """[rows, num_samples] in [0, 1), a function of the seed and of the sequence alone, for ever.

    Raw bits of Philox, because numpy keeps those the same from version to version and its distributions not.
    """
    state = xxhash.xxh3_128_intdigest(seed.to_bytes(16, "little", signed=True) + key)
    raw = np.random.Philox(key=state).random_raw(rows * num_samples)
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(rows, num_samples)


def draw(unnormalised: Tensor, uniform: Tensor) -> Tensor:
    """Columns [n, S] drawn in proportion to `unnormalised` [n, W] by inverse CDF from `uniform` [n, S]; W is a multiple of _SUMMED.

    Two levels: sums of groups of columns, then the columns of the groups that were hit. A row without mass yields some column.
    """
    groups = unnormalised.unflatten(-1, (unnormalised.shape[1] // _SUMMED, _SUMMED))
    cdf = groups.sum(-1).double().cumsum(-1)
    aim = uniform * cdf[:, -1:]
    group = _first_beyond(cdf, aim)
    before = cdf.gather(1, (group - 1).clamp_min(0)).masked_fill(group == 0, 0.0)
    inside = groups.gather(1, group.unsqueeze(-1).expand(-1, -1, _SUMMED)).double().cumsum(-1)
    column = _first_beyond(inside.flatten(0, 1), (aim - before).reshape(-1, 1))
    return group * _SUMMED + column.view_as(group)


def _first_beyond(cdf: Tensor, aim: Tensor) -> Tensor:
    """The first place at which the running sum exceeds `aim`: never one of probability zero, whatever rounding does at the ends."""
    last = cdf[:, -1:]
    aim = torch.minimum(aim, torch.nextafter(last, torch.zeros_like(last))).clamp_min(0)
    return torch.searchsorted(cdf.contiguous(), aim.contiguous(), right=True).clamp_max(cdf.shape[-1] - 1)


def count(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Draws [n, S] as distinct ids, ascending, and how often each was drawn; rows with fewer ids end in zeros of count 0."""
    ordered = columns.sort(-1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = new.cumsum(-1) - 1
    most = int(place[:, -1].max()) + 1 if ordered.numel() else 0
    counts = torch.zeros_like(ordered).scatter_add_(-1, place, torch.ones_like(ordered))
    ids = torch.zeros_like(ordered).scatter_(-1, place, ordered)
    return ids[:, :most], counts[:, :most]

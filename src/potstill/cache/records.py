"""What a cache holds of one sequence, before it is coded: one of four kinds of rows, and what all records of a cache share.

A record is what was measured of the teacher; which outcomes of it an objective sees is decided by who reads it.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from potstill.signals import ByRow, ProjectedOutcomes, TopKOutcomes

Kind = Literal["top_k", "sampled", "top_k_sampled", "hidden", "projected"]


@dataclass(frozen=True)
class RecordFormat:
    """What all records of a cache share; the codec is a function of it. `dtype` is that of hidden rows and projections."""

    outcomes: Kind
    vocabulary_size: int
    k: int = 0
    num_samples: int = 0
    proposal_exponent: float = 1.0
    temperature: float = 1.0
    exact: bool = False
    width: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class DrawnTokens(ByRow):
    """n draws a row, as distinct ids (ascending, padded with count 0), how often each was drawn, and the weight of one draw.

    `weights` is p / (r n) with r the proposal; for an exponent of 1 it is 1 / n everywhere.
    """

    ids: Int[Tensor, "N M"]
    counts: Int[Tensor, "N M"]
    weights: Float[Tensor, "N M"]


@dataclass(frozen=True)
class TopKAndDrawn(ByRow):
    """The top K exactly, and draws from the rest: weights of the draws are under p itself, so top and draws add up to p in the mean."""

    top: TopKOutcomes
    drawn: DrawnTokens

    def rows(self, part):
        return TopKAndDrawn(self.top.rows(part), self.drawn.rows(part))

    def to(self, device):
        return TopKAndDrawn(self.top.to(device), self.drawn.to(device))

    def __len__(self) -> int:
        return len(self.top)


@dataclass(frozen=True)
class HiddenRows(ByRow):
    """The teacher's last hidden rows, after its final norm. Its head lies in the cache once."""

    hidden: Float[Tensor, "N D"]


Record = TopKOutcomes | DrawnTokens | TopKAndDrawn | HiddenRows | ProjectedOutcomes

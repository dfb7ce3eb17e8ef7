"""What an objective asks of a teacher (Needs) and what a teacher answers (TeacherSignal), by target row.

Log-probabilities here are under the teacher's full softmax at temperature 1. Nothing here knows where an answer comes from.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from potstill.head import Head

Outcomes = Literal["nothing", "sampled", "top_k", "full"]
_RANK = {"nothing": 0, "sampled": 1, "top_k": 2, "full": 3}


@dataclass(frozen=True)
class Needs:
    """Which outcomes an objective must know of the teacher's next-token distribution. Needs unite with `|`."""

    outcomes: Outcomes = "nothing"

    def __or__(self, other: "Needs") -> "Needs":
        return max(self, other, key=lambda needs: _RANK[needs.outcomes])

    def within(self, offers: "Needs") -> bool:
        """Whether a teacher that offers `offers` can serve these needs: full serves all, else only its own kind."""
        return self.outcomes == "nothing" or offers.outcomes in ("full", self.outcomes)


@dataclass(frozen=True)
class FullOutcomes:
    """The whole distribution, as hidden rows and a head, so that even the teacher's logits exist one chunk at a time."""

    hidden: Float[Tensor, "N D"]
    head: Head

    def rows(self, part: slice) -> "FullOutcomes":
        return FullOutcomes(self.hidden[part], self.head)

    def __len__(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True)
class TopKOutcomes:
    """K kept ids a row, their log-probabilities, and the log of the mass outside them (from the full softmax)."""

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    log_tail: Float[Tensor, "N"]

    def rows(self, part: slice) -> "TopKOutcomes":
        return TopKOutcomes(self.ids[part], self.log_probs[part], self.log_tail[part])

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class SampledOutcomes:
    """Sampled ids a row and their weights (counts / draws; not self-normalised). A weight of 0 is padding."""

    ids: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]

    def rows(self, part: slice) -> "SampledOutcomes":
        return SampledOutcomes(self.ids[part], self.weights[part])

    def __len__(self) -> int:
        return self.ids.shape[0]


TeacherOutcomes = FullOutcomes | TopKOutcomes | SampledOutcomes


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's answer for the N target rows of one batch, in their order. `outcomes` is None where nothing was asked."""

    outcomes: TeacherOutcomes | None = None

"""What an objective asks of a teacher (Needs), what a teacher can answer (Offers) and what it answers (TeacherSignal), by target row.

Log-probabilities here are under the teacher's full softmax. Nothing here knows where an answer comes from.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from potstill.errors import IncompatibleError
from potstill.head import Head

Outcomes = Literal["nothing", "target", "sampled", "top_k", "projected", "full"]


@dataclass(frozen=True)
class Needs:
    """Which outcomes an objective must know of the teacher's next-token distribution."""

    outcomes: Outcomes = "nothing"
    top_k: int | None = None
    """Exactly so many kept outcomes; None: as many as the teacher has to give."""
    temperature: float | None = None
    """The distribution at this temperature; None: any will do."""


@dataclass(frozen=True)
class Offers:
    """What a teacher can answer. Who offers "full" serves every need."""

    outcomes: frozenset[Outcomes]
    top_k: int | None = None
    """The most outcomes that it keeps; None: no limit."""
    temperature: float | None = None
    """A record stands at one temperature; None: any."""

    def lacks(self, needs: Needs) -> str | None:
        """What is asked and cannot be had, in words that follow "it offers"; None where everything can be served."""
        if needs.outcomes == "nothing" or "full" in self.outcomes:
            return None
        if needs.outcomes not in self.outcomes:
            return f"{' or '.join(sorted(self.outcomes))} outcomes, not {needs.outcomes} ones"
        if needs.top_k is not None and self.top_k is not None and needs.top_k > self.top_k:
            return f"{self.top_k} kept outcomes, not {needs.top_k}"
        if None not in (needs.temperature, self.temperature) and needs.temperature != self.temperature:
            return f"outcomes at temperature {self.temperature}, not {needs.temperature}"
        return None


_Rows = TypeVar("_Rows", bound="ByRow")


@dataclass(frozen=True)
class ByRow:
    """Tensors of N rows. A field that is no tensor belongs to all rows."""

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def rows(self: _Rows, part: "slice | Int[Tensor, 'M']") -> _Rows:
        """The rows of a slice, or those with these numbers, in that order."""
        return replace(self, **{name: tensor[part] for name, tensor in self._tensors().items()})

    def to(self: _Rows, device) -> _Rows:
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def __len__(self) -> int:
        return next(iter(self._tensors().values())).shape[0]


@dataclass(frozen=True)
class FullOutcomes(ByRow):
    """The whole distribution, as hidden rows and a head, so that even the teacher's logits exist one chunk at a time."""

    hidden: Float[Tensor, "N D"]
    head: Head


@dataclass(frozen=True)
class TopKOutcomes(ByRow):
    """K kept ids a row, their log-probabilities, and the log of the mass outside them, all from the full softmax at `temperature`.

    `target_log_probs` is the teacher's log-probability of the token that came, kept or not, where it is known.
    """

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    log_tail: Float[Tensor, "N"]
    target_log_probs: Float[Tensor, "N"] | None = None
    temperature: float = 1.0

    def cut(self, k: int) -> "TopKOutcomes":
        """The k most likely of the kept outcomes, in falling order; the mass of the others goes to the tail.

        The ids of a row must differ, but for those of log-probability -inf (padding). The same object where k is what it holds.
        """
        if k == self.ids.shape[-1]:
            return self
        if not 0 < k < self.ids.shape[-1]:
            raise IncompatibleError(f"{self.ids.shape[-1]} outcomes are kept and {k} are asked for; lower objective.top_k")
        ordered, order = self.log_probs.sort(dim=-1, descending=True, stable=True)
        left_out = ordered[..., k:].double().logsumexp(-1)
        log_tail = left_out.logaddexp(self.log_tail.double()).to(self.log_tail.dtype)
        return replace(self, ids=self.ids.gather(-1, order[..., :k]), log_probs=ordered[..., :k].contiguous(), log_tail=log_tail)


@dataclass(frozen=True)
class TargetOutcomes(ByRow):
    """The teacher's log-probability of the token that came, at each row, and nothing else."""

    log_probs: Float[Tensor, "N"]
    temperature: float = 1.0


@dataclass(frozen=True)
class SampledOutcomes(ByRow):
    """Ids a row and their weights: an unbiased estimate of the teacher's probabilities at `temperature` (2503.16870).

    The weights are not self-normalised; a weight of 0 is padding.
    """

    ids: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    temperature: float = 1.0


@dataclass(frozen=True)
class ProjectedOutcomes(ByRow):
    """The teacher's probabilities p projected on the student's frozen, linear head z = W h + b: exact for forward KL, and for it alone.

    KL(p || q) = logsumexp(z / T) - (h . projection + bias) / T - entropy, with projection = sum_i p_i W_i, bias = sum_i p_i b_i, both with
    the head's scale in them, and the teacher's entropy in nats, p taken at temperature T. `head_digest` names the head that was used.
    """

    projection: Float[Tensor, "N D"]
    bias: Float[Tensor, "N"]
    entropy: Float[Tensor, "N"]
    head_digest: str = ""
    temperature: float = 1.0


@dataclass(frozen=True)
class MixtureOutcomes:
    """A weighted mean of whole distributions: sum_i weights[i] * p_i, the weights adding up to 1.

    Every p_i is at temperature 1. log p_mix then stands where a teacher's logits would: an objective's temperature divides it.
    """

    members: tuple[FullOutcomes, ...]
    weights: tuple[float, ...]

    def rows(self, part: "slice | Tensor") -> "MixtureOutcomes":
        return MixtureOutcomes(tuple(member.rows(part) for member in self.members), self.weights)

    def to(self, device) -> "MixtureOutcomes":
        return MixtureOutcomes(tuple(member.to(device) for member in self.members), self.weights)

    def __len__(self) -> int:
        return len(self.members[0])


WholeOutcomes = FullOutcomes | TargetOutcomes | TopKOutcomes | SampledOutcomes | ProjectedOutcomes | MixtureOutcomes


@dataclass(frozen=True)
class RoutedOutcomes:
    """Rows answered by different teachers: pairs of row numbers and what one teacher says of those rows; each row stands once."""

    parts: tuple[tuple[Int[Tensor, "_"], WholeOutcomes], ...] = field(default=())

    def to(self, device) -> "RoutedOutcomes":
        return RoutedOutcomes(tuple((rows.to(device), outcomes.to(device)) for rows, outcomes in self.parts))

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self.parts)


TeacherOutcomes = WholeOutcomes | RoutedOutcomes


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's answer for the N target rows of one batch, in their order. `outcomes` is None where nothing was asked."""

    outcomes: TeacherOutcomes | None = None

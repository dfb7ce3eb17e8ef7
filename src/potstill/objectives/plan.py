"""A distillation loss as a set of choices that fit together, checked once; what a tile needs to know.

It knows nothing of chunks, heads or models.
"""

from dataclasses import dataclass

from potstill.objectives.catalogue import SEQUENCE_WEIGHTS, Value, check_choice, check_row_cap, loss_weights, scales_by_temperature_squared


@dataclass(frozen=True)
class Plan:
    """Resolved choices: every parameter is present, every default has been taken.

    `kd_weight` weighs the divergence, `sft_weight` the cross-entropy. Tuples of items stand for dictionaries so that a plan can be
    the key of a compiled tile.
    """

    divergence: str
    parameters: tuple[tuple[str, Value], ...]
    kd_weight: float
    sft_weight: float
    temperature: float
    squared: bool
    support: str
    support_size: int
    token_weight: str
    weight_parameters: tuple[tuple[str, Value], ...]
    has_teacher: bool = True
    row_cap: float | None = None

    @property
    def divergence_factor(self) -> float:
        """What multiplies a position's divergence in the total."""
        return self.kd_weight * (self.temperature**2 if self.squared else 1.0)

    @property
    def weighs_tokens_itself(self) -> bool:
        """Whether the token weight comes from the position alone, inside the tile."""
        return self.token_weight != "none" and self.token_weight not in SEQUENCE_WEIGHTS


def make_plan(
    divergence: str,
    parameters: dict[str, Value] | None,
    *,
    kd_ratio: float | None = None,
    kd_weight: float | None = None,
    sft_weight: float | None = None,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool | None = None,
    support: str = "full",
    token_weight: str = "none",
    row_cap: float | None = None,
) -> Plan:
    """Checks the choices of a recipe or a call; ConfigError names what does not fit. `parameters` is flat."""
    of_divergence, of_text = loss_weights(kd_ratio, kd_weight, sft_weight)
    own, of_support, of_weight = check_choice(divergence, support, token_weight, parameters, temperature)
    return Plan(
        divergence=divergence,
        parameters=tuple(own.items()),
        kd_weight=of_divergence,
        sft_weight=of_text,
        temperature=float(temperature),
        squared=scales_by_temperature_squared(scale_by_temperature_squared, divergence, of_text, temperature),
        support=support,
        support_size=int(next(iter(of_support.values()), 0)),
        token_weight=token_weight,
        weight_parameters=tuple(of_weight.items()),
        row_cap=check_row_cap(row_cap, divergence, support),
    )


def likelihood_plan(sft_weight: float = 1.0) -> Plan:
    """Cross-entropy alone: no teacher is asked."""
    return Plan("cross_entropy", (), 0.0, sft_weight, 1.0, False, "full", 0, "none", (), has_teacher=False)

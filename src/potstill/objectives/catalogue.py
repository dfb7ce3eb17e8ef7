"""The names that a recipe may write, their parameters and the one place where the defaults stand. Imports no torch.

It knows nothing of the formulas: those are in `divergences.py`, `supports.py` and `weights.py`, under the same names.
"""

import difflib

from potstill.errors import ConfigError

Value = float | int | bool

# What each parameter weighs is said by the docstring of its divergence.
PARAMETERS: dict[str, dict[str, Value]] = {
    "cross_entropy": {},
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5, "jsd_normalize": False},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1, "detach_mixture": False},
    "mixed_kl": {"forward_weight": 0.5},
    "adaptive_kl": {"mu": 0.5},
    "tvd": {},
    "alpha_beta": {"alpha": 0.5, "beta": 0.5},
    "logit_mse": {},
    "dkd": {"alpha": 1.0, "beta": 8.0},
}

SUPPORTS: dict[str, dict[str, Value]] = {
    "full": {},
    "top_k_tail": {"top_k": 64},
    "top_k_renormalised": {"top_k": 64},
    "samples": {"num_samples": 50},
}

TOKEN_WEIGHTS: dict[str, dict[str, Value]] = {
    "none": {},
    "teacher_entropy": {},
    "student_entropy": {},
    "entropy_gap": {"gap_weight": 3.0},
    "teacher_confidence": {"min_confidence": 0.5},
    "position": {"position_gain": 0.5},
    "top_share": {"share": 0.5},
}

REDUCTIONS = ("token_mean", "seq_mean")

# They need the id of the token that came, so they are defined where every token is an outcome of its own.
NEEDS_TARGETS = frozenset({"cross_entropy", "dkd"})
# A squared distance of logits: a temperature would only rescale it.
WITHOUT_TEMPERATURE = frozenset({"logit_mse"})
# Weights that compare a token with the others of its response, hence a first look at all of them.
SEQUENCE_WEIGHTS = frozenset({"position", "top_share"})
# entropy_gap weighs the two directions of KL apart.
GAP_DIVERGENCES = frozenset({"forward_kl", "reverse_kl", "mixed_kl"})


def _known(kind: str, name: str, names: dict[str, dict[str, Value]]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=2) or sorted(names)
        raise ConfigError(f"objective: there is no {kind} {name!r}; nearest: {', '.join(near)}")


def _check_values(values: dict[str, Value], divergence: str) -> None:
    """Ranges: what a share, a probability or a count may be."""
    if divergence == "jsd" and not 0 < values["beta"] < 1:
        raise ConfigError(
            f"objective.beta of jsd is the teacher's share in the mixture, inside (0, 1); found {values['beta']}; "
            "say divergence: forward_kl in place of 0, reverse_kl in place of 1"
        )
    if divergence.startswith("skew") and not 0 <= values["alpha"] < 1:
        raise ConfigError(f"objective.alpha of {divergence} is a share in [0, 1); found {values['alpha']}")
    for key in ("forward_weight", "mu", "min_confidence"):
        if key in values and not 0 <= values[key] <= 1:
            raise ConfigError(f"objective.{key} lies in [0, 1]; found {values[key]}")
    for key in ("top_k", "num_samples"):
        if key in values and (values[key] < 1 or int(values[key]) != values[key]):
            raise ConfigError(f"objective.{key} is a whole number of at least 1; found {values[key]}")
    if "share" in values and not 0 < values["share"] <= 1:
        raise ConfigError(f"objective.share lies in (0, 1]; found {values['share']}")


def check_choice(
    divergence: str, support: str, token_weight: str, given: dict[str, Value] | None = None, temperature: float = 1.0
) -> tuple[dict[str, Value], dict[str, Value], dict[str, Value]]:
    """The complete parameters of a divergence, a support and a token weight, defaults filled in.

    `given` is flat, as a recipe has it. Raises ConfigError (exit code 2) for unknown names and keys, for values out of range and
    for combinations that have no meaning, naming the way out.
    """
    _known("divergence", divergence, PARAMETERS)
    _known("support", support, SUPPORTS)
    _known("token_weight", token_weight, TOKEN_WEIGHTS)
    given = dict(given or {})
    filled = []
    for defaults in (PARAMETERS[divergence], SUPPORTS[support], TOKEN_WEIGHTS[token_weight]):
        filled.append({key: given.pop(key) if key in given else default for key, default in defaults.items()})
    if given:
        known = sorted(key for values in filled for key in values)
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"objective: {divergence} has no parameter {', '.join(map(repr, given))}; {has}")
    _check_values({**filled[2], **filled[1], **filled[0]}, divergence)
    if not temperature > 0:
        raise ConfigError(f"objective.temperature must be above 0; found {temperature}")
    if divergence in WITHOUT_TEMPERATURE and temperature != 1:
        raise ConfigError(f"objective: {divergence} compares logits as they are; found temperature {temperature}; leave it at 1.0")
    if divergence in NEEDS_TARGETS and support != "full":
        raise ConfigError(f"objective: {divergence} needs every token as an outcome; found support {support!r}; say support: full")
    if support == "samples" and divergence != "forward_kl":
        raise ConfigError(f"objective: samples are unbiased for forward_kl alone; found {divergence}; say support: top_k_tail")
    if token_weight == "entropy_gap" and divergence not in GAP_DIVERGENCES:
        raise ConfigError(f"objective: entropy_gap weighs {', '.join(sorted(GAP_DIVERGENCES))}; found {divergence}; say token_weight: none")
    if token_weight == "position" and support != "full":
        raise ConfigError(f"objective: position needs the teacher's probability of each written token; found support {support!r}; say full")
    if support == "samples" and token_weight in ("teacher_entropy", "entropy_gap", "teacher_confidence"):
        raise ConfigError(f"objective: {token_weight} needs the teacher's probabilities; found samples; say support: top_k_tail")
    return filled[0], filled[1], filled[2]


def scales_by_temperature_squared(choice: bool | None, divergence: str, kd_ratio: float, temperature: float) -> bool:
    """The recipe's word if it has one; else true for forward KL mixed with cross-entropy at another temperature than 1 (Hinton)."""
    if choice is not None:
        return choice
    return divergence == "forward_kl" and kd_ratio < 1 and temperature != 1

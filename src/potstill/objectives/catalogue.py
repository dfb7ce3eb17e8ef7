"""The names that a recipe may write, their parameters and the one place where the defaults stand. Imports no torch.

It knows nothing of the formulas: those are in `divergences.py`, `supports.py`, `weights.py` and `credit.py`, under the same names.
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
    "projected": {},
    "student_top_k_tail": {"top_k": 64},
    "written": {},
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

REDUCTIONS = ("token_mean", "seq_mean", "seq_sum")
BASELINES = ("none", "kl")
FUTURES = ("none", "discounted", "mean")
RATIOS = ("none", "truncate", "mask", "clip")
ONE_TOKEN = (
    "one token renormalised on itself is 1 on both sides, so that nothing would be learned; keep at least 2 (objective.top_k), or say "
    "objective.support: top_k_tail"
)
# The share of the divergence where nothing is said; cross-entropy has the rest.
KD_RATIO = 0.5

# They need the id of the token that came, so they are defined where every token is an outcome of its own.
NEEDS_TARGETS = frozenset({"cross_entropy", "dkd"})
# A squared distance of logits: a temperature would only rescale it.
WITHOUT_TEMPERATURE = frozenset({"logit_mse"})
# Weights that compare a token with the others of its response, hence a first look at all of them.
SEQUENCE_WEIGHTS = frozenset({"position", "top_share"})
# Weights that read the teacher's probabilities, which samples are not.
NEEDS_TEACHER_PROBABILITIES = frozenset({"teacher_entropy", "entropy_gap", "teacher_confidence", "position"})
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
    _check_support(divergence, support, token_weight, filled[1])
    if token_weight == "entropy_gap" and divergence not in GAP_DIVERGENCES:
        raise ConfigError(f"objective: entropy_gap weighs {', '.join(sorted(GAP_DIVERGENCES))}; found {divergence}; say token_weight: none")
    return filled[0], filled[1], filled[2]


def _check_support(divergence: str, support: str, token_weight: str, of_support: dict[str, Value]) -> None:
    """Pairs that would run and mean something else."""
    if divergence in NEEDS_TARGETS and support != "full":
        raise ConfigError(f"objective: {divergence} needs every token as an outcome; found support {support!r}; say support: full")
    if support == "samples" and divergence != "forward_kl":
        raise ConfigError(f"objective: samples are unbiased for forward_kl alone; found {divergence}; say support: top_k_tail")
    if support == "projected" and divergence != "forward_kl":
        raise ConfigError(f"objective: a projected record serves forward_kl alone; found {divergence}; say support: top_k_tail or full")
    if support == "written" and divergence != "reverse_kl":
        raise ConfigError(
            f"objective: written tokens estimate reverse_kl alone; found {divergence}; say divergence: reverse_kl, or support: "
            "student_top_k_tail or full"
        )
    if support == "written" and token_weight not in ("none", "position"):
        raise ConfigError(f"objective: {token_weight} needs a distribution at each position; found support written; say token_weight: none")
    if support == "top_k_renormalised" and of_support["top_k"] == 1:
        raise ConfigError(f"objective: top_k is 1, and {ONE_TOKEN}")
    if support == "samples" and token_weight in NEEDS_TEACHER_PROBABILITIES:
        raise ConfigError(f"objective: {token_weight} needs the teacher's probabilities; found samples; say support: top_k_tail")
    if support == "samples" and token_weight == "top_share":
        raise ConfigError(
            "objective: top_share ranks positions by their divergence, and what samples give at one position is noise and the teacher's "
            "entropy beside it; say support: top_k_tail"
        )
    if support == "projected" and token_weight != "none":
        raise ConfigError(f"objective: a projected record knows no more than forward KL; found token_weight {token_weight!r}; say none")


def check_policy(
    divergence: str, support: str, *, baseline: str = "none", future: str = "none", ratio: str = "none", temperature: float = 1.0
) -> None:
    """Raises ConfigError, naming the key, where tokens cannot be credited so. Divergence, support and weights are checked elsewhere."""
    for key, name, names in (("baseline", baseline, BASELINES), ("future", future, FUTURES), ("ratio", ratio, RATIOS)):
        if name not in names:
            raise ConfigError(f"objective.policy.{key} is one of {', '.join(names)}; found {name!r}")
    if temperature != 1:
        raise ConfigError(
            f"objective.temperature: the policy that is credited is the student at temperature 1; found {temperature}; leave it at 1.0 "
            "(text drawn at another rollouts.sampling.temperature is weighed by policy.ratio)"
        )
    if baseline == "kl" and support != "written":
        raise ConfigError(
            f"objective.policy.baseline: kl is taken from the credit of written tokens; found support {support!r}, which has no such "
            "credit; say support: written, or baseline: none"
        )
    if future != "none" and divergence != "reverse_kl":
        raise ConfigError(
            f"objective.policy.future: what follows is credited with its part of the sequence's reverse KL; found {divergence}; say "
            "divergence: reverse_kl, or future: none"
        )
    if future != "none" and support in ("samples", "projected"):
        raise ConfigError(
            f"objective.policy.future: needs the teacher's probability of each token; found support {support!r}; say full or future: none"
        )


def check_row_cap(row_cap: float | None, divergence: str, support: str) -> float | None:
    """The cap, or ConfigError where a position's divergence is not known well enough to be capped."""
    if row_cap is None:
        return None
    if not 0 < row_cap < float("inf"):
        raise ConfigError(f"objective.row_cap is a finite number of nats above 0; found {row_cap}; leave it out for no cap")
    if divergence == "cross_entropy" or support in ("samples", "projected", "written"):
        what = "cross_entropy, which is no divergence" if divergence == "cross_entropy" else f"support {support!r}"
        raise ConfigError(f"objective.row_cap: needs each position's divergence in closed form; found {what}; leave it out")
    return float(row_cap)


def loss_weights(kd_ratio: float | None, kd_weight: float | None, sft_weight: float | None) -> tuple[float, float]:
    """(kd_weight, sft_weight): kd_ratio and one minus it, or the two weights that stand in its place."""
    if kd_weight is None and sft_weight is None:
        ratio = KD_RATIO if kd_ratio is None else kd_ratio
        if not 0 <= ratio <= 1:
            raise ConfigError(f"objective.kd_ratio is the share of the divergence, in [0, 1]; found {ratio}")
        return float(ratio), float(1 - ratio)
    if kd_ratio is not None:
        raise ConfigError(
            f"objective.kd_ratio is {kd_ratio} and kd_weight {kd_weight}, sft_weight {sft_weight}: the two weights stand in place of "
            "kd_ratio; leave out kd_ratio, or both of them"
        )
    if kd_weight is None or sft_weight is None:
        missing, given = ("kd_weight", "sft_weight") if kd_weight is None else ("sft_weight", "kd_weight")
        raise ConfigError(f"objective.{given} is set and {missing} is not; set both, or kd_ratio in their place")
    for name, weight in (("kd_weight", kd_weight), ("sft_weight", sft_weight)):
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"objective.{name} is a finite number of at least 0; found {weight}")
    if kd_weight == sft_weight == 0:
        raise ConfigError("objective.kd_weight is 0 and so is sft_weight: nothing would be learned; set one of them above 0")
    return float(kd_weight), float(sft_weight)


def scales_by_temperature_squared(choice: bool | None, divergence: str, sft_weight: float, temperature: float) -> bool:
    """The recipe's word if it has one; else true for forward KL mixed with cross-entropy at another temperature than 1 (Hinton)."""
    if choice is not None:
        return choice
    return divergence == "forward_kl" and sft_weight > 0 and temperature != 1

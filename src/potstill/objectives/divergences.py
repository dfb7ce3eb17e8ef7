"""Distances between next-token distributions, one function each, and their table.

Every function takes log-probabilities [..., O] of student and teacher over the same O outcomes and returns nats a position [...].
No mask, no mean, no temperature. Where the gradient with respect to the student's logits has a closed form it stands in GRADIENTS:
a function of the same arguments that returns [..., O]. By the softmax Jacobian it is q (g - sum q g), g = dD/dq, in every case.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

LogProbs = Float[Tensor, "*N O"]
Nats = Float[Tensor, "*N"]
# Below this, a parameter of alpha_beta counts as zero: the general formula divides by it.
_SMALL = 1e-3
# Stands for log 0 where the gradient must stay a number; its exponential is 0 in float32 and float64.
_LOG_ZERO = -1e30


def _expectation(probs: Tensor, values: Tensor) -> Tensor:
    """sum of probs * values over outcomes; an impossible outcome counts 0 whatever its value, in the gradient too."""
    return (probs * torch.where(probs > 0, values, 0.0)).sum(-1)


def _log_mixture(first: Tensor, second: Tensor, first_share: float) -> Tensor:
    """log(share * exp(first) + (1 - share) * exp(second)), safe where both are -inf."""
    if first_share == 0:
        return second
    return torch.logaddexp(
        first.clamp_min(_LOG_ZERO) + math.log(first_share), second.clamp_min(_LOG_ZERO) + math.log1p(-first_share)
    )


def _through_softmax(probs: Tensor, values: Tensor) -> Tensor:
    """probs * (values - E[values]): what the softmax makes of a gradient with respect to probabilities."""
    weighted = probs * torch.where(probs > 0, values, 0.0)
    return weighted - probs * weighted.sum(-1, keepdim=True)


def _at(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(-1, targets.unsqueeze(-1))


def cross_entropy(student_log_probs: LogProbs, teacher_log_probs: LogProbs | None = None, *, targets: Int[Tensor, "*N"]) -> Nats:
    """-log q[target]. There is no teacher in it; the place is kept so that the table has one signature."""
    return -_at(student_log_probs, targets).squeeze(-1)


def cross_entropy_gradient(
    student_log_probs: LogProbs, teacher_log_probs: LogProbs | None = None, *, targets: Int[Tensor, "*N"]
) -> LogProbs:
    """q - onehot(target)."""
    ones = torch.ones_like(targets, dtype=student_log_probs.dtype).unsqueeze(-1)
    return student_log_probs.exp().scatter_add(-1, targets.unsqueeze(-1), -ones)


def forward_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Nats:
    """KL(p || q), mean-seeking (Hinton et al., 1503.02531). Infinite where the teacher allows what the student excludes."""
    return _expectation(teacher_log_probs.exp(), teacher_log_probs - student_log_probs)


def forward_kl_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> LogProbs:
    """q - p."""
    return student_log_probs.exp() - teacher_log_probs.exp()


def reverse_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Nats:
    """KL(q || p), mode-seeking (MiniLLM's row term, 2306.08543)."""
    return _expectation(student_log_probs.exp(), student_log_probs - teacher_log_probs)


def reverse_kl_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> LogProbs:
    """q (log(q/p) - D)."""
    return _through_softmax(student_log_probs.exp(), student_log_probs - teacher_log_probs)


def jsd(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, beta: float = 0.5, jsd_normalize: bool = False) -> Nats:
    """beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q (GKD, 2306.13649, eq. 1).

    `beta` is the teacher's share, inside (0, 1). The value shrinks like beta (1 - beta); `jsd_normalize` divides by that, so that
    the limits are forward and reverse KL.
    """
    _check_beta(beta)
    mixture = _log_mixture(teacher_log_probs, student_log_probs, beta)
    teacher_side = _expectation(teacher_log_probs.exp(), teacher_log_probs - mixture)
    student_side = _expectation(student_log_probs.exp(), student_log_probs - mixture)
    return (beta * teacher_side + (1 - beta) * student_side) * _jsd_factor(beta, jsd_normalize)


def jsd_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, beta: float = 0.5, jsd_normalize: bool = False) -> LogProbs:
    """(1 - beta) q (log(q/M) - KL(q || M))."""
    _check_beta(beta)
    mixture = _log_mixture(teacher_log_probs, student_log_probs, beta)
    return _through_softmax(student_log_probs.exp(), student_log_probs - mixture) * ((1 - beta) * _jsd_factor(beta, jsd_normalize))


def _jsd_factor(beta: float, jsd_normalize: bool) -> float:
    return 1 / (beta * (1 - beta)) if jsd_normalize else 1.0


def _check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(
            f"beta of jsd is the teacher's share in the mixture, inside (0, 1); found {beta}; "
            "use forward_kl in place of 0, reverse_kl in place of 1"
        )


def skew_forward_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.1) -> Nats:
    """KL(p || S), S = alpha p + (1 - alpha) q: `alpha` is the teacher's share in S (DistiLLM, 2402.03898). At most -log(alpha)."""
    return _expectation(teacher_log_probs.exp(), teacher_log_probs - _log_mixture(teacher_log_probs, student_log_probs, alpha))


def skew_forward_kl_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.1) -> LogProbs:
    """(1 - alpha) q (E_q[p/S] - p/S)."""
    mixture = _log_mixture(teacher_log_probs, student_log_probs, alpha)
    return _through_softmax(student_log_probs.exp(), (teacher_log_probs - mixture).exp()) * (alpha - 1)


def skew_reverse_kl(
    student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.1, detach_mixture: bool = False
) -> Nats:
    """KL(q || S), S = alpha q + (1 - alpha) p: `alpha` is the student's share in S (DistiLLM).

    `detach_mixture` takes S as a constant in the gradient, as the code of DistiLLM-2 does.
    """
    inside = student_log_probs.detach() if detach_mixture else student_log_probs
    return _expectation(student_log_probs.exp(), student_log_probs - _log_mixture(inside, teacher_log_probs, alpha))


def skew_reverse_kl_gradient(
    student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.1, detach_mixture: bool = False
) -> LogProbs:
    """q (h - E_q[h]), h = log(q/S) - alpha q/S; without its second term where the mixture is detached."""
    log_ratio = student_log_probs - _log_mixture(student_log_probs, teacher_log_probs, alpha)
    values = log_ratio if detach_mixture else log_ratio - alpha * log_ratio.exp()
    return _through_softmax(student_log_probs.exp(), values)


def mixed_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, forward_weight: float | Nats = 0.5) -> Nats:
    """w KL(p || q) + (1 - w) KL(q || p): `forward_weight` w is the weight of the forward direction; it may differ by row."""
    forward, reverse = forward_kl(student_log_probs, teacher_log_probs), reverse_kl(student_log_probs, teacher_log_probs)
    return forward_weight * forward + (1 - forward_weight) * reverse


def mixed_kl_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, forward_weight: float | Nats = 0.5) -> LogProbs:
    """w (q - p) + (1 - w) q (log(q/p) - D)."""
    weight = forward_weight.unsqueeze(-1) if isinstance(forward_weight, Tensor) else forward_weight
    forward = forward_kl_gradient(student_log_probs, teacher_log_probs)
    return weight * forward + (1 - weight) * reverse_kl_gradient(student_log_probs, teacher_log_probs)


def adaptive_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, mu: float = 0.5) -> Nats:
    """Forward KL weighted by the gap on the teacher's head, reverse KL by the gap on its tail (2404.02657); weights are constants.

    The head is the most probable token and those after it while their cumulative mass stays within `mu`: the token that crosses
    `mu` belongs to the tail, as in the authors' code.
    """
    return mixed_kl(student_log_probs, teacher_log_probs, forward_weight=head_share(student_log_probs, teacher_log_probs, mu))


def adaptive_kl_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, mu: float = 0.5) -> LogProbs:
    """As mixed_kl, the weights being constants."""
    return mixed_kl_gradient(student_log_probs, teacher_log_probs, forward_weight=head_share(student_log_probs, teacher_log_probs, mu))


@torch.no_grad()
def head_share(student_log_probs: LogProbs, teacher_log_probs: LogProbs, mu: float) -> Nats:
    """The share of sum |p - q| that lies on the teacher's head; a half where student and teacher are equal."""
    teacher = teacher_log_probs.exp()
    gap = (teacher - student_log_probs.exp()).abs()
    sorted_probs, order = teacher.sort(dim=-1, descending=True, stable=True)
    in_head = sorted_probs.cumsum(-1) <= mu
    in_head[..., 0] = True
    head = torch.where(in_head, gap.gather(-1, order), 0.0).sum(-1)
    total = gap.sum(-1)
    return torch.where(total > 0, head / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)


def tvd(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Nats:
    """Total variation, half of sum |p - q|: one minus the acceptance rate of speculative decoding. Subgradient 0 at ties."""
    return 0.5 * (student_log_probs.exp() - teacher_log_probs.exp()).abs().sum(-1)


def tvd_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> LogProbs:
    """0.5 q (s - E_q[s]), s = sign(q - p)."""
    student = student_log_probs.exp()
    return _through_softmax(student, 0.5 * torch.sign(student - teacher_log_probs.exp()))


def alpha_beta(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.5, beta: float = 0.5) -> Nats:
    """The alpha-beta divergence (ABKD, 2505.04560): `alpha` is the exponent of the teacher, `beta` of the student.

    (1, 0) is forward KL, (0, 1) reverse KL, (1/2, 1/2) four times the squared Hellinger distance. Near zero of alpha, beta or their
    sum the closed limits of Cichocki et al. (2011) are taken.
    """
    total = alpha + beta
    student, teacher = student_log_probs, teacher_log_probs
    if abs(alpha) < _SMALL and abs(beta) < _SMALL:
        return 0.5 * (student - teacher).square().sum(-1)
    if abs(beta) < _SMALL:
        powers = (alpha * student).exp() - (alpha * teacher).exp()
        return (alpha * _expectation((alpha * teacher).exp(), teacher - student) + powers.sum(-1)) / alpha**2
    if abs(alpha) < _SMALL:
        powers = (beta * teacher).exp() - (beta * student).exp()
        return (beta * _expectation((beta * student).exp(), student - teacher) + powers.sum(-1)) / beta**2
    if abs(total) < _SMALL:
        log_ratio = alpha * (student - teacher)
        return (log_ratio + (-log_ratio).exp() - 1).sum(-1) / alpha**2
    cross = (alpha * teacher + beta * student).exp()
    own = (alpha / total) * (total * teacher).exp() + (beta / total) * (total * student).exp()
    return (own - cross).sum(-1) / (alpha * beta)


def alpha_beta_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.5, beta: float = 0.5) -> LogProbs:
    """u - q sum u, u = q^beta (q^alpha - p^alpha) / alpha."""
    if abs(alpha) < _SMALL:
        scaled = student_log_probs - teacher_log_probs
    else:
        scaled = ((alpha * student_log_probs).exp() - (alpha * teacher_log_probs).exp()) / alpha
    powers = (beta * student_log_probs).exp() * scaled if abs(beta) >= _SMALL else scaled
    return powers - student_log_probs.exp() * powers.sum(-1, keepdim=True)


def logit_mse(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Nats:
    """Mean over outcomes of the squared difference of logits, each row centred: a row's constant is free, so log-probs serve.

    Outcomes that either side excludes (-inf) do not count.
    """
    difference, num_outcomes = _centred(student_log_probs, teacher_log_probs)
    return difference.square().sum(-1) / num_outcomes.squeeze(-1)


def logit_mse_gradient(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> LogProbs:
    """(2 / O) (d - mean d)."""
    difference, num_outcomes = _centred(student_log_probs, teacher_log_probs)
    return difference * (2 / num_outcomes)


def _centred(student_log_probs: Tensor, teacher_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    valid = (student_log_probs > -torch.inf) & (teacher_log_probs > -torch.inf)
    student, teacher = torch.where(valid, student_log_probs, 0.0), torch.where(valid, teacher_log_probs, 0.0)
    num_outcomes = valid.sum(-1, keepdim=True).clamp_min(1).to(student.dtype)
    difference = student - teacher
    return torch.where(valid, difference - difference.sum(-1, keepdim=True) / num_outcomes, 0.0), num_outcomes


def dkd(
    student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, targets: Int[Tensor, "*N"], alpha: float = 1.0, beta: float = 8.0
) -> Nats:
    """alpha TCKD + beta NCKD (decoupled KD, 2203.08679): the target against the rest, and the shape of the rest.

    `alpha` weighs the target's term, `beta` the rest's. Forward KL is TCKD + (1 - p[target]) NCKD.
    """
    student_rest, teacher_rest = _without(student_log_probs, targets), _without(teacher_log_probs, targets)
    log_student, log_teacher = student_rest.logsumexp(-1), teacher_rest.logsumexp(-1)
    student_hit, teacher_hit = _at(student_log_probs, targets).squeeze(-1), _at(teacher_log_probs, targets).squeeze(-1)
    target_term = _expectation(
        torch.stack([teacher_hit, log_teacher], -1).exp(), torch.stack([teacher_hit - student_hit, log_teacher - log_student], -1)
    )
    rest_term = forward_kl(student_rest - log_student.unsqueeze(-1), teacher_rest - log_teacher.unsqueeze(-1))
    return alpha * target_term + beta * rest_term


def dkd_gradient(
    student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, targets: Int[Tensor, "*N"], alpha: float = 1.0, beta: float = 8.0
) -> LogProbs:
    """At the target alpha (q - p); elsewhere alpha q (p_t - q_t) / (1 - q_t) + beta (q / (1 - q_t) - p / (1 - p_t))."""
    student_rest, teacher_rest = _without(student_log_probs, targets), _without(teacher_log_probs, targets)
    gap = _at(student_log_probs, targets).exp() - _at(teacher_log_probs, targets).exp()
    student_shape = (student_rest - student_rest.logsumexp(-1, keepdim=True)).exp()
    teacher_shape = (teacher_rest - teacher_rest.logsumexp(-1, keepdim=True)).exp()
    rest = (beta - alpha * gap) * student_shape - beta * teacher_shape
    return rest.scatter(-1, targets.unsqueeze(-1), alpha * gap)


def _without(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.scatter(-1, targets.unsqueeze(-1), -torch.inf)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "mixed_kl": mixed_kl,
    "adaptive_kl": adaptive_kl,
    "tvd": tvd,
    "alpha_beta": alpha_beta,
    "logit_mse": logit_mse,
    "dkd": dkd,
}

GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy_gradient,
    "forward_kl": forward_kl_gradient,
    "reverse_kl": reverse_kl_gradient,
    "jsd": jsd_gradient,
    "skew_forward_kl": skew_forward_kl_gradient,
    "skew_reverse_kl": skew_reverse_kl_gradient,
    "mixed_kl": mixed_kl_gradient,
    "adaptive_kl": adaptive_kl_gradient,
    "tvd": tvd_gradient,
    "alpha_beta": alpha_beta_gradient,
    "logit_mse": logit_mse_gradient,
    "dkd": dkd_gradient,
}

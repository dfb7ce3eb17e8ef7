"""Distances between next-token distributions, one function each, and their table.

Every function takes log-probabilities [..., O] of student and teacher over the same O outcomes and returns nats a position [...].
No mask, no mean, no temperature. Beside a function stands its gradient where it has a closed form, for the fused loss: it takes a
Pair, whose probabilities are at hand, and returns the value and its gradient [..., O] with respect to the student's logits, which is
q (g - sum q g), g = dD/dq, in every case.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.objectives.pair import EXCLUDED, LOG_ZERO, LogProbs, Nats, Pair, expectation, finite, mixture, nats, through_softmax

NatsAndGradient = tuple[Float[Tensor, "*N"], Float[Tensor, "*N O"]]
# Below this, a parameter of alpha_beta counts as zero: the general formula divides by it.
_SMALL = 1e-3


def _at(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(-1, targets.unsqueeze(-1))


def cross_entropy(student_log_probs: LogProbs, teacher_log_probs: LogProbs | None = None, *, targets: Int[Tensor, "*N"]) -> Nats:
    """-log q[target]. There is no teacher in it; the place is kept so that the table has one signature."""
    return -_at(student_log_probs, targets).squeeze(-1)


def cross_entropy_gradient(pair: Pair, *, targets: Int[Tensor, "*N"]) -> NatsAndGradient:
    """q - onehot(target)."""
    ones = torch.ones_like(targets, dtype=pair.student.dtype).unsqueeze(-1)
    return cross_entropy(pair.student, targets=targets), pair.student_probs.scatter_add(-1, targets.unsqueeze(-1), -ones)


def forward_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Nats:
    """KL(p || q), mean-seeking (Hinton et al., 1503.02531). Infinite where the teacher allows what the student excludes."""
    student, teacher = finite(student_log_probs, teacher_log_probs)
    return nats(expectation(teacher.exp(), teacher - student))


def forward_kl_gradient(pair: Pair) -> NatsAndGradient:
    """q - p."""
    value = expectation(pair.teacher_probs, pair.teacher - pair.student)
    return nats(value), pair.student_probs - pair.teacher_probs


def reverse_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Nats:
    """KL(q || p), mode-seeking (MiniLLM's row term, 2306.08543). Infinite where the student allows what the teacher excludes."""
    student, teacher = finite(student_log_probs, teacher_log_probs)
    return nats(expectation(student.exp(), student - teacher))


def reverse_kl_gradient(pair: Pair) -> NatsAndGradient:
    """q (log(q/p) - D)."""
    value, gradient = through_softmax(pair.student_probs, pair.student - pair.teacher)
    return nats(value), gradient


def jsd(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, beta: float = 0.5, jsd_normalize: bool = False) -> Nats:
    """beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q (GKD, 2306.13649, eq. 1).

    `beta` is the teacher's share, inside (0, 1). The value shrinks like beta (1 - beta); `jsd_normalize` divides by that, so that
    the limits are forward and reverse KL.
    """
    factor = _jsd_factor(beta, jsd_normalize)
    student, teacher = finite(student_log_probs, teacher_log_probs)
    student_probs, teacher_probs = student.exp(), teacher.exp()
    log_mixed = mixture(teacher_probs, student_probs, beta).log()
    student_side = expectation(student_probs, student - log_mixed)
    return factor * (beta * expectation(teacher_probs, teacher - log_mixed) + (1 - beta) * student_side)


def jsd_gradient(pair: Pair, *, beta: float = 0.5, jsd_normalize: bool = False) -> NatsAndGradient:
    """(1 - beta) q (log(q/M) - KL(q || M))."""
    factor = _jsd_factor(beta, jsd_normalize)
    log_mixed = mixture(pair.teacher_probs, pair.student_probs, beta).log_()
    teacher_side = expectation(pair.teacher_probs, pair.teacher - log_mixed)
    student_side, gradient = through_softmax(pair.student_probs, pair.student - log_mixed)
    return factor * (beta * teacher_side + (1 - beta) * student_side), gradient.mul_((1 - beta) * factor)


def _jsd_factor(beta: float, jsd_normalize: bool) -> float:
    if not 0 < beta < 1:
        raise ValueError(
            f"beta of jsd is the teacher's share in the mixture, inside (0, 1); found {beta}; "
            "use forward_kl in place of 0, reverse_kl in place of 1"
        )
    return 1 / (beta * (1 - beta)) if jsd_normalize else 1.0


def skew_forward_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.1) -> Nats:
    """KL(p || S), S = alpha p + (1 - alpha) q: `alpha` is the teacher's share in S (DistiLLM, 2402.03898). At most -log(alpha)."""
    if alpha == 0:
        return forward_kl(student_log_probs, teacher_log_probs)
    student, teacher = finite(student_log_probs, teacher_log_probs)
    teacher_probs = teacher.exp()
    return expectation(teacher_probs, teacher - mixture(teacher_probs, student.exp(), alpha).log())


def skew_forward_kl_gradient(pair: Pair, *, alpha: float = 0.1) -> NatsAndGradient:
    """(1 - alpha) q (E_q[p/S] - p/S)."""
    if alpha == 0:
        return forward_kl_gradient(pair)
    mixed = mixture(pair.teacher_probs, pair.student_probs, alpha)
    _, gradient = through_softmax(pair.student_probs, pair.teacher_probs / mixed)
    return expectation(pair.teacher_probs, pair.teacher - mixed.log_()), gradient.mul_(alpha - 1)


def skew_reverse_kl(
    student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.1, detach_mixture: bool = False
) -> Nats:
    """KL(q || S), S = alpha q + (1 - alpha) p: `alpha` is the student's share in S (DistiLLM).

    `detach_mixture` takes S as a constant in the gradient, as the code of DistiLLM-2 does.
    """
    if alpha == 0:
        return reverse_kl(student_log_probs, teacher_log_probs)
    student, teacher = finite(student_log_probs, teacher_log_probs)
    student_probs = student.exp()
    mixed = mixture(student_probs.detach() if detach_mixture else student_probs, teacher.exp(), alpha)
    return expectation(student_probs, student - mixed.log())


def skew_reverse_kl_gradient(pair: Pair, *, alpha: float = 0.1, detach_mixture: bool = False) -> NatsAndGradient:
    """q (h - E_q[h]), h = log(q/S) - alpha q/S; without its second term where the mixture is detached."""
    if alpha == 0:
        return reverse_kl_gradient(pair)
    mixed = mixture(pair.student_probs, pair.teacher_probs, alpha)
    value, gradient = through_softmax(pair.student_probs, pair.student - mixed.log())
    if not detach_mixture:
        gradient.sub_(through_softmax(pair.student_probs, pair.student_probs / mixed)[1], alpha=alpha)
    return value, gradient


def mixed_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, forward_weight: float | Nats = 0.5) -> Nats:
    """w KL(p || q) + (1 - w) KL(q || p): `forward_weight` w is the weight of the forward direction; it may differ by row."""
    forward, reverse = forward_kl(student_log_probs, teacher_log_probs), reverse_kl(student_log_probs, teacher_log_probs)
    return forward_weight * forward + (1 - forward_weight) * reverse


def mixed_kl_gradient(pair: Pair, *, forward_weight: float | Nats = 0.5) -> NatsAndGradient:
    """w (q - p) + (1 - w) q (log(q/p) - D)."""
    forward, over_forward = forward_kl_gradient(pair)
    reverse, over_reverse = reverse_kl_gradient(pair)
    weight = forward_weight.unsqueeze(-1) if isinstance(forward_weight, Tensor) else forward_weight
    return forward_weight * forward + (1 - forward_weight) * reverse, torch.lerp(over_reverse, over_forward, weight)


def adaptive_kl(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, mu: float = 0.5) -> Nats:
    """Forward KL weighted by the gap on the teacher's head, reverse KL by the gap on its tail (2404.02657); weights are constants.

    The head is the most probable token and those after it while their cumulative mass stays within `mu`: the token that crosses
    `mu` belongs to the tail, as in the authors' code.
    """
    return mixed_kl(student_log_probs, teacher_log_probs, forward_weight=head_share(student_log_probs, teacher_log_probs, mu))


def adaptive_kl_gradient(pair: Pair, *, mu: float = 0.5) -> NatsAndGradient:
    """As mixed_kl, the weights being constants."""
    return mixed_kl_gradient(pair, forward_weight=head_share(pair.student, pair.teacher, mu))


@torch.no_grad()
@torch.compiler.disable()
def head_share(student_log_probs: LogProbs, teacher_log_probs: LogProbs, mu: float) -> Nats:
    """The share of sum |p - q| that lies on the teacher's head; a half where student and teacher are equal."""
    teacher = teacher_log_probs.exp().flatten(0, -2)
    gap = (teacher - student_log_probs.exp().flatten(0, -2)).abs()
    head = torch.zeros_like(gap[:, 0])
    # Heads are small as a rule: the few most probable tokens are looked at first, and more of them only for the rows that need it.
    open_rows = torch.arange(len(teacher), device=teacher.device)
    for size in (64, 1024, teacher.shape[-1]):
        if size > teacher.shape[-1] or not len(open_rows):
            continue
        probs, order = teacher[open_rows].topk(size, dim=-1)
        mass = probs.cumsum(-1)
        in_head = mass <= mu
        in_head[:, 0] = True
        head[open_rows] = (gap[open_rows].gather(-1, order) * in_head).sum(-1)
        open_rows = open_rows[mass[:, -1] <= mu]
    total = gap.sum(-1)
    share = torch.where(total > 0, head / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)
    return share.reshape(teacher_log_probs.shape[:-1])


def tvd(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Nats:
    """Total variation, half of sum |p - q|: one minus the acceptance rate of speculative decoding. Subgradient 0 at ties."""
    return 0.5 * (student_log_probs.exp() - teacher_log_probs.exp()).abs().sum(-1)


def tvd_gradient(pair: Pair) -> NatsAndGradient:
    """0.5 q (s - E_q[s]), s = sign(q - p)."""
    difference = pair.student_probs - pair.teacher_probs
    return 0.5 * difference.abs().sum(-1), through_softmax(pair.student_probs, difference.sign_())[1].mul_(0.5)


def alpha_beta(student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, alpha: float = 0.5, beta: float = 0.5) -> Nats:
    """The alpha-beta divergence (ABKD, 2505.04560): `alpha` is the exponent of the teacher, `beta` of the student.

    (1, 0) is forward KL, (0, 1) reverse KL, (1/2, 1/2) four times the squared Hellinger distance. Near zero of alpha, beta or their
    sum the closed limits of Cichocki et al. (2011) are taken.
    """
    total = alpha + beta
    student, teacher = finite(student_log_probs, teacher_log_probs)
    num_outcomes = student.shape[-1]
    if abs(alpha) < _SMALL and abs(beta) < _SMALL:
        return nats(0.5 * (student - teacher).square().sum(-1), -EXCLUDED)
    if abs(beta) < _SMALL:
        powers = (alpha * student).exp() - (alpha * teacher).exp()
        value = (alpha * expectation((alpha * teacher).exp(), teacher - student) + powers.sum(-1)) / alpha**2
        return nats(value, 1e6 * num_outcomes)
    if abs(alpha) < _SMALL:
        powers = (beta * teacher).exp() - (beta * student).exp()
        value = (beta * expectation((beta * student).exp(), student - teacher) + powers.sum(-1)) / beta**2
        return nats(value, 1e6 * num_outcomes)
    if abs(total) < _SMALL:
        log_ratio = alpha * (student - teacher)
        return nats((log_ratio + (-log_ratio).exp() - 1).sum(-1) / alpha**2, -EXCLUDED)
    cross = (alpha * teacher + beta * student).exp()
    own = (alpha / total) * (total * teacher).exp() + (beta / total) * (total * student).exp()
    return (own - cross).sum(-1) / (alpha * beta)


def alpha_beta_gradient(pair: Pair, *, alpha: float = 0.5, beta: float = 0.5) -> NatsAndGradient:
    """u - q sum u, u = q^beta (q^alpha - p^alpha) / alpha."""
    if abs(alpha) < _SMALL:
        scaled = pair.student - pair.teacher
    else:
        scaled = ((alpha * pair.student).exp_() - (alpha * pair.teacher).exp_()).mul_(1 / alpha)
    powers = (beta * pair.student).exp_().mul_(scaled) if abs(beta) >= _SMALL else scaled
    gradient = torch.addcmul(powers, pair.student_probs, powers.sum(-1, keepdim=True), value=-1)
    return alpha_beta(pair.student, pair.teacher, alpha=alpha, beta=beta), gradient


def logit_mse(student_log_probs: LogProbs, teacher_log_probs: LogProbs) -> Nats:
    """Mean over outcomes of the squared difference of logits, each row centred: a row's constant is free, so log-probs serve.

    Outcomes that either side excludes (-inf) do not count.
    """
    difference, num_outcomes = _centred(student_log_probs, teacher_log_probs)
    return difference.square().sum(-1) / num_outcomes.squeeze(-1)


def logit_mse_gradient(pair: Pair) -> NatsAndGradient:
    """(2 / O) (d - mean d)."""
    difference, num_outcomes = _centred(pair.student, pair.teacher)
    return difference.square().sum(-1) / num_outcomes.squeeze(-1), difference * (2 / num_outcomes)


def _centred(student_log_probs: Tensor, teacher_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """The differences less their mean over the outcomes that both sides allow, 0 elsewhere; and the number of those outcomes."""
    difference = student_log_probs - teacher_log_probs
    # Where nothing is excluded, as a look at the smallest entries tells, no mask over the vocabulary is needed.
    looks = not torch.compiler.is_compiling() and difference.device.type == "cpu" and difference.numel() > 0
    if looks and float(torch.minimum(student_log_probs.detach().amin(), teacher_log_probs.detach().amin())) > EXCLUDED:
        num_outcomes = torch.full_like(difference[..., :1], difference.shape[-1])
        return difference - difference.mean(-1, keepdim=True), num_outcomes
    valid = (student_log_probs > EXCLUDED) & (teacher_log_probs > EXCLUDED)
    difference = torch.where(valid, student_log_probs, 0.0) - torch.where(valid, teacher_log_probs, 0.0)
    num_outcomes = valid.sum(-1, keepdim=True).clamp_min(1).to(difference.dtype)
    return torch.where(valid, difference - difference.sum(-1, keepdim=True) / num_outcomes, 0.0), num_outcomes


def dkd(
    student_log_probs: LogProbs, teacher_log_probs: LogProbs, *, targets: Int[Tensor, "*N"], alpha: float = 1.0, beta: float = 8.0
) -> Nats:
    """alpha TCKD + beta NCKD (decoupled KD, 2203.08679): the target against the rest, and the shape of the rest.

    `alpha` weighs the target's term, `beta` the rest's. Forward KL is TCKD + (1 - p[target]) NCKD.
    """
    student_hit, student_rest, student_shape = _decoupled(student_log_probs, targets)
    teacher_hit, teacher_rest, teacher_shape = _decoupled(teacher_log_probs, targets)
    target_term = forward_kl(torch.cat([student_hit, student_rest], -1), torch.cat([teacher_hit, teacher_rest], -1))
    return alpha * target_term + beta * forward_kl(student_shape, teacher_shape)


def dkd_gradient(pair: Pair, *, targets: Int[Tensor, "*N"], alpha: float = 1.0, beta: float = 8.0) -> NatsAndGradient:
    """At the target alpha (q - p); elsewhere alpha q (p_t - q_t) / (1 - q_t) + beta (q / (1 - q_t) - p / (1 - p_t))."""
    student_hit, student_rest, student_shape = _decoupled(pair.student, targets)
    teacher_hit, teacher_rest, teacher_shape = _decoupled(pair.teacher, targets)
    target_term = forward_kl(torch.cat([student_hit, student_rest], -1), torch.cat([teacher_hit, teacher_rest], -1))
    shape = Pair(student_shape, teacher_shape, student_shape.exp(), teacher_shape.exp())
    rest_term, over_shape = forward_kl_gradient(shape)
    over_target = alpha * (student_hit.exp() - teacher_hit.exp())
    gradient = torch.addcmul(over_shape.mul_(beta), shape.student_probs, over_target, value=-1)
    return alpha * target_term + beta * rest_term, gradient.scatter_(-1, targets.unsqueeze(-1), over_target)


def _decoupled(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the target [..., 1], log of the mass of the rest [..., 1], and the log-distribution within the rest [..., O]."""
    rest = log_probs.scatter(-1, targets.unsqueeze(-1), LOG_ZERO)
    mass = rest.logsumexp(-1, keepdim=True).clamp_min(LOG_ZERO)
    return _at(log_probs, targets), mass, rest - mass


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

GRADIENTS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
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

"""Every distance again, one row at a time, in probability space and float64, from the papers' lines. Shares nothing with the package.

Deliberately naive: plain Python sums over plain floats, no log-space, no closed form; gradients are central differences.
"""

import math


def softmax(logits, temperature=1.0):
    top = max(logits)
    powers = [math.exp((x - top) / temperature) if x > -math.inf else 0.0 for x in logits]
    return [x / sum(powers) for x in powers]


def kl(first, second):
    total = 0.0
    for a, b in zip(first, second, strict=True):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else math.inf
    return total


def mix(share, first, second):
    return [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]


def forward_kl(q, p):
    return kl(p, q)


def reverse_kl(q, p):
    return kl(q, p)


def jsd(q, p, beta=0.5, jsd_normalize=False):
    m = mix(beta, p, q)
    value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return value / (beta * (1 - beta)) if jsd_normalize else value


def skew_forward_kl(q, p, alpha=0.1):
    return kl(p, mix(alpha, p, q))


def skew_reverse_kl(q, p, alpha=0.1, detach_mixture=False, constant=None):
    """`constant` is the student inside the mixture, where that is not differentiated."""
    inside = constant if detach_mixture and constant is not None else q
    return kl(q, mix(alpha, inside, p))


def mixed_kl(q, p, forward_weight=0.5):
    return forward_weight * kl(p, q) + (1 - forward_weight) * kl(q, p)


def adaptive_kl(q, p, mu=0.5, constant=None):
    student = q if constant is None else constant
    order = sorted(range(len(p)), key=lambda i: -p[i])
    mass, head = 0.0, set()
    for place, i in enumerate(order):
        mass += p[i]
        if place == 0 or mass <= mu:
            head.add(i)
    gaps = [abs(a - b) for a, b in zip(p, student, strict=True)]
    if sum(gaps) == 0:
        return 0.0
    share = sum(gaps[i] for i in head) / sum(gaps)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def tvd(q, p):
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def alpha_beta(q, p, alpha=0.5, beta=0.5):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        s = alpha + beta
        total += a**alpha * b**beta - alpha / s * a**s - beta / s * b**s
    return -total / (alpha * beta)


def logit_mse(q, p):
    d = [math.log(b) - math.log(a) for a, b in zip(p, q, strict=True) if a > 0 and b > 0]
    mean = sum(d) / len(d)
    return sum((x - mean) ** 2 for x in d) / len(d)


def dkd(q, p, target, alpha=1.0, beta=8.0):
    rest = [i for i in range(len(p)) if i != target]
    hit = kl([p[target], 1 - p[target]], [q[target], 1 - q[target]])
    shape = kl([p[i] / (1 - p[target]) for i in rest], [q[i] / (1 - q[target]) for i in rest])
    return alpha * hit + beta * shape


def cross_entropy(q, p, target):
    return -math.log(q[target])


REFERENCE = {
    "cross_entropy": cross_entropy, "forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl, "mixed_kl": mixed_kl, "adaptive_kl": adaptive_kl, "tvd": tvd, "alpha_beta": alpha_beta,
    "logit_mse": logit_mse, "dkd": dkd,
}
HOLDS_THE_STUDENT = {"adaptive_kl"}


def value(name, student_logits, teacher_logits, temperature=1.0, target=None, **parameters):
    """The distance of one row of logits (lists of floats)."""
    extra = {} if target is None else {"target": target}
    return REFERENCE[name](softmax(student_logits, temperature), softmax(teacher_logits, temperature), **extra, **parameters)


def gradient(name, student_logits, teacher_logits, temperature=1.0, target=None, step=1e-6, **parameters):
    """By central differences; what a definition holds constant is held."""
    extra = {} if target is None else {"target": target}
    q, p = softmax(student_logits, temperature), softmax(teacher_logits, temperature)
    if name in HOLDS_THE_STUDENT or parameters.get("detach_mixture"):
        extra["constant"] = q
    found = []
    for i in range(len(student_logits)):
        if student_logits[i] == -math.inf:
            found.append(0.0)
            continue
        sides = []
        for move in (step, -step):
            moved = [*student_logits]
            moved[i] += move
            sides.append(REFERENCE[name](softmax(moved, temperature), p, **extra, **parameters))
        found.append((sides[0] - sides[1]) / (2 * step))
    return found

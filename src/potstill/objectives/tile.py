"""One block of rows: from raw logits of student and teacher to each row's losses, and the gradient over the student's logits.

Here over the whole vocabulary, for every divergence; what knows fewer outcomes has a tile of its own. Run as it stands or compiled.
It knows nothing of hidden rows, of head weights, or of how many blocks there are.
"""

from torch import Tensor

from potstill.objectives.pair import nats
from potstill.objectives.plan import Plan
from potstill.objectives.sparse_tile import sparse_step
from potstill.objectives.supports import Compared
from potstill.objectives.tile_parts import Finish, TileInput, seen, text_scale, weighted_divergence, wide
from potstill.objectives.weights import entropy_share


def tile_step(plan: Plan, finishes: tuple[Finish, Finish], linear: Tensor, rows: TileInput, *, training: bool, details: bool = False):
    """Losses by row (a dict of [n] tensors). `linear` is given up: with `training` the gradient over it is written over it."""
    if plan.has_teacher and plan.support != "full":
        return sparse_step(plan, finishes, linear, rows, training=training, details=details)
    return _whole_step(plan, finishes, linear, rows, training, details)


def _whole_step(plan: Plan, finishes: tuple[Finish, Finish], linear: Tensor, rows: TileInput, training: bool, details: bool):
    logits = finishes[0].logits(wide(linear))
    log_probs = logits.log_softmax(-1)
    picked = rows.targets.unsqueeze(-1)
    found = {"cross_entropy": nats(-log_probs.gather(-1, picked).squeeze(-1))}
    probs = log_probs.exp() if training else None
    gradient: Tensor | None = None
    if plan.has_teacher:
        tempered = log_probs if plan.temperature == 1 else (logits / plan.temperature).log_softmax(-1)
        tempered_probs = probs if plan.temperature == 1 or probs is None else tempered.exp()
        of_teacher = finishes[1].logits(wide(rows.teacher[0]))
        teacher = (of_teacher if plan.temperature == 1 else of_teacher / plan.temperature).log_softmax(-1)
        compared = Compared(tempered, teacher, tempered.shape[-1])
        of_student = entropy_share(tempered) if plan.token_weight == "student_entropy" else None
        more, gradient = weighted_divergence(plan, compared, rows, tempered_probs, of_student, training=training)
        found.update(more)
        if plan.token_weight == "position":
            found["disagreement"] = (teacher.gather(-1, picked) - tempered.gather(-1, picked)).squeeze(-1)
        if details:
            found.update(seen(log_probs, teacher if plan.temperature == 1 else of_teacher.log_softmax(-1)))
    elif details:
        found.update(seen(log_probs, None))
    if probs is not None and plan.sft_weight > 0:
        weights = text_scale(plan, rows)
        gradient = probs * weights if gradient is None else gradient.addcmul_(probs, weights)
        gradient.scatter_add_(-1, picked, -weights)
    if training:
        assert gradient is not None
        linear.copy_(finishes[0].back(gradient, finishes[0].slope(logits)))
    return found

"""A teacher's probabilities projected on the student's frozen head: making such a record, and the proof that it fits a head.

z = scale (W h + b), so that sum_i p_i z_i = h . projection + bias, whatever h will be: forward KL needs no more of the teacher than
these, its entropy, and the student's own logsumexp. It knows nothing of tiles.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from potstill.errors import IncompatibleError
from potstill.head import Head, head_digest
from potstill.objectives.answers import TeacherAnswers, finish_of
from potstill.objectives.tile_parts import wide
from potstill.objectives.weights import entropy
from potstill.signals import FullOutcomes, MixtureOutcomes, ProjectedOutcomes

_MIB = 2**20
# Rows of a head that are widened at once, where its numbers are narrower than the sums that are made of them.
_WINDOW = 8192
_known_digests = WeakTensorKeyDictionary()


@torch.no_grad()
def project(
    teacher: FullOutcomes | MixtureOutcomes, head: Head, *, temperature: float = 1.0, vocabulary_size: int | None = None
) -> ProjectedOutcomes:
    """The record of a live teacher's rows on `head`, at `temperature`, in float32 (float64 where the teacher is).

    The teacher's probabilities exist for a slice of rows at a time. Raises IncompatibleError for a head that is not linear.
    """
    check_linear(head)
    vocabulary = head.vocabulary_size if vocabulary_size is None else vocabulary_size
    num_rows, width = len(teacher), head.weight.shape[1]
    step = max(16, 32 * _MIB // (4 * vocabulary))
    answers = TeacherAnswers(teacher, temperature=temperature, vocabulary=vocabulary, slice_rows=min(step, max(num_rows, 1)))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, num_rows, step):
        (linear,) = answers.of(slice(start, min(start + step, num_rows)))
        log_probs = (finish_of(teacher).logits(wide(linear)) / temperature).log_softmax(-1)
        row_entropy = entropy(log_probs)
        probs = log_probs.exp_()
        bias = probs.new_zeros(len(probs)) if head.bias is None else probs @ head.bias[:vocabulary].to(probs.dtype) * head.scale
        parts.append((widened_product(probs, head.weight[:vocabulary]).mul_(head.scale), bias, row_entropy))
    if not parts:
        none = torch.zeros(0, device=head.weight.device)
        parts = [(none.reshape(0, width), none, none)]
    projection, bias, row_entropy = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ProjectedOutcomes(projection, bias, row_entropy, known_digest(head, vocabulary), temperature)


def widened_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the wider of their dtypes and at least float32, without a wide copy of all of `right`."""
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    if right.dtype == dtype:
        return left.to(dtype) @ right
    total = torch.zeros(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    for start in range(0, right.shape[0], _WINDOW):
        window = slice(start, start + _WINDOW)
        total.addmm_(left[:, window].to(dtype), right[window].to(dtype))
    return total


def check_linear(head: Head) -> None:
    """Raises IncompatibleError where logits are not one fixed matrix times the hidden rows."""
    if head.softcap is not None:
        raise IncompatibleError(
            f"a projected record needs a linear head; this one caps its logits at {head.softcap:g}; say objective.support: top_k_tail"
        )
    if head.low_rank:
        raise IncompatibleError(
            "a projected record needs a head that stays as it is; this one carries a LoRA; leave the head out of the adapter "
            "(student.lora.on_head: false), or say objective.support: top_k_tail"
        )


def check_projected(head: Head, record: ProjectedOutcomes, vocabulary: int) -> None:
    """Raises IncompatibleError unless `head` is linear, frozen, and the one that the record was projected on."""
    check_linear(head)
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        raise IncompatibleError(
            "a projected record holds for the head that it was made on, and this head learns; train a LoRA that leaves the head alone, "
            "or say objective.support: top_k_tail"
        )
    if record.projection.shape[1] != head.weight.shape[1]:
        raise IncompatibleError(
            f"the record's projections are {record.projection.shape[1]} wide and the student's hidden rows {head.weight.shape[1]}; "
            "record the teacher's answers for this student"
        )
    found = known_digest(head, vocabulary)
    if record.head_digest != found:
        raise IncompatibleError(
            f"the record was projected on the head {record.head_digest or 'of no name'}, and the student's is {found}; train the student "
            "that it was made for, in the same dtype, or record the teacher's answers again"
        )


def known_digest(head: Head, vocabulary: int) -> str:
    """The head's digest, counted once for as long as nobody writes to it."""
    tensors = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return head_digest(head, vocabulary)
    state = (vocabulary, head.scale, *((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors))
    known = _known_digests.get(head.weight)
    if known is None or known[0] != state:
        known = (state, head_digest(head, vocabulary))
        _known_digests[head.weight] = known
    return known[1]

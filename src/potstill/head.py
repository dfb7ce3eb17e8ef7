"""The arithmetic of a language-model head, the one place where hidden rows become logits.

A head is a sum of matrix products, so that a LoRA on the head needs no merged copy of a vocabulary-wide weight:
`logits = softcap * tanh(scale * (sum_i rows_i @ weight_i.T + bias) / softcap)`.
It knows nothing of models; `potstill.models` reads it off one, `potstill.objectives` runs it chunk by chunk.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A LoRA delta on the head: `scaling * (rows @ down.T) @ up.T`, `down [r, D]`, `up [V, r]`."""

    down: Float[Tensor, "r D"]
    up: Float[Tensor, "V r"]
    scaling: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Head:
    """Everything between a model's last hidden state (after its final norm) and its logits.

    `scale` multiplies (Cohere's `logit_scale`; Granite's `logits_scaling` is its reciprocal); `softcap` is Gemma 2's
    `final_logit_softcapping`.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[LowRank, ...] = field(default=())

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits, padded rows included."""
        return self.weight.shape[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Head":
        """The same arithmetic with every tensor changed: cast, moved, or cut from its gradient."""
        low_rank = tuple(replace(delta, down=change(delta.down), up=change(delta.up)) for delta in self.low_rank)
        return replace(self, weight=change(self.weight), bias=None if self.bias is None else change(self.bias), low_rank=low_rank)

    def factors(self, rows: Float[Tensor, "N D"], training: bool = False) -> list[tuple[Tensor, Tensor]]:
        """The products whose sum is the linear part: [(rows, weight), (scaling * low_rank_rows, up), ...].

        The narrow side of a LoRA is computed here, under autograd; the vocabulary-wide side is left to the caller.
        """
        products = [(rows, self.weight)]
        for delta in self.low_rank:
            dropped = torch.nn.functional.dropout(rows, delta.dropout, training) if delta.dropout else rows
            narrow = (dropped.to(delta.down.dtype) @ delta.down.T) * delta.scaling
            products.append((narrow, delta.up))
        return products

    def finish(self, logits: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
        """Scale and soft-cap (not the bias) of a linear part that already holds the bias."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def logits(self, rows: Float[Tensor, "N D"], training: bool = False) -> Float[Tensor, "N V"]:
        """The whole logits at once, under autograd: the reference that every chunked execution must equal."""
        total = None
        for left, right in self.factors(rows, training):
            product = left.to(right.dtype) @ right.T
            total = product if total is None else total + product
        assert total is not None
        if self.bias is not None:
            total = total + self.bias
        return self.finish(total)


# Rows of a head that are brought to the processor at once to be hashed.
_HASHED_ROWS = 8192


def head_digest(head: Head, vocabulary_size: int) -> str:
    """Names the linear part of a head, cropped to its real tokens: weight, bias, dtypes and scale. Padded rows do not count."""
    digest = hashlib.blake2b(repr((vocabulary_size, head.scale)).encode(), digest_size=16)
    for tensor in (head.weight, head.bias):
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(repr((tensor.dtype, tuple(tensor.shape[1:]))).encode())
        for start in range(0, vocabulary_size, _HASHED_ROWS):
            part = tensor.detach()[start : min(start + _HASHED_ROWS, vocabulary_size)].cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()

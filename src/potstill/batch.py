"""Example and Batch: what flows from the data to the objectives.

Here, and nowhere else, "predict the next token" is a shift by one. Nothing above this file shifts, and no objective ever
sees a prompt or a padding position.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sequence_key(tokens: np.ndarray, is_target: np.ndarray) -> bytes:
    """16 bytes, equal for equal tokens and marks: what a recorded answer is found by, whatever shares its row or its batch."""
    return xxhash.xxh3_128_digest(tokens.astype(np.int32).tobytes() + is_target.astype(np.bool_).tobytes())


@dataclass(frozen=True)
class Example:
    """One tokenised sequence: which of its tokens must be predicted, and where it comes from.

    `tokens` and `is_target` have equal length; `origin` ("file.jsonl:17") is for messages, `index` is the row's number in its
    data set and is what the log of seen samples holds. `route` names the teacher that answers it, where several do.

    Of text that a model wrote: `log_probs[i]` is that of tokens[i] under the distribution that it was drawn from (0 where nothing was
    drawn), `reward` what a task gives for it. Where the teacher sees more than the student, `teacher_prompt` stands for it in place of
    the first `prompt_length` tokens.
    """

    tokens: list[int]
    is_target: list[bool]
    index: int
    origin: str = ""
    route: str = ""
    log_probs: list[float] | None = None
    reward: float | None = None
    teacher_prompt: list[int] | None = None
    prompt_length: int = 0

    def __post_init__(self):
        if len(self.tokens) != len(self.is_target):
            raise ValueError(f"{self.origin}: {len(self.tokens)} tokens but {len(self.is_target)} target marks")
        if self.log_probs is not None and len(self.log_probs) != len(self.tokens):
            raise ValueError(f"{self.origin}: {len(self.tokens)} tokens but {len(self.log_probs)} log-probabilities")
        if self.teacher_prompt is not None and (not self.teacher_prompt or any(self.is_target[: self.prompt_length])):
            raise ValueError(f"{self.origin}: a teacher's prompt takes the place of tokens of which none is a target, and is not empty")

    def for_teacher(self) -> "Example":
        """The same targets behind the teacher's prompt; itself where both see the same."""
        if self.teacher_prompt is None:
            return self
        return Example(
            self.teacher_prompt + self.tokens[self.prompt_length :],
            [False] * len(self.teacher_prompt) + self.is_target[self.prompt_length :], self.index, self.origin, self.route,
        )  # fmt: skip

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: a target in first place has no predictor and does not count."""
        return sum(self.is_target[1:])


@dataclass(frozen=True)
class Document:
    """One sequence of a batch, without padding and neighbours. `rows` are its target rows among the batch's, in their order."""

    tokens: Int[Tensor, "L"]
    is_target: Bool[Tensor, "L"]
    rows: slice
    route: str = ""

    @property
    def key(self) -> bytes:
        return sequence_key(self.tokens.cpu().numpy(), self.is_target.cpu().numpy())


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens.

    A row may hold several documents (packing); `positions` restart at each, and models attend within a document alone.
    Padding is to the right and belongs to no document (`documents == -1`); causal attention never lets a token see it.
    """

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    documents: Int[Tensor, "B T"]      # numbered from 0 within a row; -1 is padding
    is_target: Bool[Tensor, "B T"]     # this token must be predicted
    examples: tuple[int, ...] = ()     # Example.index of what is inside, in order
    routes: tuple[str, ...] = ()       # Example.route of the same; empty where one teacher answers all
    log_probs: Float[Tensor, "B T"] | None = None   # Example.log_probs, 0 where nothing was drawn; None where nothing was at all
    rewards: Float[Tensor, "B T"] | None = None     # Example.reward, at every token of its document
    teacher_view: "Batch | None" = None             # what the teacher reads instead: other prompts, the same targets in the same order

    @cached_property
    def _targets(self) -> tuple[Tensor, Tensor, Tensor]:
        same_document = (self.documents[:, 1:] == self.documents[:, :-1]) & (self.documents[:, 1:] >= 0)
        wanted = self.is_target[:, 1:] & same_document
        sequence, position = wanted.nonzero(as_tuple=True)
        rows = sequence * self.tokens.shape[1] + position
        # A response is one document of one row; its number makes means over responses possible.
        response = sequence * (int(self.documents.max()) + 1 if self.documents.numel() else 1) + self.documents[sequence, position]
        return rows, self.tokens[sequence, position + 1], response

    def target_rows(self) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
        """Flat positions (b * T + t) whose output predicts a target, and the targets: tokens[b, t + 1]."""
        rows, targets, _ = self._targets
        return rows, targets

    def target_responses(self) -> Int[Tensor, "N"]:
        """For each target row the number of the response (document) that it belongs to; unique within the batch."""
        return self._targets[2]

    @property
    def num_targets(self) -> int:
        return self._targets[0].shape[0]

    @property
    def num_responses(self) -> int:
        """Documents with at least one target."""
        return int(self._targets[2].unique().shape[0])

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.documents >= 0).sum())

    @property
    def is_packed(self) -> bool:
        return bool((self.documents > 0).any())

    def sequences(self) -> list[Document]:
        """The documents of the batch, row by row, each with the slice of the target rows that is its own."""
        found: list[Document] = []
        first = 0
        for tokens, documents, is_target in zip(self.tokens, self.documents, self.is_target, strict=True):
            start = 0
            for length in torch.unique_consecutive(documents[documents >= 0], return_counts=True)[1].tolist():
                part = slice(start, start + length)
                end = first + int(is_target[part][1:].sum())
                route = self.routes[len(found)] if self.routes else ""
                found.append(Document(tokens[part], is_target[part], slice(first, end), route))
                start, first = part.stop, end
        return found

    def select(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "N D"]:
        """The rows of a [B, T, D] tensor that predict a target."""
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.target_rows()[0])

    def at_targets(self, values: Tensor) -> Tensor:
        """[N]: what a [B, T] tensor holds at the targets (the tokens that are predicted, not the rows that predict them)."""
        return values.reshape(-1).index_select(0, self.target_rows()[0] + 1)

    def to(self, device: torch.device | str) -> "Batch":
        moved = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor | Batch)}
        return replace(self, **moved)

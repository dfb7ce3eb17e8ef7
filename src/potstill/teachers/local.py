"""A teacher in this process. It answers with hidden rows and its head, so that its logits never exist as a whole."""

from collections.abc import Mapping

import torch

from potstill.batch import Batch
from potstill.models.causal_lm import CausalLM
from potstill.signals import FullOutcomes, Needs, Offers, TeacherSignal


class LocalTeacher:
    """A `CausalLM` that is frozen, in evaluation mode, and never in the optimizer's hands (it is not an `nn.Module`)."""

    def __init__(self, causal_lm: CausalLM):
        self.causal_lm = causal_lm.eval().requires_grad_(False)

    @property
    def name(self) -> str:
        return f"the local teacher {self.causal_lm.name}"

    @property
    def offers(self) -> Offers:
        return Offers(frozenset({"full"}))

    @property
    def identity(self) -> Mapping[str, str]:
        return {}

    @torch.no_grad()
    def score(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """`FullOutcomes` for the target rows, or nothing where nothing is asked."""
        if needs.outcomes == "nothing":
            return TeacherSignal()
        rows, head = self.causal_lm(batch)
        return TeacherSignal(FullOutcomes(rows, head))

    def close(self) -> None:
        """Nothing is held open."""

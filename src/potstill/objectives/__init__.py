"""From a student's hidden rows, a teacher's answer and the targets to a total and a count. Torch alone, no Hugging Face.

Names are looked up on first use, so that reading `potstill.objectives.catalogue` costs no import of torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potstill.objectives.divergences import DIVERGENCES
    from potstill.objectives.fused import fused_distillation_loss

__all__ = ["DIVERGENCES", "fused_distillation_loss"]


def __getattr__(name: str):
    if name == "DIVERGENCES":
        from potstill.objectives.divergences import DIVERGENCES

        return DIVERGENCES
    if name == "fused_distillation_loss":
        from potstill.objectives.fused import fused_distillation_loss

        return fused_distillation_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")

"""A teacher's logits, a tile of rows at a time, in float32 and cropped to the vocabulary: nothing vocabulary-wide is ever longer.

It knows hidden rows, heads and mixtures. What is kept of a tile is not its affair.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from potstill.head import Head
from potstill.signals import FullOutcomes, MixtureOutcomes

_TILE_BYTES = 32 * 2**20


class LogitTiles:
    """Iterates over (rows, tile): logits, of a mixture log-probabilities, divided by the temperature; each tile serves all slices in turn.

    A tile is as wide as `width`, the vocabulary rounded up to `multiple_of`; the columns beyond the vocabulary are -inf.
    """

    def __init__(self, outcomes: FullOutcomes | MixtureOutcomes, *, vocabulary_size: int, temperature: float, multiple_of: int = 1):
        self._members = outcomes.members if isinstance(outcomes, MixtureOutcomes) else (outcomes,)
        self._weights = outcomes.weights if isinstance(outcomes, MixtureOutcomes) else None
        self._vocabulary, self._temperature = vocabulary_size, temperature
        self.width = -(-vocabulary_size // multiple_of) * multiple_of
        self.num_rows, self.device = len(outcomes), self._members[0].hidden.device
        self._linear: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if not self.num_rows:
            return
        most = min(max(1, _TILE_BYTES // (4 * self.width)), self.num_rows)
        most = -(-self.num_rows // -(-self.num_rows // most))  # of equal size: a last small part costs a product of its own
        tile = torch.empty(most, self.width, device=self.device)
        tile[:, self._vocabulary :] = -torch.inf
        for start in range(0, self.num_rows, most):
            rows = slice(start, min(start + most, self.num_rows))
            filled = tile[: rows.stop - rows.start]
            self._fill(filled[:, : self._vocabulary], rows)
            yield rows, filled

    def _fill(self, tile: Tensor, rows: slice) -> None:
        if self._weights is None:
            self._logits_into(tile, self._members[0], rows)
        else:
            self._mixture_into(tile, self._weights, rows)
        if self._temperature != 1.0:
            tile.div_(self._temperature)

    def _mixture_into(self, tile: Tensor, weights: tuple[float, ...], rows: slice) -> None:
        """log sum_i w_i p_i, every p_i at temperature 1: as the loss against the live teachers has it."""
        part = torch.empty_like(tile)
        for number, (member, weight) in enumerate(zip(self._members, weights, strict=True)):
            self._logits_into(part, member, rows)
            weighted = torch.log_softmax(part, -1).add_(float(torch.tensor(weight, dtype=torch.float64).log()))
            tile.copy_(weighted if number == 0 else torch.logaddexp(tile, weighted))

    def _logits_into(self, tile: Tensor, outcomes: FullOutcomes, rows: slice) -> None:
        self._linear_into(tile, outcomes.head, outcomes.hidden[rows])
        if outcomes.head.scale != 1.0:
            tile.mul_(outcomes.head.scale)
        if outcomes.head.softcap is not None:
            tile.div_(outcomes.head.softcap).tanh_().mul_(outcomes.head.softcap)

    def _linear_into(self, tile: Tensor, head: Head, hidden: Tensor) -> None:
        """The products in the head's own dtype, their sum in float32; no second tile where that dtype is float32."""
        for number, (left, right) in enumerate(head.factors(hidden)):
            right = right[: self._vocabulary]
            left = left.to(right.dtype)
            if right.dtype == torch.float32:
                torch.mm(left, right.T, out=tile) if number == 0 else tile.addmm_(left, right.T)
                continue
            if self._linear is None or self._linear.dtype != right.dtype:
                self._linear = torch.empty(tile.shape, dtype=right.dtype, device=tile.device)
            product = torch.mm(left, right.T, out=self._linear[: len(left)])
            tile.copy_(product) if number == 0 else tile.add_(product)
        if head.bias is not None:
            tile.add_(head.bias[: self._vocabulary])

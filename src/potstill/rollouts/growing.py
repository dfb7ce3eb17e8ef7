"""A layer of a key-value cache with room to grow: one more token is written into it, where transformers' own copies all before it.

It knows transformers' cache layers; no model, and no mask.
"""

from torch import Tensor
from transformers.cache_utils import DynamicLayer

# A full buffer is replaced by one that is longer by this share and these tokens: each token is copied about four times in all.
_MORE, _LEAST = 0.25, 32


class GrowingLayer(DynamicLayer):
    """`keys` and `values` [B, H, T, D] are what is filled of two buffers that reach further.

    Unlike its base it is for reading without a gradient alone.
    """

    def __init__(self, layer: DynamicLayer):
        """Goes on from `layer`, which has read something."""
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        super().lazy_initialization(layer.keys, layer.values)
        self.is_initialized = True
        self._start, self._end = 0, layer.keys.shape[-2]
        self._buffers = (layer.keys, layer.values)
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, self._start : self._end] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds what was read [B, H, 1, D]; all that was read, as views that the next call leaves unchanged in what they hold."""
        first, self._end = self._end, self._end + key_states.shape[-2]
        if self._end > self._buffers[0].shape[-2]:
            held, needed = first - self._start, self._end - self._start
            longer = int(needed * (1 + _MORE)) + _LEAST
            self._buffers = tuple(_larger(buffer[:, :, self._start : first], longer) for buffer in self._buffers)
            self._start, first, self._end = 0, held, needed
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, first : self._end] = states
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps these rows, in this order."""
        self._buffers = tuple(buffer.index_select(0, beam_idx) for buffer in self._buffers)
        self._show()

    def forget(self, count: int) -> None:
        """Leaves out the first `count` tokens that are still held: padding of every row."""
        self._start += count
        self._show()


def _larger(held: Tensor, capacity: int) -> Tensor:
    buffer = held.new_empty(*held.shape[:2], capacity, held.shape[-1])
    buffer[:, :, : held.shape[2]] = held
    return buffer


def let_grow(cache) -> bool:
    """Puts a growing layer in the place of each plain one; whether all of them are, so that padding can be forgotten."""
    cache.layers = [GrowingLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in cache.layers]
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def forget(cache, count: int) -> None:
    """Leaves out the first `count` tokens of every layer; all of them must be growing ones."""
    for layer in cache.layers:
        layer.forget(count)

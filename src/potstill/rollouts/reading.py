"""A model that reads a batch of texts token after token: its key-value cache, the mask over its left padding, and its head.

It knows transformers' trunk and cache; nothing of how a token is chosen, and of no other row than those of its batch.
"""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from potstill.errors import ModelError
from potstill.head import Head, LowRank
from potstill.models.causal_lm import CausalLM
from potstill.models.loading import longest_context
from potstill.rollouts.growing import forget, let_grow


def require_cache(model: CausalLM) -> None:
    """Raises ModelError for a family whose trunk keeps no key-value cache that rows can be taken out of."""
    if "past_key_values" not in inspect.signature(model.trunk.forward).parameters:
        raise ModelError(
            f"{model.name}: {type(model.inner).__name__} keeps no key-value cache, so it cannot write here; "
            "use rollouts.generator.kind: vllm"
        )


def reach(model: CausalLM) -> int | None:
    """The tokens that a model can read at all, where it looks its positions up in a table; None where it computes them."""
    longest = longest_context(model.inner.config)
    if longest is None:
        return None
    read = model.inner.get_input_embeddings()
    tables = [module for module in model.trunk.modules() if isinstance(module, nn.Embedding) and module is not read]
    # OPT keeps two rows before the first position.
    return longest if any(longest <= table.num_embeddings <= longest + 2 for table in tables) else None


class Voice:
    """A model's trunk and the real rows of its head, as they are now: read once, used for every token of a batch."""

    def __init__(self, model: CausalLM, vocabulary_size: int):
        self.model = model
        self.device = model.device
        parameters = inspect.signature(model.trunk.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._narrow = _narrower(model)
        self._head = _cropped(model.head(), vocabulary_size, _computing(self.device) or self._narrow)
        self._through_root = isinstance(model.inner, FSDPModule)
        self._tall_first = self.device.type == "cpu" and self._head.weight.dtype == torch.float32

    def states(self, arguments: dict[str, Any]) -> Any:
        """The trunk's output: `last_hidden_state [B, T, D]` and, where it was asked for, `past_key_values`."""
        with nullcontext() if self._narrow is None else torch.autocast(self.device.type, dtype=self._narrow):
            return self._through_its_root(arguments) if self._through_root else self.model.trunk(**arguments)

    def _through_its_root(self, arguments: dict[str, Any]) -> Any:
        caught: list[Any] = []
        handle = self.model.trunk.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        try:
            # A model that is sharded by itself gathers its parameters in its own forward alone.
            kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.inner.forward).parameters else {}
            self.model.inner(**arguments, **kept)
        finally:
            handle.remove()
        return caught[0]

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [B, V] of the real tokens, from hidden rows [B, D]."""
        with torch.autocast(self.device.type, enabled=False):
            return _tall_first(self._head, rows) if self._tall_first else self._head.logits(rows).float()

    def step_along(self, pad_token: int) -> None:
        """One forward over nothing: what a rank without rows does while others, with whom it shares the parameters, read."""
        self.states({"input_ids": torch.full((1, 1), pad_token, device=self.device), "use_cache": False})


def _computing(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _tall_first(head: Head, rows: Tensor) -> Tensor:
    """`head.logits(rows)` with the vocabulary-wide factor on the left, which takes a processor two thirds of the time for a few rows."""
    first, *others = [right @ left.to(right.dtype).T for left, right in head.factors(rows)]
    total = sum(others, first)
    if head.bias is not None:
        total = total + head.bias[:, None]
    return head.finish(total).T.contiguous()


def _narrower(model: CausalLM) -> torch.dtype | None:
    """Where nobody has said autocast, and trained weights are wider than frozen ones: the narrower of them."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    narrow = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)
    return None if torch.is_autocast_enabled(model.device.type) or len(dtypes) == 1 else narrow


def _cropped(head: Head, vocabulary_size: int, dtype: torch.dtype | None) -> Head:
    """The rows of the real tokens, cast once where autocast would cast them for every token."""
    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None else tensor.to(dtype)

    return replace(
        head, weight=cast(head.weight[:vocabulary_size]), bias=None if head.bias is None else cast(head.bias[:vocabulary_size]),
        low_rank=tuple(LowRank(cast(d.down), cast(d.up[:vocabulary_size]), d.scaling) for d in head.low_rank),
    )  # fmt: skip


class Reader:
    """The rows of one batch, as one model has read them so far."""

    def __init__(self, voice: Voice, pad_token: int):
        self._voice, self._pad_token = voice, pad_token
        self._cache: Any = None
        self._grows = False
        self._padding: list[int] = []          # columns before the first token of each row
        self._mask: Tensor | None = None       # [B, T] of what is no padding; None where nothing is
        self._next: Tensor | None = None       # [B, 1] the position of the next token

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts; float32 logits [B, V] of the token after each."""
        device = self._voice.device
        longest = max(map(len, prompts))
        self._padding = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[self._pad_token] * before + list(row) for before, row in zip(self._padding, prompts, strict=True)])
        before = torch.tensor(self._padding, device=device)[:, None]
        columns = torch.arange(longest, device=device)
        self._next = longest - before
        self._mask = columns >= before if any(self._padding) else None
        logits = self._read(tokens.to(device), (columns - before).clamp_min(0))
        self._grows = let_grow(self._cache)
        return logits

    def read(self, tokens: Tensor) -> Tensor:
        """Reads one more token of each row [B]; float32 logits [B, V] of the one after it."""
        positions = self._next
        assert positions is not None
        self._next = positions + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        return self._read(tokens[:, None], positions)

    def _read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": tokens, "use_cache": True, "past_key_values": self._cache, "attention_mask": self._mask}
        if self._voice.takes_positions:
            arguments["position_ids"] = positions
        output = self._voice.states(arguments)
        self._cache = output.past_key_values
        return self._voice.logits(output.last_hidden_state[:, -1])

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone, in this order; a row may be named several times.

        Columns that are padding in all of them are forgotten, so that a prompt that was long costs nothing once its answer has ended.
        """
        assert self._next is not None
        chosen = torch.tensor(rows, device=self._next.device)
        self._cache.reorder_cache(chosen)
        self._next = self._next[chosen]
        self._padding = [self._padding[row] for row in rows]
        if self._mask is None:
            return
        self._mask = self._mask[chosen]
        spare = min(self._padding)
        if spare and self._grows:
            forget(self._cache, spare)
            self._padding = [before - spare for before in self._padding]
            self._mask = self._mask[:, spare:]
        if not any(self._padding):
            self._mask = None

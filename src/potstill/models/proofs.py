"""Asks a loaded model, with a few tokens, whether what we assume of it is true: its head's arithmetic, and that packing does not leak.

Both are answered by the model's own forward, not by a list of families.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.batch import Batch
from potstill.errors import ModelError
from potstill.models.causal_lm import CausalLM

# How far two ways through the same weights may lie apart, relative to the largest value, by the coarser dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# How far a document's states may typically move when another one changes: not at all, but experts are then multiplied in other shapes.
_UNTOUCHED = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
# LLM.int8 keeps columns apart that hold a large value in any row of the batch, so it rounds a document by what stands beside it, to a
# few thousandths; a document that is really seen moves another by a tenth and more.
_ROUNDED_TOGETHER = 2e-2
# Logits of this size show a soft-cap that small logits would hide.
_LOUD = 60.0


@contextmanager
def _quietly(causal_lm: CausalLM) -> Iterator[None]:
    """Evaluation mode, no gradient, and autocast where trained parameters are wider than the frozen ones."""
    training = causal_lm.training
    dtypes = {p.dtype for p in causal_lm.parameters() if p.is_floating_point()}
    narrow = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)
    causal_lm.eval()
    try:
        mixed = torch.autocast(causal_lm.device.type, dtype=narrow or torch.bfloat16, enabled=narrow is not None and len(dtypes) > 1)
        with torch.no_grad(), mixed:
            yield
    finally:
        causal_lm.train(training)


def refuse_not_finite(causal_lm: CausalLM, name: str) -> None:
    """Raises ModelError where a weight of `name` is NaN or infinite: what such a model writes and is scored by means nothing."""
    for key, weight in causal_lm.inner.named_parameters():
        # One byte a value is a quantised weight, which has scales of its own.
        if weight.numel() and weight.is_floating_point() and weight.element_size() > 1:
            low, high = torch.aminmax(weight.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ModelError(f"{name}: its weight {key} is not finite everywhere; name a model that trained well")


def _probe_tokens(causal_lm: CausalLM, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(causal_lm.vocabulary_size, (1, length), generator=generator).to(causal_lm.device)


def _batch(tokens: Tensor, positions: Tensor, documents: Tensor) -> Batch:
    return Batch(tokens, positions, documents, torch.ones_like(tokens, dtype=torch.bool))


def relative_distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the largest value; NaN stays NaN."""
    expected = expected.float()
    return float((got.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def typical_distance(got: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference as a part of that of the values; NaN stays NaN."""
    return float((got.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt().clamp_min(1e-30))


def _equal(got: Tensor, expected: Tensor) -> bool:
    return relative_distance(got, expected) <= max(_ROUNDING[got.dtype], _ROUNDING[expected.dtype])


def probe_logits(causal_lm: CausalLM) -> Float[Tensor, "8 V"]:
    """The logits of the real tokens on a fixed sequence of eight, which a model and its export must share."""
    tokens = _probe_tokens(causal_lm, 8)
    with _quietly(causal_lm):
        hidden = causal_lm.hidden(_batch(tokens, torch.arange(8, device=tokens.device)[None], torch.zeros_like(tokens)))
        return causal_lm.head().logits(hidden[0])[:, : causal_lm.vocabulary_size]


def prove_head(causal_lm: CausalLM) -> None:
    """Raises ModelError unless `head().logits(hidden)` gives the logits that the model's own forward gives.

    The trunk's last state is made large on its way into the model's own head, so that a soft-cap, a scale or a bias that small
    logits would hide is seen whatever the weights are.
    """
    tokens = _probe_tokens(causal_lm, 8)
    positions = torch.arange(8, device=tokens.device)[None]
    batch = _batch(tokens, positions, torch.zeros_like(tokens))
    seen: list[Tensor] = []

    def loudly(_module, _inputs, output):
        seen.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    with _quietly(causal_lm):
        hidden, head = causal_lm.hidden(batch), causal_lm.head()
        linear = head.weight[: causal_lm.vocabulary_size].float() @ hidden[0].float().T
        factor = float(_LOUD / linear.abs().max().clamp_min(1e-6))
        handle = causal_lm.trunk.register_forward_hook(loudly)
        try:
            theirs = causal_lm.inner(input_ids=tokens, use_cache=False).logits
        finally:
            handle.remove()
        if not seen or seen[0].shape != hidden.shape or not _equal(seen[0], hidden):
            raise ModelError(
                f"{causal_lm.name}: {type(causal_lm.inner).__name__} does not give its head the states that its trunk returns; {_REFUSAL}"
            )
        ours = head.logits((hidden * factor)[0])[None]
    if ours.shape != theirs.shape or not _equal(ours, theirs):
        found = f"widths {ours.shape[-1]} and {theirs.shape[-1]}" if ours.shape != theirs.shape else (
            f"logits up to {float((ours.float() - theirs.float()).abs().max()):.3g} apart"
        )
        raise ModelError(
            f"{causal_lm.name}: the head of {type(causal_lm.inner).__name__} does something that its configuration does not tell "
            f"({found}); {_REFUSAL}"
        )


_REFUSAL = "training it through its head would optimise another model, so it is refused"


def supports_packing(causal_lm: CausalLM) -> bool:
    """Whether documents packed into one row stay apart: each sees itself alone, at its own positions.

    False: set `data.packing: false`. Two rows are asked at once, since some attention kernels tell documents apart in one row only.
    """
    first, second = 5, 7
    documents = torch.tensor([[0] * first + [1] * second], device=causal_lm.device).repeat(2, 1)
    positions = torch.tensor([[*range(first), *range(second)]], device=causal_lm.device).repeat(2, 1)
    follower = _probe_tokens(causal_lm, second, seed=1)

    def packed(seed: int) -> Tensor:
        row = torch.cat([_probe_tokens(causal_lm, first, seed), follower], dim=1).repeat(2, 1)
        return causal_lm.hidden(_batch(row, positions, documents))[:, first:]

    with _quietly(causal_lm):
        beside_one, beside_another = packed(2), packed(3)
        alone = causal_lm.hidden(_batch(follower, positions[:1, first:], torch.zeros_like(follower)))
        moved = typical_distance(beside_another, beside_one)
        if any(type(parameter).__name__ == "Int8Params" for parameter in causal_lm.parameters()):
            return max(moved, typical_distance(beside_one, alone.expand_as(beside_one))) <= _ROUNDED_TOGETHER
        # What stands before must not matter at all; alone may differ by rounding, since the kernels see other shapes.
        untouched = moved <= _UNTOUCHED[beside_one.dtype]
        return untouched and _equal(beside_one, alone.expand_as(beside_one))


def refuse_leaking_packing(causal_lm: CausalLM) -> None:
    """Raises ModelError with the remedy where `supports_packing` says no."""
    if not supports_packing(causal_lm):
        raise ModelError(
            f"{causal_lm.name}: documents packed into one row see each other in {type(causal_lm.inner).__name__} with "
            f"{causal_lm.inner.config._attn_implementation} attention; set data.packing: false, or another attention kernel"
        )

"""The head's arithmetic against a float64 reference that writes each term out, and its gradients through every part."""

import numpy as np
import pytest
import torch

from potstill.head import Head, LowRank


def make_head(bias: bool, scale: float, softcap: float | None, rank: int) -> Head:
    draw = torch.Generator().manual_seed(3)
    def parameter(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)
    delta = (LowRank(parameter(rank, 5), parameter(11, rank), scaling=0.5),) if rank else ()
    return Head(parameter(11, 5), parameter(11) if bias else None, scale, softcap, delta)


KINDS = [(False, 1.0, None, 0), (True, 1.0, None, 0), (False, 0.25, None, 0), (True, 2.0, 3.0, 0), (True, 0.5, 2.0, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_softcapped_scaled_sums_of_products(kind):
    head = make_head(*kind)
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, w = rows.numpy(), head.weight.detach().numpy()
    for delta in head.low_rank:
        w = w + delta.scaling * delta.up.detach().numpy() @ delta.down.detach().numpy()
    expected = x @ w.T + (0 if head.bias is None else head.bias.detach().numpy())
    expected = expected * head.scale
    if head.softcap:
        expected = head.softcap * np.tanh(expected / head.softcap)
    np.testing.assert_allclose(head.logits(rows).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_part(kind):
    head = make_head(*kind)
    rows = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    head.logits(rows).square().sum().backward()
    parts = [rows, head.weight, *([] if head.bias is None else [head.bias])]
    parts += [part for delta in head.low_rank for part in (delta.down, delta.up)]
    for part in parts:
        assert part.grad is not None
        assert part.grad.abs().sum() > 0


def test_dropout_of_a_low_rank_delta_acts_only_in_training():
    head = make_head(False, 1.0, None, 2)
    dropped = Head(head.weight, low_rank=(LowRank(head.low_rank[0].down, head.low_rank[0].up, 0.5, dropout=0.9),))
    rows = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(dropped.logits(rows), head.logits(rows))
    assert not torch.equal(dropped.logits(rows, training=True), head.logits(rows))

"""A projected record is the dense forward KL: values and gradients, whatever the mix, the temperature and the head's bias and scale."""

from dataclasses import replace

import pytest
import torch

from potstill.errors import IncompatibleError
from potstill.head import Head, LowRank, head_digest
from potstill.objectives.execution import Execution
from potstill.objectives.fused import fused_loss
from potstill.objectives.projection import project
from potstill.signals import FullOutcomes, MixtureOutcomes

N, V, PADDED, D, E = 9, 13, 16, 6, 5


def tensor(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def setting(bias=True, scale=0.7, dtype=torch.float64):
    rows = tensor(N, D, seed=0, dtype=dtype).requires_grad_()
    head = Head(tensor(PADDED, D, seed=1, dtype=dtype), tensor(PADDED, seed=2, dtype=dtype) if bias else None, scale)
    teacher = FullOutcomes(tensor(N, E, seed=3, dtype=dtype), Head(tensor(PADDED + 2, E, seed=4, dtype=dtype), softcap=4.0))
    return rows, head, teacher, torch.arange(N) % V


def both(rows, head, teacher, targets, temperature=1.0, execution=None, **choices):
    """(total, cross-entropy, divergence, gradient) of the dense loss and of the record."""
    found = []
    record = project(teacher, head, temperature=temperature, vocabulary_size=V)
    for outcomes, support in ((teacher, "full"), (record, "projected")):
        loss = fused_loss(
            rows, head, outcomes, targets, temperature=temperature, support=support, vocabulary_size=V, execution=execution, **choices
        )
        found.append((loss.total.detach(), loss.cross_entropy, loss.divergence, *torch.autograd.grad(loss.total, rows)))
    return found


@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.7)])
@pytest.mark.parametrize("weights", [{"kd_ratio": 1.0}, {"kd_ratio": 0.3}, {"kd_weight": 2.0, "sft_weight": 0.5}])
def test_it_is_the_dense_loss(temperature, bias, scale, weights):
    for execution in (Execution(), Execution(group_rows=4, slice_rows=3, block_rows=2), Execution(group_rows=1, block_rows=1)):
        dense, record = both(
            *setting(bias, scale), temperature=temperature, execution=execution, row_weights=torch.linspace(0.2, 2, N), **weights
        )
        torch.testing.assert_close(record, dense, rtol=1e-9, atol=1e-10)


def test_totals_of_parts_add_up():
    rows, head, teacher, targets = setting()
    record = project(teacher, head, vocabulary_size=V)
    whole = fused_loss(rows, head, record, targets, support="projected", vocabulary_size=V)
    parts = [
        fused_loss(rows[part], head, record.rows(part), targets[part], support="projected", vocabulary_size=V)
        for part in (slice(0, 4), slice(4, None))
    ]
    wanted = torch.autograd.grad(whole.total / N, rows)
    torch.testing.assert_close(torch.autograd.grad((parts[0].total + parts[1].total) / N, rows), wanted)


def test_a_live_teacher_and_a_mixture_serve_it_too():
    rows, head, teacher, targets = setting()
    mixture = MixtureOutcomes((teacher, FullOutcomes(tensor(N, 3, seed=8), Head(tensor(V, 3, seed=9)))), (0.25, 0.75))
    for outcomes in (teacher, mixture):
        record = project(outcomes, head, temperature=1.3, vocabulary_size=V)
        found = []
        for answer, support in ((outcomes, "full"), (outcomes, "projected"), (record, "projected")):
            loss = fused_loss(rows, head, answer, targets, support=support, vocabulary_size=V, temperature=1.3)
            found.append((loss.total.detach(), *torch.autograd.grad(loss.total, rows)))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        torch.testing.assert_close(found[2], found[0])


def test_float32_and_bfloat16_stay_near_float64():
    generator = torch.Generator().manual_seed(6)
    hidden, weight, other, other_weight = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((64, 16), (50, 16), (64, 8), (50, 8))
    )
    targets = torch.randint(0, 50, (64,), generator=generator)
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        head, rows = Head(weight.to(dtype) * 0.5), hidden.to(dtype).requires_grad_()
        teacher = FullOutcomes(other.to(dtype), Head(other_weight.to(dtype) * 0.5))
        record = project(teacher, head)
        assert record.projection.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        loss = fused_loss(rows, head, record, targets, kd_ratio=0.5, support="projected", execution=Execution(group_rows=16))
        found[dtype] = (loss.total.double(), torch.autograd.grad(loss.total, rows)[0])
        assert found[dtype][1].dtype == dtype
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for one, other in zip(found[dtype], found[torch.float64], strict=True):
            assert (one.double() - other).norm() <= tolerance * other.norm()


def test_a_gradient_near_the_optimum_is_not_lost_in_bfloat16():
    """Where student and teacher nearly agree, it is the small difference of two large sums."""
    rows, weight = tensor(32, 16, seed=1), tensor(200, 16, seed=2) + 2.0
    head, near = Head(weight.bfloat16()), rows.bfloat16()
    teacher = FullOutcomes((near.double() + 0.05 * tensor(32, 16, seed=3)), Head(weight.bfloat16().double()))
    record = project(teacher, head)
    leaf = near.clone().requires_grad_()
    loss = fused_loss(leaf, head, record, torch.zeros(32, dtype=torch.long), kd_ratio=1.0, support="projected")
    wide = near.double().requires_grad_()
    exact = fused_loss(wide, Head(weight.bfloat16().double()), teacher, torch.zeros(32, dtype=torch.long), kd_ratio=1.0)
    one, other = torch.autograd.grad(loss.total, leaf)[0].double(), torch.autograd.grad(exact.total, wide)[0]
    assert (one - other).norm() <= 0.2 * other.norm()


def test_under_autocast():
    rows, head, teacher, targets = setting(dtype=torch.float32)
    record = project(teacher, head, vocabulary_size=V)
    wanted = torch.autograd.grad(fused_loss(rows, head, record, targets, support="projected", vocabulary_size=V).total, rows)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_loss(rows, head, record, targets, support="projected", vocabulary_size=V)
        (gradient,) = torch.autograd.grad(loss.total, rows)
    assert gradient.dtype == torch.float32
    assert (gradient - wanted).norm() <= 3e-2 * wanted.norm()


def test_what_does_not_fit_is_refused_and_says_what_to_do():
    rows, head, teacher, targets = setting()
    record = project(teacher, head, vocabulary_size=V)

    def loss(head, record, **choices):
        return fused_loss(rows, head, record, targets, support="projected", vocabulary_size=V, **choices)

    with pytest.raises(IncompatibleError, match="this head learns; train a LoRA that leaves the head alone"):
        loss(replace(head, weight=head.weight.clone().requires_grad_()), record)
    with pytest.raises(IncompatibleError, match="caps its logits at 2"):
        loss(replace(head, softcap=2.0), record)
    with pytest.raises(IncompatibleError, match="carries a LoRA"):
        loss(replace(head, low_rank=(LowRank(tensor(2, D, seed=1), tensor(PADDED, 2, seed=1), 1.0),)), record)
    weight = head.weight
    for changes in ({"weight": weight + 1e-12}, {"bias": None}, {"scale": 1.0}, {"weight": weight.float()}):
        with pytest.raises(IncompatibleError, match="was projected on the head"):
            loss(replace(head, **changes), record)
    with pytest.raises(IncompatibleError, match=r"made at temperature 1 .*found temperature 2; set objective.temperature to 1"):
        loss(head, record, temperature=2.0)
    with pytest.raises(IncompatibleError, match="caps its logits"):
        project(teacher, teacher.head)


def test_a_head_that_was_written_to_is_noticed():
    rows, head, teacher, targets = setting()
    record = project(teacher, head, vocabulary_size=V)
    fused_loss(rows, head, record, targets, support="projected", vocabulary_size=V)
    with torch.no_grad():
        head.weight[0, 0] += 1
    with pytest.raises(IncompatibleError, match="was projected on the head"):
        fused_loss(rows, head, record, targets, support="projected", vocabulary_size=V)
    with torch.no_grad():
        head.weight[0, 0] -= 1
    with torch.no_grad():
        head.weight[PADDED - 1] += 1  # a padded row
    fresh = setting()[1]
    assert head_digest(fresh, V) == head_digest(replace(fresh, weight=fresh.weight[:V], bias=fresh.bias[:V]), V)
    assert head_digest(fresh, V) != head_digest(fresh, V - 1)


def test_no_rows():
    _, head, teacher, _ = setting()
    record = project(teacher.rows(slice(0, 0)), head, vocabulary_size=V)
    assert record.projection.shape == (0, D)
    empty = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    loss = fused_loss(empty, head, record, torch.zeros(0, dtype=torch.long), support="projected", vocabulary_size=V)
    assert loss.total.item() == 0
    loss.total.backward()

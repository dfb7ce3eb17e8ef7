"""Mixtures are the weighted mean of probabilities, written out; routed rows are each teacher's own loss on its rows, added up."""

import pytest
import torch

from potstill.batch import Batch
from potstill.errors import IncompatibleError
from potstill.head import Head
from potstill.objectives import DIVERGENCES
from potstill.objectives.catalogue import NEEDS_TARGETS, PARAMETERS
from potstill.objectives.distribution import DistributionMatching
from potstill.objectives.execution import Execution
from potstill.objectives.fused import fused_loss, run_plan
from potstill.objectives.plan import make_plan
from potstill.signals import FullOutcomes, MixtureOutcomes, RoutedOutcomes, TeacherSignal, TopKOutcomes

N, V, D = 10, 11, 6
SMALL = Execution(group_rows=4, slice_rows=3, block_rows=2)
NAMES = [name for name in PARAMETERS if name not in NEEDS_TARGETS and name != "logit_mse"]


def tensor(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student():
    return tensor(N, D, seed=0).requires_grad_(), Head(tensor(V + 5, D, seed=1).requires_grad_())


def member(seed, width, softcap=None):
    return FullOutcomes(tensor(N, width, seed=seed), Head(tensor(V + seed, width, seed=seed + 100), softcap=softcap))


TARGETS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_is_the_mean_of_its_members_probabilities(name):
    members, weights = (member(2, 4), member(3, 7, softcap=3.0), member(4, 5)), (0.5, 0.3, 0.2)
    probs = sum(
        weight * one.head.logits(one.hidden)[:, :V].softmax(-1) for one, weight in zip(members, weights, strict=True)
    )
    for temperature in (1.0, 1.5):
        rows, head = student()
        # At a temperature, log p_mix is tempered as a teacher's logits would be.
        teacher = (probs.log() / temperature).log_softmax(-1)
        by_row = DIVERGENCES[name]((head.logits(rows)[:, :V] / temperature).log_softmax(-1), teacher)
        (wanted,) = torch.autograd.grad(by_row.sum(), rows)
        for execution in (None, SMALL):
            loss = fused_loss(
                rows, head, MixtureOutcomes(members, weights), TARGETS, divergence=name, kd_ratio=1.0, temperature=temperature,
                vocabulary_size=V, execution=execution,
            )
            torch.testing.assert_close(loss.by_row["divergence"], by_row.detach())
            torch.testing.assert_close(torch.autograd.grad(loss.total, rows)[0], wanted)


@pytest.mark.parametrize("support", ["top_k_tail", "top_k_renormalised"])
def test_a_mixture_is_cut_down_as_one_teacher_is(support):
    members = (member(2, 4), member(3, 7))
    log_probs = (0.4 * members[0].head.logits(members[0].hidden)[:, :V].softmax(-1)
                 + 0.6 * members[1].head.logits(members[1].hidden)[:, :V].softmax(-1)).log()  # fmt: skip
    kept, ids = log_probs.topk(4)
    record = TopKOutcomes(ids, kept, torch.log1p(-kept.exp().sum(-1)))
    rows, head = student()
    found = []
    for outcomes in (MixtureOutcomes(members, (0.4, 0.6)), record):
        loss = fused_loss(
            rows, head, outcomes, TARGETS, divergence="jsd", parameters={"top_k": 4}, support=support, vocabulary_size=V, execution=SMALL
        )
        found.append((loss.total.detach(), *torch.autograd.grad(loss.total, [rows, head.weight])))
    torch.testing.assert_close(found[0], found[1])


def test_a_member_of_weight_zero_is_not_there_and_one_of_weight_one_is_alone():
    rows, head = student()
    alone, other = member(2, 4), member(3, 7)
    wanted = fused_loss(rows, head, alone, TARGETS, vocabulary_size=V).total
    for members, weights in (((alone, other), (1.0, 0.0)), ((alone, alone), (0.3, 0.7)), ((alone,), (1.0,))):
        torch.testing.assert_close(fused_loss(rows, head, MixtureOutcomes(members, weights), TARGETS, vocabulary_size=V).total, wanted)


def test_wrong_mixtures_are_refused():
    rows, head = student()
    for mixture, message in (
        (MixtureOutcomes((member(2, 4), member(3, 7)), (0.5, 0.6)), "add up to 1; found 0.5, 0.6"),
        (MixtureOutcomes((member(2, 4), member(3, 7)), (1.5, -0.5)), "at least 0"),
        (MixtureOutcomes((member(2, 4), member(3, 7)), (1.0,)), "2 teachers, 1 weights"),
        (MixtureOutcomes((member(2, 4), member(3, 7).rows(slice(0, 3))), (0.5, 0.5)), r"rows \[3, 10\]"),
    ):
        with pytest.raises(IncompatibleError, match=message):
            fused_loss(rows, head, mixture, TARGETS, vocabulary_size=V)


def routed():
    """Two teachers whose rows are interleaved and out of order."""
    first, second = torch.tensor([7, 0, 2, 9, 4]), torch.tensor([8, 1, 3, 5, 6])
    whole = member(2, 4), member(3, 7)
    return RoutedOutcomes(((first, whole[0].rows(first)), (second, whole[1].rows(second)))), whole, (first, second)


@pytest.mark.parametrize("support", ["full", "top_k_tail"])
def test_routed_rows_are_each_teachers_own_loss_added_up(support):
    outcomes, whole, parts = routed()
    rows, head = student()
    weights = torch.linspace(0.3, 2, N, dtype=torch.float64)
    plan = make_plan("jsd", {"top_k": 3} if support != "full" else None, kd_ratio=0.4, support=support)
    loss = run_plan(plan, rows, head, outcomes, TARGETS, vocabulary_size=V, row_weights=weights, execution=SMALL)
    wanted = sum(
        run_plan(plan, rows, head, teacher, TARGETS, vocabulary_size=V, row_weights=weights * torch.zeros(N).index_fill(0, part, 1)).total
        for teacher, part in zip(whole, parts, strict=True)
    )
    torch.testing.assert_close(loss.total, wanted)
    leaves = [rows, head.weight]
    torch.testing.assert_close(torch.autograd.grad(loss.total, leaves), torch.autograd.grad(wanted, leaves))
    for teacher, part in zip(whole, parts, strict=True):
        alone = run_plan(plan, rows, head, teacher, TARGETS, vocabulary_size=V).by_row
        for name, values in alone.items():
            torch.testing.assert_close(loss.by_row[name][part], values[part])


def test_weights_within_a_response_see_all_its_rows_whoever_answered_them():
    """Both parts are the same teacher, so that the sum must be the loss of that teacher alone."""
    batch = Batch(
        torch.zeros(1, N + 1, dtype=torch.long), torch.arange(N + 1)[None], torch.zeros(1, N + 1, dtype=torch.long),
        torch.tensor([[False] + [True] * N]),
    )
    rows, head = student()
    teacher, (_, _, parts) = member(2, 4), routed()
    split = RoutedOutcomes(tuple((part, teacher.rows(part)) for part in parts))
    for weight in ("top_share", "position"):
        objective = DistributionMatching(token_weight=weight, kd_ratio=1.0, vocabulary_size=V)
        one, two = (objective.total(rows, head, TeacherSignal(outcomes), batch) for outcomes in (teacher, split))
        torch.testing.assert_close(one.total, two.total)
        torch.testing.assert_close(one.by_row, two.by_row)
        torch.testing.assert_close(torch.autograd.grad(one.total, rows), torch.autograd.grad(two.total, rows))


def test_every_row_is_answered_once():
    outcomes, _, _ = routed()
    rows, head = student()
    once = RoutedOutcomes(outcomes.parts[:1])
    twice = RoutedOutcomes((outcomes.parts[0], outcomes.parts[0]))
    for wrong in (once, twice):
        with pytest.raises(IncompatibleError, match="answered by exactly one"):
            fused_loss(rows, head, wrong, TARGETS, vocabulary_size=V)
    empty = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    loss = fused_loss(empty, head, RoutedOutcomes(), TARGETS[:0], vocabulary_size=V)
    assert loss.total.item() == 0
    loss.total.backward()
    none = torch.zeros(0, dtype=torch.long)
    with_empty = RoutedOutcomes((*outcomes.parts, (none, member(4, 5).rows(none))))
    one, other = (fused_loss(rows, head, answer, TARGETS, vocabulary_size=V).total for answer in (with_empty, outcomes))
    torch.testing.assert_close(one, other)

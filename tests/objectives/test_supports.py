"""Sparse teachers: the fixture numbers of each support, its identities, and samples without bias by enumeration."""

import itertools

import pytest
import torch

from potstill.errors import ConfigError, IncompatibleError
from potstill.head import Head
from potstill.objectives.catalogue import check_choice
from potstill.objectives.fused import fused_loss
from potstill.signals import FullOutcomes, MixtureOutcomes, SampledOutcomes, TopKOutcomes

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
IDENTITY = torch.eye(4, dtype=torch.float64)


def loss_of(student_logits, outcomes, support, divergence="forward_kl", **choices):
    """Value and gradient over the student's logits: its head is the identity, so its rows are its logits."""
    rows = student_logits.clone().reshape(-1, student_logits.shape[-1]).requires_grad_()
    head = Head(torch.eye(rows.shape[1], dtype=rows.dtype))
    loss = fused_loss(
        rows, head, outcomes, torch.zeros(len(rows), dtype=torch.long), divergence=divergence, kd_ratio=1.0, support=support, **choices
    )
    return loss.total.item(), torch.autograd.grad(loss.total, rows)[0].squeeze(0)


def record(p=P, ids=(0, 1)) -> TopKOutcomes:
    kept = p[list(ids)]
    return TopKOutcomes(torch.tensor([list(ids)]), kept.log()[None], (1 - kept.sum()).log()[None])


@pytest.mark.parametrize(
    ("support", "divergence", "wanted", "wanted_gradient"),
    [
        ("top_k_tail", "forward_kl", 0.2578973159, (-0.1, -0.2, 0.3 * 0.6, 0.2 * 0.6)),
        ("top_k_tail", "reverse_kl", 0.2590267165, (-0.1928681071, -0.1357639005, 0.1971792046, 0.1314528031)),
        ("top_k_renormalised", "forward_kl", 0.0814406986, (0.4 / 0.5 - 0.5 / 0.8, 0.1 / 0.5 - 0.3 / 0.8, 0.0, 0.0)),
    ],
)
def test_fixture_numbers(support, divergence, wanted, wanted_gradient):
    value, gradient = loss_of(Q.log(), record(), support, divergence)
    assert value == pytest.approx(wanted, abs=2e-10)
    torch.testing.assert_close(gradient, torch.tensor(wanted_gradient, dtype=torch.float64), rtol=0, atol=2e-10)


def test_forward_kl_is_the_tailed_one_and_the_divergence_within_the_tail():
    value, _ = loss_of(Q.log(), record(), "top_k_tail")
    whole, _ = loss_of(Q.log(), FullOutcomes(P.log()[None], Head(IDENTITY)), "full")
    within = 0.2 * sum(a / 0.2 * torch.log((a / 0.2) / (b / 0.5)) for a, b in zip(P[2:], Q[2:], strict=True)).item()
    assert within == pytest.approx(0.0099713512, abs=1e-9)
    assert value + within == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl"])
def test_all_tokens_but_one_kept_is_the_whole_vocabulary(divergence):
    sparse = loss_of(Q.log(), record(ids=(2, 0, 1)), "top_k_tail", divergence)
    dense = loss_of(Q.log(), FullOutcomes(P.log()[None], Head(IDENTITY)), "full", divergence)
    assert sparse[0] == pytest.approx(dense[0], abs=1e-12)
    torch.testing.assert_close(sparse[1], dense[1])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_students_most_likely_tokens_are_those_that_the_teacher_is_asked_for(divergence, temperature):
    """By hand: a record of the teacher at the student's three best ids, and the mass outside them."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 9, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    log_probs, ids = (teacher / temperature).log_softmax(-1), student.topk(3).indices
    kept = log_probs.gather(-1, ids)
    of_teacher = TopKOutcomes(ids, kept, torch.log1p(-kept.exp().sum(-1)), temperature=temperature)
    wanted = loss_of(student, of_teacher, "top_k_tail", divergence, temperature=temperature)
    live = FullOutcomes(teacher, Head(torch.eye(9, dtype=torch.float64)))
    for outcomes in (live, MixtureOutcomes((live, live), (0.5, 0.5))):
        found = loss_of(student, outcomes, "student_top_k_tail", divergence, temperature=temperature, parameters={"top_k": 3})
        assert found[0] == pytest.approx(wanted[0], abs=1e-12)
        torch.testing.assert_close(found[1], wanted[1])
    assert not torch.equal(ids.sort().values, teacher.topk(3).indices.sort().values)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("size", [4, 3, 64])
def test_all_of_the_students_tokens_are_the_whole_vocabulary(divergence, size):
    outcomes = FullOutcomes(P.log()[None], Head(IDENTITY))
    sparse = loss_of(Q.log(), outcomes, "student_top_k_tail", divergence, parameters={"top_k": size})
    dense = loss_of(Q.log(), outcomes, "full", divergence)
    assert sparse[0] == pytest.approx(dense[0], abs=1e-12)
    torch.testing.assert_close(sparse[1], dense[1])


def test_fewer_tokens_of_the_student_see_less_of_reverse_kl_and_their_gradient_is_that_of_the_value():
    outcomes = FullOutcomes(P.log()[None], Head(IDENTITY))
    dense, _ = loss_of(Q.log(), outcomes, "full", "reverse_kl")
    values = [loss_of(Q.log(), outcomes, "student_top_k_tail", "reverse_kl", parameters={"top_k": k})[0] for k in (1, 2, 3)]
    assert 0 < values[0] < values[1] < values[2] == pytest.approx(dense)
    _, gradient = loss_of(Q.log(), outcomes, "student_top_k_tail", "reverse_kl", parameters={"top_k": 2})
    for place in range(4):
        move = 1e-6 * torch.eye(4, dtype=torch.float64)[place]
        up, down = (
            loss_of(Q.log() + sign * move, outcomes, "student_top_k_tail", "reverse_kl", parameters={"top_k": 2})[0] for sign in (1, -1)
        )
        assert gradient[place].item() == pytest.approx((up - down) / 2e-6, abs=1e-8)


def test_one_kept_token_renormalised_is_refused_and_with_its_tail_it_learns():
    with pytest.raises(IncompatibleError, match=r"keeps 1 token a row.*nothing would be learned.*top_k_tail"):
        loss_of(Q.log(), record(ids=(0,)), "top_k_renormalised")
    with pytest.raises(ConfigError, match=r"top_k is 1.*nothing would be learned.*top_k_tail"):
        check_choice("forward_kl", "top_k_renormalised", "none", {"top_k": 1})
    value, gradient = loss_of(Q.log(), record(ids=(0,)), "top_k_tail")
    assert value > 0.01
    assert gradient.abs().max() > 0.01


def test_an_id_that_stands_twice_counts_once():
    once = record()
    twice = TopKOutcomes(torch.tensor([[0, 1, 0]]), torch.cat([once.log_probs, once.log_probs[:, :1]], 1), once.log_tail)
    for support in ("top_k_tail", "top_k_renormalised"):
        for divergence in ("forward_kl", "jsd"):
            one, two = loss_of(Q.log(), once, support, divergence), loss_of(Q.log(), twice, support, divergence)
            assert two[0] == pytest.approx(one[0], abs=1e-12)
            torch.testing.assert_close(two[1], one[1])


@pytest.mark.parametrize("support", ["top_k_tail", "top_k_renormalised"])
def test_a_live_teacher_cut_down_equals_its_record(support):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    log_probs = teacher.log_softmax(-1)
    kept, ids = log_probs.topk(3)
    recorded = loss_of(student, TopKOutcomes(ids, kept, torch.log1p(-kept.exp().sum(-1))), support, "jsd")
    live = loss_of(student, FullOutcomes(teacher, Head(torch.eye(9, dtype=torch.float64))), support, "jsd", parameters={"top_k": 3})
    assert live[0] == pytest.approx(recorded[0], abs=1e-12)
    torch.testing.assert_close(live[1], recorded[1])


def test_a_tiny_tail_is_exact_in_float32():
    """One minus the mass of the kept tokens would be zero here; the tail is summed from what lies outside them."""
    student = torch.tensor([[30.0, 0.0, 0.5, 1.0]])
    teacher = TopKOutcomes(torch.tensor([[0]]), torch.tensor([[-1e-13]]), torch.tensor([-30.0]))
    _, gradient = loss_of(student, teacher, "top_k_tail", "reverse_kl")
    wide = TopKOutcomes(teacher.ids, teacher.log_probs.double(), teacher.log_tail.double())
    _, precise = loss_of(student.double(), wide, "top_k_tail", "reverse_kl")
    torch.testing.assert_close(gradient[1:].double(), precise[1:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kept", [(), (0,), (2, 0)])
@pytest.mark.parametrize("proposal_power", [1.0, 0.5])
def test_samples_are_unbiased_by_enumeration(proposal_power, kept):
    """All draws of two from what is not kept, weighted p / (r n): value and gradient are the dense ones in expectation, exactly.

    Kept tokens stand in the record with their own probability: the exact head and the sampled tail.
    """
    rest = [i for i in range(4) if i not in kept]
    proposal = P[rest] ** proposal_power / (P[rest] ** proposal_power).sum()
    value, gradient = 0.0, torch.zeros(4, dtype=torch.float64)
    for draw in itertools.product(range(len(rest)), repeat=2):
        drawn = [rest[place] for place in draw]
        chances = proposal[list(draw)]
        ids, weights = torch.tensor([[*kept, *drawn]]), torch.cat([P[list(kept)], P[drawn] / (2 * chances)])[None]
        one, slope = loss_of(Q.log(), SampledOutcomes(ids, weights), "samples")
        value, gradient = value + chances.prod().item() * one, gradient + chances.prod().item() * slope
    assert value == pytest.approx(1.4099887101, abs=1e-10)
    torch.testing.assert_close(gradient, Q - P, rtol=0, atol=1e-12)


def test_the_top_kept_exactly_varies_less_than_samples_alone():
    """The spread of the gradient over all draws, with the two likeliest tokens known and without."""

    def variance(kept):
        rest = [i for i in range(4) if i not in kept]
        mass, found = P[rest].sum(), 0.0
        for draw in itertools.product(rest, repeat=2):
            ids = torch.tensor([[*kept, *draw]])
            weights = torch.cat([P[list(kept)], mass.expand(2) / 2])[None]
            _, slope = loss_of(Q.log(), SampledOutcomes(ids, weights), "samples")
            found += (P[list(draw)] / mass).prod().item() * (slope - (Q - P)).square().sum().item()
        return found

    assert 0 < variance((0, 1)) < 0.2 * variance(())


def test_a_sample_of_weight_zero_is_padding():
    padded = SampledOutcomes(torch.tensor([[0, 1, 3]]), torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64))
    plain = SampledOutcomes(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    one, other = loss_of(Q.log(), padded, "samples"), loss_of(Q.log(), plain, "samples")
    assert one[0] == pytest.approx(other[0])
    torch.testing.assert_close(one[1], other[1])


def test_samples_of_a_live_teacher_are_those_of_its_distribution():
    torch.manual_seed(0)
    rows = 4000
    outcomes = FullOutcomes(P.log().expand(rows, 4), Head(IDENTITY))
    student = Q.log().expand(rows, 4)
    total, gradient = loss_of(student, outcomes, "samples", parameters={"num_samples": 8})
    assert total / rows == pytest.approx(1.40998871, abs=0.02)
    torch.testing.assert_close(gradient.mean(0), Q - P, rtol=0, atol=0.02)


def test_what_a_support_cannot_do_is_refused_and_says_what_can():
    with pytest.raises(IncompatibleError, match=r"the teacher answered TopKOutcomes; say objective.support: top_k_tail"):
        loss_of(Q.log(), record(), "full")
    with pytest.raises(IncompatibleError, match=r"'student_top_k_tail' takes FullOutcomes or MixtureOutcomes; the teacher answered TopK"):
        loss_of(Q.log(), record(), "student_top_k_tail")
    with pytest.raises(IncompatibleError, match="top_k_renormalised"):
        loss_of(Q.log(), record(), "top_k_tail", temperature=2.0)
    with pytest.raises(IncompatibleError, match=r"names tokens 0\.\.9"):
        loss_of(Q.log(), TopKOutcomes(torch.tensor([[0, 9]]), torch.zeros(1, 2).double(), torch.zeros(1).double()), "top_k_tail")
    with pytest.raises(IncompatibleError, match=r"made at temperature 1 and holds for no other.*set objective.temperature to 1"):
        loss_of(Q.log(), SampledOutcomes(torch.tensor([[0]]), torch.ones(1, 1).double()), "samples", temperature=2.0)
    with pytest.raises(IncompatibleError, match=r"'position' needs the teacher's probability of each written token.*does not hold it"):
        loss_of(Q.log(), record(), "top_k_tail", token_weight="position")
    for divergence, support, weight, message in (
        ("jsd", "projected", "none", "serves forward_kl alone.*top_k_tail or full"), ("forward_kl", "samples", "position", "top_k_tail"),
        ("forward_kl", "projected", "teacher_entropy", "say none"), ("forward_kl", "samples", "top_share", "top_k_tail"),
        ("dkd", "top_k_tail", "none", "say support: full"), ("jsd", "samples", "none", "say support: top_k_tail"),
        ("jsd", "full", "entropy_gap", "token_weight: none"), ("forward_kl", "samples", "teacher_entropy", "top_k_tail"),
        ("forward_kl", "top_k", "none", "nearest: top_k_tail"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_choice(divergence, support, weight)

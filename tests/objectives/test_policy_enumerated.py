"""Every estimator over tables of a few tokens: its gradient, averaged over all texts exactly, is the analytic one."""

import math
import random

import pytest
import torch

from objectives.enumerated import END, TOKENS, Tables, added, softmax
from potstill.batch import Batch
from potstill.head import Head
from potstill.objectives.policy import PolicyGradient
from potstill.signals import FullOutcomes, TargetOutcomes, TeacherSignal, TopKOutcomes

FAR = 1e9  # a limit that no ratio comes near


def tables(longest=3, drawn=None, seed=0) -> Tables:
    shape = Tables({}, {}, lambda prefix: [1 / 3] * 3, longest)
    draw = random.Random(seed)
    student, teacher = ({p: [draw.gauss(0, 1) for _ in TOKENS] for p in shape.prefixes()} for _ in range(2))
    made = Tables(student, teacher, longest=longest)
    if drawn == "elsewhere":
        other = {p: [draw.gauss(0, 1) for _ in TOKENS] for p in shape.prefixes()}
        return Tables(student, teacher, lambda p: softmax(other[p]), longest)
    if drawn == "teacher_mixed":
        return Tables(
            student, teacher, lambda p: [0.2 * a + 0.8 * b for a, b in zip(softmax(teacher[p]), softmax(student[p]), strict=True)], longest
        )
    return made


def averaged(world: Tables, objective: PolicyGradient, *, reward=None, outcomes="full"):
    """The package's gradient over the student's table, and its value, in expectation over every text that may be drawn."""
    states = {prefix: place for place, prefix in enumerate(world.prefixes())}
    student, teacher = (
        torch.tensor([table[p] for p in states], dtype=torch.float64).T.contiguous() for table in (world.student, world.teacher)
    )
    weight = student.requires_grad_()
    value = 0.0
    gradient = torch.zeros_like(weight)
    for text, chance in world.texts():
        length = len(text)
        drawn = [0.0, *(math.log(world.drawn(text[:i])[text[i]]) for i in range(length))]
        batch = Batch(
            torch.tensor([[0, *text]]), torch.arange(length + 1)[None], torch.zeros(1, length + 1, dtype=torch.long),
            torch.tensor([[False] + [True] * length]), log_probs=torch.tensor([drawn], dtype=torch.float64),
            rewards=None if reward is None else torch.full((1, length + 1), reward(text), dtype=torch.float64),
        )  # fmt: skip
        rows = torch.eye(len(states), dtype=torch.float64)[[states[text[:i]] for i in range(length)]]
        answer = FullOutcomes(rows, Head(teacher))
        log_probs = (rows @ teacher.T).log_softmax(-1)
        at_target = log_probs.gather(-1, torch.tensor(text)[:, None]).squeeze(-1)
        if outcomes == "target":
            answer = TargetOutcomes(at_target)
        elif outcomes == "top_k":
            kept, ids = log_probs.topk(1)
            answer = TopKOutcomes(ids, kept, torch.log1p(-kept.exp().sum(-1)), at_target)
        loss = objective.total(rows, Head(weight), TeacherSignal(answer), batch)
        value += chance * loss.total.item()
        gradient += chance * torch.autograd.grad(loss.total, weight)[0]
    return {prefix: gradient[:, place].tolist() for prefix, place in states.items()}, value


def assert_same(found, wanted, atol=1e-8):
    for prefix, row in wanted.items():
        assert found[prefix] == pytest.approx(row, abs=atol), prefix


def policy(**choices) -> PolicyGradient:
    return PolicyGradient(**{"reduction": "seq_sum", "ratio_limit": FAR, **choices})


def total(ratios):
    return sum(ratios)


def mean(ratios):
    return sum(ratios) / len(ratios) if ratios else 0.0


def discounted(discount):
    """Of what follows a token: the next one counts `discount`, the one after it its square."""
    return lambda ratios: sum(discount ** (place + 1) * x for place, x in enumerate(ratios))


@pytest.mark.parametrize("choices", [{"support": "written"}, {"support": "written", "baseline": "kl"}, {"support": "full"}])
@pytest.mark.parametrize("drawn", [None, "elsewhere", "teacher_mixed"])
def test_tokens_alone_give_the_local_gradient_wherever_they_were_drawn(choices, drawn):
    world = tables(drawn=drawn)
    found, value = averaged(world, policy(**choices))
    assert_same(found, world.local_slopes())
    assert value == pytest.approx(sum(world.visits(p) * world.local(p, world.student[p]) for p in world.prefixes()), abs=1e-9)


def test_without_ratios_text_that_another_drew_gives_another_gradient():
    world = tables(drawn="elsewhere")
    found, _ = averaged(world, policy(support="written", ratio="none"))
    wanted = world.local_slopes()
    assert max(abs(a - b) for p in wanted for a, b in zip(found[p], wanted[p], strict=True)) > 1e-2


@pytest.mark.parametrize(("baseline", "outcomes"), [("none", "full"), ("none", "target"), ("kl", "full")])
def test_the_undiscounted_return_gives_the_gradient_of_the_sequences_divergence(baseline, outcomes):
    world = tables()
    found, _ = averaged(world, policy(support="written", future="discounted", baseline=baseline), outcomes=outcomes)
    assert_same(found, world.sequence_slopes(world.sequence_reverse_kl))


def test_the_local_term_in_closed_form_and_the_return_give_it_as_well():
    world = tables()
    found, _ = averaged(world, policy(support="full", future="discounted"))
    assert_same(found, world.sequence_slopes(world.sequence_reverse_kl))


@pytest.mark.parametrize("support", ["full", "written"])
@pytest.mark.parametrize("drawn", [None, "elsewhere", "teacher_mixed"])
@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_a_discounted_return(support, drawn, discount):
    world = tables(drawn=drawn)
    found, _ = averaged(world, policy(support=support, future="discounted", discount=discount))
    assert_same(found, added(world.local_slopes(), world.return_slopes(discounted(discount))))


@pytest.mark.parametrize("drawn", [None, "elsewhere", "teacher_mixed"])
def test_minillm(drawn):
    """The single step in closed form, the rest by the mean of what follows; teacher-mixed text with its weights."""
    world = tables(drawn=drawn)
    found, _ = averaged(world, policy(support="full", future="mean"))
    assert_same(found, added(world.local_slopes(), world.return_slopes(mean)))


def test_minillm_on_one_kept_token_credits_with_the_recorded_targets():
    """A record of the teacher's most likely token and the written one: the return is exact, the local term is on the coarser outcomes."""
    world = tables()
    parameters = {"parameters": {"top_k": 1}, "support": "top_k_tail"}
    with_return, _ = averaged(world, policy(future="mean", **parameters), outcomes="top_k")
    without, _ = averaged(world, policy(**parameters), outcomes="top_k")
    for prefix, wanted in world.return_slopes(mean).items():
        assert [a - b for a, b in zip(with_return[prefix], without[prefix], strict=True)] == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("support", ["full", "written"])
def test_a_reward_beside_the_divergence(support):
    world = tables()

    def reward(text):
        return 1.0 if text[-1] == END and 1 in text else -0.25

    found, _ = averaged(world, policy(support=support, reward_weight=0.7), reward=reward)
    of_reward = world.sequence_slopes(lambda text, student: -0.7 * reward(text))
    assert_same(found, added(world.local_slopes(), of_reward))
    weighed, _ = averaged(world, policy(support=support, reward_weight=0.7, kd_weight=0.3), reward=reward)
    assert_same(weighed, added({p: [0.3 * x for x in row] for p, row in world.local_slopes().items()}, of_reward))


@pytest.mark.parametrize("choices", [{"support": "full", "future": "mean"}, {"support": "written", "future": "discounted"}])
def test_a_student_that_is_the_teacher_gets_no_gradient_from_any_text(choices):
    world = tables()
    equal = Tables(world.student, world.student)
    found, value = averaged(equal, policy(**choices))
    assert max(abs(x) for row in found.values() for x in row) < 1e-15
    assert value == pytest.approx(0, abs=1e-15)


def two_steps() -> Tables:
    """Two binary steps; the third token never comes."""

    def row(one):
        return [math.log(1 - one), math.log(one), -60.0]

    student = {(): row(0.6), (0,): row(0.3), (1,): row(0.8)}
    teacher = {(): row(0.5), (0,): row(0.4), (1,): row(0.9)}
    return Tables(student, teacher, longest=2)


def test_the_fixture_of_two_binary_steps():
    world = two_steps()
    kl = sum(chance * world.sequence_reverse_kl(text, world.student) for text, chance in world.texts())
    assert kl == pytest.approx(0.0554176598, abs=1e-9)
    at_start = {
        name: averaged(world, policy(**choices))[0][()][1]
        for name, choices in {
            "local": {}, "written": {"support": "written"}, "sequence": {"future": "discounted"}, "minillm": {"future": "mean"},
            "all written": {"support": "written", "future": "discounted"},
        }.items()
    }
    assert at_start["local"] == pytest.approx(0.0973116259, abs=1e-9)
    assert at_start["written"] == pytest.approx(0.0973116259, abs=1e-9)
    # With one token left its mean is its sum.
    for name in ("sequence", "minillm", "all written"):
        assert at_start[name] == pytest.approx(0.1027841428, abs=1e-9), name
    # Counting the token's own ratio in the return as well, as a public code does, would be this.
    assert 2 * at_start["local"] + 0.0054725168 == pytest.approx(0.2000957687, abs=1e-9)
    assert abs(at_start["minillm"] - 0.2000957687) > 0.09


def test_the_baseline_lowers_the_spread_and_leaves_the_mean():
    """The fixture of one position: the trace of a single sample's covariance, 0.4655 without and 0.3915 with the local KL."""
    student, teacher = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    rows = torch.ones(1, 1, dtype=torch.float64)
    spread = {}
    for baseline in ("none", "kl"):
        objective = policy(support="written", baseline=baseline)
        slopes = []
        for token in range(4):
            weight = student.log()[:, None].requires_grad_()
            batch = Batch(
                torch.tensor([[0, token]]), torch.arange(2)[None], torch.zeros(1, 2, dtype=torch.long), torch.tensor([[False, True]]),
                log_probs=torch.tensor([[0.0, student[token].log().item()]], dtype=torch.float64),
            )
            signal = TeacherSignal(FullOutcomes(rows, Head(teacher.log()[:, None])))
            slopes.append(torch.autograd.grad(objective.total(rows, Head(weight), signal, batch).total, weight)[0].squeeze(-1))
        mean = sum(chance * slope for chance, slope in zip(student, slopes, strict=True))
        expected = torch.tensor([-0.2036911713, -0.1384696666, 0.1221188411, 0.2200419968], dtype=torch.float64)
        torch.testing.assert_close(mean, expected, atol=1e-9, rtol=0)
        spread[baseline] = sum(chance * (slope - mean).square().sum() for chance, slope in zip(student, slopes, strict=True)).item()
    assert spread["none"] == pytest.approx(0.4655, abs=5e-5)
    assert spread["kl"] == pytest.approx(0.3915, abs=5e-5)

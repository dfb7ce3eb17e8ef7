"""Policy gradients over a batch: equality with autograd of the written-out sum, what is constant, ratios, returns, refusals."""

import math

import pytest
import torch

from potstill.batch import Batch, Example
from potstill.data.collation import collate
from potstill.errors import ConfigError, IncompatibleError
from potstill.head import Head
from potstill.objectives import DIVERGENCES
from potstill.objectives.credit import credited, following, importance
from potstill.objectives.distribution import DistributionMatching
from potstill.objectives.execution import Execution
from potstill.objectives.policy import PolicyGradient
from potstill.objectives.targets import teacher_log_probs
from potstill.signals import (
    FullOutcomes,
    MixtureOutcomes,
    Needs,
    RoutedOutcomes,
    SampledOutcomes,
    TargetOutcomes,
    TeacherSignal,
    TopKOutcomes,
)  # fmt: skip

B, T, V, D, E = 3, 8, 12, 6, 5
LIMIT = 1.4
CHOICES = [
    {"support": "written"}, {"support": "written", "baseline": "kl"}, {"support": "written", "token_weight": "position"},
    {"support": "written", "baseline": "kl", "token_weight": "position", "future": "mean"}, {"future": "mean"},
    {"future": "discounted", "discount": 0.8, "reduction": "seq_mean"}, {"future": "mean", "token_weight": "top_share"},
    {"reward_weight": 0.6, "divergence": "jsd", "token_weight": "teacher_entropy"}, {"kd_weight": 0.0, "reward_weight": 1.0},
    {"support": "written", "future": "discounted", "reward_weight": 0.5, "kd_weight": 2.0, "reduction": "seq_sum"},
    {"divergence": "skew_reverse_kl", "ratio": "mask"}, {"support": "written", "ratio": "mask"}, {"support": "written", "ratio": "clip"},
    {"future": "mean", "ratio": "clip"}, {"support": "written", "ratio": "none"}, {"row_cap": 0.7, "future": "mean"},
    {"row_cap": 0.9, "token_weight": "teacher_entropy", "reward_weight": 0.3},
]
EACH = pytest.mark.parametrize("choices", CHOICES, ids=lambda c: "-".join(str(v) for v in c.values()))


def make_batch(**changes) -> Batch:
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 8, [0] * 5 + [-1] * 3, [0] * 7 + [-1]])
    is_target = torch.arange(T).expand(B, T) >= torch.tensor([[3], [2], [4]])
    log_probs = torch.randn(B, T, generator=generator, dtype=torch.float64) * 0.3 - 2.5
    rewards = torch.tensor([[0.5], [-1.0], [0.25]], dtype=torch.float64).expand(B, T)
    parts = {"is_target": is_target, "log_probs": log_probs, "rewards": rewards} | changes
    return Batch(torch.randint(0, V, (B, T), generator=generator), torch.arange(T).expand(B, T), documents, **parts)


BATCH = make_batch()
N, TARGETS, RESPONSES = BATCH.num_targets, BATCH.target_rows()[1], BATCH.target_responses()


def setting():
    generator = torch.Generator().manual_seed(1)
    rows, weight, hidden, teacher_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (V, D), (N, E), (V, E))
    )
    return rows.requires_grad_(), weight.requires_grad_(), FullOutcomes(hidden, Head(teacher_weight * 0.4))


def written_out(rows, weight, outcomes, *, divergence="reverse_kl", support="full", token_weight="none", kd_weight=1.0,
                reduction="token_mean", baseline="none", future="none", discount=1.0, ratio="truncate", reward_weight=0.0,
                row_cap=None):  # fmt: skip
    """(the sum whose gradient is meant, the value that is told), row by row in plain loops over whole logits."""
    student, teacher = (rows @ weight.T).log_softmax(-1), (outcomes.hidden @ outcomes.head.weight.T).log_softmax(-1)
    distances, kl = DIVERGENCES[divergence](student, teacher), DIVERGENCES["reverse_kl"](student, teacher).detach()
    own = student[torch.arange(N), TARGETS]
    gaps = (teacher[torch.arange(N), TARGETS] - own).detach()
    drawn, rewards = BATCH.at_targets(BATCH.log_probs), BATCH.at_targets(BATCH.rewards)
    meant, told = 0.0, 0.0
    for t in range(N):
        mine = [s for s in range(N) if RESPONSES[s] == RESPONSES[t]]
        later = [gaps[s].item() for s in mine if s > t]
        rho = math.exp(own[t].item() - drawn[t].item())
        of_position = 1.0
        if token_weight == "position":
            of_position = 1 + 0.5 * (1 - sum(abs(gaps[s]) for s in mine if s < t) / sum(abs(gaps[s]) for s in mine))
        elif token_weight == "top_share":
            of_position = float(sum(distances[s] > distances[t] for s in mine) < math.ceil(0.5 * len(mine)))
        elif token_weight == "teacher_entropy":
            of_position = (-(teacher[t].exp() * teacher[t]).sum() / math.log(V)).item()
        if row_cap is not None:
            of_position = of_position * min(1.0, row_cap / distances[t].item())
        advantage = reward_weight * rewards[t].item()
        if support == "written":
            advantage += kd_weight * of_position * (gaps[t].item() + (kl[t].item() if baseline == "kl" else 0.0))
        if future == "mean" and later:
            advantage += kd_weight * sum(later) / len(later)
        if future == "discounted":
            advantage += kd_weight * sum(discount ** (place + 1) * gap for place, gap in enumerate(later))
        low, high = 1 / LIMIT, LIMIT
        weights = {"none": 1.0, "truncate": min(rho, high), "mask": rho if low <= rho <= high else 0.0, "clip": min(max(rho, low), high)}
        coefficient = weights[ratio] * advantage
        if ratio == "clip":
            coefficient = 0.0 if (advantage > 0 and rho > high) or (advantage < 0 and rho < low) else rho * advantage
        scale = 1 / len(mine) if reduction == "seq_mean" else 1.0
        meant = meant + scale * coefficient * -own[t]
        if support == "written":
            of_estimate = min(rho, high) if ratio == "clip" else weights[ratio]
            told += scale * kd_weight * of_estimate * (math.exp(gaps[t]) - 1 - gaps[t].item())
        else:
            meant = meant + scale * kd_weight * weights[ratio] * of_position * distances[t]
            told += scale * kd_weight * weights[ratio] * of_position * distances[t].item()
    return meant, told


def made(**choices) -> PolicyGradient:
    return PolicyGradient(ratio_limit=LIMIT, execution=Execution(group_rows=4, slice_rows=3, block_rows=2), **choices)


def gradients(total, *tensors):
    return torch.autograd.grad(total, tensors)


@EACH
def test_value_and_gradient_are_those_of_the_sum_written_out(choices):
    rows, weight, outcomes = setting()
    loss = made(**choices).total(rows, Head(weight), TeacherSignal(outcomes), BATCH)
    meant, told = written_out(rows, weight, outcomes, **choices)
    close = 1e-7 if choices.get("reduction") == "seq_mean" else 1e-11  # one over a length is a float32
    assert loss.total.item() == pytest.approx(told, rel=close)
    torch.testing.assert_close(gradients(loss.total, rows, weight), gradients(meant, rows, weight), rtol=close, atol=close)


@EACH
def test_chunked_is_whole_and_the_value_needs_no_gradient(choices):
    rows, weight, outcomes = setting()
    whole = PolicyGradient(ratio_limit=LIMIT, execution=Execution(group_rows=99, slice_rows=99, block_rows=99), **choices)
    losses = [objective.total(rows, Head(weight), TeacherSignal(outcomes), BATCH) for objective in (made(**choices), whole)]
    torch.testing.assert_close(losses[0].total, losses[1].total)
    torch.testing.assert_close(gradients(losses[0].total, rows, weight), gradients(losses[1].total, rows, weight))
    with torch.no_grad():
        still = whole.eval().total(rows, Head(weight), TeacherSignal(outcomes), BATCH)
    torch.testing.assert_close(still.total, losses[1].total.detach())


def answers(outcomes: FullOutcomes) -> dict:
    """The same teacher's answer in every form that tells of the written token."""
    log_probs = outcomes.head.logits(outcomes.hidden).log_softmax(-1)
    at_target = log_probs.gather(-1, TARGETS[:, None]).squeeze(-1)
    kept, ids = log_probs.topk(3)
    even, odd = torch.arange(0, N, 2), torch.arange(1, N, 2)
    other = FullOutcomes(outcomes.hidden.flip(0), outcomes.head)
    return {
        "full": outcomes, "target": TargetOutcomes(at_target),
        "top_k": TopKOutcomes(ids, kept, torch.log1p(-kept.exp().sum(-1)), at_target),
        "mixture": MixtureOutcomes((outcomes, other), (1.0, 0.0)),
        "routed": RoutedOutcomes(((odd, outcomes.rows(odd)), (even, TargetOutcomes(at_target[even])))),
    }


def test_every_answer_that_tells_of_the_token_gives_the_same():
    rows, weight, outcomes = setting()
    objective = made(support="written", future="discounted", discount=0.7)
    found = {}
    for name, answer in answers(outcomes).items():
        loss = objective.total(rows, Head(weight), TeacherSignal(answer), BATCH)
        found[name] = (loss.total.detach(), *gradients(loss.total, rows, weight))
    for name, values in found.items():
        torch.testing.assert_close(values, found["full"], msg=name)


def test_a_mixture_of_teachers_is_the_mean_of_their_probabilities():
    _, weight, outcomes = setting()
    other = FullOutcomes(outcomes.hidden.flip(0), outcomes.head)
    mixed = teacher_log_probs(MixtureOutcomes((outcomes, other), (0.3, 0.7)), TARGETS, Head(weight))
    probs = [one.head.logits(one.hidden).softmax(-1)[torch.arange(N), TARGETS] for one in (outcomes, other)]
    torch.testing.assert_close(mixed, (0.3 * probs[0] + 0.7 * probs[1]).log())


@pytest.mark.parametrize("choices", [{"future": "mean"}, {"divergence": "jsd", "reward_weight": 0.5}])
def test_rows_of_several_teachers_are_weighed_each_by_its_own(choices):
    rows, weight, outcomes = setting()
    even, odd = torch.arange(0, N, 2), torch.arange(1, N, 2)
    losses = [
        made(**choices).total(rows, Head(weight), TeacherSignal(answer), BATCH)
        for answer in (outcomes, RoutedOutcomes(((odd, outcomes.rows(odd)), (even, outcomes.rows(even)))))
    ]
    torch.testing.assert_close(losses[0].total, losses[1].total)
    torch.testing.assert_close(gradients(losses[0].total, rows, weight), gradients(losses[1].total, rows, weight))


def test_fresh_text_of_the_student_alone_is_the_plain_divergence():
    rows, weight, outcomes = setting()
    own = (rows @ weight.T).log_softmax(-1)[torch.arange(N), TARGETS].detach()
    laid_out = torch.zeros(B * T, dtype=torch.float64).index_copy(0, BATCH.target_rows()[0] + 1, own).reshape(B, T)
    loss = made().total(rows, Head(weight), TeacherSignal(outcomes), make_batch(log_probs=laid_out))
    plain = DistributionMatching(divergence="reverse_kl", kd_ratio=1.0).total(rows, Head(weight), TeacherSignal(outcomes), BATCH)
    torch.testing.assert_close(loss.total, plain.total)
    torch.testing.assert_close(gradients(loss.total, rows, weight), gradients(plain.total, rows, weight))


@pytest.mark.parametrize("choices", [{"support": "written", "baseline": "kl"}, {"future": "mean"}, {"support": "student_top_k_tail"}])
def test_a_student_that_is_the_teacher_learns_nothing(choices):
    rows, weight, _ = setting()
    outcomes = FullOutcomes(rows.detach(), Head(weight.detach()))
    loss = made(**choices).total(rows, Head(weight), TeacherSignal(outcomes), BATCH)
    assert abs(loss.total.item()) < 1e-14
    assert max(float(g.abs().max()) for g in gradients(loss.total, rows, weight)) < 1e-14


def test_what_follows_is_of_the_same_response_alone():
    values, responses = torch.tensor([1.0, -2.0, 3.0, 0.0, 5.0, 7.0]).double(), torch.tensor([4, 4, 4, 4, 9, 9])
    # The numbers of MiniLLM's length normalisation: rewards (1, -2, 3, 0).
    assert following("mean", 1.0, values, responses).tolist() == pytest.approx([1 / 3, 1.5, 0.0, 0.0, 7.0, 0.0])
    assert following("discounted", 1.0, values, responses).tolist() == [1.0, 3.0, 0.0, 0.0, 7.0, 0.0]
    assert following("discounted", 0.5, values, responses).tolist() == [-0.25, 1.5, 0.0, 0.0, 3.5, 0.0]
    assert following("none", 0.5, values, responses).tolist() == [0.0] * 6
    long = torch.ones(5000, dtype=torch.float64)
    found = following("discounted", 0.9, long, torch.zeros(5000, dtype=torch.long))
    assert found[0].item() == pytest.approx(9.0)
    assert found.isfinite().all()


def test_ratios():
    ratio = torch.tensor([0.1, 0.6, 1.0, 1.9, 30.0]).double()
    assert importance("none", 2.0, ratio.log()).tolist() == [1.0] * 5
    assert importance("truncate", 2.0, ratio.log()).tolist() == pytest.approx([0.1, 0.6, 1.0, 1.9, 2.0])
    assert importance("mask", 2.0, ratio.log()).tolist() == pytest.approx([0.0, 0.6, 1.0, 1.9, 0.0])
    assert importance("clip", 2.0, ratio.log()).tolist() == pytest.approx([0.5, 0.6, 1.0, 1.9, 2.0])
    ones = torch.ones(5).double()
    assert credited("clip", 2.0, ratio.log(), ones).tolist() == pytest.approx([0.1, 0.6, 1.0, 1.9, 0.0])
    assert credited("clip", 2.0, ratio.log(), -ones).tolist() == pytest.approx([0.0, -0.6, -1.0, -1.9, -30.0])


def test_k3_is_told_and_not_differentiated():
    """Differentiating k3 would train forward KL: its slope over the logits is (e^l - 1) (q - onehot), ours -l (q - onehot)."""
    rows, weight, outcomes = setting()
    loss = made(support="written", ratio="none").total(rows, Head(weight), TeacherSignal(outcomes), BATCH)
    gap = loss.by_row["log_ratio"]
    assert loss.divergence.item() == pytest.approx((gap.exp() - 1 - gap).sum().item())
    probs = (rows @ weight.T).softmax(-1).detach()
    over_logits = gap[:, None] * (probs - torch.nn.functional.one_hot(TARGETS, V))
    torch.testing.assert_close(gradients(loss.total, rows)[0], over_logits @ weight.detach())


def test_a_batch_without_targets_keeps_the_graph():
    weight = setting()[1]
    rows, batch = torch.zeros(0, D, dtype=torch.float64, requires_grad=True), make_batch(is_target=torch.zeros(B, T, dtype=torch.bool))
    for answer, choices in (
        (FullOutcomes(torch.zeros(0, E).double(), Head(torch.zeros(V, E).double())), {"future": "mean"}),
        (TargetOutcomes(torch.zeros(0).double()), {"support": "written"}),
    ):
        loss = made(**choices).total(rows, Head(weight), TeacherSignal(answer), batch)
        assert loss.total.item() == 0
        assert gradients(loss.total, weight)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("choices", "needs"),
    [
        ({"support": "written"}, Needs("target", temperature=1.0)), ({"support": "written", "baseline": "kl"}, Needs("full")),
        ({"future": "mean"}, Needs("full")), ({"support": "student_top_k_tail", "parameters": {"top_k": 8}}, Needs("full")),
        ({"support": "top_k_tail", "parameters": {"top_k": 8}}, Needs("top_k", 8, 1.0)),
    ],
)
def test_what_is_asked_of_the_teacher(choices, needs):
    assert PolicyGradient(**choices).needs == needs


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"support": "written", "divergence": "jsd"}, "estimate reverse_kl alone; found jsd"),
        ({"support": "written", "token_weight": "teacher_entropy"}, "found support written; say token_weight: none"),
        ({"baseline": "kl"}, "found support 'full'.*say support: written"),
        ({"future": "all"}, "one of none, discounted, mean; found 'all'"),
        ({"future": "mean", "divergence": "forward_kl"}, "say divergence: reverse_kl, or future: none"),
        ({"divergence": "forward_kl", "support": "samples", "future": "mean"}, "future"),
        ({"temperature": 2.0}, "at temperature 1; found 2"),
        ({"support": "written", "row_cap": 0.5}, "closed form; found support 'written'"),
        ({"ratio": "drop"}, "policy.ratio is one of"), ({"ratio_limit": 1.0}, "ratio_limit above 1"), ({"discount": 0.0}, r"in \(0, 1\]"),
    ],
)
def test_choices_without_a_meaning_are_refused(choices, said):
    with pytest.raises(ConfigError, match=said):
        PolicyGradient(**choices)


def test_text_that_cannot_be_credited_is_refused():
    rows, weight, outcomes = setting()
    signal = TeacherSignal(outcomes)
    with pytest.raises(IncompatibleError, match="without the log-probabilities that it was drawn with"):
        made(support="written").total(rows, Head(weight), signal, make_batch(log_probs=None))
    with pytest.raises(IncompatibleError, match=r"rollouts.reward: this text has no rewards"):
        made(reward_weight=1.0).total(rows, Head(weight), signal, make_batch(rewards=None))
    assert made(support="written").eval().total(rows, Head(weight), signal, make_batch(log_probs=None)).total.isfinite()
    with pytest.raises(IncompatibleError, match="needs the teacher's target outcomes; found none"):
        made(support="written").total(rows, Head(weight), TeacherSignal(), BATCH)
    sampled = SampledOutcomes(TARGETS[:, None], torch.ones(N, 1).double())
    with pytest.raises(IncompatibleError, match="SampledOutcomes, does not hold it"):
        made(support="written").total(rows, Head(weight), TeacherSignal(sampled), BATCH)
    with pytest.raises(IncompatibleError, match="at temperature 1; this answer knows it at 2"):
        made(support="written").total(rows, Head(weight), TeacherSignal(TargetOutcomes(torch.zeros(N), 2.0)), BATCH)
    with pytest.raises(IncompatibleError, match="answered 3 rows"):
        made(support="written").total(rows, Head(weight), TeacherSignal(TargetOutcomes(torch.zeros(3))), BATCH)
    with pytest.raises(ConfigError, match="use PolicyGradient"):
        DistributionMatching(divergence="reverse_kl", support="written")


def test_a_token_that_the_student_would_never_have_drawn_does_not_make_the_loss_infinite():
    """From text of another, or older text: its ratio is 0 in float32, and so is its credit."""
    weight = torch.tensor([[0.0], [-100.0], [0.0]], requires_grad=True)
    batch = collate([[Example([0, 1], [False, True], 0, log_probs=[0.0, -1.6])]], pad_token=0)
    signal = TeacherSignal(TargetOutcomes(torch.tensor([-0.1])))
    loss = PolicyGradient(support="written").total(torch.tensor([[1.0]]), Head(weight), signal, batch)
    assert torch.isfinite(loss.total)
    loss.total.backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-30

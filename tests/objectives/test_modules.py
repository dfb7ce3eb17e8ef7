"""The two objectives over a batch: totals and counts, what they need, reductions and token weights."""

import math
import subprocess
import sys

import pytest
import torch

from potstill.batch import Batch
from potstill.errors import ConfigError, IncompatibleError
from potstill.head import Head
from potstill.objectives import DIVERGENCES
from potstill.objectives.catalogue import REDUCTIONS, SUPPORTS, TOKEN_WEIGHTS, check_choice
from potstill.objectives.distribution import DistributionMatching
from potstill.objectives.execution import Execution
from potstill.objectives.fused import run_plan
from potstill.objectives.likelihood import Likelihood
from potstill.objectives.plan import make_plan
from potstill.objectives.weights import sequence_weight
from potstill.signals import FullOutcomes, Needs, Offers, TeacherSignal

B, T, V, D, E = 3, 9, 12, 6, 5


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2, [0] * 9])
    return Batch(
        torch.randint(0, V, (B, T), generator=generator), torch.arange(T).expand(B, T), documents,
        torch.rand(B, T, generator=generator) > 0.3,
    )


BATCH = make_batch()
N = BATCH.num_targets
TARGETS, RESPONSES = BATCH.target_rows()[1], BATCH.target_responses()


def setting():
    generator = torch.Generator().manual_seed(1)
    rows, weight, hidden, teacher_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (V, D), (N, E), (V, E))
    )
    signal = TeacherSignal(FullOutcomes(hidden, Head(teacher_weight)))
    student, teacher = (rows @ weight.T).log_softmax(-1), (hidden @ teacher_weight.T).log_softmax(-1)
    return rows.requires_grad_(), Head(weight), signal, student, teacher


def total_of(**choices):
    rows, head, signal, _, _ = setting()
    objective = DistributionMatching(execution=Execution(group_rows=4, slice_rows=3, block_rows=2), **choices)
    return objective.total(rows, head, signal, BATCH), objective.count(BATCH)


def test_likelihood_is_the_mean_cross_entropy():
    rows, head, _, student, _ = setting()
    objective = Likelihood()
    loss = objective.total(rows, head, None, BATCH)
    wanted = torch.nn.functional.cross_entropy(student, TARGETS)
    torch.testing.assert_close(loss.total / objective.count(BATCH), wanted)
    assert objective.needs == Needs("nothing")
    assert loss.divergence.item() == 0
    (gradient,) = torch.autograd.grad(loss.total, rows)
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(head.logits(rows), TARGETS, reduction="sum"), rows)
    torch.testing.assert_close(gradient, slope)


def test_a_mean_over_responses_is_a_mean_of_means():
    loss, count = total_of(kd_ratio=1.0, reduction="seq_mean")
    _, _, _, student, teacher = setting()
    by_row = DIVERGENCES["forward_kl"](student, teacher)
    means = [by_row[response == RESPONSES].mean() for response in RESPONSES.unique()]
    assert count == len(means) == BATCH.num_responses
    torch.testing.assert_close(loss.total / count, torch.stack(means).mean())
    assert not torch.isclose(loss.total / count, by_row.mean())


def test_a_mean_over_sums_of_responses():
    loss, count = total_of(kd_ratio=1.0, reduction="seq_sum")
    _, _, _, student, teacher = setting()
    by_row = DIVERGENCES["forward_kl"](student, teacher)
    sums = [by_row[response == RESPONSES].sum() for response in RESPONSES.unique()]
    assert count == len(sums) == BATCH.num_responses
    torch.testing.assert_close(loss.total / count, torch.stack(sums).mean())


def test_a_total_is_a_sum_so_any_split_of_the_rows_adds_up():
    rows, head, signal, _, _ = setting()
    plan = make_plan(
        "jsd", None, kd_ratio=0.4, temperature=1.0, scale_by_temperature_squared=None, support="full", token_weight="none"
    )
    whole = run_plan(plan, rows, head, signal.outcomes, TARGETS)
    wanted = torch.autograd.grad(whole.total / N, rows)[0]
    parts = [run_plan(plan, rows[part], head, signal.outcomes.rows(part), TARGETS[part]) for part in (slice(0, 3), slice(3, None))]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    torch.testing.assert_close(torch.autograd.grad(sum(part.total for part in parts) / N, rows)[0], wanted)


@pytest.mark.parametrize(
    ("choice", "divergence", "kd_ratio", "temperature", "wanted"),
    [
        (None, "forward_kl", 0.5, 2.0, True), (None, "forward_kl", 1.0, 2.0, False), (None, "jsd", 0.5, 2.0, False),
        (None, "forward_kl", 0.5, 1.0, False), (True, "jsd", 1.0, 2.0, True), (False, "forward_kl", 0.5, 2.0, False),
    ],
)
def test_where_the_squared_temperature_is_the_default(choice, divergence, kd_ratio, temperature, wanted):
    plan = make_plan(
        divergence, None, kd_ratio=kd_ratio, temperature=temperature, scale_by_temperature_squared=choice, support="full",
        token_weight="none",
    )
    assert plan.squared is wanted


def entropy(log_probs):
    return -(log_probs.exp() * log_probs).sum(-1)


def expected_weight(name, student, teacher):
    if name == "teacher_entropy":
        return entropy(teacher) / math.log(V)
    if name == "student_entropy":
        return entropy(student) / math.log(V)
    if name == "teacher_confidence":
        return (teacher.exp().max(-1).values >= 0.5).double()
    if name == "entropy_gap":
        return torch.where(entropy(teacher) > entropy(student), 3.0, 1.0).double()
    by_row = DIVERGENCES["forward_kl"](student, teacher)
    gap = (teacher.gather(-1, TARGETS[:, None]) - student.gather(-1, TARGETS[:, None])).abs().squeeze(-1)
    weights = torch.zeros(N, dtype=torch.float64)
    for response in RESPONSES.unique():
        places = (response == RESPONSES).nonzero().squeeze(-1)
        if name == "position":
            for order, place in enumerate(places):
                weights[place] = 1 + 0.5 * (1 - gap[places[:order]].sum() / gap[places].sum())
        else:
            keep = math.ceil(0.5 * len(places))
            weights[places[by_row[places].argsort(descending=True)[:keep]]] = 1.0
    return weights


@pytest.mark.parametrize("name", [name for name in TOKEN_WEIGHTS if name != "none"])
def test_a_token_weight_multiplies_the_divergence_of_its_row_and_is_constant(name):
    rows, head, signal, student, teacher = setting()
    loss, count = total_of(token_weight=name, kd_ratio=0.6)
    assert count == N
    weight = expected_weight(name, student, teacher)
    torch.testing.assert_close(loss.by_row["token_weight"], weight)
    assert weight.min() + weight.max() > 0
    assert weight.min() < weight.max()
    log_probs = head.logits(rows).log_softmax(-1)
    by_row = DIVERGENCES["forward_kl"](log_probs, teacher)
    whole = 0.6 * (weight * by_row).sum() + 0.4 * torch.nn.functional.cross_entropy(log_probs, TARGETS, reduction="sum")
    torch.testing.assert_close(loss.total, whole)
    objective = DistributionMatching(token_weight=name, kd_ratio=0.6)
    found = torch.autograd.grad(objective.total(rows, head, signal, BATCH).total, rows)
    torch.testing.assert_close(found, torch.autograd.grad(whole, rows))


@pytest.mark.parametrize(
    "choices",
    [
        {}, {"token_weight": "teacher_entropy"}, {"support": "top_k_tail", "parameters": {"top_k": 3}}, {"token_weight": "position"},
        {"divergence": "reverse_kl", "support": "student_top_k_tail", "parameters": {"top_k": 3}, "temperature": 2.0},
    ],
)
def test_a_capped_row_counts_the_cap_and_keeps_its_direction(choices):
    """The constant min(1, cap / D) on top of whatever weighs the row, so that every row's gradient is a multiple of its own."""
    rows, head, signal, _, _ = setting()
    plain = DistributionMatching(kd_ratio=1.0, **choices).total(rows, head, signal, BATCH)
    slopes = torch.autograd.grad(plain.total, rows)[0]
    divergence = plain.by_row["divergence"]
    cap = divergence.median().item()
    objective = DistributionMatching(kd_ratio=1.0, row_cap=cap, execution=Execution(group_rows=4, slice_rows=3, block_rows=2), **choices)
    capped = objective.total(rows, head, signal, BATCH)
    weight = (cap / divergence).clamp(max=1.0)
    assert 0 < (weight < 1).sum() < N
    torch.testing.assert_close(torch.autograd.grad(capped.total, rows)[0], slopes * weight[:, None])
    torch.testing.assert_close((capped.by_row["divergence"], capped.divergence), (divergence, plain.divergence))
    of_token = plain.by_row.get("token_weight", torch.ones_like(divergence))
    torch.testing.assert_close(capped.total, (of_token * divergence.clamp(max=cap)).sum())
    equal = DistributionMatching(kd_ratio=1.0, row_cap=1e-9).total(
        rows, head, TeacherSignal(FullOutcomes(rows.detach(), head)), BATCH
    )
    assert torch.autograd.grad(equal.total, rows)[0].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"row_cap": 0.0}, "above 0; found 0"), ({"row_cap": 0.1, "support": "samples"}, "closed form; found support 'samples'"),
        ({"row_cap": 0.1, "support": "projected"}, "support 'projected'"),
        ({"row_cap": 0.1, "divergence": "cross_entropy"}, "found cross_entropy, which is no divergence"),
    ],
)
def test_a_cap_without_a_meaning_is_refused(choices, said):
    with pytest.raises(ConfigError, match=said):
        DistributionMatching(**choices)


def test_entropy_gap_weighs_the_two_directions_of_mixed_kl_apart():
    rows, head, signal, student, teacher = setting()
    loss, _ = total_of(divergence="mixed_kl", parameters={"forward_weight": 0.3}, token_weight="entropy_gap", kd_ratio=1.0)
    gap = entropy(teacher) - entropy(student)
    forward, reverse = torch.where(gap > 0, 3.0, 1.0), torch.where(gap < 0, 3.0, 1.0)
    log_probs = head.logits(rows).log_softmax(-1)
    sides = DIVERGENCES["forward_kl"](log_probs, teacher), DIVERGENCES["reverse_kl"](log_probs, teacher)
    whole = (0.3 * forward * sides[0] + 0.7 * reverse * sides[1]).sum()
    torch.testing.assert_close(loss.total, whole)
    objective = DistributionMatching(divergence="mixed_kl", parameters={"forward_weight": 0.3}, token_weight="entropy_gap", kd_ratio=1.0)
    found = torch.autograd.grad(objective.total(rows, head, signal, BATCH).total, rows)
    torch.testing.assert_close(found, torch.autograd.grad(whole, rows))


def test_weights_within_a_response_do_not_depend_on_the_others():
    divergence = torch.tensor([1.0, 5.0, 2.0, 9.0, 8.0, 7.0])
    one = sequence_weight("top_share", {"share": 0.4}, torch.tensor([4, 4, 4, 9, 9, 9]), divergence, divergence)
    assert one.tolist() == [0, 1, 1, 1, 1, 0]
    alone = sequence_weight("position", {"position_gain": 1.0}, torch.tensor([4, 4, 4]), divergence[:3], divergence[:3])
    both = sequence_weight("position", {"position_gain": 1.0}, torch.tensor([4, 4, 4, 9, 9, 9]), divergence, divergence)
    torch.testing.assert_close(both[:3], alone)
    torch.testing.assert_close(alone, torch.tensor([2.0, 2 - 1 / 8, 2 - 6 / 8]))


def test_a_row_weight_of_zero_is_a_row_that_is_not_there():
    rows, head, signal, _, _ = setting()
    plan = make_plan("jsd", None, kd_ratio=0.4, temperature=1.0, scale_by_temperature_squared=None, support="full", token_weight="none")
    keep = torch.arange(N) % 3 != 0
    loss = run_plan(plan, rows, head, signal.outcomes, TARGETS, row_weights=keep.double())
    outcomes = FullOutcomes(signal.outcomes.hidden[keep], signal.outcomes.head)
    fewer = run_plan(plan, rows[keep], head, outcomes, TARGETS[keep])
    torch.testing.assert_close(loss.total, fewer.total)
    torch.testing.assert_close(torch.autograd.grad(loss.total, rows), torch.autograd.grad(fewer.total, rows))


def test_every_choice_of_the_catalogue_runs_or_is_refused_when_it_is_made():
    ran = 0
    for support in SUPPORTS:
        for weight in TOKEN_WEIGHTS:
            for reduction in REDUCTIONS:
                try:
                    check_choice("forward_kl", support, weight)
                except ConfigError:
                    with pytest.raises(ConfigError):
                        DistributionMatching(support=support, token_weight=weight, reduction=reduction)
                    continue
                loss, _ = total_of(support=support, token_weight=weight, reduction=reduction)
                assert loss.total.isfinite()
                ran += 1
    assert ran > 30


@pytest.mark.parametrize(
    ("choices", "needs"),
    [
        ({}, Needs("full")),
        ({"temperature": 2.0}, Needs("full")),
        ({"support": "top_k_tail"}, Needs("top_k", None, 1.0)),
        ({"support": "top_k_tail", "temperature": 2.0, "parameters": {"top_k": 12}}, Needs("top_k", 12, 2.0)),
        ({"support": "top_k_renormalised", "temperature": 2.0}, Needs("top_k")),
        ({"support": "top_k_renormalised", "temperature": 2.0, "token_weight": "position"}, Needs("top_k", None, 2.0)),
        ({"support": "samples", "parameters": {"num_samples": 9}}, Needs("sampled", None, 1.0)),
        ({"support": "projected", "temperature": 1.5}, Needs("projected", None, 1.5)),
        ({"support": "student_top_k_tail", "temperature": 1.5, "parameters": {"top_k": 9}}, Needs("full")),
    ],
)
def test_it_asks_for_what_was_said_and_for_the_temperature_that_a_record_must_have(choices, needs):
    assert DistributionMatching(**choices).needs == needs


def test_a_record_of_fewer_tokens_serves_unless_more_were_asked_for():
    few, many = Offers(frozenset({"top_k"}), top_k=20, temperature=1.0), {"parameters": {"top_k": 21}}
    assert few.lacks(DistributionMatching(support="top_k_tail").needs) is None
    assert few.lacks(DistributionMatching(support="top_k_tail", parameters={"top_k": 20}).needs) is None
    assert few.lacks(DistributionMatching(support="top_k_tail", **many).needs) == "20 kept outcomes, not 21"
    assert few.lacks(DistributionMatching(support="top_k_tail", temperature=2.0).needs) == "outcomes at temperature 1.0, not 2.0"
    assert few.lacks(DistributionMatching(support="top_k_renormalised", temperature=2.0).needs) is None


def test_two_weights_are_a_ratio_times_a_factor_and_the_log_stays_unweighted():
    rows, head, signal, _, _ = setting()
    for temperature in (1.0, 2.0):
        by_ratio = DistributionMatching(kd_ratio=0.25, temperature=temperature).total(rows, head, signal, BATCH)
        by_weights = DistributionMatching(kd_weight=0.75, sft_weight=2.25, temperature=temperature).total(rows, head, signal, BATCH)
        torch.testing.assert_close(by_weights.total, 3 * by_ratio.total)
        torch.testing.assert_close(torch.autograd.grad(by_weights.total, rows)[0], 3 * torch.autograd.grad(by_ratio.total, rows)[0])
        torch.testing.assert_close((by_weights.cross_entropy, by_weights.divergence), (by_ratio.cross_entropy, by_ratio.divergence))
    text = Likelihood(sft_weight=2.0).total(rows, head, None, BATCH)
    plain = Likelihood().total(rows, head, None, BATCH)
    torch.testing.assert_close((text.total, text.cross_entropy), (2 * plain.total, plain.cross_entropy))
    assert DistributionMatching().plan.kd_weight == DistributionMatching().plan.sft_weight == 0.5


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"kd_ratio": 0.5, "kd_weight": 1.0, "sft_weight": 1.0}, "leave out kd_ratio, or both"),
        ({"kd_weight": 1.0}, "kd_weight is set and sft_weight is not"), ({"sft_weight": 1.0}, "sft_weight is set and kd_weight is not"),
        ({"kd_weight": -1.0, "sft_weight": 1.0}, "kd_weight is a finite number of at least 0"),
        ({"kd_weight": 1.0, "sft_weight": math.inf}, "sft_weight is a finite number"),
        ({"kd_weight": 0.0, "sft_weight": 0.0}, "nothing would be learned"), ({"kd_ratio": 1.5}, r"in \[0, 1\]; found 1.5"),
    ],
)
def test_weights_that_do_not_fit_are_refused(choices, said):
    with pytest.raises(ConfigError, match=said):
        DistributionMatching(**choices)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_details_are_counted_only_where_asked_and_know_no_temperature(temperature):
    rows, head, signal, student, teacher = setting()
    plan = make_plan("jsd", None, kd_ratio=0.4, temperature=temperature, support="full", token_weight="none")
    assert set(run_plan(plan, rows, head, signal.outcomes, TARGETS).by_row) == {"cross_entropy", "divergence"}
    found = run_plan(plan, rows, head, signal.outcomes, TARGETS, details=True).by_row
    torch.testing.assert_close(found["student_entropy"], entropy(student))
    torch.testing.assert_close(found["teacher_entropy"], entropy(teacher))
    torch.testing.assert_close(found["top1_agreement"], (student.argmax(-1) == teacher.argmax(-1)).double())


def test_a_missing_answer_and_a_wrong_reduction_are_refused():
    rows, head, _, _, _ = setting()
    with pytest.raises(IncompatibleError, match="needs the teacher's full outcomes"):
        DistributionMatching().total(rows, head, TeacherSignal(), BATCH)
    with pytest.raises(ConfigError, match="token_mean, seq_mean, seq_sum"):
        DistributionMatching(reduction="mean")


def test_the_catalogue_is_read_without_torch():
    program = "import sys, potstill.objectives.catalogue; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_room_imports_nothing_of_hugging_face():
    program = (
        "import sys, potstill.objectives as o; o.DIVERGENCES, o.fused_distillation_loss; "
        "assert not {'transformers', 'pydantic', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

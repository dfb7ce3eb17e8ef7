"""Laws of the sparse tile over the whole table: every divergence on every record that serves it, against sums in probability space.

The reference is plain Python on the K tokens and the rest (tests/objectives/reference.py), its gradients central differences.
"""

import math

import pytest
import torch

from objectives import reference
from potstill.head import Head, LowRank
from potstill.objectives.catalogue import NEEDS_TARGETS, PARAMETERS, WITHOUT_TEMPERATURE
from potstill.objectives.execution import Execution
from potstill.objectives.fused import fused_loss, run_plan
from potstill.objectives.plan import make_plan
from potstill.signals import FullOutcomes, SampledOutcomes, TopKOutcomes

N, V, K = 5, 9, 3
NAMES = [name for name in PARAMETERS if name not in NEEDS_TARGETS]
EVERY_SIZE = [Execution(group_rows=1, block_rows=1), Execution(group_rows=3, block_rows=2), Execution()]


def logits_of(seed, num_rows=N, width=V, spread=1.5):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def record_of(logits, k=K, temperature=1.0, targets=None):
    log_probs = (logits / temperature).log_softmax(-1)
    kept, ids = log_probs.topk(k)
    tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    at_targets = None if targets is None else log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return TopKOutcomes(ids, kept, tail, at_targets, temperature)


def loss_of(student, outcomes, support, divergence="forward_kl", targets=None, **choices):
    """The total and its gradient over the student's logits: its head is the identity, so its rows are its logits."""
    rows = student.clone().requires_grad_()
    head = choices.pop("head", Head(torch.eye(rows.shape[1], dtype=rows.dtype)))
    targets = torch.zeros(len(rows), dtype=torch.long) if targets is None else targets
    loss = fused_loss(rows, head, outcomes, targets, divergence=divergence, support=support, **{"kd_ratio": 1.0, **choices})
    return loss, torch.autograd.grad(loss.total, rows)[0]


def partition(probs, ids, support):
    on_ids = [probs[i] for i in ids]
    if support == "top_k_renormalised":
        return [p / sum(on_ids) for p in on_ids]
    return [*on_ids, sum(p for i, p in enumerate(probs) if i not in ids)]


def naive(name, student, teacher, ids, support, temperature, target, kd, step=1e-6):
    """(1 - kd) CE + kd [T^2] D of one row, in probabilities, and its central differences; what is held constant is held."""
    p = partition(reference.softmax(teacher, temperature), ids, support)
    held = partition(reference.softmax(student, temperature), ids, support)
    extra = {"constant": held} if name in reference.HOLDS_THE_STUDENT else {}
    squared = temperature**2 if name == "forward_kl" and kd < 1 else 1.0

    def value(z):
        q = partition(reference.softmax(z, temperature), ids, support)
        return -(1 - kd) * math.log(reference.softmax(z)[target]) + kd * squared * reference.REFERENCE[name](q, p, **extra)

    slopes = []
    for i in range(len(student)):
        up, down = [*student], [*student]
        up[i], down[i] = up[i] + step, down[i] - step
        slopes.append((value(up) - value(down)) / (2 * step))
    return value(student), slopes


@pytest.mark.parametrize("support", ["top_k_tail", "top_k_renormalised"])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_on_every_record_is_the_sum_over_its_outcomes(name, support):
    student, teacher, targets = logits_of(0), logits_of(1), torch.tensor([0, 3, 8, 2, 5])
    for temperature in [1.0] if name in WITHOUT_TEMPERATURE else [1.0, 1.7]:
        record = record_of(teacher, temperature=temperature)
        targets[1] = record.ids[1, 0]  # a target that is kept, among others that are not
        for kd in (1.0, 0.4):
            wanted = [
                naive(name, student[i].tolist(), teacher[i].tolist(), record.ids[i].tolist(), support, temperature, int(targets[i]), kd)
                for i in range(N)
            ]
            for execution in EVERY_SIZE:
                loss, gradient = loss_of(
                    student, record, support, name, targets, kd_ratio=kd, temperature=temperature, execution=execution
                )
                assert loss.total.item() == pytest.approx(sum(value for value, _ in wanted), abs=1e-10)
                slopes = torch.tensor([slope for _, slope in wanted], dtype=torch.float64)
                torch.testing.assert_close(gradient, slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "logit_mse"])
def test_with_every_token_kept_it_is_the_dense_loss(name):
    student, teacher, targets = logits_of(2), logits_of(3), torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    temperature = 1.0 if name in WITHOUT_TEMPERATURE else 1.3
    dense = loss_of(student, FullOutcomes(teacher, Head(torch.eye(V, dtype=torch.float64))), "full", name, targets, kd_ratio=0.4,
                    temperature=temperature)  # fmt: skip
    for k, support in ((V, "top_k_renormalised"), (V, "top_k_tail"), (V - 1, "top_k_tail")):
        sparse = loss_of(student, record_of(teacher, k, temperature), support, name, targets, kd_ratio=0.4, temperature=temperature)
        assert sparse[0].total.item() == pytest.approx(dense[0].total.item(), abs=1e-9)
        torch.testing.assert_close(sparse[1], dense[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("support", ["top_k_tail", "top_k_renormalised"])
def test_the_heads_whole_arithmetic_is_differentiated(support):
    """Scale, softcap, bias and LoRA, at a temperature, mixed with cross-entropy, with row weights."""
    generator = torch.Generator().manual_seed(4)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows, weight, bias, down, up = leaf(N, 4), leaf(V + 2, 4), leaf(V + 2), leaf(2, 4), leaf(V + 2, 2)
    head = Head(weight, bias, 0.8, 2.5, (LowRank(down, up, 0.5),))
    record, targets, weights = record_of(logits_of(1), temperature=1.6), torch.tensor([0, 3, 8, 2, 5]), torch.linspace(0.2, 2, N).double()
    log_probs = head.logits(rows)[:, :V]
    tempered = (log_probs / 1.6).log_softmax(-1)
    on_ids = tempered.gather(-1, record.ids)
    student, teacher = on_ids.log_softmax(-1), record.log_probs.log_softmax(-1)
    if support == "top_k_tail":
        tail = tempered.scatter(-1, record.ids, -torch.inf).logsumexp(-1, keepdim=True)
        student, teacher = torch.cat([on_ids, tail], -1), torch.cat([record.log_probs, record.log_tail[:, None]], -1)
    by_row = (teacher.exp() * (teacher - student)).sum(-1) * 1.6**2
    entropies = torch.nn.functional.cross_entropy(log_probs, targets, reduction="none")
    whole = (weights * (0.7 * entropies + 0.3 * by_row)).sum()
    leaves = [rows, weight, bias, down, up]
    wanted = torch.autograd.grad(whole, leaves)
    for execution in EVERY_SIZE:
        loss = fused_loss(
            rows, head, record, targets, kd_ratio=0.3, temperature=1.6, support=support, vocabulary_size=V, row_weights=weights,
            execution=execution,
        )
        torch.testing.assert_close(loss.total, whole)
        torch.testing.assert_close(torch.autograd.grad(loss.total, leaves), wanted, rtol=1e-7, atol=1e-9)


def test_a_tail_far_below_every_kept_token_is_exact_in_float32():
    """200 nats below: its exponentials beside the largest logit would all be zero."""
    student = torch.tensor([[0.0, 1.0, -200.0, -201.0]])
    teacher = TopKOutcomes(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4]]).log(), torch.tensor([0.1]).log())
    loss, gradient = loss_of(student, teacher, "top_k_tail", "forward_kl")
    wide = TopKOutcomes(teacher.ids, teacher.log_probs.double(), teacher.log_tail.double())
    exact, slopes = loss_of(student.double(), wide, "top_k_tail", "forward_kl")
    assert loss.total.item() == pytest.approx(exact.total.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), slopes, rtol=1e-5, atol=1e-7)
    share = 1 / (1 + math.exp(-1))
    assert gradient[0, 2:].tolist() == pytest.approx([-0.1 * share, -0.1 * (1 - share)], rel=1e-5)


@pytest.mark.parametrize("support", ["top_k_tail", "top_k_renormalised"])
@pytest.mark.parametrize("place", ["front", "back"])
def test_padding_names_no_outcome(support, place):
    """A log-probability of -inf beside any id, one that is kept or one that is not, in front or behind."""
    student, record = logits_of(0), record_of(logits_of(1))
    foreign = torch.tensor([next(i for i in range(V) if i not in row) for row in record.ids.tolist()])[:, None]
    none = torch.full((N, 1), -torch.inf, dtype=torch.float64)
    for padding in (foreign, record.ids[:, 1:2]):
        parts = [(padding, none), (record.ids, record.log_probs)]
        parts = parts if place == "front" else parts[::-1]
        padded = TopKOutcomes(torch.cat([ids for ids, _ in parts], 1), torch.cat([kept for _, kept in parts], 1), record.log_tail)
        for name in ("forward_kl", "reverse_kl", "jsd"):
            (one, slope), (two, again) = loss_of(student, record, support, name), loss_of(student, padded, support, name)
            assert two.total.item() == pytest.approx(one.total.item(), abs=1e-12)
            torch.testing.assert_close(again, slope)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_row_of_padding_alone_leaves_cross_entropy_and_says_nothing_of_the_teacher(temperature):
    """A served teacher whose most likely tokens all lie beyond the vocabulary: the rest is everything, the filling's id too."""
    student, targets = logits_of(0), torch.tensor([0, 0, 4, 8, 0])
    record = record_of(logits_of(1), temperature=temperature)
    ids, kept, tail = record.ids.clone(), record.log_probs.clone(), record.log_tail.clone()
    ids[:3], kept[:3], tail[:3] = 0, -torch.inf, 0.0
    record = TopKOutcomes(ids, kept, tail, None, temperature)
    loss, gradient = loss_of(student, record, "top_k_tail", "forward_kl", targets, temperature=temperature, kd_ratio=0.5)
    rows = student.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(rows, targets, reduction="none")
    torch.testing.assert_close(loss.by_row["cross_entropy"], expected.detach())
    assert float(loss.by_row["divergence"][:3].abs().max()) < 1e-12
    torch.testing.assert_close(gradient[:3], torch.autograd.grad(0.5 * expected.sum(), rows)[0][:3])


def test_a_renormalised_record_may_be_used_at_another_temperature_and_the_others_not_silently():
    student, teacher = logits_of(0), logits_of(1)
    at_one, at_two = record_of(teacher, temperature=1.0), record_of(teacher, temperature=2.0)
    for temperature in (1.0, 2.0, 3.0):
        one, two = (loss_of(student, record, "top_k_renormalised", "jsd", temperature=temperature) for record in (at_one, at_two))
        torch.testing.assert_close(one[0].total, two[0].total)
        torch.testing.assert_close(one[1], two[1])


def test_bfloat16_stays_near_float64():
    generator = torch.Generator().manual_seed(3)
    rows, weight = torch.randn(64, 16, generator=generator).bfloat16(), (torch.randn(50, 16, generator=generator) * 0.5).bfloat16()
    record = record_of(logits_of(5, 64, 50), 8)
    targets = torch.randint(0, 50, (64,), generator=generator)
    for support, name in (("top_k_tail", "forward_kl"), ("top_k_tail", "jsd"), ("top_k_renormalised", "reverse_kl")):
        found = []
        for dtype in (torch.bfloat16, torch.float64):
            leaves = [rows.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
            answer = TopKOutcomes(record.ids, record.log_probs.float(), record.log_tail.float())
            loss = fused_loss(leaves[0], Head(leaves[1]), answer, targets, divergence=name, support=support)
            found.append([loss.total, *torch.autograd.grad(loss.total, leaves)])
        for one, other in zip(*found, strict=True):
            assert (one.double() - other.double()).norm() <= 2e-2 * other.double().norm()


def test_details_and_position_weights_of_a_record_are_those_of_its_teacher():
    student, teacher, targets = logits_of(0), logits_of(1), torch.tensor([0, 3, 8, 2, 5])
    head = Head(torch.eye(V, dtype=torch.float64))
    live, record = FullOutcomes(teacher, head), record_of(teacher, targets=targets)
    for support in ("top_k_tail", "top_k_renormalised"):
        plan = make_plan("jsd", {"top_k": K}, support=support, token_weight="position")
        one, two = (run_plan(plan, student, head, outcomes, targets, details=True).by_row for outcomes in (live, record))
        assert set(one) == {"cross_entropy", "divergence", "disagreement", "student_entropy", "teacher_entropy", "top1_agreement"}
        whole = teacher.log_softmax(-1)
        torch.testing.assert_close(one.pop("teacher_entropy"), -(whole.exp() * whole).sum(-1))
        torch.testing.assert_close(two, one)  # the entropy of a teacher of which K tokens are known is not known
        gap = teacher.log_softmax(-1) - student.log_softmax(-1)
        torch.testing.assert_close(two["disagreement"], gap.gather(-1, targets[:, None]).squeeze(-1))
        torch.testing.assert_close(two["top1_agreement"], (student.argmax(-1) == teacher.argmax(-1)).double())


@pytest.mark.parametrize("weight", ["student_entropy", "teacher_confidence", "teacher_entropy"])
def test_a_weight_of_the_position_multiplies_the_divergence_alone(weight):
    student, teacher, targets = logits_of(0), logits_of(1), torch.tensor([0, 3, 8, 2, 5])
    teacher[0, 4] += 6
    record = record_of(teacher, temperature=1.4)
    log_probs = (student / 1.4).log_softmax(-1)
    outcomes = torch.cat([record.log_probs, record.log_tail[:, None]], -1)

    def entropy(of):
        return -(of.exp() * of).sum(-1) / math.log(of.shape[-1])

    wanted = {
        "student_entropy": entropy(log_probs), "teacher_entropy": entropy(outcomes),
        "teacher_confidence": (record.log_probs[:, 0].exp() >= 0.5).double(),
    }[weight]  # fmt: skip
    plain, plain_slopes = loss_of(student, record, "top_k_tail", "jsd", targets, temperature=1.4)
    text, text_slopes = loss_of(student, record, "top_k_tail", "jsd", targets, temperature=1.4, kd_ratio=0.0)
    loss, slopes = loss_of(student, record, "top_k_tail", "jsd", targets, temperature=1.4, kd_ratio=0.3, token_weight=weight)
    torch.testing.assert_close(loss.by_row["token_weight"], wanted)
    torch.testing.assert_close(loss.total, 0.7 * text.total + 0.3 * (wanted * plain.by_row["divergence"]).sum())
    torch.testing.assert_close(slopes, 0.7 * text_slopes + 0.3 * wanted[:, None] * plain_slopes)
    assert wanted.min() < wanted.max()


def test_samples_keep_the_sum_of_their_weights_and_their_temperature():
    """sum_i w_i (-log q_i) at the temperature of the draws, mixed with cross-entropy at 1; a token may be drawn twice."""
    student, targets = logits_of(0), torch.tensor([0, 3, 8, 2, 5])
    ids = torch.randint(0, V, (N, 6), generator=torch.Generator().manual_seed(1))
    ids[:, 3] = ids[:, 0]
    weights = torch.rand(N, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for temperature in (1.0, 1.8):
        leaf = student.clone().requires_grad_()
        by_row = -(weights * (leaf / temperature).log_softmax(-1).gather(-1, ids)).sum(-1)
        squared = temperature**2
        whole = (0.6 * torch.nn.functional.cross_entropy(leaf, targets, reduction="none") + 0.4 * squared * by_row).sum()
        (wanted,) = torch.autograd.grad(whole, leaf)
        for execution in EVERY_SIZE:
            loss, gradient = loss_of(
                student, SampledOutcomes(ids, weights, temperature), "samples", targets=targets, kd_ratio=0.4, temperature=temperature,
                execution=execution,
            )
            torch.testing.assert_close(loss.total, whole)
            torch.testing.assert_close(gradient, wanted)


@pytest.mark.slow
def test_compiled_equals_eager():
    """Runs without the annotations' checker, which torch.compile cannot look into."""
    import subprocess
    import sys

    program = """
import torch
torch.set_num_threads(1)
from potstill.head import Head
from potstill.objectives.execution import Execution
from potstill.objectives.fused import fused_loss
from potstill.signals import TopKOutcomes
g = torch.Generator().manual_seed(0)
h, w = torch.randn(24, 8, generator=g).requires_grad_(), torch.randn(64, 8, generator=g).requires_grad_()
y, kept = torch.randint(0, 64, (24,), generator=g), torch.randn(24, 64, generator=g).log_softmax(-1)
values, ids = kept.topk(5)
record = TopKOutcomes(ids, values, torch.log1p(-values.exp().sum(-1)))
found = []
for mode in ("off", "on"):
    loss = fused_loss(h, Head(w, scale=0.8, softcap=4.0), record, y, divergence="jsd", support="top_k_tail",
                      execution=Execution(compile=mode, block_rows=12))
    found.append((loss.total.detach(), *torch.autograd.grad(loss.total, [h, w])))
torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    if "C++ compiler" in done.stderr or "InvalidCxxCompiler" in done.stderr:
        pytest.skip("no C++ compiler on this machine")
    assert done.returncode == 0, done.stderr[-2000:]

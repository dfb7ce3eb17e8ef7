"""The fused loss is the loss written out whole: values and gradients, for every divergence, support and kind of head."""

import pytest
import torch
from torch import Tensor

from potstill.errors import ConfigError, IncompatibleError
from potstill.head import Head, LowRank
from potstill.objectives import DIVERGENCES, fused_distillation_loss
from potstill.objectives.catalogue import NEEDS_TARGETS, PARAMETERS, WITHOUT_TEMPERATURE
from potstill.objectives.execution import Execution
from potstill.objectives.fused import fused_loss
from potstill.signals import FullOutcomes, SampledOutcomes, TopKOutcomes

NUM_ROWS, VOCABULARY, PADDED, WIDTH, TEACHER_WIDTH = 13, 11, 16, 6, 5
_SIZES = ((1, 1, 1), (3, 2, 1), (5, 3, 2), (NUM_ROWS, NUM_ROWS, NUM_ROWS))
CHUNKS = [Execution(group_rows=group, slice_rows=part, block_rows=block) for group, part, block in _SIZES]
HEADS = ["plain", "bias", "scale", "softcap", "lora", "everything"]


def leaf(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def make_head(kind: str, dtype=torch.float64) -> tuple[Head, list[Tensor]]:
    leaves = [leaf(PADDED, WIDTH, seed=1, dtype=dtype)]
    everything = kind == "everything"
    bias, low_rank = None, ()
    if kind == "bias" or everything:
        bias = leaf(PADDED, seed=2, dtype=dtype)
        leaves.append(bias)
    if kind == "lora" or everything:
        low_rank = (LowRank(leaf(2, WIDTH, seed=3, dtype=dtype), leaf(PADDED, 2, seed=4, dtype=dtype), 0.5),)
        leaves += [low_rank[0].down, low_rank[0].up]
    scale = 0.7 if kind == "scale" or everything else 1.0
    return Head(leaves[0], bias, scale, 3.0 if kind == "softcap" or everything else None, low_rank), leaves


def make_teacher(kind: str) -> FullOutcomes | TopKOutcomes | SampledOutcomes:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(NUM_ROWS, TEACHER_WIDTH, generator=generator, dtype=torch.float64)
    head = Head(torch.randn(PADDED + 3, TEACHER_WIDTH, generator=generator, dtype=torch.float64), softcap=4.0)
    if kind == "full":
        return FullOutcomes(hidden, head)
    log_probs = head.logits(hidden)[:, :VOCABULARY].log_softmax(-1)
    if kind == "samples":
        ids = torch.multinomial(log_probs.exp(), 6, replacement=True, generator=generator)
        return SampledOutcomes(ids, torch.full(ids.shape, 1 / 6, dtype=torch.float64))
    kept, ids = log_probs.topk(4)
    return TopKOutcomes(ids, kept, torch.log1p(-kept.exp().sum(-1)))


def targets_of(seed=5) -> Tensor:
    return torch.randint(0, VOCABULARY, (NUM_ROWS,), generator=torch.Generator().manual_seed(seed))


def written_out(head: Head, rows: Tensor, teacher, targets: Tensor, name: str, support: str, kd_ratio: float, temperature: float, weights):
    """The definition, on whole logits, under autograd."""
    logits = head.logits(rows)[:, :VOCABULARY]
    student = (logits / temperature).log_softmax(-1)
    extra = {"targets": targets} if name in NEEDS_TARGETS else {}
    if support == "full":
        whole = (teacher.head.logits(teacher.hidden)[:, :VOCABULARY] / temperature).log_softmax(-1)
        divergence = DIVERGENCES[name](student, whole, **extra)
    elif support == "samples":
        divergence = -(teacher.weights * student.gather(-1, teacher.ids)).sum(-1)
    elif support == "top_k_renormalised":
        divergence = DIVERGENCES[name](student.gather(-1, teacher.ids).log_softmax(-1), (teacher.log_probs / temperature).log_softmax(-1))
    else:
        on_ids = student.gather(-1, teacher.ids)
        tail = torch.log1p(-on_ids.exp().sum(-1, keepdim=True))
        both = torch.cat([teacher.log_probs, teacher.log_tail[:, None]], -1)
        divergence = DIVERGENCES[name](torch.cat([on_ids, tail], -1), both)
    squared = temperature**2 if name == "forward_kl" and kd_ratio < 1 else 1.0
    ce = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (weights * ((1 - kd_ratio) * ce + kd_ratio * squared * divergence)).sum(), (weights * ce).sum(), (weights * divergence).sum()


def pairs():
    for name in PARAMETERS:
        yield name, "full", 1.0 if name in WITHOUT_TEMPERATURE else 1.5
        if name not in NEEDS_TARGETS:
            yield name, "top_k_tail", 1.0
            yield name, "top_k_renormalised", 1.0 if name in WITHOUT_TEMPERATURE else 1.5
    yield "forward_kl", "samples", 1.0


def check(name, support, temperature, kind, kd_ratio, execution):
    head, leaves = make_head(kind)
    rows, teacher, targets = leaf(NUM_ROWS, WIDTH, seed=0), make_teacher(support), targets_of()
    weights = torch.linspace(0.5, 2.0, NUM_ROWS, dtype=torch.float64)
    whole = written_out(head, rows, teacher, targets, name, support, kd_ratio, temperature, weights)
    wanted = torch.autograd.grad(whole[0], [rows, *leaves])
    loss = fused_loss(
        rows, head, teacher, targets, divergence=name, kd_ratio=kd_ratio, temperature=temperature, vocabulary_size=VOCABULARY,
        row_weights=weights, support=support, execution=execution,
    )
    found = torch.autograd.grad(loss.total, [rows, *leaves])
    torch.testing.assert_close((loss.total, loss.cross_entropy, loss.divergence), whole, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    assert (found[1][VOCABULARY:] == 0).all(), "rows beyond the vocabulary have a gradient of exactly 0"
    with torch.no_grad():
        again = fused_loss(
            rows, head, teacher, targets, divergence=name, kd_ratio=kd_ratio, temperature=temperature, vocabulary_size=VOCABULARY,
            row_weights=weights, support=support, execution=execution, training=False,
        )
    torch.testing.assert_close(again.total, whole[0].detach(), rtol=1e-9, atol=1e-11)
    assert not again.total.requires_grad


@pytest.mark.parametrize(("name", "support", "temperature"), list(pairs()))
def test_every_divergence_on_every_support_is_the_loss_written_out(name, support, temperature):
    for execution in CHUNKS:
        check(name, support, temperature, "everything", 0.3, execution)
    check(name, support, temperature, "plain", 1.0, CHUNKS[2])


@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_of_head(kind):
    for name, support in (("forward_kl", "full"), ("jsd", "full"), ("reverse_kl", "top_k_tail")):
        check(name, support, 1.0, kind, 0.5, CHUNKS[2])


def test_float32_is_equal_to_a_millionth():
    head, leaves = make_head("bias", torch.float32)
    rows, teacher, targets = leaf(NUM_ROWS, WIDTH, seed=0, dtype=torch.float32), make_teacher("full"), targets_of()
    narrow = FullOutcomes(teacher.hidden.float(), Head(teacher.head.weight.float(), softcap=4.0))
    grads = []
    for execution in CHUNKS:
        loss = fused_loss(rows, head, narrow, targets, vocabulary_size=VOCABULARY, execution=execution)
        grads.append((loss.total.detach(), *torch.autograd.grad(loss.total, [rows, *leaves])))
    for found in grads[1:]:
        torch.testing.assert_close(found, grads[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "cross_entropy"])
def test_bfloat16_stays_near_float64(name):
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((64, 16), (50, 16), (64, 24), (50, 24))]
    rounded = [tensor.bfloat16() for tensor in tensors]
    targets = torch.randint(0, 50, (64,), generator=generator)
    results = []
    for dtype, execution in ((torch.bfloat16, Execution(group_rows=16)), (torch.bfloat16, Execution()), (torch.float64, Execution())):
        hidden, weight, teacher_hidden, teacher_weight = (tensor.to(dtype) for tensor in rounded)
        weight, teacher_weight, hidden = (weight * 0.5).requires_grad_(), teacher_weight * 0.5, hidden.clone().requires_grad_()
        total, count = fused_distillation_loss(
            hidden, weight, teacher_hidden, teacher_weight, targets, divergence=name, kd_ratio=0.5, execution=execution
        )
        grads = torch.autograd.grad(total / count, [hidden, weight])
        results.append((total.double() / count, *(grad.double() for grad in grads)))
        assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert [grad.dtype for grad in grads] == [dtype, dtype]
    for found in results[:2]:
        for one, other in zip(found, results[2], strict=True):
            assert (one - other).norm() <= 2e-2 * other.norm()


def test_a_tied_weight_gets_both_gradients():
    weight, tokens, targets = leaf(PADDED, WIDTH, seed=1), torch.randint(0, PADDED, (NUM_ROWS,)), targets_of()
    teacher = make_teacher("full")

    def grad(fused: bool):
        rows = torch.nn.functional.embedding(tokens, weight)
        if fused:
            total = fused_loss(rows, Head(weight), teacher, targets, vocabulary_size=VOCABULARY, execution=CHUNKS[2]).total
        else:
            total = written_out(Head(weight), rows, teacher, targets, "forward_kl", "full", 0.5, 1.0, torch.ones(NUM_ROWS))[0]
        return torch.autograd.grad(total, weight)[0]

    torch.testing.assert_close(grad(True), grad(False))


def test_a_frozen_head_still_carries_the_gradient_of_rows_and_lora():
    head, leaves = make_head("lora")
    head.weight.requires_grad_(False)
    rows, teacher, targets = leaf(NUM_ROWS, WIDTH, seed=0), make_teacher("full"), targets_of()
    total = fused_loss(rows, head, teacher, targets, vocabulary_size=VOCABULARY, execution=CHUNKS[1]).total
    whole = written_out(head, rows, teacher, targets, "forward_kl", "full", 0.5, 1.0, torch.ones(NUM_ROWS))[0]
    torch.testing.assert_close(torch.autograd.grad(total, [rows, *leaves[1:]]), torch.autograd.grad(whole, [rows, *leaves[1:]]))


def test_a_float32_lora_on_a_bfloat16_head():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(20, 8, generator=generator).bfloat16()
    down, up = torch.randn(2, 8, generator=generator).requires_grad_(), torch.randn(20, 2, generator=generator).requires_grad_()
    delta = LowRank(down, up, 0.5)
    rows = torch.randn(9, 8, generator=generator).bfloat16().requires_grad_()
    head, targets = Head(weight, low_rank=(delta,)), torch.randint(0, 20, (9,), generator=generator)
    found = fused_loss(rows, head, None, targets, execution=Execution(group_rows=4))
    whole = torch.nn.functional.cross_entropy(head.logits(rows).float(), targets, reduction="sum")
    torch.testing.assert_close(found.total, whole, rtol=1e-4, atol=1e-4)
    leaves = [rows, delta.down, delta.up]
    for one, other in zip(torch.autograd.grad(found.total, leaves), torch.autograd.grad(whole, leaves), strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= 2e-2 * other.float().norm()


def inputs(seed=0, num_rows=10, width=20):
    generator = torch.Generator().manual_seed(seed)
    student, weight, teacher, teacher_weight = (
        torch.randn(*shape, generator=generator) for shape in ((num_rows, 6), (width, 6), (num_rows, 5), (width, 5))
    )
    targets = torch.randint(0, width, (num_rows,), generator=generator)
    return student.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight, targets


def test_rows_that_are_ignored_may_hold_nan():
    student, weight, teacher, teacher_weight, targets = inputs()
    targets[[2, 7]] = -100
    total, count = fused_distillation_loss(student, weight, teacher, teacher_weight, targets)
    wanted = torch.autograd.grad(total, [student, weight])
    with torch.no_grad():
        student[[2, 7]] = torch.nan
        teacher[[2, 7]] = torch.nan
    again, count_again = fused_distillation_loss(student, weight, teacher, teacher_weight, targets)
    assert (count, count_again) == (8, 8)
    assert torch.equal(again, total)
    found = torch.autograd.grad(again, [student, weight])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert (found[0][[2, 7]] == 0).all()


def test_other_ignore_index_and_leading_dimensions():
    student, weight, teacher, teacher_weight, targets = inputs()
    flat, _ = fused_distillation_loss(student, weight, teacher, teacher_weight, targets)
    split, count = fused_distillation_loss(student.view(2, 5, 6), weight, teacher.view(2, 5, 5), teacher_weight, targets.view(2, 5))
    assert torch.equal(flat, split)
    assert count == 10
    _, count = fused_distillation_loss(student, weight, teacher, teacher_weight, targets, ignore_index=int(targets[0]))
    assert count == 10 - int((targets == targets[0]).sum())


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "cross_entropy"])
def test_tokens_that_both_models_ban_by_a_bias_of_minus_infinity(name):
    student, weight, teacher, teacher_weight, targets = inputs(width=8)
    bias = torch.tensor([0.0] * 6 + [-torch.inf] * 2)
    loss = fused_loss(
        student, Head(weight, bias), FullOutcomes(teacher, Head(teacher_weight, bias)), targets % 6, divergence=name
    )
    cropped = fused_loss(
        student, Head(weight), FullOutcomes(teacher, Head(teacher_weight)), targets % 6, divergence=name, vocabulary_size=6
    )
    torch.testing.assert_close(loss.total, cropped.total)
    found, wanted = (torch.autograd.grad(one.total, [student, weight]) for one in (loss, cropped))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_excludes_what_the_student_allows_is_infinite():
    student, weight, teacher, teacher_weight, targets = inputs(width=8)
    bias = torch.tensor([0.0] * 7 + [-torch.inf])
    outcomes = FullOutcomes(teacher, Head(teacher_weight, bias))
    assert fused_loss(student, Head(weight), outcomes, targets % 6, divergence="reverse_kl").total.isinf()
    assert fused_loss(student, Head(weight), outcomes, targets % 6, divergence="forward_kl").total.isfinite()


def test_nan_is_not_hidden():
    student, weight, teacher, teacher_weight, targets = inputs()
    with torch.no_grad():
        student[0, 0] = torch.nan
    assert fused_distillation_loss(student, weight, teacher, teacher_weight, targets)[0].isnan()


def test_no_rows_keep_the_graph_and_leave_zeros():
    _, weight, _, teacher_weight, _ = inputs()
    empty, bias = torch.zeros(0, 6, requires_grad=True), torch.zeros(20, requires_grad=True)
    loss = fused_loss(
        empty, Head(weight, bias), FullOutcomes(torch.zeros(0, 5), Head(teacher_weight)), torch.zeros(0, dtype=torch.long)
    )
    assert loss.total.item() == loss.cross_entropy.item() == loss.divergence.item() == 0
    loss.total.backward()
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()
    assert empty.grad.shape == (0, 6)


@pytest.mark.parametrize("retain", [True, False])
def test_a_second_backward_says_what_is_wrong(retain):
    student, weight, teacher, teacher_weight, targets = inputs()
    total, _ = fused_distillation_loss(student, weight, teacher, teacher_weight, targets)
    total.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match="second backward through the same loss"):
        total.backward()


def test_the_incoming_gradient_scales_and_sums_of_losses_work():
    student, weight, teacher, teacher_weight, targets = inputs()
    plain = torch.autograd.grad(fused_distillation_loss(student, weight, teacher, teacher_weight, targets)[0], [student, weight])
    one, _ = fused_distillation_loss(student, weight, teacher, teacher_weight, targets)
    two, _ = fused_distillation_loss(student, weight, teacher, teacher_weight, targets)
    scaled = torch.autograd.grad(one / 4 + two / 2, [student, weight])
    torch.testing.assert_close(scaled, tuple(grad * 0.75 for grad in plain))


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    student, weight, teacher, teacher_weight, targets = inputs()
    plain = torch.autograd.grad(fused_distillation_loss(student * 1, weight, teacher, teacher_weight, targets)[0], [student, weight])

    def loss(hidden):
        return fused_distillation_loss(hidden * 1, weight, teacher, teacher_weight, targets)[0]

    torch.utils.checkpoint.checkpoint(loss, student, use_reentrant=reentrant).backward()
    torch.testing.assert_close((student.grad, weight.grad), plain)


def test_under_autocast_it_computes_in_the_autocast_dtype():
    student, weight, teacher, teacher_weight, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = fused_distillation_loss(student, weight, teacher, teacher_weight, targets)
        grads = torch.autograd.grad(total, [student, weight])
    cast = [tensor.detach().bfloat16().requires_grad_() for tensor in (student, weight)]
    wanted, _ = fused_distillation_loss(*cast, teacher.bfloat16(), teacher_weight.bfloat16(), targets)
    torch.testing.assert_close(total, wanted, rtol=1e-2, atol=1e-2)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_widths_that_differ_need_the_number_of_tokens():
    student, weight, teacher, _, targets = inputs()
    wide = torch.randn(23, 5)
    with pytest.raises(IncompatibleError, match="20 rows and the teacher's 23"):
        fused_distillation_loss(student, weight, teacher, wide, targets)
    total, _ = fused_distillation_loss(student, weight, teacher, wide, targets % 18, vocabulary_size=18)
    same, _ = fused_distillation_loss(student, weight[:18], teacher, wide[:18], targets % 18)
    torch.testing.assert_close(total, same)


def test_wrong_calls_say_what_is_wrong():
    student, weight, teacher, teacher_weight, targets = inputs()
    with pytest.raises(ConfigError, match="no divergence 'forward_k'; nearest: forward_kl"):
        fused_distillation_loss(student, weight, teacher, teacher_weight, targets, divergence="forward_k")
    with pytest.raises(ConfigError, match="forward_kl has no parameter 'beta'"):
        fused_distillation_loss(student, weight, teacher, teacher_weight, targets, beta=0.5)
    with pytest.raises(ConfigError, match="forward_kl in place of 0"):
        fused_distillation_loss(student, weight, teacher, teacher_weight, targets, divergence="jsd", beta=0.0)
    with pytest.raises(ConfigError, match="leave it at 1"):
        fused_distillation_loss(student, weight, teacher, teacher_weight, targets, divergence="logit_mse", temperature=2.0)
    with pytest.raises(IncompatibleError, match="targets lie in"):
        fused_distillation_loss(student, weight, teacher, teacher_weight, targets + 20)
    with pytest.raises(IncompatibleError, match="answered 9 rows for 10 targets"):
        fused_loss(student, Head(weight), FullOutcomes(teacher[:9], Head(teacher_weight)), targets)


def test_compiled_equals_eager():
    """Runs without the annotations' checker, which torch.compile cannot look into."""
    import subprocess
    import sys

    program = """
import torch
torch.set_num_threads(1)
from potstill.objectives import fused_distillation_loss
from potstill.objectives.execution import Execution
g = torch.Generator().manual_seed(0)
h, w, th, tw = (torch.randn(*s, generator=g) for s in ((24, 8), (64, 8), (24, 12), (64, 12)))
h.requires_grad_(), w.requires_grad_()
y = torch.randint(0, 64, (24,), generator=g)
found = []
for mode in ("off", "on"):
    total, _ = fused_distillation_loss(h, w, th, tw, y, divergence="jsd", execution=Execution(compile=mode, block_rows=5))
    found.append((total.detach(), *torch.autograd.grad(total, [h, w])))
torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    if "C++ compiler" in done.stderr or "InvalidCxxCompiler" in done.stderr:
        pytest.skip("no C++ compiler on this machine")
    assert done.returncode == 0, done.stderr[-2000:]

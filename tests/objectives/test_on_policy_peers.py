"""The on-policy losses of TRL on one model and one batch of fixed completions, where their definition is ours. `make peers` runs them.

docs/methods/on_policy_peers.md says where it is not.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from potstill.batch import Example
from potstill.data.collation import collate
from potstill.head import Head
from potstill.objectives.distribution import DistributionMatching
from potstill.objectives.fused import fused_loss
from potstill.objectives.policy import PolicyGradient
from potstill.signals import FullOutcomes, TargetOutcomes, TeacherSignal
from tiny import tiny_llama

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
CASES = pytest.mark.parametrize(
    ("divergence", "parameters", "beta"),
    [("jsd", {"beta": 0.1}, 0.1), ("jsd", {"beta": 0.5}, 0.5), ("forward_kl", {}, 0.0), ("reverse_kl", {}, 1.0)],
)
V, PAD = 320, 0


def texts():
    """Prompts and completions of unequal lengths."""
    generator = torch.Generator().manual_seed(3)
    return [
        tuple(torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths) for lengths in ((5, 7), (9, 2), (3, 11))
    ]


def models():
    return tiny_llama(0), tiny_llama(1, width=48).requires_grad_(False).eval()


def gradients(loss, model):
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters()]]


def ours(divergence, parameters, reduction="token_mean"):
    student, teacher = models()
    examples = [Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), 0) for prompt, answer in texts()]
    batch = collate([[example] for example in examples], pad_token=PAD)
    objective = DistributionMatching(divergence=divergence, parameters=parameters, kd_ratio=1.0, reduction=reduction)


    def rows(model):
        return batch.select(model.model(input_ids=batch.tokens, position_ids=batch.positions).last_hidden_state)

    answer = TeacherSignal(FullOutcomes(rows(teacher).detach(), Head(teacher.lm_head.weight)))
    loss = objective.total(rows(student), Head(student.lm_head.weight), answer, batch)
    return gradients(loss.total / objective.count(batch), student)


def padded(rows, left: bool):
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    masks = [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f) for f, row in zip(fill, rows, strict=True)]
    tokens = [f + row if left else row + f for f, row in zip(fill, rows, strict=True)]
    return torch.tensor(tokens), torch.tensor(masks)


@CASES
def test_trl_gkd(divergence, parameters, beta):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teacher = models()
    tokens, mask = padded([[*prompt, *answer] for prompt, answer in texts()], left=False)
    labels, _ = padded([[-100] * len(prompt) + answer for prompt, answer in texts()], left=False)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    trainer = SimpleNamespace(teacher_model=teacher, generalized_jsd_loss=gkd.generalized_jsd_loss, beta=beta)
    wanted = gradients(gkd.compute_loss(trainer, student, inputs), student)
    torch.testing.assert_close(ours(divergence, parameters), wanted, rtol=1e-4, atol=1e-6)


@CASES
def test_trl_distillation_trainer(divergence, parameters, beta, monkeypatch):
    # Tests lie on the path, and among them a folder that TRL would take for an installed vLLM.
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not place.endswith("tests")])
    trainer_class = pytest.importorskip("trl.trainer.distillation_trainer").DistillationTrainer
    student, teacher = models()
    prompts, prompt_mask = padded([prompt for prompt, _ in texts()], left=True)
    answers, answer_mask = padded([answer for _, answer in texts()], left=False)
    inputs = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": answers, "completion_mask": answer_mask}
    trainer = SimpleNamespace(
        teacher_model=teacher, beta=beta, temperature=1.0, model_kwarg_keys=("logits_to_keep",), _is_vlm=False,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model, is_main_process=False),
        _forward_redirection=lambda wrapper, inner, call, *args, **kwargs: call(*args, **kwargs),
    )
    trainer._get_last_hidden_state = trainer_class._get_last_hidden_state.__get__(trainer)
    loss, _, count = trainer_class._compute_loss(trainer, student, inputs, None)
    assert int(count) == sum(len(answer) for _, answer in texts())
    torch.testing.assert_close(ours(divergence, parameters), gradients(loss, student), rtol=1e-4, atol=1e-6)


def rows_of_one_answer():
    """Logits of one answer of eleven tokens on both sides, a prompt's end masked, and the written tokens."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(1, 11, V, generator=generator) for _ in range(2))
    tokens = torch.randint(0, V, (1, 11), generator=generator)
    return student.requires_grad_(), teacher, tokens, torch.where(torch.arange(11) < 2, -100, tokens)


def iw_opd(monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not place.endswith("tests")])
    return pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer").IWOPDTrainer


@pytest.mark.parametrize("top_k", [1, 5])
def test_trl_on_the_students_most_likely_tokens(top_k, monkeypatch):
    """Reverse KL on the student's top K and a tail bucket; its tail is one minus a clamped sum."""
    student, teacher, _, labels = rows_of_one_answer()
    loss = iw_opd(monkeypatch).generalized_jsd_loss(student, teacher, labels=labels, beta=1.0, top_k=top_k)
    wanted = (loss.detach(), torch.autograd.grad(loss, student)[0])
    rows, eye = student[0, 2:], torch.eye(V)
    mine = fused_loss(
        rows, Head(eye), FullOutcomes(teacher[0, 2:], Head(eye)), labels[0, 2:], divergence="reverse_kl", kd_ratio=1.0,
        support="student_top_k_tail", parameters={"top_k": top_k},
    ).total / 9  # fmt: skip
    torch.testing.assert_close((mine.detach(), torch.autograd.grad(mine, student)[0]), wanted, rtol=1e-4, atol=1e-6)


def test_trl_iw_opd(monkeypatch):
    """Its gradient is that of written tokens weighed by position; its value is a constant times log q and no divergence."""
    trainer = SimpleNamespace(
        temperature=1.0, iw_opd_gamma=0.5, iw_opd_epsilon=1e-8, model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    student, teacher, tokens, labels = rows_of_one_answer()
    at_token = teacher.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    loss = iw_opd(monkeypatch)._compute_iw_opd_loss(trainer, student, tokens, labels, at_token)
    (wanted,) = torch.autograd.grad(loss, student)
    example = Example([7, *tokens[0].tolist()], [False] * 3 + [True] * 9, 0, log_probs=[0.0] * 12)
    objective = PolicyGradient(support="written", token_weight="position", ratio="none")
    signal = TeacherSignal(TargetOutcomes(at_token[0, 2:]))
    mine = objective.total(student[0, 2:], Head(torch.eye(V)), signal, collate([[example]], pad_token=PAD)).total / 9
    torch.testing.assert_close(torch.autograd.grad(mine, student)[0], wanted, rtol=1e-4, atol=1e-6)
    assert mine.item() != pytest.approx(loss.item(), rel=0.1)


def test_the_papers_mean_over_responses_is_another_number_than_trls_mean_over_tokens():
    token_mean, seq_mean = (ours("jsd", {"beta": 0.5}, reduction)[0] for reduction in ("token_mean", "seq_mean"))
    assert abs(token_mean - seq_mean) > 1e-3 * token_mean

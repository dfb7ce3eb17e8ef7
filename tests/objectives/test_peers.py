"""Equality with the installed losses of TRL, Liger and torchtune, where they are right. `make peers` installs and runs them.

Known offsets: torchtune's forward KL is the cross part alone (the teacher's entropy is missing from the value, not from the
gradient); Liger mixes in half of a cross-entropy unless told not to.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from potstill.head import Head
from potstill.objectives import DIVERGENCES, fused_distillation_loss
from potstill.objectives.fused import fused_loss
from potstill.signals import TopKOutcomes

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
CASES = pytest.mark.parametrize(
    ("divergence", "parameters", "beta"),
    [
        ("jsd", {"beta": 0.1}, 0.1), ("jsd", {"beta": 0.5}, 0.5), ("jsd", {"beta": 0.9}, 0.9),
        ("forward_kl", {}, 0.0), ("reverse_kl", {}, 1.0),
    ],
)
N, V, D, E = 24, 37, 8, 12


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher, teacher_weight = (torch.randn(*s, generator=generator) for s in ((N, D), (V, D), (N, E), (V, E)))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[[3, 9]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight * 0.5, targets


def ours(divergence, **parameters):
    hidden, weight, teacher, teacher_weight, targets = inputs()
    total, count = fused_distillation_loss(
        hidden, weight, teacher, teacher_weight, targets, divergence=divergence, kd_ratio=1.0, **parameters
    )
    mean = total / count
    return mean.detach(), *torch.autograd.grad(mean, [hidden, weight])


def theirs(loss):
    hidden, weight, teacher, teacher_weight, targets = inputs()
    value = loss(hidden, weight, teacher, teacher_weight, targets)
    return value.detach(), *torch.autograd.grad(value, [hidden, weight])


@CASES
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trl(divergence, parameters, beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")

    def loss(hidden, weight, teacher, teacher_weight, targets):
        return gkd.GKDTrainer.generalized_jsd_loss(
            (hidden @ weight.T)[None], (teacher @ teacher_weight.T)[None], labels=targets[None], beta=beta, temperature=temperature
        )

    torch.testing.assert_close(ours(divergence, temperature=temperature, **parameters), theirs(loss), rtol=1e-5, atol=1e-6)


@CASES
def test_liger(divergence, parameters, beta):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    module = chunked.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=7)

    def loss(hidden, weight, teacher, teacher_weight, targets):
        return module(hidden, weight, teacher, teacher_weight, targets)

    torch.testing.assert_close(ours(divergence, **parameters), theirs(loss), rtol=1e-5, atol=1e-6)


def torchtune_losses():
    """The file of its losses alone: importing the package fails beside newer releases of what it depends on."""
    package = importlib.util.find_spec("torchtune")
    if package is None or not package.submodule_search_locations:
        pytest.skip("torchtune is not installed")
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torchtune():
    losses = torchtune_losses()

    def loss(kind):
        def run(hidden, weight, teacher, teacher_weight, targets):
            return kind()((hidden @ weight.T)[None], (teacher @ teacher_weight.T)[None], targets[None])

        return run

    torch.testing.assert_close(ours("reverse_kl"), theirs(loss(losses.ReverseKLLoss)), rtol=1e-5, atol=1e-6)
    _, _, teacher, teacher_weight, targets = inputs()
    log_probs = (teacher @ teacher_weight.T)[targets != -100].log_softmax(-1)
    entropy_of_the_teacher = -(log_probs.exp() * log_probs).sum(-1).mean()
    value, *grads = ours("forward_kl")
    their_value, *their_grads = theirs(loss(losses.ForwardKLLoss))
    torch.testing.assert_close(value + entropy_of_the_teacher, their_value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, their_grads, rtol=1e-5, atol=1e-6)


def test_the_formula_equals_torchs_own_kl():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 9, generator=generator).log_softmax(-1) for _ in range(2))
    wanted = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(DIVERGENCES["forward_kl"](student, teacher), wanted)


@pytest.mark.parametrize("support", ["top_k_tail", "top_k_renormalised"])
def test_trl_with_a_teacher_behind_a_server(support):
    """Its forward KL of a top K, with the tail bucket and without; it mixes in no cross-entropy."""
    server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer").ServerDistillationTrainer
    hidden, weight, teacher, teacher_weight, targets = inputs()
    kept, ids = (teacher @ teacher_weight.T).log_softmax(-1).topk(5)
    trainer = SimpleNamespace(loss_add_tail=support == "top_k_tail", _reduce_divergence_loss=server._reduce_divergence_loss)
    loss = server._compute_server_forward_kl_loss
    value = getattr(loss, "__wrapped__", loss)(
        trainer, {"topk_logprobs": kept[None], "topk_token_ids": ids[None]}, (hidden @ weight.T)[None].log_softmax(-1), targets[None]
    )
    wanted = (value.detach(), *torch.autograd.grad(value, [hidden, weight]))
    valid = targets != -100
    record = TopKOutcomes(ids[valid], kept[valid], torch.log1p(-kept[valid].exp().sum(-1)))
    mine = fused_loss(hidden[valid], Head(weight), record, targets[valid], kd_ratio=1.0, support=support).total / valid.sum()
    torch.testing.assert_close((mine.detach(), *torch.autograd.grad(mine, [hidden, weight])), wanted, rtol=1e-5, atol=1e-6)

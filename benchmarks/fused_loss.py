"""The loss from hidden states, forward and backward through both heads: ours against installed peers and the four products.

    python benchmarks/fused_loss.py [--shape f32-32k ...] [--rounds 5] [--contender NAME ...]

The floor is the four matrix products that nobody can avoid: student logits, teacher logits, gradient of the rows, gradient of the
head. Times are CPU seconds of one thread, every contender once a round in one process, median of the ratios to the floor of the same
round. Peaks are the kernel's high-water mark of a fresh process for each contender, less what stood before the measured step.
Peers that are not installed are left out.
"""

import importlib.util
import os
from pathlib import Path

from measuring import print_ratios

os.environ.setdefault("OMP_NUM_THREADS", "1")
SHAPES = {
    "f32-32k": ("float32", 2048, 32000), "bf16-32k": ("bfloat16", 2048, 32000), "bf16-128k": ("bfloat16", 512, 128256),
    "f32-128k": ("float32", 512, 128256),
}
STUDENT_WIDTH, TEACHER_WIDTH = 512, 1024
PEERS_OF_FORWARD_KL = ["torchtune chunked", "trl", "liger", "liger compiled"]


def inputs(shape: str):
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, num_rows, vocabulary = SHAPES[shape]
    dtype = getattr(torch, name)
    # Logits of about the spread that a language model's have.
    hidden, teacher = torch.randn(num_rows, STUDENT_WIDTH).to(dtype), torch.randn(num_rows, TEACHER_WIDTH).to(dtype)
    weight = (torch.randn(vocabulary, STUDENT_WIDTH) * (2.5 / STUDENT_WIDTH**0.5)).to(dtype)
    teacher_weight = (torch.randn(vocabulary, TEACHER_WIDTH) * (2.5 / TEACHER_WIDTH**0.5)).to(dtype)
    targets = torch.randint(0, vocabulary, (num_rows,))
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight, targets


def kd_losses():
    package = importlib.util.find_spec("torchtune")
    if package is None:
        raise ImportError("torchtune")
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contender(name: str, tensors):
    """A function of no arguments that makes one loss and its gradients; ImportError where the peer is missing."""
    import torch

    hidden, weight, teacher, teacher_weight, targets = tensors

    def floor():
        with torch.no_grad():
            student_logits = hidden @ weight.T
            teacher @ teacher_weight.T
            _ = student_logits @ weight, student_logits.T @ hidden

    def step(loss):
        def run():
            loss().backward()
            hidden.grad = weight.grad = None

        return run

    if name == "floor":
        return floor
    kind, _, rest = name.partition(" ")
    beta = 0.5 if rest.startswith("jsd") else 0.0
    if kind == "ours":
        from potstill.objectives import fused_distillation_loss
        from potstill.objectives.execution import Execution

        divergence, _, mode = rest.partition(" ")
        execution = Execution(compile="on" if mode == "compiled" else "off")

        def fused():
            total, count = fused_distillation_loss(
                hidden, weight, teacher, teacher_weight, targets, divergence=divergence, execution=execution
            )
            return total / count

        return step(fused)
    if kind == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=beta, compiled="compiled" in rest)
        return step(lambda: module(hidden, weight, teacher, teacher_weight, targets))
    if kind == "torchtune":
        loss = kd_losses().ForwardKLWithChunkedOutputLoss()

        def chunked():
            student = [(part @ weight.T)[None] for part in hidden.chunk(8)]
            with torch.no_grad():
                logits = [(part @ teacher_weight.T)[None] for part in teacher.chunk(8)]
            return loss(student, logits, targets[None])

        return step(chunked)
    if kind == "trl":
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        def whole():
            with torch.no_grad():
                logits = teacher @ teacher_weight.T
            return GKDTrainer.generalized_jsd_loss((hidden @ weight.T)[None], logits[None], labels=targets[None], beta=beta)

        return step(whole)
    raise ValueError(f"no contender {name!r}")


def available(names: list[str]) -> list[str]:
    from importlib.util import find_spec

    packages = {"liger": "liger_kernel", "trl": "trl", "torchtune": "torchtune"}
    return [name for name in names if find_spec(packages.get(name.split()[0], "torch"))]


def made(shape: str, names) -> dict:
    tensors = inputs(shape)
    return {name: contender(name, tensors) for name in names}


if __name__ == "__main__":
    every = ["ours forward_kl", "ours forward_kl compiled", "ours jsd", "ours jsd compiled", *PEERS_OF_FORWARD_KL]
    print_ratios(__doc__, SHAPES, ["f32-32k", "bf16-32k", "bf16-128k"], lambda asked: available(asked or every), made)

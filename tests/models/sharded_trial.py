"""What each of two ranks does in test_sharding.py: a sharded teacher, a sharded student, and its export, against unsharded ones."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from potstill.batch import Batch
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.export import export_student
from potstill.models.loading import load_model
from potstill.models.proofs import probe_logits, prove_head, supports_packing, typical_distance
from potstill.signals import Needs
from potstill.teachers.local import LocalTeacher
from tiny import tiny_tokenizer

LORAS = {"whole": None, "head": {"rank": 2, "targets": ["q_proj", "lm_head"]}}


class Root(nn.Module):
    """Stands for the module that is wrapped and trained: the student is called inside its forward alone."""

    def __init__(self, causal_lm: CausalLM):
        super().__init__()
        self.student = causal_lm

    def forward(self, batch: Batch) -> torch.Tensor:
        rows, head = self.student(batch)
        return head.logits(rows).square().mean()


def a_batch(seed: int) -> Batch:
    tokens = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.arange(12).repeat(2, 1), torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))


def student(path: Path, lora) -> CausalLM:
    model = load_model(ModelConfig(path=str(path), lora=lora), trainable=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return CausalLM(model, 320)


def try_teacher(path: Path) -> None:
    batch = a_batch(distributed.get_rank())   # each rank asks about text of its own
    plain = LocalTeacher(CausalLM(load_model(LoadingConfig(path=str(path))), 320)).score(batch, Needs("full")).outcomes
    causal_lm = CausalLM(load_model(LoadingConfig(path=str(path)), sharded=True), 320)
    assert all(isinstance(parameter, DTensor) for parameter in causal_lm.parameters())
    teacher = LocalTeacher(causal_lm)
    for _ in range(2):
        outcomes = teacher.score(batch, Needs("full")).outcomes
        torch.testing.assert_close(outcomes.hidden, plain.hidden, rtol=0, atol=1e-6)
        torch.testing.assert_close(outcomes.head.weight, plain.head.weight, rtol=0, atol=0)
    prove_head(causal_lm)
    assert supports_packing(causal_lm)


def try_student(path: Path, lora, run: Path) -> None:
    batch = a_batch(7)
    plain, sharded = student(path, lora), student(path, lora)
    expected = Root(plain)(batch)
    expected.backward()
    for layer in sharded.inner.get_decoder().layers:
        fully_shard(layer)
    root = fully_shard(Root(sharded))
    loss = root(batch)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    loss.backward()
    for (name, got), wanted in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad.full_tensor(), wanted.grad, rtol=0, atol=1e-6, msg=name)
    written = export_student(sharded, tiny_tokenizer(), run, writes=distributed.get_rank() == 0)
    assert bool(written) is (distributed.get_rank() == 0)
    distributed.barrier()
    again = CausalLM(load_model(LoadingConfig(path=str(run / "student"))), 320)
    assert typical_distance(probe_logits(again), probe_logits(plain)) < 1e-5


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    distributed.init_process_group("gloo")
    for name in ("untied", "tied"):
        try_teacher(folder / name)
        for kind, lora in LORAS.items():
            try_student(folder / name, lora, folder / f"{name}-{kind}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The loss against a recorded top K, from hidden states, forward and backward: ours against peers and the work nobody can avoid.

    python benchmarks/sparse_loss.py [--shape f32-32k ...] [--rounds 5] [--contender NAME ...]

The floor is the student head's three matrix products (logits, gradient of the rows, gradient of the head) and one logsumexp over the
whole logits, nothing in chunks. Every loss is forward KL on the K tokens and the rest unless its name says otherwise, mixed half and
half with cross-entropy. Times are CPU seconds of one thread, every contender once a round in one process, median of the ratios to the
floor of the same round. Peaks are the kernel's high-water mark of a fresh process for each contender, less what stood before the
measured step. Peers that are not installed are left out.
"""

import os
from types import SimpleNamespace

from measuring import print_ratios

os.environ.setdefault("OMP_NUM_THREADS", "1")
SHAPES = {
    "f32-32k": ("float32", 2048, 32000, 64), "f32-32k-k100": ("float32", 2048, 32000, 100), "bf16-32k": ("bfloat16", 2048, 32000, 64),
    "f32-128k": ("float32", 2048, 128256, 64), "f32-152k": ("float32", 2048, 151936, 64),
}
WIDTH = 512
OURS = ["ours forward_kl", "ours forward_kl compiled", "ours jsd", "ours reverse_kl"]
PEERS = ["gather", "gather chunked", "dense from sparse", "trl"]


def inputs(shape: str):
    """Logits of about the spread that a language model's have; a teacher of its own for each row, K of its tokens kept."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, num_rows, vocabulary, k = SHAPES[shape]
    dtype = getattr(torch, name)
    hidden = torch.randn(num_rows, WIDTH).to(dtype)
    weight = (torch.randn(vocabulary, WIDTH) * (2.5 / WIDTH**0.5)).to(dtype)
    targets = torch.randint(0, vocabulary, (num_rows,))
    kept, ids, tail = torch.empty(num_rows, k), torch.empty(num_rows, k, dtype=torch.long), torch.empty(num_rows)
    for row in range(num_rows):
        log_probs = (torch.randn(vocabulary) * 2.5).log_softmax(-1)
        kept[row], ids[row] = log_probs.topk(k)
        tail[row] = torch.log1p(-kept[row].exp().sum())
    return hidden.requires_grad_(), weight.requires_grad_(), ids, kept, tail, targets


def gather(hidden, weight, ids, kept, tail, targets):
    """From the whole log-softmax."""
    import torch

    log_probs = (hidden @ weight.T).float().log_softmax(-1)
    on_ids = log_probs.gather(-1, ids)
    student = torch.cat([on_ids, torch.log1p(-on_ids.exp().sum(-1, keepdim=True))], -1)
    teacher = torch.cat([kept, tail[:, None]], -1)
    return 0.5 * torch.nn.functional.nll_loss(log_probs, targets) + 0.5 * (teacher.exp() * (teacher - student)).sum(-1).mean()


def dense_from_sparse(hidden, weight, ids, kept, tail, targets):
    """As DistillKit is described to do with a missing tail: spread evenly over the other tokens, then the usual dense loss."""
    import torch

    logits = (hidden @ weight.T).float()
    rest = weight.shape[0] - ids.shape[1]
    teacher = (tail[:, None] - torch.tensor(float(rest)).log()).expand(-1, weight.shape[0]).scatter(-1, ids, kept)
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
    return 0.5 * torch.nn.functional.cross_entropy(logits, targets) + 0.5 * divergence


def trl(hidden, weight, ids, kept, targets):
    """Its loss for a teacher behind a server, with the tail; it mixes in no cross-entropy."""
    from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer as Trainer

    loss = Trainer._compute_server_forward_kl_loss
    trainer = SimpleNamespace(loss_add_tail=True, _reduce_divergence_loss=Trainer._reduce_divergence_loss)
    answer = {"topk_logprobs": kept[None], "topk_token_ids": ids[None]}
    return getattr(loss, "__wrapped__", loss)(trainer, answer, (hidden @ weight.T)[None].log_softmax(-1), targets[None])


def ours(rest: str, hidden, weight, ids, kept, tail, targets):
    from potstill.head import Head
    from potstill.objectives.execution import Execution
    from potstill.objectives.fused import fused_loss
    from potstill.signals import TopKOutcomes

    divergence, _, mode = rest.partition(" ")
    loss = fused_loss(
        hidden, Head(weight), TopKOutcomes(ids, kept, tail), targets, divergence=divergence, kd_ratio=0.5, support="top_k_tail",
        execution=Execution(compile="on" if mode == "compiled" else "off"),
    )  # fmt: skip
    return loss.total / len(targets)


def contender(name: str, tensors):
    """A function of no arguments that makes one loss and its gradients."""
    import torch

    hidden, weight, ids, kept, tail, targets = tensors
    kind, _, rest = name.partition(" ")

    def floor():
        with torch.no_grad():
            logits = hidden @ weight.T
            torch.logsumexp(logits, -1)
            _ = logits @ weight, logits.T @ hidden

    def chunked():
        for part in torch.arange(len(targets)).chunk(8):
            (gather(hidden[part], weight, ids[part], kept[part], tail[part], targets[part]) / 8).backward()
        hidden.grad = weight.grad = None

    if name == "floor":
        return floor
    if name == "gather chunked":
        return chunked
    losses = {
        "gather": lambda: gather(*tensors), "dense from sparse": lambda: dense_from_sparse(*tensors),
        "trl": lambda: trl(hidden, weight, ids, kept, targets),
    }
    loss = losses[name] if name in losses else lambda: ours(rest, *tensors)
    if name not in losses and kind != "ours":
        raise ValueError(f"no contender {name!r}")

    def run():
        loss().backward()
        hidden.grad = weight.grad = None

    return run


def available(names: list[str]) -> list[str]:
    from importlib.util import find_spec

    return [name for name in names if name != "trl" or find_spec("trl")]


def made(shape: str, names) -> dict:
    tensors = inputs(shape)
    return {name: contender(name, tensors) for name in names}


if __name__ == "__main__":
    every = [*OURS, *PEERS]
    print_ratios(__doc__, SHAPES, ["f32-32k"], lambda asked: available(asked or every), made)

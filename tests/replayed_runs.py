"""A whole run of a second on a replay buffer, with plain text beside: what one process does and what two ranks do, in one place.

As a script, `torchrun ... replayed_runs.py FOLDER`, it leaves the weights, the last checkpoint and each rank's state there.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from small_runs import STOPS, VOCABULARY, Run, examples, make_student, make_teacher, opened, weights

# Windows of 4, the last of an epoch short. A step so long that the validation loss does not only fall: the threshold must move.
RUN = Run(num_examples=14, num_validation=4).but(
    batch_size=2, accumulation=2, epochs=None, steps=12, save_steps=3, eval_steps=2, learning_rate=0.05, scheduler="constant_with_warmup"
)
REPLAY = {"capacity": 7, "start": 0.6, "rise": 0.2, "margin": 0.065}
NEW_TOKENS = 8
# What two ranks do.
RANKS = {"ddp": RUN, "fsdp": RUN.but(fsdp=True)}


def make_parts(run: Run, ranks, replay=None):
    """(distiller, teacher, rows, author, beside). Deterministic."""
    from potstill.batch import Example
    from potstill.objectives.distribution import DistributionMatching
    from potstill.objectives.likelihood import Likelihood
    from potstill.rollouts.config import ReplayConfig, TextConfig
    from potstill.rollouts.endings import Endings
    from potstill.rollouts.local import LocalGenerator
    from potstill.rollouts.prompts import Prompts
    from potstill.rollouts.replay import ReplayAuthor
    from potstill.rollouts.writer import Writer
    from potstill.rollouts.writing import Sampling
    from potstill.training.beside import make_beside
    from potstill.training.distiller import Distiller

    def skew(kd_ratio):
        return DistributionMatching(
            divergence="skew_forward_kl", parameters={"alpha": 0.1}, kd_ratio=kd_ratio, reduction=run.reduction, vocabulary_size=VOCABULARY
        )

    distiller = Distiller(
        make_student(run.student, run.dropout),
        {"dataset": skew(0.5), "student": skew(1.0), "text": Likelihood(vocabulary_size=VOCABULARY)},
    )
    rows, teacher = examples(run.num_examples), make_teacher()
    agree = (lambda more: ranks.largest([more])[0] > 0) if run.config().fsdp and ranks.world_size > 1 else None
    generator = LocalGenerator(distiller.student, stop_ids=STOPS, pad_token=0, batch_size=3, agree=agree)
    writer = Writer(
        Prompts(rows, max_tokens=64, max_new_tokens=NEW_TOKENS), generator, Sampling(max_new_tokens=NEW_TOKENS), Endings(STOPS),
        seed=run.seed, by="student", group=ranks, keep_texts=1, decode=str,
    )  # fmt: skip
    config = ReplayConfig(**(REPLAY | (replay or {})))
    author = ReplayAuthor(writer, None, config, seed=run.seed, num_steps=run.config().steps, group=ranks)
    texts = [Example(text.tokens, [False] + [True] * (len(text.tokens) - 1), text.index) for text in examples(9, seed=55)]
    beside = make_beside(texts, TextConfig(path="texts.txt", weight=0.25), run.config(), seed=run.seed, pad_token=0)
    return distiller, teacher, rows, author, beside


def execute(path: Path, *, run: Run = RUN, replay=None, writer: bool = True, text: bool = True):
    """The run, from the start or from where it was broken off. Returns (distiller, author, summary)."""
    from potstill.recipes.assemble import join_ranks
    from potstill.training.trainer import train

    distiller, teacher, rows, author, beside = make_parts(run, join_ranks(), replay)
    with opened(path, run, writer) as folder:
        summary = train(
            distiller, teacher, rows, examples(run.num_validation, seed=77), run.config(), folder, seed=run.seed, pad_token=0, quiet=True,
            author=author, beside=beside if text else None,
        )  # fmt: skip
    return distiller, author, summary


def plain(author) -> dict:
    """The state of an author as JSON values."""
    tensors, numbers = author.state()
    return {**numbers, **{name: tensor.tolist() for name, tensor in tensors.items()}}


if __name__ == "__main__":
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name, run in RANKS.items():
        trained, memory, _ = execute(folder / name, run=run, writer=rank == 0)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(plain(memory)))
        found = weights(trained)
        if rank == 0:
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / f"{name}.safetensors")

"""Whole training runs of a second: real models, real trainer, real run folders, made from one description each.

Used by the tests of training and by the script that several ranks run.
"""

import contextlib
import hashlib
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny import tiny_llama

VOCABULARY, WIDTH = 320, 32
LORA = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]}


def examples(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 21):
    """Sequences of unequal lengths; the first third of each is a prompt. Numbered from 0."""
    from potstill.batch import Example

    numbers = random.Random(seed)
    made = []
    for index in range(count):
        length = numbers.randint(shortest, longest)
        tokens = [numbers.randrange(3, VOCABULARY) for _ in range(length)]
        made.append(Example(tokens, [place >= length // 3 for place in range(length)], index))
    return made


@dataclass(frozen=True)
class Run:
    """What is trained and how; `training` holds keys of the recipe."""

    student: str = "plain"
    divergence: str | None = "forward_kl"   # None: no teacher, learning from text
    kd_ratio: float = 0.5
    reduction: str = "token_mean"
    dropout: float = 0.0
    num_examples: int = 22
    num_validation: int = 0
    packed_tokens: int | None = None
    seed: int = 3
    author: str | None = None               # who writes: student | teacher | teacher_mixed | mixture | pair; None: the data set
    share: float = 0.5                      # of a mixture
    rewarded: bool = False
    training: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> "Run":
        """With other keys of the recipe's training section."""
        return replace(self, training={**self.training, **changes})

    def config(self):
        from potstill.training.config import TrainingConfig

        defaults = {
            "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2, "scheduler": "linear", "warmup_steps": 1, "weight_decay": 0.01,
            "precision": "float32", "save_steps": 2, "logging_steps": 1,
            # Large, so that AdamW does not blow up a rounding error of a gradient that is nearly zero into a step.
            "adam_epsilon": 1e-3,
        }
        given = {**defaults, **self.training}
        return TrainingConfig(**given) if "epochs" in given or "steps" in given else TrainingConfig(**given, epochs=2)


def make_student(kind: str, dropout: float = 0.0):
    """plain | tied | lora | lora_head (an adapter on the head too) | saved_head (head trained whole beside an adapter) | checkpointed."""
    from potstill.models.adapters import add_lora
    from potstill.models.causal_lm import CausalLM
    from potstill.models.config import LoraConfig

    model: Any = tiny_llama(0, width=WIDTH, tied=kind in ("tied", "tied_checkpointed"), attention_dropout=dropout)
    if kind.startswith("lora") or kind == "saved_head":
        settings: dict[str, Any] = {**LORA, "dropout": dropout}
        if kind == "lora_head":
            settings["targets"] = [*settings["targets"], "lm_head"]
        if kind == "saved_head":
            settings["modules_to_save"] = ["lm_head"]
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = add_lora(model, LoraConfig(**settings))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # a new adapter is zero, and a zero hides mistakes
                    torch.nn.init.normal_(parameter, std=0.02)
    if kind.endswith("checkpointed"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return CausalLM(model, VOCABULARY)


def make_distiller(run: Run):
    from potstill.objectives.distribution import DistributionMatching
    from potstill.objectives.likelihood import Likelihood
    from potstill.objectives.policy import PolicyGradient
    from potstill.training.distiller import Distiller

    student = make_student(run.student, run.dropout)
    if run.divergence is None:
        return Distiller(student, Likelihood(reduction=run.reduction, vocabulary_size=VOCABULARY))

    def matching(kd_ratio: float):
        return DistributionMatching(divergence=run.divergence, kd_ratio=kd_ratio, reduction=run.reduction, vocabulary_size=VOCABULARY)

    if run.author is None:
        return Distiller(student, matching(run.kd_ratio))
    own = matching(1.0)
    if run.rewarded:
        own = PolicyGradient(divergence=run.divergence, reward_weight=0.1, ratio="none", vocabulary_size=VOCABULARY)
    return Distiller(student, {"dataset": matching(run.kd_ratio), "teacher": matching(run.kd_ratio), "student": own})


def make_teacher():
    from potstill.models.causal_lm import CausalLM
    from potstill.teachers.local import LocalTeacher

    return LocalTeacher(CausalLM(tiny_llama(9, width=48, layers=1), VOCABULARY))


# An eighth of the ids, so that a model that knows nothing ends its answers, at very unequal lengths.
STOPS, NEW_TOKENS = (2, *range(200, 240)), 12


def make_author(run: Run, student, teacher, ranks, rows):
    """The author that `run` names, writing in this process. `rows` are what prompts are taken from."""
    from potstill.rollouts.authors import MixtureAuthor, OneAuthor
    from potstill.rollouts.config import PairConfig, WatchConfig
    from potstill.rollouts.endings import Endings
    from potstill.rollouts.local import LocalGenerator
    from potstill.rollouts.pairs import PairAuthor
    from potstill.rollouts.prompts import Prompts
    from potstill.rollouts.watch import Watch
    from potstill.rollouts.writer import Writer
    from potstill.rollouts.writing import Sampling

    agree = (lambda more: ranks.largest([more])[0] > 0) if run.config().fsdp and ranks.together else None
    prompts = Prompts(rows, max_tokens=64, max_new_tokens=NEW_TOKENS)

    def writer(by, model, **more):
        generator = LocalGenerator(model, stop_ids=STOPS, pad_token=0, batch_size=3, agree=agree, **more)
        reward = (lambda row, completion: float(len(completion.tokens) + row % 3)) if run.rewarded and by == "student" else None
        return Writer(
            prompts, generator, Sampling(max_new_tokens=NEW_TOKENS), Endings(STOPS), seed=run.seed, by=by, group=ranks, reward=reward,
            watch=Watch(WatchConfig()), keep_texts=2, decode=str,
        )  # fmt: skip

    if run.author == "teacher":
        return OneAuthor("teacher", writer("teacher", teacher.causal_lm))
    if run.author == "teacher_mixed":
        return OneAuthor("student", writer("student", student, teacher=teacher.causal_lm, teacher_share=0.4))
    if run.author == "pair":
        return PairAuthor(writer("student", student), writer("teacher", teacher.causal_lm), PairConfig(student_weight=0.7), num_steps=1)
    if run.author == "mixture":
        return MixtureAuthor(writer("student", student), None, run.share, run.seed)
    return OneAuthor("student", writer("student", student))


def weights(distiller) -> dict[str, Tensor]:
    """Trained parameters, whole and on the CPU, on every rank."""
    from potstill.training.state import weights as trained

    return trained(distiller)


def digest(tensors: dict[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest()


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference of any two weights."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


@contextlib.contextmanager
def opened(path: Path, run: Run, writer: bool = True):
    from potstill.run_folder import RunFolder

    config = run.config()
    recipe = {"run": {"folder": str(path), "seed": run.seed}, "training": config.model_dump(mode="json")}
    folder = RunFolder.open(path, recipe, writer=writer)
    try:
        yield folder
    finally:
        folder.close()


def execute(run: Run, path: Path, *, distiller=None, writer: bool = True):
    """The whole run, from the start or from where it was broken off. Returns (distiller, summary)."""
    from potstill.recipes.assemble import join_ranks
    from potstill.training.trainer import train

    distiller = distiller or make_distiller(run)
    teacher = None if run.divergence is None else make_teacher()
    rows = examples(run.num_examples)
    validation = examples(run.num_validation, seed=77) if run.num_validation else None
    author = make_author(run, distiller.student, teacher, join_ranks(), rows) if run.author else None
    with opened(path, run, writer) as folder:
        summary = train(
            distiller, teacher, rows, validation, run.config(), folder,
            seed=run.seed, pad_token=0, packed_tokens=run.packed_tokens, quiet=True, author=author,
        )  # fmt: skip
    return distiller, summary

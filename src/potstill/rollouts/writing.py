"""The nouns of this room: a prompt, how it is answered, the answer, and whoever writes it. They know no model and no recipe."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn from a writer's logits; `rollouts.config.SamplingConfig` says it in a recipe."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Prompt:
    """What is answered. `seed` alone decides what is drawn: equal seeds, weights and tokens give equal answers, whoever is beside."""

    tokens: tuple[int, ...]
    seed: int
    teacher_tokens: tuple[int, ...] | None = None
    """What the teacher reads in its place, where that differs and the teacher takes part in the writing."""


@dataclass(frozen=True)
class Completion:
    """What was written: its ids, the one that ended it included, and the log-probability of each under what it was drawn from.

    `log_probs` are of the distribution after temperature and truncation (and of the mixture, where a teacher took part), so that a
    ratio to them corrects for all of these. `version` is the number of optimizer steps that the writer's weights had seen.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool
    """By an end-of-text token; otherwise it was cut at the limit."""
    version: int = 0


class Generator(Protocol):
    """Answers prompts. `name` is for messages."""

    @property
    def name(self) -> str: ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in their order. Where ranks share a model all of them call it, with or without prompts."""
        ...

    def refresh(self, step: int) -> None:
        """The student has taken `step` optimizer steps: give its weights to whoever writes elsewhere."""
        ...

    def heed(self, check: Callable[[], None]) -> None:
        """`check` is called several times a second while text is written; what it raises ends the writing."""
        ...

    def close(self) -> None: ...


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits from several numbers, such as (seed, step, row)."""
    digest = hashlib.blake2b(("write," + ",".join(map(str, numbers))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(*numbers: int) -> float:
    """A number in [0, 1) that is a function of these: what is drawn once for all ranks, and again after a resume."""
    digest = hashlib.blake2b(("draw," + ",".join(map(str, numbers))).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53

"""Row numbers go in, examples with a written answer come out: prompts, a generator and the rules of endings, joined.

What is drawn for a row is a function of (seed, step, row) and the weights, so that neither batches nor ranks nor a break change it.
It knows no optimizer and no objective.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from potstill.batch import Example
from potstill.errors import NonFiniteError
from potstill.rollouts.author import Alone, Group
from potstill.rollouts.endings import Endings
from potstill.rollouts.prompts import PromptRow, Prompts
from potstill.rollouts.watch import Tally, Watch
from potstill.rollouts.writing import Completion, Generator, Prompt, Sampling, seed_of

# What a task gives for an answer: row number, completion -> reward.
Reward = Callable[[int, Completion], float]
Decode = Callable[[Sequence[int]], str]


class Writer:
    """Writes answers of one kind: the student's (with the log-probability of each token, so that ratios to it can be taken) or the
    teacher's (text alone; behind the teacher's own prompt where a row has one).

    `reward` gives each answer a number; an example gets it less the mean over the other answers of the same optimizer step, of all
    ranks of `group`. `keep_texts` answers of a step are kept for the run folder, put into words by `decode`.
    """

    def __init__(
        self, prompts: Prompts, generator: Generator, sampling: Sampling, endings: Endings, *, seed: int, by: Literal["student", "teacher"],
        reward: Reward | None = None, group: Group | None = None, watch: Watch | None = None, keep_texts: int = 0,
        decode: Decode | None = None,
    ):  # fmt: skip
        self.prompts, self.generator, self.sampling, self.endings = prompts, generator, sampling, endings
        self._seed, self._by = seed, by
        self._reward, self._group, self._watch = reward, group or Alone(), watch
        self._keep_texts, self._decode = keep_texts if decode is not None else 0, decode or str
        self._fresh, self._line = Tally(), Tally()    # of the step in progress; since the last line of the log
        self._fresh_texts: list[dict[str, Any]] = []
        self._texts: list[dict[str, Any]] = []
        self._refreshed: int | None = None

    # ------------------------------------------------------------ writing

    def write(self, rows: Sequence[int], step: int) -> list[Example]:
        """One example a row, in their order, written with the weights after `step` optimizer steps. Every rank of a step calls it once."""
        began = time.monotonic()
        self.refresh(step)
        found = [self.prompts[row] for row in rows]
        completions = self.generator.generate([self._prompt(*pair, step) for pair in zip(rows, found, strict=True)], self.sampling)
        rewards = [self._reward(row, completion) for row, completion in zip(rows, completions, strict=True)] if self._reward else None
        baselines = self._others(rewards)
        self._fresh, self._fresh_texts = Tally(writings=1.0), []
        written = []
        for place, (row, completion) in enumerate(zip(found, completions, strict=True)):
            self._check(row, completion)
            reward = None if rewards is None else rewards[place]
            written.append(self._example(row, completion, None if reward is None else reward - baselines[place]))
            self._fresh.count(completion, foreign=self.endings.is_foreign(completion), step=step, reward=reward)
            if place < self._keep_texts:
                self._fresh_texts.append(self._text(row, completion, reward))
        self._fresh.seconds = time.monotonic() - began
        return written

    def _prompt(self, row: int, prompt: PromptRow, step: int) -> Prompt:
        seed = seed_of(self._seed, step, row)
        if self._by == "teacher":
            return Prompt(prompt.teacher_tokens or prompt.tokens, seed_of(seed, 1))
        return Prompt(prompt.tokens, seed, prompt.teacher_tokens)

    def _others(self, rewards: list[float] | None) -> list[float]:
        """For each of this rank's answers the mean reward of all other answers of the step; its own where it is the only one."""
        if rewards is None:
            return []
        every = np.concatenate(self._group.gather(np.array(rewards, dtype=np.float64)))
        if len(every) < 2:
            return rewards
        total = math.fsum(every)  # exact, so that it does not depend on who wrote which
        return [(total - reward) / (len(every) - 1) for reward in rewards]

    def _check(self, row: PromptRow, completion: Completion) -> None:
        if len(completion.log_probs) != len(completion.tokens) or not all(map(math.isfinite, completion.log_probs)):
            raise NonFiniteError(
                f"{row.origin}: the answer of {self.generator.name} has no finite log-probability for each of its {len(completion.tokens)} "
                "tokens; its weights or its numbers are broken"
            )

    def _example(self, row: PromptRow, completion: Completion, reward: float | None) -> Example:
        length = len(row.tokens)
        return Example(
            [*row.tokens, *completion.tokens], [False] * length + self.endings.marks(completion), row.index, row.origin, row.route,
            log_probs=[0.0] * length + list(completion.log_probs) if self._by == "student" else None, reward=reward,
            teacher_prompt=None if row.teacher_tokens is None else list(row.teacher_tokens), prompt_length=length,
        )  # fmt: skip

    def _text(self, row: PromptRow, completion: Completion, reward: float | None) -> dict[str, Any]:
        said = {"by": self._by, "example": row.index, "prompt": self._decode(row.tokens), "answer": self._decode(completion.tokens)}
        numbers = {"tokens": len(completion.tokens), "ended": completion.ended, "log_prob": sum(completion.log_probs)}
        return {**said, **numbers} if reward is None else {**said, **numbers, "reward": reward}

    # ------------------------------------------------------------ around a step

    def refresh(self, step: int) -> None:
        """The student has taken `step` steps. `write` calls it: whoever writes elsewhere gets weights only where it will write."""
        if self._refreshed != step:
            self.generator.refresh(step)
            self._refreshed = step

    def step_done(self) -> None:
        """The step was taken on what was written last, or on other text where nothing was."""
        self._line, self._texts = self._line.plus(self._fresh), self._fresh_texts
        self._fresh, self._fresh_texts = Tally(), []

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last call, over all ranks, by their names in the log; empty where nothing was written."""
        line, self._line = Tally.of(self._group.sum(self._line.numbers)), Tally()
        if not line.answers:
            return {}
        means = line.means()
        if self._watch is not None:
            self._watch.look(means, say=self._group.rank == 0)
        return {f"rollouts/{name}" if self._by == "student" else f"rollouts/teacher/{name}": value for name, value in means.items()}

    def texts(self) -> list[dict[str, Any]]:
        """The answers that were kept of the last step that is done; none where it was taken on other text."""
        return self._texts

    def state(self) -> dict[str, Any]:
        """JSON numbers, as of the last `step_done`. Every rank calls it."""
        return {"line": self._group.sum(self._line.numbers), "watch": self._watch.state() if self._watch else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self._group.rank == 0 and "line" in state:  # sums over all ranks stand with the first
            self._line = Tally.of(state["line"])
        if self._watch is not None:
            self._watch.restore(state.get("watch") or {})

    def heed(self, check: Callable[[], None]) -> None:
        self.generator.heed(check)

    def close(self) -> None:
        self.generator.close()

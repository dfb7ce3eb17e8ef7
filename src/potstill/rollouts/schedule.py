"""DistiLLM's schedule (2402.03898, section 3.2): how often a step is taken on the student's text, and how often that text is fresh.

Numbers alone: it knows no text and no buffer but for whether that is full.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from potstill.rollouts.config import ReplayConfig
from potstill.rollouts.writing import uniform

Branch = Literal["fresh", "replayed", "others"]


class Schedule:
    """A threshold, the probability of the student's text, that rises when the cross-entropy on the validation set does.

    The first validation sets the level that later ones are held against; a worse one raises the threshold and becomes the level, and a
    better one changes nothing. With the schedule `constant` the threshold stays, and half of the student's steps are fresh.
    """

    def __init__(self, config: ReplayConfig, *, seed: int, num_steps: int):
        self._config, self._seed, self._num_steps = config, seed, max(num_steps, 1)
        self.threshold = config.start
        self.level: float | None = None

    def validated(self, loss: float) -> None:
        """A loss that is not finite says nothing: as a level, nothing would ever be worse."""
        if self._config.schedule == "constant" or not math.isfinite(loss):
            return
        if self.level is None:
            self.level = loss
        elif loss >= self.level + self._config.margin:
            self.threshold, self.level = min(self.threshold + self._config.rise, 1.0), loss

    def fresh_threshold(self, step: int) -> float:
        """Below it the step after `step` steps is taken on fresh text."""
        return self.threshold * (0.5 if self._config.schedule == "constant" else max(1.0 - step / self._num_steps, 0.0))

    def branch(self, step: int, *, buffer_full: bool) -> Branch:
        """What the step after `step` steps is taken on: a function of (seed, step), the threshold, and whether the buffer is full."""
        drawn = uniform(self._seed, step)
        if drawn >= self.threshold:
            return "others"
        return "fresh" if drawn < self.fresh_threshold(step) or not buffer_full else "replayed"

    def state(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "level": self.level}

    def restore(self, numbers: Mapping[str, Any]) -> None:
        if numbers:
            self.threshold, self.level = float(numbers["threshold"]), numbers["level"]

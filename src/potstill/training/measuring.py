"""What a run measures of itself between two lines of its log: losses, tokens a second, memory. Sums stay on the device until asked."""

import resource
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


def peak_gib(device: torch.device) -> float:
    """Highest memory so far: of the device's allocator, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


@dataclass
class Parts:
    """Means over the steps since the last line."""

    losses: list[float]
    tokens_per_second: float


@dataclass
class Measures:
    """Sums since the last line of the log (`_line`) and of the step in progress (`_step`): total, cross-entropy, divergence."""

    window_targets: float = 0.0
    window_tokens: int = 0
    _step: list[Tensor] = field(default_factory=list)
    _line: list[Tensor] = field(default_factory=list)
    _steps: int = 0
    _tokens: int = 0
    _since: float = field(default_factory=time.monotonic)

    def begin_window(self, targets: float, tokens: int) -> None:
        self.window_targets, self.window_tokens = targets, tokens
        self._step = []

    def add(self, *losses: Tensor) -> None:
        self._step = [a + b for a, b in zip(self._step, losses, strict=True)] if self._step else list(losses)

    @property
    def step_total(self) -> Tensor | float:
        """This rank's part of the loss of the step in progress."""
        return self._step[0] if self._step else 0.0

    def forget_step(self) -> None:
        """The step was not taken: its loss must not spoil the mean."""
        self._step = []

    def end_step(self) -> None:
        if self._step:
            self._line = [a + b for a, b in zip(self._line, self._step, strict=True)] if self._line else list(self._step)
            self._steps += 1
        self._step = []
        self._tokens += self.window_tokens

    def pause(self, seconds: float) -> None:
        """Time that training did not have, such as an evaluation's."""
        self._since += seconds

    def take(self) -> Parts:
        seconds = max(time.monotonic() - self._since, 1e-9)
        losses = [float(value) / self._steps for value in self._line] if self._line else [float("nan")] * 3
        parts = Parts(losses, self._tokens / seconds)
        self._line, self._steps, self._tokens, self._since = [], 0, 0, time.monotonic()
        return parts

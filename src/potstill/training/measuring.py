"""What a run measures of itself between two lines of its log: losses, tokens a second, memory. Sums stay on the device until asked."""

import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from potstill.training.processes import Ranks


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
    seconds_per_step: float
    streams: dict[str, tuple[float, int]]
    """By stream: the sum of its mean losses, and the steps that had it."""

    def by_stream(self, ranks: Ranks) -> dict[str, float]:
        """The mean loss of each stream over the steps that had it, before its weight. Every rank calls it."""
        totals = ranks.sum([total for total, _ in self.streams.values()])
        steps = [steps * ranks.world_size for _, steps in self.streams.values()]
        return {f"loss/{name}": total / count for name, total, count in zip(self.streams, totals, steps, strict=True)}


@dataclass
class Measures:
    """Sums since the last line of the log (`_line`) and of the step in progress (`_step`): total, cross-entropy, divergence."""

    window_targets: float = 0.0
    window_tokens: int = 0
    refused: bool = False
    """Whether the step in progress was found not to be finite, and is not taken."""
    _step: list[Tensor] = field(default_factory=list)
    _line: list[Tensor] = field(default_factory=list)
    _streams: dict[str, Tensor | float] = field(default_factory=dict)
    _streams_of_line: dict[str, tuple[Tensor | float, int]] = field(default_factory=dict)
    _steps: int = 0
    _ended: int = 0
    """Steps since the last line, with those that were refused."""
    _tokens: int = 0
    _since: float = field(default_factory=time.monotonic)

    def begin_window(self, targets: float, tokens: int, streams: Iterable[str] = ()) -> None:
        """`streams` are those with a target on any rank: alike on all."""
        self.window_targets, self.window_tokens, self.refused = targets, tokens, False
        self._step, self._streams = [], dict.fromkeys(streams, 0.0)

    def add(self, *losses: Tensor, stream: str = "", weight: float = 1.0) -> None:
        """Losses of a micro-batch, each divided by the count of the whole step; `weight` is what they were multiplied by."""
        if stream in self._streams:
            self._streams[stream] = self._streams[stream] + losses[0] / weight
        self._step = [a + b for a, b in zip(self._step, losses, strict=True)] if self._step else list(losses)

    @property
    def step_total(self) -> Tensor | float:
        """This rank's part of the loss of the step in progress."""
        return self._step[0] if self._step else 0.0

    def forget_step(self) -> None:
        """The step was not taken: its loss must not spoil the mean."""
        self._step, self._streams, self.refused = [], {}, True

    def end_step(self) -> None:
        if self._step:
            self._line = [a + b for a, b in zip(self._line, self._step, strict=True)] if self._line else list(self._step)
            self._steps += 1
        for stream, total in self._streams.items():
            former, steps = self._streams_of_line.get(stream, (0.0, 0))
            self._streams_of_line[stream] = (former + total, steps + 1)
        self._step, self._streams = [], {}
        self._tokens += self.window_tokens
        self._ended += 1

    def pause(self, seconds: float) -> None:
        """Time that training did not have, such as an evaluation's."""
        self._since += seconds

    def take(self) -> Parts:
        seconds = max(time.monotonic() - self._since, 1e-9)
        losses = [float(value) / self._steps for value in self._line] if self._line else [float("nan")] * 3
        streams = {stream: (float(total), steps) for stream, (total, steps) in sorted(self._streams_of_line.items())}
        parts = Parts(losses, self._tokens / seconds, seconds / max(self._ended, 1), streams)
        self._line, self._streams_of_line, self._since = [], {}, time.monotonic()
        self._steps = self._ended = self._tokens = 0
        return parts

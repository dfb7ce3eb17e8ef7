"""When a training state is committed and how it is put back: the join of state.py (tensors and numbers) and checkpoint.py (bytes).

Also the progress of a run, which a checkpoint carries. It knows no data and no loss.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from potstill import storage
from potstill.errors import IncompatibleError
from potstill.run_folder import NON_FINITE, RunFolder
from potstill.training import checkpoint, state
from potstill.training.checkpoint import CheckpointState
from potstill.training.order import Window
from potstill.training.processes import Ranks


@dataclass
class Progress:
    """How far a run has come. All of it is JSON and stands in every checkpoint."""

    step: int = 0
    epoch: float = 0.0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    non_finite_steps: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    evaluation_pending: bool = False

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> "Progress":
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in numbers.items() if name in known})


class Kept(Protocol):
    """A part of a run, beside the student and the optimizer, whose state must survive a break."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors on the CPU, and JSON numbers. Every rank calls it; the first one's counts."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None: ...


@dataclass
class Saver:
    """Commits and restores through a run folder. `fingerprints` must be equal when a run is resumed, but for those `overridden`."""

    folder: RunFolder
    ranks: Ranks
    fingerprints: dict[str, Any]
    keep: int
    progress: Progress = field(default_factory=Progress)
    found: CheckpointState | None = None
    committed: int | None = None
    resumed_from: int | None = None
    kept: dict[str, Kept] = field(default_factory=dict)
    overridden: Collection[str] = ()
    _clock: float = field(default_factory=time.monotonic)

    # ------------------------------------------------------------ at the start

    def look_for_checkpoint(self) -> list[str]:
        """Reads the newest whole checkpoint, if there is one. Returns what the user should be told.

        Raises IncompatibleError where the data, the order or the trained parameters differ from those of the run.
        """
        latest = checkpoint.latest_checkpoint(self.folder.checkpoints)
        notes = [f"passed over a torn checkpoint: {torn}" for torn in latest.torn]
        if latest.path is not None:
            self.found = checkpoint.load_checkpoint(latest.path)
            checkpoint.refuse_other(self.found.numbers["fingerprints"], self.fingerprints, self.overridden)
            self.progress = Progress.of(self.found.numbers["progress"])
            self.committed = self.resumed_from = self.progress.step
        # No rank may cut the logs back, or commit anew, while another still looks.
        self.ranks.wait()
        if self.ranks.first:
            redo = self.folder.cut_back(self.committed)
            if self.committed is not None:
                again = f"{redo} steps since then are done again" if redo else "no step was taken since then"
                notes.append(f"resuming at step {self.committed}; {again}")
        return notes

    # ------------------------------------------------------------ commit and restore

    def commit(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Commits the state after `progress.step`, unless that is done. Every rank must call it."""
        if self.committed == self.progress.step and not self.progress.evaluation_pending:
            return
        now = time.monotonic()
        self.progress.seconds, self._clock = self.progress.seconds + now - self._clock, now
        keep = self.ranks.first
        tensors = {"weights": state.weights(model, keep=keep)}
        numbers: dict[str, Any] = {"progress": asdict(self.progress), "fingerprints": self.fingerprints}
        if optimizer is not None:
            tensors["optimizer"], numbers["optimizer"] = state.optimizer_state(optimizer, model, keep=keep)
        for name, part in self.kept.items():
            tensors[name], numbers[name] = part.state()
        made = CheckpointState(tensors, state.plain(numbers))
        del tensors

        def write() -> None:
            self.folder.sync_logs()
            checkpoint.save_checkpoint(self.folder.checkpoints, self.progress.step, made, keep=self.keep, best=self.progress.best_step)

        self.ranks.on_first(write)
        self.committed = self.progress.step

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, scheduler: LambdaLR | None) -> None:
        """Puts the checkpoint that was found into a model, and into what trains it. The tensors are then let go."""
        assert self.found is not None
        state.restore_weights(model, self.found.tensors["weights"])
        if optimizer is not None and "optimizer" in self.found.numbers:
            numbers = state.restored(self.found.numbers["optimizer"])
            state.restore_optimizer(optimizer, model, self.found.tensors.get("optimizer", {}), numbers)
        for name, part in self.kept.items():
            part.restore(self.found.tensors.get(name, {}), self.found.numbers.get(name, {}))
        if scheduler is not None and optimizer is not None:
            _place_schedule(scheduler, optimizer, self.progress.step)
        self.found = None

    def forget_lost_best(self) -> list[str]:
        """The best evaluation counts only while its weights are there: a run without early stopping keeps the last ones alone.

        Returns what the user should be told.
        """
        best = self.progress.best_step
        if best in (None, self.progress.step):
            return []
        if not storage.verify_folder(checkpoint.checkpoint_path(self.folder.checkpoints, best)):
            return []
        self.progress.best_step, self.progress.best_loss, self.progress.evaluations_without_gain = None, None, 0
        return [f"the weights of step {best}, the best so far, are not kept any more; the best is looked for among what follows"]

    def restore_best(self, model: nn.Module) -> bool:
        """The weights of the best evaluation. False where no evaluation was better than the last."""
        if self.progress.best_step in (None, self.progress.step):
            return False
        path = checkpoint.checkpoint_path(self.folder.checkpoints, self.progress.best_step)
        state.restore_weights(model, checkpoint.load_checkpoint(path).tensors["weights"])
        return True

    # ------------------------------------------------------------ incidents

    def report_non_finite(self, window: Window, examples: list[int], loss: float, grad_norm: float) -> None:
        """Writes down which examples were in a step that was refused."""
        incident = {"step": window.step + 1, "epoch": window.epoch, "examples": examples, "loss": repr(loss), "grad_norm": repr(grad_norm)}
        if self.ranks.first:
            known = self.folder.read_refused_steps()
            # What a broken-off run wrote of steps that are done again is written again.
            self.folder.write_json(NON_FINITE, [*(former for former in known if former["step"] < incident["step"]), incident])


def _place_schedule(scheduler: LambdaLR, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Schedules are functions of the step, so the place in one is its number; a resumed run may end later than was planned."""
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, base, rate in zip(optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
        group["lr"], group["initial_lr"] = rate, base
    scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = step, step + 1, rates  # type: ignore[attr-defined]


def refuse_smaller(step: int, num_steps: int) -> None:
    """Raises IncompatibleError where a run that is to be resumed has already gone further than it should."""
    if step > num_steps:
        raise IncompatibleError(
            f"the run has already taken {step} steps, and the recipe now asks for {num_steps}; "
            f"ask for at least {step}, or --fresh starts over"
        )


def refuse_full_disk(saver: Saver, model: nn.Module) -> None:
    """Raises StorageError where the checkpoints that are to be kept, and the one being written, will not fit beside what is there.

    A checkpoint holds each trained weight three times: AdamW keeps two moments of it.
    """
    one = 3 * sum(parameter.numel() * parameter.element_size() for parameter in state.trainable_parameters(model).values())
    there = len(list(saver.folder.checkpoints.glob("step-*")))
    saver.ranks.on_first(lambda: storage.require_free(saver.folder.checkpoints, one * max(1, saver.keep + 1 - there)))

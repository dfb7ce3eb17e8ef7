"""The seam to transformers.Trainer, as thin as it goes: what a window of micro-batches is, what its loss is divided by, what is
saved and when a step is refused. The mathematics is in `objectives`, the order in order.py, the bytes in checkpoint.py.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from potstill.batch import Batch, Example
from potstill.errors import ConfigError, DataError, InterruptedRun, NonFiniteError, PotstillError
from potstill.run_folder import RunFolder
from potstill.signals import TeacherSignal
from potstill.teachers.teacher import Teacher
from potstill.training.arguments import training_arguments
from potstill.training.callbacks import BestEvaluation, MetricsToFolder, StepGuard
from potstill.training.config import TrainingConfig
from potstill.training.distiller import Distiller
from potstill.training.feeding import Rows
from potstill.training.interruption import SignalWatch
from potstill.training.measuring import Measures, peak_gib
from potstill.training.order import Division, GlobalOrder, MicroBatch, Window, mix
from potstill.training.processes import Ranks, launched_ranks
from potstill.training.saving import Progress, Saver, refuse_smaller

_log = logging.getLogger("potstill")


@dataclass(frozen=True)
class Feed:
    """Where the rows come from, and in which order."""

    order: GlobalOrder
    training: Rows
    validation: Rows | None


class DistillationTrainer(Trainer):
    """transformers.Trainer with the loss, the data order, the denominators and the checkpoints of Potstill.

    What is overridden: the window (`get_batch_samples`), the loss, evaluation, and everything that would write or read a pickle.
    """

    # The loss is divided by the count of the whole window, so the Trainer must not divide by the accumulation again.
    loss_is_scaled_for_ga = True

    def __init__(
        self, distiller: Distiller, teacher: Teacher | None, feed: Feed, args: TrainingArguments, *, config: TrainingConfig,
        ranks: Ranks, saver: Saver, watch: SignalWatch, callbacks: list[TrainerCallback],
    ):  # fmt: skip
        self.distiller, self.teacher, self.feed, self.config = distiller, teacher, feed, config
        self.ranks, self.folder, self.saver, self.watch = ranks, saver.folder, saver, watch
        self.progress = saver.progress
        self.needs = distiller.objective.needs
        self.window: Window = feed.order.window(self.progress.step)
        self.measures = Measures()
        self.grad_norm: float = math.nan
        super().__init__(distiller, args, train_dataset=feed.training, eval_dataset=feed.validation, callbacks=callbacks)

        self.remove_callback(PrinterCallback)

    def run(self) -> None:
        """Trains to the end, from the checkpoint that the saver has found where it has found one."""
        with TemporaryDirectory() as scratch:
            found = None
            if self.saver.found is not None:
                # The Trainer takes the place to go on from out of a file of its own; everything else is restored below.
                found, place = scratch, self.progress
                steps = {"logging_steps": self.args.logging_steps, "eval_steps": self.args.eval_steps, "save_steps": self.args.save_steps}
                TrainerState(global_step=place.step, epoch=place.epoch, **steps).save_to_json(str(Path(scratch) / TRAINER_STATE_NAME))
            try:
                self.train(resume_from_checkpoint=found)
            except PotstillError:
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise

    # ------------------------------------------------------------ a window of micro-batches

    def get_train_dataloader(self) -> DataLoader:
        """Only its length is used: the window of a step is a function of the step's number, see `get_batch_samples`."""
        turns = self.feed.order.steps_per_epoch * self.args.gradient_accumulation_steps
        return DataLoader(range(turns), batch_size=1, generator=torch.Generator())  # type: ignore[arg-type]

    def num_examples(self, dataloader: DataLoader) -> int:
        return self.feed.training.num_examples

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list, Any]:
        """This rank's micro-batches of the step that comes next, and the count that its loss is divided by."""
        if self.control.should_training_stop:
            return [], None
        self.stop_if_asked()
        self.window = self.feed.order.window(self.state.global_step)
        share = self.feed.order.share(self.window, self.ranks.rank, self.ranks.world_size)
        batches = [self.feed.training.batch(micro_batch.rows) for micro_batch in share]
        count = float(sum(self.distiller.objective.count(batch) for batch in batches))
        targets = float(sum(batch.num_targets for batch in batches))
        count, targets = self.ranks.sum([count, targets])
        self.measures.begin_window(targets, self.feed.training.num_tokens(self.window.rows))
        samples = [{"batch": batch, "micro_batch": micro_batch} for batch, micro_batch in zip(batches, share, strict=True)]
        return samples, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.stop_if_asked()
        micro_batch: MicroBatch = inputs["micro_batch"]
        if micro_batch.everywhere_empty:
            return torch.zeros((), device=self.args.device)
        # Dropout is a function of the micro-batch's number: the same after a resume and for any number of ranks.
        torch.manual_seed(mix(self.args.seed, micro_batch.number))
        return super().training_step(model, inputs, num_items_in_batch)

    def answer(self, batch: Batch) -> TeacherSignal:
        return TeacherSignal() if self.teacher is None else self.teacher.score(batch, self.needs)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch: Any = None):
        """total / count of the window. DDP and FSDP2 average gradients over ranks, where the sum is meant: hence the world size."""
        batch = inputs["batch"].to(self.args.device)
        total, cross_entropy, divergence = model(batch, self.answer(batch))
        scale = self.ranks.world_size / max(num_items_in_batch, 1.0)
        self.measures.add(total.detach() * scale, cross_entropy * scale, divergence * scale)
        return total * scale

    # ------------------------------------------------------------ before and after an optimizer step

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self.grad_norm = float(norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm)
        return norm

    def refuse_non_finite(self) -> None:
        """All ranks together look at the loss and the gradient of the step that is about to be taken, and leave it out if need be."""
        loss, grad_norm = (value / self.ranks.world_size for value in self.ranks.sum([float(self.measures.step_total), self.grad_norm]))
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        # Without gradients the optimizer leaves weights, moments and its count of steps alone.
        for parameter in self.distiller.parameters():
            parameter.grad = None
        self.measures.forget_step()
        examples = self.feed.training.example_numbers(self.window.rows)
        self.saver.report_non_finite(self.window, examples, loss, grad_norm)
        limit = 0 if self.config.non_finite == "stop" else self.config.non_finite.skip
        if self.progress.non_finite_steps >= limit:
            self.commit()
            raise NonFiniteError(
                f"step {self.window.step + 1}: the loss ({loss}) or the gradient (norm {grad_norm}) is not finite; the step was not taken "
                f"and the weights are those of step {self.state.global_step}. {self.folder.path / 'non_finite.json'} names the examples. "
                "Look at them, lower training.learning_rate, or set training.non_finite: {skip: n}"
            )
        self.progress.non_finite_steps += 1

    def step_done(self) -> None:
        self.progress.step, self.progress.epoch = self.state.global_step, float(self.state.epoch or 0.0)
        self.progress.tokens += self.measures.window_tokens
        self.progress.targets += int(self.measures.window_targets)
        self.measures.end_step()
        if self.ranks.first:
            self.folder.append_samples(self.state.global_step, self.window.epoch, self.feed.training.example_numbers(self.window.rows))

    # ------------------------------------------------------------ signals

    def stop_if_asked(self) -> None:
        """On a signal to any rank: all ranks commit the last completed step and leave."""
        number = int(self.ranks.largest([self.watch.received])[0])
        if not number:
            return
        self.commit()
        raise InterruptedRun(
            f"interrupted at step {self.progress.step} of {self.state.max_steps or self.args.max_steps}; everything up to it is "
            "committed, and the same command goes on from there", number,
        )  # fmt: skip

    # ------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss on the validation set, in nats a target (of the whole set, over all ranks): total, cross-entropy, divergence."""
        assert self.feed.validation is not None
        self.progress.evaluation_pending = True
        began = time.monotonic()
        rows = self.feed.validation
        ordered = sorted(range(len(rows)), key=lambda row: (-rows.lengths[row], row))
        size, ranks = self.config.batch_size, self.ranks
        turns = range(math.ceil(len(ordered) / (size * ranks.world_size)))
        self.callback_handler.eval_dataloader = turns  # type: ignore[assignment]
        self.model_wrapped.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        for turn in turns:
            self.stop_if_asked()
            first = (turn * ranks.world_size + ranks.rank) * size
            batch = rows.batch(ordered[first : first + size])
            moved = batch.to(self.args.device)
            with torch.no_grad():
                parts = self.model_wrapped(moved, self.answer(moved))
            sums += torch.tensor([*(float(part) for part in parts), float(self.distiller.objective.count(batch))], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total, cross_entropy, divergence, count = ranks.sum(sums.tolist())
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1.0), f"{metric_key_prefix}_loss/ce": cross_entropy / max(count, 1.0)}
        if self.teacher is not None:
            metrics[f"{metric_key_prefix}_loss/kd"] = divergence / max(count, 1.0)
        metrics[f"{metric_key_prefix}_seconds"] = time.monotonic() - began
        self.progress.evaluation_pending = False
        self.measures.pause(metrics[f"{metric_key_prefix}_seconds"])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------ logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the loss is made of and how fast it goes; the Trainer's own closing line is left out."""
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            parts = self.measures.take()
            total, cross_entropy, divergence = (value / self.ranks.world_size for value in self.ranks.sum(parts.losses))
            logs |= {"loss": total, "loss/ce": cross_entropy, "grad_norm": self.grad_norm}
            if self.teacher is not None:
                logs["loss/kd"] = divergence
            logs |= {"tokens_per_second": parts.tokens_per_second, "target_tokens": float(self.progress.targets)}
            logs["peak_gib"] = self.ranks.largest([peak_gib(self.args.device)])[0]
            if self.progress.non_finite_steps:
                logs["non_finite_steps"] = float(self.progress.non_finite_steps)
        super().log(logs)

    # ------------------------------------------------------------ checkpoints: ours in the place of the Trainer's

    def commit(self) -> None:
        """Makes the state after the last completed step durable, unless it already is."""
        self.saver.commit(self.distiller, self.optimizer)

    def _save_checkpoint(self, model, trial=None) -> None:
        self.commit()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing: weights are restored with the optimizer's state, once the ranks have wrapped the model."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.saver.restore(self.distiller, self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: bfloat16 and float32 need no loss scale."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every micro-batch seeds the generators by its number."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0


@dataclass(frozen=True)
class TrainingSummary:
    """What a finished run says of its training. `best_loss` is of the validation set, in nats a target."""

    steps: int
    epochs: float
    seconds: float
    tokens: int
    target_tokens: int
    peak_gib: float
    resumed_from: int | None
    best_step: int | None
    best_loss: float | None
    stopped_early: bool
    non_finite_steps: int

    @classmethod
    def of(cls, progress: Progress, peak: float, resumed_from: int | None) -> "TrainingSummary":
        return cls(
            progress.step, progress.epoch, progress.seconds, progress.tokens, progress.targets, peak, resumed_from,
            progress.best_step, progress.best_loss, progress.stopped_early, progress.non_finite_steps,
        )  # fmt: skip


def train(
    distiller: Distiller, teacher: Teacher | None, train_set: Sequence[Example], validation_set: Sequence[Example] | None,
    config: TrainingConfig, folder: RunFolder, *, seed: int, pad_token: int, packed_tokens: int | None = None,
    trackers: Sequence[str] = (), quiet: bool = False,
) -> TrainingSummary:  # fmt: skip
    """Trains `distiller` in place and resumes by itself from what `folder` holds. Every rank calls it.

    `packed_tokens` is the length of packed rows, None trains on one example a row. `quiet` shows no progress bar. With early stopping
    the weights at the end are those of the best evaluation. Raises InterruptedRun after SIGTERM or SIGINT and NonFiniteError for a
    step that must not be taken (everything before it is committed), ConfigError, DataError and IncompatibleError before the first step.
    """
    if not len(train_set):
        raise DataError("the training set is empty: no row has a target token that fits; see data.max_tokens and data.too_long")
    if config.early_stopping and not validation_set:
        raise ConfigError("training.early_stopping needs a validation set; set data.validation to a file or a fraction")
    training = Rows(train_set, pad_token=pad_token, seed=seed, max_tokens=packed_tokens)
    validation = Rows(validation_set, pad_token=pad_token, seed=seed, max_tokens=packed_tokens) if validation_set else None
    order = GlobalOrder(training.lengths, seed=seed, batch_size=config.batch_size, accumulation=config.accumulation)
    num_steps = config.num_steps(order.steps_per_epoch)
    division = Division.of(launched_ranks()[1], config.batch_size, config.accumulation)
    with SignalWatch() as watch:
        args = training_arguments(
            config, folder.path, model=distiller, seed=seed, num_steps=num_steps, steps_per_epoch=order.steps_per_epoch,
            validates=validation is not None, local_accumulation=config.accumulation // division.over_micro_batches,
            trackers=trackers, quiet=quiet,
        )  # fmt: skip
        ranks = Ranks()
        fingerprints = {"seed": seed, "training data": training.fingerprint, "rows of an optimizer step": config.global_batch}
        saver = Saver(folder, ranks, fingerprints, keep=config.keep_checkpoints)
        for note in saver.look_for_checkpoint():
            _log.warning(note)
        refuse_smaller(saver.progress.step, num_steps)
        if saver.progress.step < num_steps and not saver.progress.stopped_early:
            guard = StepGuard()
            trainer = DistillationTrainer(
                distiller, teacher, Feed(order, training, validation), args, config=config, ranks=ranks, saver=saver, watch=watch,
                callbacks=[guard, MetricsToFolder(folder), BestEvaluation(saver.progress, config.early_stopping)],
            )  # fmt: skip
            guard.trainer = trainer
            trainer.run()
        else:
            saver.restore(distiller, None, None)
        if config.early_stopping:
            saver.restore_best(distiller)
        peak = ranks.largest([peak_gib(args.device)])[0]
    return TrainingSummary.of(saver.progress, peak, saver.resumed_from)

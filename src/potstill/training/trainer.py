"""`train`: a distiller, a teacher and examples go in, a trained student comes out, and the run folder knows how it went.

It assembles the order of rows, the arguments, the checkpoint to resume from and the seam to transformers.Trainer (seam.py).
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.batch import Example
from potstill.errors import ConfigError, DataError
from potstill.interruption import SignalWatch
from potstill.rollouts.author import Author
from potstill.run_folder import RunFolder
from potstill.teachers.teacher import Teacher
from potstill.training.arguments import training_arguments
from potstill.training.callbacks import BestEvaluation, MetricsToFolder
from potstill.training.config import TrainingConfig
from potstill.training.distiller import Distiller
from potstill.training.feeding import Rows
from potstill.training.measuring import peak_gib
from potstill.training.order import Division, GlobalOrder
from potstill.training.processes import Ranks, launched_ranks
from potstill.training.saving import Kept, Progress, Saver, refuse_full_disk, refuse_smaller
from potstill.training.seam import DistillationTrainer
from potstill.training.trackers import tracker_callbacks
from potstill.training.turns import Beside, Feed

_log = logging.getLogger("potstill")


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
    trackers: Sequence[str] = (), quiet: bool = False, fingerprints: Mapping[str, Any] | None = None,
    author: Author | None = None, kept: Mapping[str, Kept] | None = None, beside: Beside | None = None, overridden: Collection[str] = (),
) -> TrainingSummary:  # fmt: skip
    """Trains `distiller` in place and resumes by itself from what `folder` holds. Every rank calls it.

    `packed_tokens` is the length of packed rows, None trains on one example a row. `quiet` shows no progress bar. `fingerprints` are
    further things that must be what they were when the run is resumed, by name, but for those `overridden`. `author` writes what is
    learned from, where the data set does not; `beside` is plain text with an order of its own; `kept` are further parts whose state
    every checkpoint holds, by name.
    With early stopping the weights at the end are those of the best evaluation. Raises InterruptedRun after SIGTERM or SIGINT and
    NonFiniteError for a step that must not be taken (everything before it is committed), ConfigError, DataError and IncompatibleError
    before the first step.
    """
    if not len(train_set):
        raise DataError("the training set is empty: no row has a target token that fits; see data.max_tokens and data.too_long")
    if config.early_stopping and not validation_set:
        raise ConfigError("training.early_stopping needs a validation set; set data.validation to a file or a fraction")
    training = Rows(train_set, pad_token=pad_token, seed=seed, max_tokens=packed_tokens)
    validation = Rows(validation_set, pad_token=pad_token, seed=seed, max_tokens=packed_tokens) if validation_set else None
    order = GlobalOrder(training.lengths, seed=seed, batch_size=config.batch_size, accumulation=config.accumulation)
    num_steps = config.num_steps(order.steps_per_epoch)
    feed = Feed(order, training, validation, author, beside)
    division = Division.of(launched_ranks()[1], config.batch_size, config.accumulation)
    with SignalWatch() as watch:
        args = training_arguments(
            config, folder.path, model=distiller, seed=seed, num_steps=num_steps, steps_per_epoch=order.steps_per_epoch,
            validates=validation is not None, local_accumulation=feed.most_streams * config.accumulation // division.over_micro_batches,
            quiet=quiet,
        )  # fmt: skip
        ranks = Ranks()
        own = {"seed": seed, "training data": training.fingerprint, "rows of an optimizer step": config.global_batch}
        saver = Saver(folder, ranks, {**own, **(fingerprints or {})}, keep=config.keep_checkpoints, overridden=overridden)
        saver.kept = {**({"author": author} if author is not None else {}), **(kept or {})}
        notes = saver.look_for_checkpoint()
        if config.early_stopping:
            notes += saver.forget_lost_best()
        # Whoever has since asked for more patience, or for none of this, wants the run to go on.
        patience = config.early_stopping.patience if config.early_stopping else math.inf
        saver.progress.stopped_early &= saver.progress.evaluations_without_gain >= patience
        for note in notes:
            _log.warning(note)
        refuse_smaller(saver.progress.step, num_steps)
        refuse_full_disk(saver, distiller)
        progress = saver.progress
        if progress.evaluation_pending or (progress.step < num_steps and not progress.stopped_early):
            trainer = DistillationTrainer(
                distiller, teacher, feed, args, config=config, ranks=ranks, saver=saver, watch=watch,
                callbacks=[MetricsToFolder(folder), BestEvaluation(saver.progress, config.early_stopping),
                           *tracker_callbacks(trackers if ranks.first else (), folder, progress.step)],
            )  # fmt: skip
            trainer.run()
        else:
            saver.restore(distiller, None, None)
        if config.early_stopping:
            saver.restore_best(distiller)
        peak = ranks.largest([peak_gib(args.device)])[0]
    return TrainingSummary.of(saver.progress, peak, saver.resumed_from)

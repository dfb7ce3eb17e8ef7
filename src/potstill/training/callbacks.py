"""What happens at the Trainer's events: the guard against steps that are not finite, the metrics of the run folder, early stopping.

Each is a few lines around a method of `DistillationTrainer` or of the run folder.
"""

import math
from collections.abc import Callable

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from potstill.run_folder import RunFolder
from potstill.training.config import EarlyStopping
from potstill.training.saving import Progress


class StepGuard(TrainerCallback):
    """Looks at loss and gradient before each optimizer step, and books the step afterwards. The last callback of all."""

    def __init__(self, before_training: Callable[[], None], before_step: Callable[[], None], after_step: Callable[[], None]):
        self._before_training, self._before_step, self._after_step = before_training, before_step, after_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_):
        self._before_training()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_):
        self._before_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_):
        self._after_step()


class Bar(ProgressCallback):
    """The Trainer's bar with the loss beside it. The Trainer's own also prints every line of the log, which stands in the run folder."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **_):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")


class MetricsToFolder(TrainerCallback):
    """Appends every line of the log to the run folder; metrics.jsonl is what reports are made from."""

    def __init__(self, folder: RunFolder):
        self._folder = folder

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **_):
        if state.is_world_process_zero and logs:
            self._folder.append_metrics({"step": state.global_step, **logs})


class BestEvaluation(TrainerCallback):
    """Keeps the best evaluation's checkpoint, and stops the run after too many that were no better."""

    def __init__(self, progress: Progress, early_stopping: EarlyStopping | None):
        self._progress, self._early_stopping = progress, early_stopping

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics=None, **_):
        assert metrics is not None
        loss, progress = metrics["eval_loss"], self._progress
        margin = self._early_stopping.min_delta if self._early_stopping else 0.0
        # A loss that is not finite is never the best one: nothing would be less than NaN.
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss - margin):
            progress.best_loss, progress.best_step, progress.evaluations_without_gain = loss, state.global_step, 0
            control.should_save = control.should_save or self._early_stopping is not None
        else:
            progress.evaluations_without_gain += 1
        if self._early_stopping and progress.evaluations_without_gain >= self._early_stopping.patience:
            progress.stopped_early = True
            control.should_training_stop = control.should_save = True
        return control

"""The seam to transformers.Trainer, as thin as it goes: what a window of micro-batches is, what its loss is divided by, what is
saved and when a step is refused. The mathematics is in `objectives`, the order in order.py, the bytes in checkpoint.py.
"""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from potstill.batch import Batch
from potstill.errors import InterruptedRun, NonFiniteError, OutageError, PotstillError, TeacherError
from potstill.interruption import SignalWatch
from potstill.run_folder import NON_FINITE
from potstill.signals import Needs, TeacherSignal
from potstill.teachers.teacher import Teacher, heed, step_done
from potstill.training.callbacks import Bar, StepGuard
from potstill.training.config import TrainingConfig
from potstill.training.distiller import Distiller
from potstill.training.measuring import Measures, peak_gib
from potstill.training.order import Window, mix
from potstill.training.processes import Ranks
from potstill.training.saving import Saver
from potstill.training.turns import Feed, Turn
from potstill.training.validation import Validation, means_by_name

# Seconds that ranks go on writing after a signal, to commit the step before; who sends one waits 30 or more before he kills.
PATIENCE = 15.0


def reshard(model: nn.Module) -> None:
    """FSDP2 leaves the root's parameters gathered after a forward without a backward; the optimizer knows only their shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
        if teacher is not None:
            heed(teacher, self.break_off_if_asked)
        if feed.author is not None:
            feed.author.heed(self.break_off_writing_if_asked)
        self.window: Window = feed.order.window(self.progress.step)
        self.measures = Measures()
        self.grad_norm: float = math.nan
        self.begun = False
        # The Trainer only asks these whether they are there and how long they are.
        super().__init__(distiller, args, train_dataset=feed.training, eval_dataset=feed.validation, callbacks=callbacks)  # type: ignore[arg-type]
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Bar())
        self.add_callback(StepGuard(self.begin, self.refuse_non_finite, self.step_done))

    def run(self) -> None:
        """Trains to the end, from the checkpoint that the saver has found where it has found one."""
        with TemporaryDirectory() as scratch:
            found = None
            if self.saver.found is not None:
                # The Trainer takes the place to go on from out of a file of its own; everything else is restored below.
                found, place = scratch, self.progress
                steps = {"logging_steps": self.args.logging_steps, "eval_steps": self.args.eval_steps, "save_steps": self.args.save_steps}
                steps["train_batch_size"] = self.args.train_batch_size
                TrainerState(global_step=place.step, epoch=place.epoch, **steps).save_to_json(str(Path(scratch) / TRAINER_STATE_NAME))
            try:
                self.train(resume_from_checkpoint=found)
                self.stop_if_asked()
            except PotstillError:
                if self.begun:  # the progress bar and the trackers are open
                    self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise

    def begin(self) -> None:
        """Before the first step, with the model wrapped and restored."""
        self.begun = True
        self.stop_if_asked()
        if self.feed.author is not None:
            self.feed.author.begin(self.state.global_step)
        self.evaluate_pending()

    # ------------------------------------------------------------ a window of micro-batches

    def get_train_dataloader(self) -> DataLoader:
        """Only its length is used: the window of a step is a function of the step's number, see `get_batch_samples`."""
        turns = self.feed.order.steps_per_epoch * self.args.gradient_accumulation_steps
        return DataLoader(range(turns), batch_size=1, generator=torch.Generator())  # type: ignore[arg-type]

    def num_examples(self, dataloader: DataLoader) -> int:
        return self.feed.training.num_examples

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list, Any]:
        """This rank's micro-batches of the step that comes next, and the count that its loss is divided by."""
        self.stop_if_asked()
        if self.control.should_training_stop or self.state.global_step >= self.args.max_steps:
            self.control.should_training_stop = True  # a resumed run can stand at its end, or have been stopped by its evaluation
            return [], None
        self.window = self.feed.order.window(self.state.global_step)
        turns = self.write()
        # Counted once everything is written: what an author writes has other lengths than what stood there before.
        names = sorted(self.distiller.objectives)
        counts = [float(sum(self.count(turn) for turn in turns if turn.stream == name)) for name in names]
        sizes = [float(sum(getattr(turn.batch, what) for turn in turns)) for what in ("num_targets", "num_tokens")]
        *counts, targets, tokens = self.ranks.sum([*counts, *sizes])
        of_stream = dict(zip(names, counts, strict=True))
        self.measures.begin_window(targets, int(tokens), [name for name in names if of_stream[name]])
        samples = [{"turn": turn, "scale": turn.weight * self.ranks.world_size / max(of_stream[turn.stream], 1.0)} for turn in turns]
        return samples, sum(counts)

    def write(self) -> list[Turn]:
        """This rank's turns of the window. Text is written within the wrapped module's forward: under FSDP2 the root's parameters are
        whole only there, and the precision is that of training."""
        share, turns = (self.window, self.ranks.rank, self.ranks.world_size), []
        if self.feed.author is None:
            return self.feed.turns(*share)
        assert self.model_wrapped is not None
        with self.committed_before(PotstillError), torch.no_grad():
            self.model_wrapped(None, None, write=lambda: turns.extend(self.feed.turns(*share)))
        reshard(self.distiller)
        return turns

    def count(self, turn: Turn) -> int:
        return self.distiller.objective_of(turn.stream).count(turn.batch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.stop_if_asked()
        turn: Turn = inputs["turn"]
        if turn.everywhere_empty:
            return torch.zeros((), device=self.args.device)
        # Dropout is a function of the micro-batch's number: the same after a resume and for any number of ranks.
        torch.manual_seed(mix(self.args.seed, turn.number))
        return super().training_step(model, inputs, num_items_in_batch)

    def answer(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """What the teacher says."""
        if self.teacher is None or needs.outcomes == "nothing":
            return TeacherSignal()
        with self.committed_before(OutageError, TeacherError):
            return self.teacher.score(batch.teacher_view or batch, needs)

    @contextmanager
    def committed_before(self, *failures: type[PotstillError]) -> Iterator[None]:
        """Where the next step cannot come about, the last one is committed before that is said."""
        try:
            yield
        except NonFiniteError:  # the student's own numbers: nothing to keep
            raise
        except failures:
            if self.ranks.world_size == 1:  # a commit is the work of all ranks, and the others are elsewhere
                self.commit()
            raise

    def break_off_if_asked(self) -> None:
        """On a signal while a teacher is waited for. Several ranks cannot agree there: the last commit stays what it is."""
        if self.ranks.world_size == 1:
            self.stop_if_asked()
        elif self.watch.received:
            raise InterruptedRun("interrupted while an answer of the teacher or text was waited for; the same command goes on from the "
                                 "last checkpoint", self.watch.received)  # fmt: skip

    def break_off_writing_if_asked(self) -> None:
        """On a signal while text is written. Several ranks go on to the end of it, where they agree and commit, unless it takes long."""
        if self.ranks.world_size == 1:
            self.stop_if_asked()
        elif self.watch.seconds > PATIENCE:
            self.break_off_if_asked()

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch: Any = None):
        """total / count of the window. DDP and FSDP2 average gradients over ranks, where the sum is meant: hence the world size."""
        turn = cast(Turn, inputs["turn"])
        batch, scale = turn.batch.to(self.args.device), inputs["scale"]
        signal = self.answer(batch, self.distiller.objective_of(turn.stream).needs)
        total, cross_entropy, divergence = model(batch, signal, turn.stream)
        losses = total.detach() * scale, cross_entropy * scale, divergence * scale
        self.measures.add(*losses, stream=turn.stream, weight=turn.weight)
        return total * scale

    # ------------------------------------------------------------ before and after an optimizer step

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # type: ignore[arg-type]
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
                f"and the weights are those of step {self.state.global_step}. {self.folder.path / NON_FINITE} names the examples. "
                "Look at them, lower training.learning_rate, or set training.non_finite: {skip: n}"
            )
        self.progress.non_finite_steps += 1

    def step_done(self) -> None:
        self.progress.step, self.progress.epoch = self.state.global_step, float(self.state.epoch or 0.0)
        self.progress.tokens += self.measures.window_tokens
        self.progress.targets += int(self.measures.window_targets)
        self.measures.end_step()
        taken = not self.measures.refused
        if self.teacher is not None and taken:
            step_done(self.teacher)
        if self.feed.author is not None:
            self.feed.author.step_done(self.state.global_step, taken=taken)
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
        """Loss on the validation set, in nats a target: total, cross-entropy, divergence."""
        assert self.feed.validation is not None
        self.progress.evaluation_pending = True
        began = time.monotonic()
        validation = Validation(self.feed.validation, self.config.batch_size, self.ranks)
        self.callback_handler.eval_dataloader = range(len(validation))  # type: ignore[assignment]
        model = self.model_wrapped
        assert model is not None
        model.eval()

        turns = itertools.count(self.ranks.rank, self.ranks.world_size)

        def measure(batch: Batch) -> tuple[tuple[Tensor, ...], float]:
            # What a support draws is the same in every evaluation: whether a run is stopped early must not hang on a break before it.
            torch.manual_seed(mix(self.args.seed, 0, next(turns)))
            batch = batch.to(self.args.device)
            with torch.no_grad():
                *sums, seen = model(batch, self.answer(batch, self.distiller.objective.needs))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            return (*sums, torch.tensor(float(batch.num_targets)), *seen), self.distiller.objective.count(batch)

        total, cross_entropy, divergence, targets, *seen = validation.means(measure, after_batch=self.stop_if_asked)
        metrics = {f"{metric_key_prefix}_loss": total, f"{metric_key_prefix}_loss/ce": cross_entropy}
        if self.teacher is not None:
            metrics[f"{metric_key_prefix}_loss/kd"] = divergence
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in means_by_name(seen, targets).items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.monotonic() - began
        reshard(self.distiller)
        self.progress.evaluation_pending = False
        if self.feed.author is not None:
            of_responses = self.distiller.objective.reduction == "seq_sum"  # the sums of whole ones, however long they are
            self.feed.author.validated(cross_entropy / targets if of_responses and targets else cross_entropy)
        self.measures.pause(metrics[f"{metric_key_prefix}_seconds"])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_pending(self) -> None:
        """Does an evaluation in which the run was broken off, and commits that it is done: what follows must not depend on the break."""
        if self.progress.evaluation_pending:
            self.evaluate()
            self.saver.committed = None
            self.commit()

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
            logs |= {"tokens_per_second": parts.tokens_per_second, "seconds_per_step": parts.seconds_per_step}
            logs |= {"target_tokens": float(self.progress.targets), "peak_gib": self.ranks.largest([peak_gib(self.args.device)])[0]}
            logs |= {} if self.feed.author is None and self.feed.beside is None else parts.by_stream(self.ranks)
            if self.feed.author is not None:
                logs |= dict(self.feed.author.metrics())
                self.folder.append_rollouts(self.state.global_step, self.feed.author.texts())
            if self.progress.non_finite_steps:
                logs["non_finite_steps"] = float(self.progress.non_finite_steps)
        super().log(logs)

    # ------------------------------------------------------------ checkpoints: ours in the place of the Trainer's

    def commit(self) -> None:
        """Makes the state after the last completed step durable, unless it already is."""
        reshard(self.distiller)
        self.saver.commit(self.distiller, self.optimizer)  # type: ignore[arg-type]

    def _save_checkpoint(self, model, trial=None) -> None:
        self.commit()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing: weights are restored with the optimizer's state, once the ranks have wrapped the model."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.saver.restore(self.distiller, self.optimizer, self.lr_scheduler)  # type: ignore[arg-type]

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: bfloat16 and float32 need no loss scale."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every micro-batch seeds the generators by its number."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

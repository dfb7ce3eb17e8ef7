"""How a student is trained, as a recipe says it. Imports neither torch nor transformers, so a recipe is read in no time.

The recipe fixes the global batch: `batch_size * accumulation` rows an optimizer step, however many ranks share them.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.config import Config

# Schedules of transformers that are a function of the step alone. Those that look at the validation loss are not offered: a
# resumed run could then depend on when it was broken off.
Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay",
]
_NEEDED_OPTIONS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
Positive = Annotated[int, Field(ge=1)]


class EarlyStopping(Config):
    """Stop when the validation loss no longer falls; the student is then the one of the best evaluation."""

    patience: Positive = 3
    """Evaluations without an improvement that are borne."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as an improvement, in nats a target."""


class SkipNonFinite(Config):
    """Go on after a step whose loss or gradient is not finite; the step is never taken."""

    skip: Positive
    """Steps that may be left out in the whole run before it stops."""


class TrainingConfig(Config):
    """One run of the optimizer (AdamW)."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training set. Exactly one of `epochs` and `steps` is set."""
    steps: Positive | None = None
    """Optimizer steps."""
    batch_size: Positive = 8
    """Rows of a micro-batch: a row is a packed sequence, or one example without packing."""
    accumulation: Positive = 1
    """Micro-batches of an optimizer step, over all ranks together."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-4
    """At the end of the warm-up."""
    scheduler: Scheduler = "cosine"
    """The name that transformers gives to the schedule."""
    scheduler_options: dict[str, float | int | str] = Field(default_factory=dict)
    """What the schedule takes beyond steps and warm-up, such as `min_lr_rate` or `num_decay_steps`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW, on weights that are neither biases nor norms."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """A longer gradient is cut to this norm; null leaves it."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean of the gradient."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the mean of its square."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1.0e-8
    """Added to the denominator."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16 computes in bfloat16 while weights that the optimizer changes stay float32; frozen weights are bfloat16."""
    save_steps: Positive | None = None
    """Steps between checkpoints; null saves at the end of every epoch. The last step is always saved."""
    keep_checkpoints: Positive = 2
    """Checkpoints that stay, besides the best one."""
    eval_steps: Positive | None = None
    """Steps between evaluations on the validation set; null evaluates at the end of every epoch, and at the last step."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the end; needs a validation set."""
    non_finite: Literal["stop"] | SkipNonFinite = "stop"
    """What becomes of a run when a loss or a gradient is not finite. The step itself is never taken."""
    logging_steps: Positive = 10
    """Steps between lines of metrics."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the elementwise part of the loss: seconds once, then less time a step. auto does it where that pays."""
    fsdp: bool = False
    """Shard the student over the ranks (FSDP2) instead of a copy on each (DDP)."""
    deterministic: bool = False
    """Ask torch for deterministic kernels on a GPU too; on a CPU a run repeats bit by bit without it."""

    @model_validator(mode="after")
    def _check(self):
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else "both; take one away, as in training.epochs=null"
            raise ValueError(f"say how long to train by exactly one of epochs and steps; found {found}")
        needed = _NEEDED_OPTIONS.get(self.scheduler, ())
        if needed and not set(needed) & set(self.scheduler_options):
            raise ValueError(f"scheduler {self.scheduler} needs scheduler_options with {' or '.join(needed)}")
        return self

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.accumulation

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(round(self.epochs * steps_per_epoch, 6)))

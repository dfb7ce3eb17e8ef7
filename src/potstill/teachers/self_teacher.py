"""The student as its own teacher: the weights of now, those under its adapter, or their moving average, on a prompt that says more.

It answers whatever batch it is given; that the batch holds the teacher's prompts is the caller's affair (`Batch.teacher_view`).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from potstill.batch import Batch
from potstill.errors import IncompatibleError
from potstill.models.causal_lm import CausalLM, evaluating
from potstill.signals import FullOutcomes, Needs, Offers, TeacherSignal

Weights = Literal["live", "base", "average"]


class SelfTeacher:
    """Answers with the student's own forward, in evaluation mode and without gradients. It is not an `nn.Module`.

    `live`: the weights as they are at this step. `base`: the student without its adapter, which must be one of peft. `average`: an
    exponential moving average of the trainable parameters, in float32, `average <- decay * average + (1 - decay) * weights` at every
    optimizer step, begun at the weights that the student has here. It must then be among the `kept` parts of `train`.
    Source: 2601.19897 (base or live), 2601.18734 (the initial weights), 2601.20802 (average).
    """

    def __init__(self, student: CausalLM, weights: Weights = "base", *, decay: float = 0.99, autocast: torch.dtype | None = None):
        """`autocast` is the dtype that training computes in where the weights are wider (bfloat16 for training.precision bf16): teacher
        and student then round alike. Raises IncompatibleError for `base` where the student has no adapter.
        """
        self.student, self.weights, self.decay, self.autocast = student, weights, decay, autocast
        if weights == "base" and not _has_adapter(student):
            raise IncompatibleError(
                f"teacher.weights: base is the student without its adapter, and {student.name} is trained whole. Set student.lora, or name "
                "the weights that it starts from as a teacher of their own (teacher.kind: local with the student's path), or set "
                "teacher.weights: average or live"
            )
        self._average: dict[str, Tensor] = {}
        if weights == "average":
            self._average = {name: parameter.detach().float().clone() for name, parameter in self._trained().items()}

    @property
    def name(self) -> str:
        return f"the student itself ({self.weights})"

    @property
    def offers(self) -> Offers:
        return Offers(frozenset({"full"}))

    @property
    def identity(self) -> Mapping[str, str]:
        return {"self": f"average, decay {self.decay}" if self.weights == "average" else self.weights}

    @torch.no_grad()
    def score(self, batch: Batch, needs: Needs) -> TeacherSignal:
        """`FullOutcomes` for the target rows, or nothing where nothing is asked. Gradients stop here, also those through the head."""
        if needs.outcomes == "nothing":
            return TeacherSignal()
        self._refuse_sharded()
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.student))
            if self.weights == "base":
                stack.enter_context(_without_adapter(self.student))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(batch.tokens.device.type, self.autocast, cache_enabled=False))
            rows, head = functional_call(self.student, self._placed(), (batch,)) if self._average else self.student(batch)
        # A constant: it shares the weights where no dtype is asked for, and takes no gradient to them.
        fixed = head.each(lambda tensor: tensor.detach().to(self.autocast))
        return TeacherSignal(FullOutcomes(rows.to(self.autocast), fixed))

    @torch.no_grad()
    def step_done(self) -> None:
        """The student's weights are those after one more optimizer step."""
        self._refuse_sharded()
        for name, average in self._on_the_device().items():
            average.lerp_(self._trained()[name].float(), 1 - self.decay)

    def close(self) -> None:
        """Nothing is held open."""

    # ------------------------------------------------------------ what a checkpoint keeps

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The average, by parameter name; nothing for the other two."""
        return {name: average.to("cpu", copy=True).contiguous() for name, average in self._average.items()}, {}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Raises IncompatibleError where the checkpoint holds the average of other parameters."""
        here = {name: average.shape for name, average in self._average.items()}
        saved = {name: tensor.shape for name, tensor in tensors.items()}
        if here != saved:
            name = next(name for name in sorted(here.keys() | saved.keys()) if here.get(name) != saved.get(name))
            raise IncompatibleError(
                f"checkpoint: the teacher's moving average of {name} is {_shape(saved.get(name))} there and {_shape(here.get(name))} in "
                "the run; were teacher.weights or the student's trained parameters changed? --fresh starts over"
            )
        for name, average in self._average.items():
            average.copy_(tensors[name])

    # ------------------------------------------------------------ the average

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def _on_the_device(self) -> dict[str, Tensor]:
        """The average where the student is by now: it was begun before the student was moved."""
        for name, parameter in self._trained().items() if self._average else ():
            self._average[name] = self._average[name].to(parameter.device)
        return self._average

    def _placed(self) -> dict[str, Tensor]:
        """The average in the dtypes of the parameters whose places it takes."""
        trained = self._trained()
        return {name: average.to(trained[name].dtype) for name, average in self._on_the_device().items()}

    def _refuse_sharded(self) -> None:
        if any(isinstance(module, FSDPModule) for module in self.student.modules()):
            raise IncompatibleError(
                "teacher.kind: self needs the whole student on each rank, and FSDP has spread its parameters; train without FSDP, or "
                "name a teacher of its own (teacher.kind: local)"
            )


def _has_adapter(student: CausalLM) -> bool:
    from peft import PeftModel

    return isinstance(student.model, PeftModel)


@contextmanager
def _without_adapter(student: CausalLM) -> Iterator[None]:
    """The base model. peft turns gradients on and off with its adapters; afterwards they are wanted of what they were wanted of."""
    wanted = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    try:
        with student.model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        for parameter, grad in wanted:
            parameter.requires_grad_(grad)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))

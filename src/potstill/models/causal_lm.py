"""A causal language model as trunk and head, whatever wraps it: peft, quantisation, tied weights, sharding.

The head is read when it is asked for, so that what the optimizer, peft or FSDP has done to it since is seen. Which tokens are
targets is the batch's affair, what becomes of the rows the objective's.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from potstill.batch import Batch
from potstill.errors import ModelError
from potstill.head import Head
from potstill.models.heads import HeadArithmetic, read_arithmetic, read_head


class CausalLM(nn.Module):
    """A model of transformers, or a `PeftModel` around one, with its trunk and its head apart.

    `vocabulary_size` is the number of real tokens (of the tokenizer); the head may be wider, and those rows are padding.
    Under FSDP call it only inside the wrapped module's forward, where the parameters of the root are whole.
    """

    def __init__(self, model: nn.Module, vocabulary_size: int):
        super().__init__()
        self.model = model
        self.vocabulary_size = vocabulary_size
        inner = self.inner
        if self.trunk is inner or self.trunk is None:
            raise ModelError(
                f"{inner.config.name_or_path}: {type(inner).__name__} does not keep its trunk apart from its head; it cannot be used"
            )
        if inner.get_output_embeddings() is None:
            raise ModelError(f"{inner.config.name_or_path}: {type(inner).__name__} has no language-model head")
        self._arithmetic: HeadArithmetic = read_arithmetic(inner.config)
        self.train(model.training)
        self._takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters

    @property
    def inner(self) -> PreTrainedModel:
        """The model of transformers itself; adapters sit inside its layers."""
        from peft import PeftModel

        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # type: ignore[return-value]

    @property
    def trunk(self) -> nn.Module:
        """Everything from the tokens to the head's input."""
        return self.inner.get_decoder()

    @property
    def name(self) -> str:
        """The path or hub name that it was loaded from."""
        return self.inner.config.name_or_path or type(self.inner).__name__

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def hidden(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """The last hidden states, after the final norm: what the head is applied to."""
        arguments = {"input_ids": batch.tokens, "use_cache": False}
        if self._takes_positions:
            # No attention mask: padding stands to the right, and positions that restart tell the documents of a row apart.
            arguments["position_ids"] = batch.positions
        return self._through_root(arguments) if isinstance(self.inner, FSDPModule) else self.trunk(**arguments).last_hidden_state

    def _through_root(self, arguments: dict) -> Float[Tensor, "B T D"]:
        """A model that is sharded by itself gathers its parameters in its own forward alone: enter there, and catch the states."""
        caught: list[Tensor] = []
        if "logits_to_keep" in inspect.signature(self.inner.forward).parameters:
            arguments["logits_to_keep"] = 1
        handle = self.trunk.register_forward_hook(lambda _module, _inputs, output: caught.append(output.last_hidden_state))
        try:
            self.inner(**arguments)
        finally:
            handle.remove()
        return caught[0]

    def rows(self, batch: Batch) -> Float[Tensor, "N D"]:
        """The hidden rows that predict a target, in the order of `batch.target_rows()`."""
        return batch.select(self.hidden(batch))

    def head(self) -> Head:
        """Everything from a hidden row to its logits, as it is at this moment, under autograd."""
        layer = self.inner.get_output_embeddings()
        assert layer is not None
        return read_head(layer, self._arithmetic, self.name)

    def forward(self, batch: Batch) -> tuple[Tensor, Head]:
        """`rows` and `head` in one call, for what wraps a module's forward."""
        return self.rows(batch), self.head()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode: no dropout, and activation checkpointing, which would switch a cache off, does not act. Afterwards every part is
    in the mode that it was in."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training

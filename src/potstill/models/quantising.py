"""Weights in 4 and 8 bits: what transformers is told while it loads them, and what must be done so that they can be used.

Which model it is, and where it comes from, is the loader's affair.
"""

import logging

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from potstill.errors import ModelError
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.quantisation import while_loading
from potstill.models.requirements import is_installed, quantisation_of, require_quantiser


def choose_quantisation(config: LoadingConfig, saved: PreTrainedConfig, dtype: torch.dtype, trainable: bool) -> BitsAndBytesConfig | None:
    """What `from_pretrained` must be told to quantise while loading, or None. Raises ModelError where it cannot be, with the remedy."""
    method = quantisation_of(saved)
    learns_beside = isinstance(config, ModelConfig) and (config.lora is not None or config.adapter is not None)
    if method is not None:
        require_quantiser(method, config.path)
        if config.quantization is not None:
            raise ModelError(f"{config.path}: its weights are already quantised by {method}; leave out quantization: {config.quantization}")
        if trainable and not learns_beside:
            raise ModelError(f"{config.path}: its weights are quantised by {method} and cannot be trained; add lora")
        return None
    if config.quantization is None:
        return None
    if not is_installed("bitsandbytes"):
        raise ModelError(f"{config.path}: quantization: {config.quantization} needs bitsandbytes: pip install 'potstill[quant]'")
    if config.quantization == "8bit":
        # It says on every product of every layer that it computes in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**while_loading(config.quantization, dtype))


def keep_differentiable(model: PreTrainedModel, dtype: torch.dtype, trainable: bool) -> None:
    """Stops bitsandbytes and gptqmodel from packing 4-bit weights anew for the CPU in their first evaluation.

    The packed layouts compute in bfloat16 whatever was asked for, and have no backward pass: after one evaluation the adapters
    below such a layer would silently stop learning. A teacher in bfloat16 keeps gptqmodel's, which is faster.
    """
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        elif hasattr(layer, "linear_mode") and (trainable or dtype != torch.bfloat16):
            layer.linear_mode = "train"  # type: ignore[assignment]


def wake(model: PreTrainedModel) -> None:
    """One token through the model's own forward: compressed-tensors unpacks its weights in the first, and only if it enters there."""
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))

"""Reads a `Head` off an output layer: plain, with LoRA, trained whole beside an adapter, quantised, or sharded.

What a family does after the matrix product is read from its configuration; whether the reading is right is proved elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from potstill.errors import ModelError
from potstill.head import Head, LowRank

# The keys under which families keep their head's scale, and whether logits are multiplied or divided by it.
_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
# Families that read `logits_scaling` the other way round.
_MULTIPLIES = frozenset({"hyperclovax"})


@dataclass(frozen=True)
class HeadArithmetic:
    """What a family does to the linear part: `softcap * tanh(scale * linear / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


def read_arithmetic(config: PreTrainedConfig) -> HeadArithmetic:
    """The head's scale and soft-cap, from the part of a configuration that describes the text model."""
    text = config.get_text_config()
    values = text.to_dict()
    scale = 1.0
    for key, power in _SCALES.items():
        if isinstance(values.get(key), int | float):
            scale *= float(values[key]) ** (1 if text.model_type in _MULTIPLIES else power)
    softcap = values.get("final_logit_softcapping")
    return HeadArithmetic(scale, float(softcap) if softcap else None)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that FSDP or tensor parallelism holds in parts; autograd reduces the gradient back."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_weight(layer: nn.Module) -> Tensor:
    """A layer's weight, unpacked where bitsandbytes, torchao or HQQ has quantised it."""
    from peft.utils.integrations import dequantize_module_weight

    if type(layer.weight).__name__ != "Int8Params":
        return dequantize_module_weight(layer)
    # Its scales move from the weight to the layer's state in the first forward.
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # type: ignore[union-attr]
    return layer.weight.float() * (scales.float()[:, None] / 127.0)  # type: ignore[operator, union-attr]


def _weight(layer: nn.Module, name: str) -> Tensor:
    if isinstance(layer, nn.Linear) or type(layer).__module__.startswith("bitsandbytes."):
        return whole(plain_weight(layer))
    raise ModelError(f"{name}: its head is a {type(layer).__name__}; only linear heads, plain or quantised by bitsandbytes, can be read")


def _low_rank(layer, name: str) -> tuple[LowRank, ...]:
    """The active LoRA deltas of a peft layer that is not merged."""
    if layer.disable_adapters or layer.merged:
        return ()
    deltas = []
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if layer.lora_variant.get(adapter) is not None or layer.lora_bias.get(adapter):
            raise ModelError(f"{name}: the adapter on its head is DoRA or another variant; on the head only plain LoRA can be read")
        dropout = layer.lora_dropout[adapter]
        deltas.append(
            LowRank(
                down=whole(layer.lora_A[adapter].weight), up=whole(layer.lora_B[adapter].weight),
                scaling=float(layer.scaling[adapter]), dropout=float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0,
            )
        )
    return tuple(deltas)


def read_head(layer: nn.Module, arithmetic: HeadArithmetic, name: str) -> Head:
    """The head of the output layer `layer`; `name` is the model's, for messages."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    low_rank: tuple[LowRank, ...] = ()
    if isinstance(layer, ModulesToSaveWrapper):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save and not layer.disable_adapters]
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    if isinstance(layer, LoraLayer):
        low_rank, layer = _low_rank(layer, name), layer.get_base_layer()
    elif isinstance(layer, BaseTunerLayer):
        raise ModelError(f"{name}: the adapter on its head is a {type(layer).__name__}; on the head only LoRA can be read")
    bias = layer.bias if isinstance(layer.bias, torch.Tensor) else None
    return Head(
        weight=_weight(layer, name), bias=None if bias is None else whole(bias),
        scale=arithmetic.scale, softcap=arithmetic.softcap, low_rank=low_rank,
    )

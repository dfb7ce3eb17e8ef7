"""The weights of a model as a plain model would hold them: adapters added in, quantised weights unpacked, shards put together.

The live model is not touched, so that it can go on training; peft's own merge changes it in place, and packs a 4-bit weight again.
"""

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.errors import ModelError
from potstill.models.heads import plain_weight, whole
from potstill.models.requirements import quantisation_of

_CANNOT = "the adapter cannot be merged into it: set run.merge_adapter: false (or --no-merge)"
# Ways of quantising that peft can undo, by the name in the model's configuration.
_UNPACKED = frozenset({"bitsandbytes", "torchao", "hqq"})


def merged_weights(model: PreTrainedModel, dtype: torch.dtype, keep: bool = True) -> dict[str, Tensor]:
    """Every parameter and saved buffer under its plain name, floating ones as `dtype` on the CPU.

    Where the parameters are sharded every rank must call this, and those with `keep=False` get an empty dict.
    Raises ModelError for adapters and quantised layers that cannot be put into plain weights.
    """
    refuse_unmergeable(model)
    with torch.no_grad():
        found: dict[str, Tensor] = {}
        tied: dict[int, Tensor] = {}  # a weight of two layers stays one tensor, so that it is saved once
        for name, part in _weights(model, ""):
            tensor = whole(part)
            if keep:
                plain = tensor.detach().to(device="cpu", dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                found[name] = tied.setdefault(id(part), plain) if isinstance(part, nn.Parameter) else plain
        return found


def checkpoint_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter under the name that a checkpoint gives it, on its device and in its dtype; what is plain already is not copied.

    A weight of two layers stands once. Where the parameters are sharded every rank must call this.
    """
    from transformers.core_model_loading import revert_weight_conversion

    refuse_unmergeable(model)
    with torch.no_grad():
        buffers = {name for name, _ in model.named_buffers()}
        # The floating type of what is merged is that of the model: `_adapted` adds its deltas in float32.
        found = {
            name: tensor.to(model.dtype) if tensor.is_floating_point() and tensor.dtype != part.dtype else tensor
            for name, part in _weights(model, "") if name not in buffers for tensor in [whole(part).detach()]
        }  # fmt: skip
        for copy_name, name in (model.all_tied_weights_keys or {}).items():
            if copy_name in found and name in found and found[copy_name].data_ptr() == found[name].data_ptr():
                del found[copy_name]
        return revert_weight_conversion(model, found)


def refuse_unmergeable(model: PreTrainedModel) -> None:
    """Raises ModelError where the model's quantisation cannot be undone, or its adapters are not plain LoRA: ask before training."""
    method = quantisation_of(model.config)
    if method is not None and method not in _UNPACKED:
        raise ModelError(f"{model.config.name_or_path}: its weights are quantised by {method}; {_CANNOT}")
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            _refuse_layer(layer, path)


def _refuse_layer(layer: BaseTunerLayer, path: str) -> None:
    base = layer.get_base_layer()
    if not isinstance(layer, LoraLayer) or not {name for name, _ in base.named_parameters(recurse=False)} <= {"weight", "bias"}:
        raise ModelError(f"{path} carries a {type(layer).__name__} on a {type(base).__name__}; {_CANNOT}")
    if any(layer.lora_variant.get(adapter) is not None or layer.lora_bias.get(adapter) for adapter in layer.active_adapters):
        raise ModelError(f"{path} carries a variant of LoRA (DoRA, a bias, ...); {_CANNOT}")


def _weights(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save and not module.disable_adapters]
        yield from _weights(module.modules_to_save[active[0]] if active else module.original_module, path)
    elif isinstance(module, BaseTunerLayer):
        yield from _adapted(module, path)
    elif type(module).__module__.startswith("bitsandbytes."):
        yield path + "weight", plain_weight(module)
        yield from ((path + name, parameter) for name, parameter in module.named_parameters(recurse=False) if name == "bias")
    else:
        yield from ((path + name, parameter) for name, parameter in module.named_parameters(recurse=False))
        yield from ((path + name, b) for name, b in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set)
        for name, child in module.named_children():
            yield from _weights(child, f"{path}{name}.")


def _adapted(layer: BaseTunerLayer, path: str) -> Iterator[tuple[str, Tensor]]:
    """A LoRA layer's base weight with the active deltas added, in float32."""
    assert isinstance(layer, LoraLayer)
    for name, tensor in _weights(layer.get_base_layer(), path):
        if name == path + "weight" and not layer.disable_adapters and not layer.merged:
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                    tensor = whole(tensor).float() + _delta(layer, adapter).float()
        yield name, tensor


def _delta(layer, adapter: str) -> Tensor:
    return whole(layer.get_delta_weight(adapter))

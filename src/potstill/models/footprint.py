"""How large a model is and how much memory it will want, from its configuration alone: nothing is downloaded but config.json.

Weights, gradients and optimizer state are counted; activations are estimated from the sizes of the layers. What the loss needs
is the objective's to say.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from potstill.models.adapters import is_linear, linear_width, targeted
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.loading import Precision, choose_dtype, local_folder, read_model_config
from potstill.models.quantisation import bytes_of_packed, left_alone, quantisation_settings

_ADAM_BYTES = 8  # two moments in float32


@dataclass(frozen=True)
class Footprint:
    """Parameters counted, bytes on one device."""

    parameters: int
    trainable: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Workload:
    """What one device computes at a time: `batch_size` rows of `max_tokens` tokens; FSDP divides the parameters by `shards`."""

    batch_size: int
    max_tokens: int
    precision: Precision = "float32"
    shards: int = 1


def empty_model(config: LoadingConfig) -> PreTrainedModel:
    """The model without storage (meta device). Raises ModelError where it cannot be built."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=True):
        return AutoModelForCausalLM.from_config(read_model_config(config), trust_remote_code=config.trust_remote_code)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, those that require a gradient); tied weights count once, packed 4-bit weights by what they stand for."""
    total = trainable = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        size = 2 * parameter.numel() if packed else parameter.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return total, trainable


def predict_student(config: ModelConfig, workload: Workload) -> Footprint:
    """What training this model takes with AdamW; the loss comes on top."""
    model = empty_model(config)
    dtype = choose_dtype(config, workload.precision, trainable=True)
    base, weights = _weights(config, model, dtype)
    if config.lora is not None:
        learned = _lora_parameters(model, config.lora.targets, config.lora.rank, config.lora.modules_to_save)
        total, weights = base + learned, weights + 4 * learned
    elif config.adapter is not None:
        learned = _saved_adapter_parameters(config.adapter)
        total, weights = base + learned, weights + 4 * learned
    else:
        learned, total = base, base
    footprint = Footprint(total, learned, weights, gradients=4 * learned, optimizer=_ADAM_BYTES * learned)
    return replace(_divided(footprint, workload.shards), activations=_kept(model, config, workload))


def predict_teacher(config: LoadingConfig, workload: Workload) -> Footprint:
    """What asking this model takes: its weights, and the widest layer's activations of one batch."""
    model = empty_model(config)
    parameters, weights = _weights(config, model, choose_dtype(config, workload.precision, trainable=False))
    widest = max(sum(linear_width(layer)) for layer in model.get_decoder().modules() if is_linear(layer))
    width = model.config.get_text_config().hidden_size
    tokens, size = workload.batch_size * workload.max_tokens, _activation_bytes(workload)
    footprint = _divided(Footprint(parameters, 0, weights), workload.shards)
    return replace(footprint, activations=tokens * size * (3 * width + 2 * widest))


def _divided(footprint: Footprint, shards: int) -> Footprint:
    return replace(
        footprint, weights=-(-footprint.weights // shards), gradients=-(-footprint.gradients // shards),
        optimizer=-(-footprint.optimizer // shards),
    )


def _weights(config: LoadingConfig, model: PreTrainedModel, dtype: torch.dtype) -> tuple[int, int]:
    """Parameters and their bytes as they will lie in memory."""
    parameters, _ = count_parameters(model)
    size = torch.empty((), dtype=dtype).element_size()
    settings = quantisation_settings(config, model.config)
    if settings is None:
        return parameters, parameters * size
    packed_bytes, folder = bytes_of_packed(settings, size), local_folder(config)
    if packed_bytes is None:
        # A method that is not known here: as large as its files, where they are at hand.
        files = [] if folder is None else [file.stat().st_size for file in folder.glob("*.safetensors")]
        return parameters, sum(files) or parameters * size
    head, whole = model.get_output_embeddings(), left_alone(settings)
    packed = [
        linear_width(layer) for name, layer in model.named_modules()
        if is_linear(layer) and layer is not head and not any(f".{part}." in f".{name}." for part in whole)
    ]  # fmt: skip
    count = sum(math.prod(widths) for widths in packed)
    return parameters, sum(packed_bytes(*widths) for widths in packed) + (parameters - count) * size


def _lora_parameters(model: PreTrainedModel, targets: list[str] | str, rank: int, saved: list[str]) -> int:
    adapted = sum(rank * sum(linear_width(layer)) for layer in targeted(model, targets))
    whole = [layer for name, layer in model.named_modules() if name.rsplit(".", 1)[-1] in saved]
    return adapted + sum(parameter.numel() for layer in whole for parameter in layer.parameters())


def _saved_adapter_parameters(adapter: str) -> int:
    """From the sizes of its files; 0 for one on the hub, which is small beside its model."""
    return sum(file.stat().st_size for file in Path(adapter).expanduser().glob("adapter_model.safetensors")) // 4


def _activation_bytes(workload: Workload) -> int:
    return 2 if workload.precision == "bf16" else 4


def _kept(model: PreTrainedModel, config: ModelConfig, workload: Workload) -> int:
    """What the backward pass needs of the forward: about what goes into and comes out of every linear layer, and two float32
    copies in every norm."""
    modules = list(model.get_decoder().modules())
    text, size = model.config.get_text_config(), _activation_bytes(workload)
    linear = [layer for layer in modules if is_linear(layer)]
    per_token = size * sum(sum(linear_width(layer)) for layer in linear)
    per_token += 2 * 4 * sum(p.numel() for layer in modules if "norm" in type(layer).__name__.lower() for p in layer.parameters())
    layers = text.num_hidden_layers
    if config.attention == "eager":
        per_token += 2 * size * layers * text.num_attention_heads * workload.max_tokens
    if config.activation_checkpointing:
        per_token = per_token // layers + layers * size * text.hidden_size
    trained_whole = config.lora is None and config.adapter is None
    # Autocast keeps a narrow copy of every wide weight until the forward is over.
    copies = 2 * sum(math.prod(linear_width(layer)) for layer in linear) if trained_whole and workload.precision == "bf16" else 0
    return workload.batch_size * workload.max_tokens * per_token + copies

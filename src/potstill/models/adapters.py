"""Low-rank adapters by peft: a new one from a recipe, or a saved one put on its base. Safetensors only."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from potstill.errors import ModelError
from potstill.hub import require_on_hub
from potstill.models.config import LoraConfig


@contextmanager
def _without_noise() -> Iterator[None]:
    """peft asks transformers by names that it has since deprecated, and warns of a tied head, which the export unties."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module="(peft|transformers)")
        yield


def is_linear(layer: nn.Module) -> bool:
    """Whether a LoRA can sit on it: linear layers, and those that gptqmodel has put in their place for AWQ and GPTQ."""
    return isinstance(layer, nn.Linear | Conv1D) or hasattr(layer, "qweight")


def linear_width(layer: nn.Module) -> tuple[int, int]:
    """What goes in and what comes out of a linear layer, per token."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)  # type: ignore[return-value]


def linear_layers(model: nn.Module) -> list[str]:
    """The last names of the linear layers, in the order of the model."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if is_linear(layer)))


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def targeted(model: PreTrainedModel, targets: list[str] | str) -> list[nn.Module]:
    """The linear layers that `targets` names, as peft reads it: by the end of their path, or all but the head.

    Raises ModelError naming a target that is not in the model.
    """
    linear = {path: layer for path, layer in model.named_modules() if is_linear(layer)}
    if isinstance(targets, str):
        return [layer for layer in linear.values() if layer is not model.get_output_embeddings()]
    for name in targets:
        if not any(_named(path, name) for path in linear):
            known = ", ".join(linear_layers(model))
            raise ModelError(f"{model.config.name_or_path}: lora.targets names {name}, which is not in the model; its layers are {known}")
    return [layer for path, layer in linear.items() if any(_named(path, name) for name in targets)]


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """A `PeftModel` with a new adapter; the base is frozen. Raises ModelError naming a target that the model does not have."""
    targeted(model, lora.targets)
    configuration = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,  # type: ignore[arg-type]
        target_modules=lora.targets, modules_to_save=lora.modules_to_save or None,
        use_rslora=lora.rank_stabilised, task_type="CAUSAL_LM",
    )
    with _without_noise():
        return get_peft_model(model, configuration)  # type: ignore[return-value]


def adapter_base(folder: str) -> str:
    """The model that a saved adapter belongs to. Raises ModelError where the adapter does not say."""
    try:
        base = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: adapter_config.json does not read as JSON: {error}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder} is an adapter that does not name its base model; name the base as path and this folder as adapter")
    return base


def load_adapter(model: PreTrainedModel, adapter: str, trainable: bool) -> PeftModel:
    """The model with the saved adapter on it. Raises ModelError where it is not there, is a pickle, or belongs to another model."""
    folder = Path(adapter).expanduser()
    if folder.exists() or adapter.startswith(("/", ".", "~")):
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{adapter}: there is no adapter (no adapter_config.json in that folder)")
        if not (folder / "adapter_model.safetensors").is_file():
            raise ModelError(f"{adapter}: it has no adapter_model.safetensors; other files of weights are pickles and are not read")
    source = str(folder) if folder.exists() else adapter
    if not folder.exists():
        require_on_hub(adapter, "adapter_config.json", None)
    try:
        with _without_noise():
            return PeftModel.from_pretrained(model, source, is_trainable=trainable, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(f"{adapter}: this adapter cannot be put on {model.config.name_or_path}: {text}") from error

"""Low-rank adapters by peft: a new one from a recipe, or a saved one put on its base. Safetensors only."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from potstill.errors import ModelError
from potstill.models.config import LoraConfig


@contextmanager
def _silent_about_renames() -> Iterator[None]:
    """peft asks transformers by names that it has since deprecated; that is nothing a user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="(peft|transformers)")
        yield


def linear_layers(model: nn.Module) -> list[str]:
    """The last names of the layers that a LoRA can sit on, in the order of the model."""
    names = [name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, nn.Linear) or _is_conv1d(layer)]
    return list(dict.fromkeys(names))


def _is_conv1d(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """A `PeftModel` with a new adapter; the base is frozen. Raises ModelError naming a target that the model does not have."""
    known = linear_layers(model)
    wanted = lora.targets if isinstance(lora.targets, list) else []
    unknown = [name for name in wanted if not any(path == name or path.endswith(f".{name}") for path, _ in model.named_modules())]
    if unknown:
        raise ModelError(
            f"{model.config.name_or_path}: lora.targets names {unknown[0]}, which the model does not have; its layers are {', '.join(known)}"
        )
    configuration = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,  # type: ignore[arg-type]
        target_modules=lora.targets, modules_to_save=lora.modules_to_save or None,
        use_rslora=lora.rank_stabilised, task_type="CAUSAL_LM",
    )
    with _silent_about_renames():
        return get_peft_model(model, configuration)  # type: ignore[return-value]


def load_adapter(model: PreTrainedModel, adapter: str, trainable: bool) -> PeftModel:
    """The model with the saved adapter on it. Raises ModelError where it is not there, is a pickle, or belongs to another model."""
    folder = Path(adapter).expanduser()
    if folder.exists() or adapter.startswith(("/", ".", "~")):
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{adapter}: there is no adapter (no adapter_config.json in that folder)")
        if not (folder / "adapter_model.safetensors").is_file():
            raise ModelError(f"{adapter}: it has no adapter_model.safetensors; other files of weights are pickles and are not read")
    source = str(folder) if folder.exists() else adapter
    try:
        with _silent_about_renames():
            return PeftModel.from_pretrained(model, source, is_trainable=trainable, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(f"{adapter}: this adapter cannot be put on {model.config.name_or_path}: {text}") from error

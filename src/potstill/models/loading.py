"""Loads what a recipe names: any `AutoModelForCausalLM`, quantised or not, with adapters or without, and its tokenizer.

Safetensors only, and no code that ships with a model unless it is pinned. Every failure names the path and the remedy.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from potstill.errors import ModelError
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.requirements import quantisation_of, require_transformers

require_transformers()

from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from potstill.hub import require_on_hub  # noqa: E402
from potstill.models.adapters import adapter_base, add_lora, load_adapter  # noqa: E402
from potstill.models.quantisation import describe_quantisation  # noqa: E402
from potstill.models.quantising import choose_quantisation, keep_differentiable, wake  # noqa: E402

Precision = Literal["bf16", "float32"]

# What transformers raises for a folder, a name or a file that is not what it should be.
_LOADING_ERRORS = (
    OSError, ValueError, ImportError, LookupError, RuntimeError, TypeError, AttributeError, SafetensorError, StrictDataclassError,
)


def _location(path: str) -> str:
    """A local folder as an absolute path, a hub name as it is. Raises ModelError where a folder is plainly meant and is not there."""
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local.absolute())
    if local.exists():
        raise ModelError(f"{path} is a file; a model is a folder with config.json and safetensors, or a name on the hub")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ModelError(f"{path}: there is no such folder; a model is a folder with config.json and safetensors, or a name on the hub")
    return path


def local_folder(config: LoadingConfig) -> Path | None:
    """The model's folder, or None where it is a name on the hub."""
    folder = Path(_location(config.path))
    return folder if folder.is_dir() else None


def _refuse_local_code(path: str, config: LoadingConfig) -> None:
    if config.trust_remote_code and Path(path).is_dir():
        raise ModelError(f"{path}: trust_remote_code is for a commit on the hub; the code in a local folder is not pinned by anything")


def _refuse_unsafe_folder(path: str, config: LoadingConfig) -> None:
    """Raises ModelError for a local folder that is no model, or whose weights are pickles, or whose code is wanted."""
    folder = Path(path)
    if not folder.is_dir():
        return
    _refuse_local_code(path, config)
    if not (folder / "config.json").exists():
        raise ModelError(f"{path} has no config.json, so it is not a model; it holds {_contents(folder)}")
    if config.weights == "pretrained" and not any(folder.glob("*.safetensors")):
        pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(pattern))
        remedy = "convert it once, where you trust it: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
        if pickles:
            raise ModelError(f"{path}: its weights are {pickles[0]}, a pickle, which runs code when it is read; {remedy}")
        raise ModelError(
            f"{path} has no *.safetensors; it holds {_contents(folder)}. For a model from its configuration alone: weights: random"
        )


def _contents(folder: Path) -> str:
    names = sorted(f.name for f in folder.iterdir())
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "nothing"


def _hub_arguments(config: LoadingConfig) -> dict:
    # False and not None: None would let transformers ask on the terminal. code_revision pins the code too.
    arguments: dict = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        arguments["revision"] = config.revision
    if local_folder(config) is None and require_on_hub(config.path, "config.json", config.revision):
        arguments["local_files_only"] = True
    if config.trust_remote_code:
        arguments["code_revision"] = config.revision
    return arguments


def _explain(config: LoadingConfig, what: str, error: Exception) -> ModelError:
    if isinstance(error, ModelError):
        return error
    text = " ".join(str(error).split())
    if "backend tokenizer" in text:
        return ModelError(f"{config.path}: there is no tokenizer beside the model (no tokenizer.json); save the tokenizer there too")
    if "trust_remote_code" in text:
        return ModelError(
            f"{config.path}: it ships code of its own, which is not run. If you have read it and trust it, set trust_remote_code: true "
            "and revision to the commit (40 hexadecimal digits) that you have read"
        )
    if not Path(config.path).expanduser().is_dir() and isinstance(error, OSError):
        return ModelError(f"{config.path}: neither a folder here nor a model that the hub gives ({what}): {text[:300]}")
    return ModelError(f"{config.path}: {what} cannot be loaded: {text[:400]}")


def with_base(config: LoadingConfig) -> LoadingConfig:
    """For a folder that is an adapter: its base model as `path`, the folder as `adapter`. Anything else as it is."""
    folder = Path(config.path).expanduser()
    if not (folder / "adapter_config.json").is_file():
        return config
    if (folder / "config.json").exists():
        raise ModelError(f"{config.path} holds a model and an adapter; put them into folders of their own and name both")
    if config.adapter is not None:
        raise ModelError(f"{config.path} is an adapter, so adapter: {config.adapter} has no model to sit on; name the base model as path")
    base = adapter_base(str(folder))
    return config.model_copy(update={"path": base, "adapter": str(folder)})


def read_model_config(config: LoadingConfig) -> PreTrainedConfig:
    """The model's configuration, without weights. Raises ModelError naming the path where there is none."""
    config = with_base(config)
    path = _location(config.path)
    _refuse_unsafe_folder(path, config)
    try:
        return AutoConfig.from_pretrained(path, **_hub_arguments(config))
    except _LOADING_ERRORS as error:
        raise _explain(config, "config.json", error) from error


def longest_context(saved: PreTrainedConfig) -> int | None:
    """Tokens that the positions of a model with this configuration reach, under whatever key its family keeps them; None where it
    does not say."""
    text = saved.get_text_config()
    return text.to_dict().get((text.attribute_map or {}).get("max_position_embeddings", "max_position_embeddings"))


def generation_settings(config: LoadingConfig) -> GenerationConfig | None:
    """What is saved beside the model of how it writes; None where nothing is."""
    config = with_base(config)
    arguments = {key: value for key, value in _hub_arguments(config).items() if key in ("revision", "local_files_only")}
    try:
        return GenerationConfig.from_pretrained(_location(config.path), **arguments)
    except OSError:
        return None


def stop_ids(config: LoadingConfig, saved: PreTrainedConfig) -> tuple[int, ...]:
    """The ids at which the model stops, by its generation settings where it has them, else by its configuration."""
    settings = generation_settings(config)
    return _ids((settings or saved).eos_token_id)


def configured_ends(saved: PreTrainedConfig) -> tuple[int, ...]:
    """The ids that a configuration alone calls ends: one, several or none."""
    return _ids(saved.get_text_config().eos_token_id)


def _ids(stated: Any) -> tuple[int, ...]:
    return tuple(stated) if isinstance(stated, list) else () if stated is None else (int(stated),)


def load_tokenizer(config: LoadingConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, with `config.chat_template` and `config.eos_token` in place of its own.

    Beside an adapter without one it is that of the adapter's base.
    """
    folder = local_folder(config)
    if folder is not None and not any(folder.glob("tokenizer*")):
        config = with_base(config)
    path = _location(config.path)
    _refuse_local_code(path, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_hub_arguments(config))
    except _LOADING_ERRORS as error:
        raise _explain(config, "its tokenizer", error) from error
    if config.chat_template is not None:
        tokenizer.chat_template = _chat_template(config.chat_template)
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise ModelError(f"{config.path}: eos_token {config.eos_token!r} is not a token of its tokenizer")
        tokenizer.eos_token = config.eos_token
    return tokenizer


def _chat_template(source: str) -> str:
    if "{%" in source or "{{" in source:
        return source
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"chat_template: {source} is neither a Jinja template nor a file that can be read ({error.strerror})") from error


def choose_dtype(config: LoadingConfig, precision: Precision, trainable: bool) -> torch.dtype:
    """Of the weights: what the recipe says; else float32 for weights that the optimizer changes, else the precision's own.

    A bfloat16 weight does not see an update smaller than 1/256 of it, so weights that are trained whole are kept in float32
    and computed with in bfloat16.
    """
    if config.dtype is not None:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    whole = trainable and isinstance(config, ModelConfig) and config.lora is None and config.adapter is None
    return torch.float32 if precision == "float32" or whole else torch.bfloat16


def stated_quantisation(config: LoadingConfig, precision: Precision = "float32") -> str:
    """How the weights of this teacher are quantised, by method, bits, groups and compute dtype; "none" where they are not.

    From its configuration alone: equal for a recipe and for the model that it loads.
    """
    config = with_base(config)
    return describe_quantisation(config, read_model_config(config), choose_dtype(config, precision, trainable=False))


def load_model(
    config: LoadingConfig, *, precision: Precision = "float32", trainable: bool = False, device: str | torch.device = "cpu",
    seed: int = 0, sharded: bool = False,
) -> nn.Module:
    """A `PreTrainedModel`, or a `PeftModel` around one, in evaluation mode.

    `trainable`: what the recipe lets learn requires a gradient and is float32, all else is frozen. `seed` fixes random weights
    and a new adapter. `sharded`: the parameters are spread over the ranks of the initialised process group (FSDP2).
    Raises ModelError naming the path and the remedy.
    """
    config = with_base(config)
    saved = read_model_config(config)
    dtype = choose_dtype(config, precision, trainable)
    arguments = {**_hub_arguments(config), "dtype": dtype}
    if config.attention is not None:
        arguments["attn_implementation"] = config.attention
    quantization = choose_quantisation(config, saved, dtype, trainable)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.weights == "random":
            model = _moved(_random(config, saved, arguments), device)
        else:
            if quantization is not None:
                arguments["quantization_config"] = quantization
            quantised = quantization is not None or quantisation_of(saved) is not None
            model = _pretrained(config, arguments, torch.device(device), sharded, quantised)
            if quantised:
                keep_differentiable(model, dtype, trainable)
                wake(model)
        model.requires_grad_(False)
        return _made_trainable(config, model, trainable).eval()


def _random(config: LoadingConfig, saved: PreTrainedConfig, arguments: dict) -> PreTrainedModel:
    arguments = {key: value for key, value in arguments.items() if key not in ("revision", "code_revision", "local_files_only")}
    try:
        return AutoModelForCausalLM.from_config(saved, **arguments)
    except _LOADING_ERRORS as error:
        raise _explain(config, "a model from its configuration", error) from error


def _pretrained(config: LoadingConfig, arguments: dict, device: torch.device, sharded: bool, quantised: bool) -> PreTrainedModel:
    if sharded:
        from potstill.models.sharding import sharding_arguments

        arguments.update(sharding_arguments(config.path, quantised))
    elif quantised:
        # A quantised model is packed for its device while it is loaded and does not move afterwards.
        arguments["device_map"] = {"": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _location(config.path), use_safetensors=True, output_loading_info=True, **arguments
        )
        model, report = loaded
    except _LOADING_ERRORS as error:
        raise _explain(config, "the model", error) from error
    missing = sorted(name for name in report["missing_keys"] if not quantised or name.endswith((".weight", ".bias")))
    if missing:
        # transformers fills these with random numbers and goes on.
        raise ModelError(
            f"{config.path}: its files lack {len(missing)} of the model's weights, the first is {missing[0]}; "
            f"is it really a checkpoint of {type(model).__name__}?"
        )
    return model if sharded or quantised else _moved(model, device)


def _enable_checkpointing(model: PreTrainedModel) -> None:
    # transformers renamed it between 5.19 and 5.23.
    renamed = "activation_checkpointing_enable" in dir(model)
    enable: Any = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _moved(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    nn.Module.to(model, torch.device(device))
    return model


def _made_trainable(config: LoadingConfig, model: PreTrainedModel, trainable: bool) -> nn.Module:
    result: PreTrainedModel | PeftModel = model
    lora = config.lora if isinstance(config, ModelConfig) else None
    if config.adapter is not None:
        result = load_adapter(model, config.adapter, trainable=trainable and lora is None)
    if not trainable:
        return result
    if lora is not None:
        # A new adapter learns on top of what a saved one taught.
        result = add_lora(result.merge_and_unload() if isinstance(result, PeftModel) else result, lora)
    elif config.adapter is None:
        result.requires_grad_(True)
    for parameter in result.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    if isinstance(config, ModelConfig) and config.activation_checkpointing:
        _enable_checkpointing(model)
    return result

"""What makes two models, two tokenizers or two templates the same, as short digests that know no path and no partition into files.

Reads safetensors tensor by tensor, so the memory that a digest takes is that of the largest tensor; no model is built.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8
from transformers import PreTrainedTokenizerBase

from potstill.errors import ModelError
from potstill.hub import require_on_hub
from potstill.models.config import LoadingConfig
from potstill.models.loading import read_model_config, with_base
from potstill.models.quantisation import describe_quantisation

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_WEIGHTS, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Bytes hashed at once; hashing a view of a mapped file in pieces touches no more of it than that.
_PIECE = 1 << 24

# What a configuration says of its origin, of training and of generation: nothing of what a forward pass computes.
_NOT_OF_THE_FORWARD = frozenset({
    "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "name_or_path", "_name_or_path", "quantization_config", "initializer_range", "attention_dropout", "auto_map",
})  # fmt: skip
_NOT_OF_THE_ADAPTER = frozenset({
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type", "lora_dropout",
    "init_lora_weights",
})  # fmt: skip
# Padding belongs to no sequence, so the token that pads and the side are no part of what a tokenizer says.
_NOT_OF_THE_TOKENIZER = ("padding", "truncation", "version")


def weights_digest(config: LoadingConfig, *, seed: int = 0) -> dict[str, str]:
    """Who answers, as it would be loaded: "teacher weights", "teacher configuration", "adapter weights" and "quantisation".

    Equal for another partition into files, another path, mount or folder name; another for one changed bit. Reads every weight
    once, from the folder or from the hub's snapshot (which is fetched where it is not here). `weights: random` is its
    configuration and the `seed`. Raises ModelError naming the path.
    """
    config = with_base(config)
    saved = read_model_config(config)
    drawn = config.weights == "random"
    return {
        "teacher weights": f"random, seed {seed}" if drawn else _tensors_digest(_tensors(config.path, _weight_files(config))),
        "teacher configuration": _digest(_meaning(saved.to_diff_dict(), _NOT_OF_THE_FORWARD)),
        "adapter weights": "none" if config.adapter is None else _adapter_digest(config.adapter),
        "quantisation": describe_quantisation(config, saved),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal where every text becomes the same ids and every id means the same: vocabulary, merges, normaliser, added and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _NOT_OF_THE_TOKENIZER}
    else:
        # Without a backend its rules are code; its name, its vocabulary and its added tokens are what can be compared.
        added = [[number, str(token.content), token.special] for number, token in sorted(tokenizer.added_tokens_decoder.items())]
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "added_tokens": added}
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return _digest({"rules": rules, "special": special})


def template_digest(template: PreTrainedTokenizerBase | str | None) -> str:
    """The source of a chat template, or of the one that a tokenizer has; "none" where there is none."""
    source = template.chat_template if isinstance(template, PreTrainedTokenizerBase) else template
    return "none" if source is None else _digest(source)


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode())


def _meaning(value: Any, left_out: frozenset[str]) -> Any:
    """A configuration without the keys that say nothing of the answer, at any depth; a key that is null is as good as absent."""
    if isinstance(value, Mapping):
        return {key: _meaning(item, left_out) for key, item in value.items() if key not in left_out and item is not None}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_meaning(item, left_out) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    return value


# ---------------------------------------------------------------- files


def _file(path: str, name: str, revision: str | None) -> Path | None:
    """A file of a model's folder or of its snapshot, or None where the model has none of that name."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    cached_alone = require_on_hub(path, _ADAPTER_CONFIG if name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS) else "config.json", revision)
    try:
        return Path(hf_hub_download(path, name, revision=revision, local_files_only=cached_alone))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"{path}: {name} cannot be had from the hub: {' '.join(str(error).split())[:300]}") from error


def _weight_files(config: LoadingConfig) -> list[Path]:
    """The files that the model is loaded from: one, or those that the index names; others beside them are no part of it."""
    single = _file(config.path, _WEIGHTS, config.revision)
    if single is not None:
        return [single]
    index = _file(config.path, _INDEX, config.revision)
    if index is None:
        raise ModelError(
            f"{config.path}: neither {_WEIGHTS} nor {_INDEX} is there, so its weights cannot be compared; save the model as safetensors"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: does not read as an index of weights: {error}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: it names a file that is not beside it: {outside[0]!r}")
    files = [_file(config.path, name, config.revision) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise ModelError(f"{config.path}: {len(missing)} of {len(names)} files of weights are not there, the first is {missing[0]}")
    return [file for file in files if file is not None]


def _adapter_digest(adapter: str) -> str:
    """Its tensors and what its configuration says of their use: rank, alpha, targets."""
    settings, weights = _file(adapter, _ADAPTER_CONFIG, None), _file(adapter, _ADAPTER_WEIGHTS, None)
    if settings is None or weights is None:
        raise ModelError(f"{adapter}: there is no adapter (it needs {_ADAPTER_CONFIG} and {_ADAPTER_WEIGHTS})")
    try:
        stated = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{adapter}: {_ADAPTER_CONFIG} does not read as JSON: {error}") from error
    # peft writes a set of targets in any order.
    for key in ("target_modules", "modules_to_save"):
        if isinstance(stated.get(key), list):
            stated[key] = sorted(stated[key])
    return _digest([_tensors_digest(_tensors(adapter, [weights])), _meaning(stated, _NOT_OF_THE_ADAPTER)])


# ---------------------------------------------------------------- tensors


def _tensors(path: str, files: Iterable[Path]) -> Iterator[tuple[str, str, list[int], str]]:
    """(name, dtype, shape, digest of the bytes) of every tensor, file by file."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - a file of tensors is no mapping
                    part = opened.get_slice(name)
                    yield name, str(part.get_dtype()), list(part.get_shape()), _bytes_digest(opened.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {file.name} does not read as safetensors: {error}") from error


def _bytes_digest(tensor: Tensor) -> str:
    hashed = xxhash.xxh3_128()
    flat = tensor.contiguous().reshape(-1).view(uint8)
    for start in range(0, len(flat), _PIECE):
        hashed.update(flat[start : start + _PIECE].numpy())  # type: ignore[arg-type]
    return hashed.hexdigest()


def _tensors_digest(tensors: Iterable[tuple[str, str, list[int], str]]) -> str:
    return _digest(sorted(tensors))

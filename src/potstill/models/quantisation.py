"""Which quantisation a model has, from its configuration alone: its settings, their words, and what a packed layer takes in memory.

Needs no package that would load the model: a recorded answer is compared where its teacher could not be loaded.
"""

import json
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from transformers import PreTrainedConfig

from potstill.models.config import LoadingConfig


def while_loading(bits: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """The settings of bitsandbytes behind `quantization: 4bit` and `8bit`, computing in `dtype`, that of the weights left whole."""
    if bits == "8bit":
        return {"load_in_8bit": True, "llm_int8_threshold": 6.0}
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "the dtype of the rest" if dtype is None else str(dtype).removeprefix("torch."),
    }  # fmt: skip


def quantisation_settings(config: LoadingConfig, saved: PreTrainedConfig, dtype: torch.dtype | None = None) -> dict[str, Any] | None:
    """The settings that the weights are quantised by, saved or while loading, as JSON would hold them; None where they are not."""
    settings = saved.to_dict().get("quantization_config")
    if settings is None and config.quantization is None:
        return None
    return _plain(settings or {"quant_method": "bitsandbytes", **while_loading(str(config.quantization), dtype)})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, bool | int | float | str) else str(value).removeprefix("torch.")


# ---------------------------------------------------------------- in words


def describe_quantisation(config: LoadingConfig, saved: PreTrainedConfig, dtype: torch.dtype | None = None) -> str:
    """How the weights are quantised, in words that are equal exactly where the settings are; "none" where they are not.

    `dtype` is that of the weights that are left whole; unset, it is stated elsewhere.
    """
    settings = quantisation_settings(config, saved, dtype)
    if settings is None:
        return "none"
    method = str(settings["quant_method"])
    take_apart = {"bitsandbytes": _bitsandbytes, "awq": _groups, "gptq": _groups, "compressed-tensors": _schemes}
    return ", ".join([method, *take_apart.get(method, _anything)(settings)])


def _bitsandbytes(settings: dict[str, Any]) -> list[str]:
    if settings.get("load_in_8bit"):
        words = ["8 bits", "rows of int8", f"outliers over {float(settings.get('llm_int8_threshold', 6.0)):g} apart"]
    else:
        kind, double = settings.get("bnb_4bit_quant_type", "fp4"), settings.get("bnb_4bit_use_double_quant", False)
        words = [
            "4 bits", f"{kind} in blocks of 64", "double quantisation" if double else "single quantisation",
            f"computed in {settings.get('bnb_4bit_compute_dtype') or 'float32'}",
        ]  # fmt: skip
    return words + _without(settings)


def _groups(settings: dict[str, Any]) -> list[str]:
    """AWQ and GPTQ, under the names that either gives its settings."""
    is_awq, size = settings["quant_method"] == "awq", _group_size(settings)
    symmetric = not settings.get("zero_point", True) if is_awq else settings.get("sym", True)
    form = settings.get("version") or settings.get("format") or settings.get("checkpoint_format") or ("gemm" if is_awq else "gptq")
    words = [
        f"{_bits(settings)} bits", f"groups of {size}" if size else "one group a row",
        "symmetric" if symmetric else "with zero points", str(form).lower(),
    ]  # fmt: skip
    return words + (["activation order"] if settings.get("desc_act") else []) + _without(settings)


def _schemes(settings: dict[str, Any]) -> list[str]:
    """compressed-tensors: which layers are quantised by which scheme, whatever defaults are written out."""
    words = []
    for scheme in settings.get("config_groups", {}).values():
        parts = {"weights": scheme.get("weights"), "inputs": scheme.get("input_activations"), "outputs": scheme.get("output_activations")}
        stated = [f"{part} in {_scheme(how)}" for part, how in parts.items() if how]
        words.append(f"{' and '.join(sorted(scheme.get('targets', [])))}: {', '.join(stated)}")
    said = ("quant_method", "config_groups", "format", "ignore", "version", "quantization_status", "global_compression_ratio")
    rest = {key: value for key, value in settings.items() if key not in (*said, "run_compressed") and value}
    form = [str(settings["format"])] if settings.get("format") else []
    return sorted(words) + form + _without(settings) + ([json.dumps(rest, sort_keys=True)] if rest else [])


def _scheme(how: dict[str, Any]) -> str:
    grouped = (how.get("group_size") or 0) > 0
    words = [
        f"{how.get('num_bits', 8)} bits", str(how.get("type", "int")), "symmetric" if how.get("symmetric", True) else "with zero points",
        f"groups of {how['group_size']}" if grouped else f"one scale a {how.get('strategy') or 'tensor'}",
    ]  # fmt: skip
    return " ".join(words + (["dynamic"] if how.get("dynamic") else []) + (["activation order"] if how.get("actorder") else []))


def _anything(settings: dict[str, Any]) -> list[str]:
    """Of a method that is not taken apart here: every setting, in one order, but what only says with what it was made."""
    made_with = ("quant_method", "version")
    return [json.dumps({key: value for key, value in settings.items() if key not in made_with and value is not None}, sort_keys=True)]


def _without(settings: dict[str, Any]) -> list[str]:
    names = left_alone(settings)
    return [f"without {' and '.join(names)}"] if names else []


# ---------------------------------------------------------------- in numbers


def left_alone(settings: dict[str, Any]) -> list[str]:
    """Names, or parts of names, of the linear layers that are said not to be quantised."""
    names = (settings.get(key) for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore"))
    return sorted({name for part in names for name in part or ()})


def _bits(settings: dict[str, Any]) -> int:
    return int(settings.get("bits", settings.get("w_bit", 4)))


def _group_size(settings: dict[str, Any]) -> int:
    """Weights that share a scale; 0 where a whole row does."""
    schemes = settings.get("config_groups") or {}
    grouped = [(scheme.get("weights") or {}).get("group_size") for scheme in schemes.values()] if schemes else [
        settings.get("group_size", settings.get("q_group_size", 128))
    ]  # fmt: skip
    return max(0, *(size or 0 for size in grouped), 0)


def bytes_of_packed(settings: dict[str, Any], size: int) -> Callable[[int, int], int] | None:
    """What a linear layer of so many inputs and outputs takes in memory, `size` being the bytes of a weight that is left whole.

    None for a method that is not known here.
    """
    method, bits, group = settings["quant_method"], _bits(settings), _group_size(settings)

    def groups(inputs: int) -> int:
        return -(-inputs // group) if group else 1

    if method == "bitsandbytes" and settings.get("load_in_8bit"):
        return lambda inputs, outputs: (inputs + 4) * outputs
    if method == "bitsandbytes":
        # A block of 64 weights shares a float32 or, where that is quantised again, 8 bits of which 256 share a float32.
        scales = 1 / 64 + 4 / (64 * 256) if settings.get("bnb_4bit_use_double_quant") else 4 / 64
        return lambda inputs, outputs: int(inputs * outputs * (0.5 + scales))
    if method in ("awq", "gptq"):
        # A group's scale has 16 bits and its zero as many as a weight; GPTQ names the group of each input in 32 bits.
        named = 4 if method == "gptq" else 0
        return lambda inputs, outputs: (inputs * bits + groups(inputs) * (16 + bits)) * outputs // 8 + named * inputs
    if method == "compressed-tensors":
        # Unpacked in the first forward; the scales stay.
        return lambda inputs, outputs: size * outputs * (inputs + groups(inputs))
    return None

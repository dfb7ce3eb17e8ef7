"""Imports transformers and peft, or says in one line why they cannot be imported here. Knows nothing of any one model."""

import importlib
import importlib.util
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from potstill.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What transformers needs for a checkpoint that is saved in quantised form: quant_method -> (modules, what to install).
QUANTISED_NEEDS = {
    "awq": (("gptqmodel",), "gptqmodel==7.6.0"),
    "gptq": (("gptqmodel", "optimum"), "gptqmodel==7.6.0 optimum"),
    "compressed-tensors": (("compressed_tensors",), "compressed-tensors"),
    "bitsandbytes": (("bitsandbytes",), "'potstill[quant]'"),
    "torchao": (("torchao",), "torchao"),
    "hqq": (("hqq",), "hqq"),
    "aqlm": (("aqlm",), "aqlm"),
    "eetq": (("eetq",), "eetq"),
    "quanto": (("optimum.quanto",), "optimum-quanto"),
}


def is_installed(module: str) -> bool:
    """Whether `import module` would find something, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def broken_torchvision() -> str | None:
    """Why an installed torchvision breaks transformers, or None.

    transformers imports torchvision merely because it is installed; one built for another torch then takes every model class
    down with "Could not import module", which names neither.
    """
    if not is_installed("torchvision"):
        return None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return (
            f"torchvision {_version('torchvision')} does not fit torch {_version('torch')} ({error}), and transformers imports it "
            "because it is installed. Potstill does not need it: pip uninstall torchvision, or install the build for this torch."
        )
    return None


def require_transformers() -> None:
    """Imports what the models need, or raises ModelError with the cause that transformers' own message hides."""
    try:
        importlib.import_module("transformers.modeling_utils")
        importlib.import_module("peft")
    except (ImportError, RuntimeError) as error:
        raise ModelError(broken_torchvision() or f"transformers or peft cannot be imported here: {error}") from error


def quantisation_of(config: "PreTrainedConfig") -> str | None:
    """How the weights of a model with this configuration are quantised ("bitsandbytes", "awq", ...), or None."""
    method = (config.to_dict().get("quantization_config") or {}).get("quant_method")
    return str(method.value if isinstance(method, Enum) else method) if method is not None else None


def require_quantiser(method: str, path: str) -> None:
    """Raises ModelError naming the package where a checkpoint's quantisation needs one that is not installed."""
    modules, install = QUANTISED_NEEDS.get(method, ((), ""))
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        raise ModelError(
            f"{path}: its weights are quantised by {method}, which needs the package {' and '.join(missing)}: pip install {install}"
        )

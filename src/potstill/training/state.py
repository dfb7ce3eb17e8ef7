"""Turns the state of a training process into tensors and JSON numbers, and back exactly: trained weights and optimizer.

Everything is keyed by parameter name and holds whole tensors, so that it fits any number of ranks and any sharding. Generators of
random numbers are no part of it: what is random in training is a function of the step. Nothing here touches a disk.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from potstill.errors import IncompatibleError

# What wrappers put into the path of a parameter; a checkpoint must not depend on how the model was wrapped.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What the recipe says of an optimizer: a resumed run has built it with today's values, and whoever changed one meant it.
_OF_THE_RECIPE = frozenset({"weight_decay", "betas", "eps"})


def plain_name(name: str) -> str:
    """A parameter's name without the parts that DDP, torch.compile, FSDP and activation checkpointing add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by plain name; a tied parameter appears once."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """The unsharded tensor on the CPU. For a sharded one every rank must call it, in the same order.

    A rank that does not `keep` it only takes part in the gathering and gets nothing: one copy on a machine is enough.
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous() if keep else torch.empty(0)


def _like(value: Tensor, reference: Tensor) -> Tensor:
    """`value`, a whole tensor, laid out over devices and ranks as `reference` is."""
    if isinstance(reference, DTensor) and value.shape == reference.shape:
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None)
    return value.to(reference.device)


# ---------------------------------------------------------------- weights


def weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The trained parameters as whole CPU tensors, by plain name. Frozen ones are not state: they are loaded as at the start."""
    return {name: whole(parameter, keep=keep) for name, parameter in trainable_parameters(model).items()}


@torch.no_grad()
def restore_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts `weights` back. Raises IncompatibleError if a name, shape or dtype differs."""
    parameters = trainable_parameters(model)
    _refuse_other_names(parameters, tensors)
    for name, parameter in parameters.items():
        saved = tensors[name]
        if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
            raise IncompatibleError(
                f"checkpoint: {name} is {saved.dtype} {list(saved.shape)}, and {parameter.dtype} {list(parameter.shape)} in the "
                "model; was the model or its precision changed? --fresh starts over"
            )
        parameter.copy_(_like(saved, parameter))


def _refuse_other_names(here: Mapping[str, object], saved: Mapping[str, object]) -> None:
    if here.keys() != saved.keys():
        name = sorted(here.keys() ^ saved.keys())[0]
        where = "only in the checkpoint" if name in saved else "only in the model"
        raise IncompatibleError(
            f"checkpoint: it holds other trained parameters than the model ({name} is {where}); was the model changed? --fresh starts over"
        )


# ---------------------------------------------------------------- optimizer


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of an optimizer over `model`'s parameters: tensors are named "exp_avg/<parameter>"."""
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        settings = {key: plain(value) for key, value in group.items() if key != "params" and key not in _OF_THE_RECIPE}
        groups.append({"settings": settings, "parameters": [names[id(parameter)] for parameter in group["params"]]})
        for parameter in group["params"]:
            name = names[id(parameter)]
            # Sorted: ranks gather shards together, and a state that was read from a file has its keys in any order.
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    tensors[f"{key}/{name}"] = whole(value, keep=keep)
                else:
                    values.setdefault(name, {})[key] = plain(value)
    return tensors, {"groups": groups, "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Puts `optimizer_state` back into an optimizer built as it was. Raises IncompatibleError for other parameters or groups."""
    parameters = trainable_parameters(model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    here = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if here != [group["parameters"] for group in numbers["groups"]]:
        raise IncompatibleError("checkpoint: the optimizer's parameter groups differ from those of the run; --fresh starts over")
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update({key: _as(restored(value), group.get(key)) for key, value in saved["settings"].items()})
    state: dict[str, dict[str, Any]] = {name: {k: restored(v) for k, v in held.items()} for name, held in numbers["values"].items()}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        # A step count is a scalar that torch keeps on the CPU; moments lie where their parameter lies.
        state.setdefault(name, {})[kind] = _like(value, parameter) if value.ndim else value.clone()
    optimizer.state.clear()
    for name, held in state.items():
        optimizer.state[parameters[name]] = held


def _as(value: Any, former: Any) -> Any:
    """A restored setting in the type that the optimizer keeps it in: betas are a tuple, a capturable learning rate a tensor."""
    if isinstance(former, tuple):
        return tuple(value)
    return torch.tensor(value, dtype=former.dtype, device=former.device) if isinstance(former, Tensor) else value


def plain(value: Any) -> Any:
    """`value` as JSON: scalars of numpy and torch become numbers, tuples lists, and what is not finite {"float": "inf"}.

    Raises TypeError for what has no such form; a state that cannot be written exactly must not be written at all.
    """
    if (isinstance(value, Tensor) and value.ndim == 0) or isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no exact form in JSON; put tensors among the tensors of a state")


def restored(value: Any) -> Any:
    """The inverse of `plain`, but for tuples, which stay lists."""
    if isinstance(value, dict):
        return float(value["float"]) if value.keys() == {"float"} else {key: restored(item) for key, item in value.items()}
    return [restored(item) for item in value] if isinstance(value, list) else value

"""Checkpoints in 4 bits, packed by hand, each with the weights that it must mean: computed here in float64, by nobody's quantiser.

Weights are rounded to the nearest level and not calibrated, so what they lose is more than a calibrated checkpoint loses.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GROUP = 32
# AWQ's GEMM kernels read the eight outputs of a word in this order.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of the trunk by name: what is quantised. The head is not."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head")


def widened(model, intermediate: int):
    """The same function with a wider MLP: the new units are zero, and silu(0) * 0 adds nothing. Packing wants widths that divide."""
    config = copy.deepcopy(model.config)
    config.intermediate_size = intermediate
    wide = type(model)(config).eval()
    state = {name: torch.zeros_like(tensor) for name, tensor in wide.state_dict().items()}
    for name, tensor in model.state_dict().items():
        state[name][tuple(slice(size) for size in tensor.shape)] = tensor
    wide.load_state_dict(state)
    return wide


def meaning(model, weights: dict[str, np.ndarray]):
    """The model in float32 with these weights in the place of its linear layers'."""
    plain = copy.deepcopy(model)
    for name, layer in linears(plain):
        layer.weight.data = torch.from_numpy(weights[name]).float()
    return plain


# ---------------------------------------------------------------- the levels


def nf4_levels() -> np.ndarray:
    """Sixteen quantiles of a normal distribution, one of them 0 (2305.14314, section 3), from the quantile function itself."""
    ends = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))

    def quantiles(count: int) -> np.ndarray:
        return torch.special.ndtri(torch.linspace(ends, 0.5, count, dtype=torch.float64)).numpy()[:-1]

    levels = np.sort(np.concatenate([-quantiles(8), [0.0], quantiles(9)]))
    return levels / levels.max()


def nf4(weight: Tensor, block: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """What NF4 keeps of a weight, its blocks' scales not quantised again, and the largest magnitude of each weight's block."""
    flat = weight.detach().double().numpy().reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    largest = np.abs(blocks).max(1, keepdims=True)
    levels = nf4_levels()
    nearest = np.abs(blocks[:, :, None] / np.maximum(largest, 1e-300)[:, :, None] - levels).argmin(-1)
    kept, scales = levels[nearest] * largest, np.broadcast_to(largest, blocks.shape)
    kept, scales = (part.reshape(-1)[: len(flat)].reshape(weight.shape) for part in (kept, scales))
    return kept, scales


def int8(weight: Tensor) -> np.ndarray:
    """What LLM.int8 keeps of a weight, which it takes in float16: rows of integers up to 127 with one scale each."""
    values = weight.detach().half().double().numpy()
    scale = np.maximum(np.abs(values).max(1, keepdims=True), 1e-300) / 127
    return np.rint(values / scale) * scale


def affine(weight: Tensor, group: int = GROUP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(integers 0 to 15, zeros, scales) of a weight [out, in]: each group of inputs spans from its smallest to its largest value.

    Integers are [out, in], zeros and scales [out, in / group]; a weight means (integer - zero) * scale. Scales are float16's.
    """
    groups = weight.detach().double().numpy().reshape(weight.shape[0], -1, group)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scale = np.maximum((high - low) / 15, 1e-6).astype(np.float16).astype(np.float64)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    integers = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, 15)
    return integers.reshape(weight.shape).astype(np.int64), zero.astype(np.int64), scale


def affine_meaning(integers: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: int = GROUP) -> np.ndarray:
    return (integers - zeros.repeat(group, 1)) * scales.repeat(group, 1)


# ---------------------------------------------------------------- the files


def _words(nibbles: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight columns of 0 to 15 in each int32, column order[i] in its bits 4i to 4i + 3."""
    columns = nibbles.reshape(nibbles.shape[0], -1, 8).astype(np.uint32)
    words = np.zeros(columns.shape[:2], dtype=np.uint32)
    for place, column in enumerate(order):
        words |= columns[:, :, column] << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32).copy())


def _save(model, folder: Path, packed: dict[str, dict[str, Tensor]], settings: dict) -> None:
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in packed}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, parts in packed.items():
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def save_awq(model, folder: Path):
    """The model as AutoAWQ writes it (GEMM): words along the outputs, interleaved. Returns what it means."""
    packed, weights = {}, {}
    for name, layer in linears(model):
        integers, zeros, scales = affine(layer.weight)
        weights[name] = affine_meaning(integers, zeros, scales)
        packed[name] = {
            "qweight": _words(integers.T, _AWQ_ORDER), "qzeros": _words(zeros.T, _AWQ_ORDER),
            "scales": torch.from_numpy(scales.T.astype(np.float16)),
        }  # fmt: skip
    _save(model, folder, packed, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"})
    return meaning(model, weights)


def save_gptq(model, folder: Path):
    """The model as AutoGPTQ writes it: words along the inputs, zeros one less than they are. Returns what it means."""
    packed, weights = {}, {}
    for name, layer in linears(model):
        integers, zeros, scales = affine(layer.weight)
        zeros = np.maximum(zeros, 1)  # a stored zero of -1 has no bits
        integers = np.clip(np.rint(layer.weight.detach().double().numpy() / scales.repeat(GROUP, 1)) + zeros.repeat(GROUP, 1), 0, 15)
        weights[name] = affine_meaning(integers, zeros, scales)
        packed[name] = {
            "qweight": _words(integers.astype(np.int64)).T, "qzeros": _words(zeros.T - 1),
            "scales": torch.from_numpy(scales.T.astype(np.float16)),
            "g_idx": torch.arange(layer.in_features, dtype=torch.int32) // GROUP,
        }  # fmt: skip
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "checkpoint_format": "gptq"}
    _save(model, folder, packed, settings)
    return meaning(model, weights)


def save_w4a16(model, folder: Path):
    """The model as compressed-tensors writes W4A16: symmetric groups, words along the inputs. Returns what it means."""
    packed, weights = {}, {}
    for name, layer in linears(model):
        groups = layer.weight.detach().double().numpy().reshape(layer.out_features, -1, GROUP)
        scales = np.maximum(np.abs(groups).max(-1) / 7.5, 1e-6).astype(np.float16).astype(np.float64)
        integers = np.clip(np.rint(groups / scales[..., None]), -8, 7)
        weights[name] = (integers * scales[..., None]).reshape(layer.weight.shape)
        packed[name] = {
            "weight_packed": _words((integers + 8).reshape(layer.weight.shape).astype(np.int64)),
            "weight_scale": torch.from_numpy(scales).float(), "weight_shape": torch.tensor(layer.weight.shape),
        }  # fmt: skip
    how = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": how}},
    }  # fmt: skip
    _save(model, folder, packed, settings)
    return meaning(model, weights)

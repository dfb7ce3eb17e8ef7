"""Writes a trained student as folders that `from_pretrained` reads: `student/`, and `adapter/` where one was trained.

Each folder is a commit: it is whole or absent. Before a student is committed it is loaded again and asked the same question as
the model in memory.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill import storage
from potstill.errors import StorageError
from potstill.models.causal_lm import CausalLM
from potstill.models.config import Dtype, LoadingConfig
from potstill.models.heads import whole
from potstill.models.loading import load_model
from potstill.models.merging import merged_weights
from potstill.models.proofs import probe_logits, typical_distance
from potstill.models.requirements import quantisation_of
from potstill.storage import commit_folder, make_folder, require_free, write_tensors

STUDENT, ADAPTER = "student", "adapter"
CARD = "README.md"
_NAMES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# How far the reloaded student's logits may typically lie from those in memory: a merge rounds every weight once more, and 8-bit
# layers round their activations too, which merged ones do not.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
_QUANTISED_TOLERANCE = 0.1


def export_student(
    causal_lm: CausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, *, merge: bool = True,
    dtype: torch.dtype | None = None, writes: bool = True, cards: Mapping[str, str] | None = None,
) -> list[Path]:
    """Commits `folder/student` and, for a model with an adapter, `folder/adapter`; returns the folders.

    `merge`: the student is a plain model with the adapter in its weights (a quantised base is unpacked); else it is the adapter,
    which `from_pretrained` puts on its base. `dtype` of the merged weights; unset, that of the model in memory.
    `cards` are the texts of README.md by the folder's name.
    Where parameters are sharded every rank calls this and one has `writes`. Raises StorageError when a folder cannot be written
    or does not read back as the model in memory.
    """
    model, inner = causal_lm.model, causal_lm.inner
    dtype = dtype or inner.dtype
    adapter = adapter_weights(model) if isinstance(model, PeftModel) else None
    plain = merged_weights(inner, dtype, keep=writes) if merge or adapter is None else None
    sharded = any(isinstance(parameter, DTensor) for parameter in causal_lm.parameters())
    expected = None if sharded else probe_logits(causal_lm).cpu()
    if not writes:
        return []
    make_folder(folder)
    committed = []
    if adapter is not None:
        assert isinstance(model, PeftModel)

        def write_adapter_folder(at: Path) -> None:
            write_adapter(model, inner, adapter, at)
            _write_card(cards, ADAPTER, at)

        commit_folder(folder / ADAPTER, write_adapter_folder, replace=True)
        committed.append(folder / ADAPTER)

    def write_student(at: Path) -> None:
        if plain is not None:
            write_plain(inner, plain, _generation_config(inner, tokenizer), at)
        else:
            assert isinstance(model, PeftModel)
            assert adapter is not None
            write_adapter(model, inner, adapter, at)
            _generation_config(inner, tokenizer).save_pretrained(at)
        tokenizer.save_pretrained(at)
        _write_card(cards, STUDENT, at)
        _require_equal(causal_lm, expected, dtype, at)

    size = sum(tensor.nbytes for tensor in (plain or {}).values())
    require_free(folder, size)
    commit_folder(folder / STUDENT, write_student, replace=True, bytes_needed=size)
    return [*committed, folder / STUDENT]


def _write_card(cards: Mapping[str, str] | None, folder: str, at: Path) -> None:
    if cards is not None and folder in cards:
        storage.write_text(at / CARD, cards[folder])


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's own weights, whole and on the CPU; where they are sharded every rank must call this."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: whole(tensor).detach().cpu().contiguous().clone() for name, tensor in state.items()}


def write_adapter(model: PeftModel, inner: PreTrainedModel, weights: dict[str, Tensor], at: Path) -> None:
    """peft's two files in the folder `at`."""
    configuration = copy.copy(model.active_peft_config)
    configuration.inference_mode = True
    configuration.base_model_name_or_path = inner.config.name_or_path
    configuration.save_pretrained(str(at))
    write_tensors(at / "adapter_model.safetensors", weights, {"format": "pt"})


def write_plain(inner: PreTrainedModel, weights: dict[str, Tensor], generation: GenerationConfig, at: Path) -> None:
    """A model that `from_pretrained` reads, without a tokenizer, from what `merged_weights` gave."""
    config = copy.deepcopy(inner.config)
    if quantisation_of(config) is not None:
        del config.quantization_config  # type: ignore[attr-defined]
    if _is_untied(inner, weights):
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
    with torch.device("meta"):
        plain = type(inner)._from_config(config, dtype=next(w.dtype for w in weights.values() if w.is_floating_point()))
    if plain.can_generate():
        plain.generation_config = generation
    plain.save_pretrained(at, state_dict=weights)


def _is_untied(inner: PreTrainedModel, weights: dict[str, Tensor]) -> bool:
    """Whether an adapter has drawn apart a head and an embedding that were one weight."""
    for copy_name, name in (inner.all_tied_weights_keys or {}).items():
        if copy_name in weights and name in weights and not torch.equal(weights[copy_name], weights[name]):
            return True
    return False


def _generation_config(inner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's own, which also ends at the tokenizer's EOS; sampling numbers without sampling are left out, as they cannot be saved."""
    config = copy.deepcopy(inner.generation_config)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [end for end in ends if end is not None]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        config.eos_token_id = [tokenizer.eos_token_id, *ends] if ends else tokenizer.eos_token_id
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
    return config


def _bits(inner: PreTrainedModel) -> Literal["4bit", "8bit"] | None:
    """How the model was quantised while it was loaded."""
    how = inner.config.to_dict().get("quantization_config") or {}
    if quantisation_of(inner.config) != "bitsandbytes":
        return None
    return "4bit" if how.get("load_in_4bit") else "8bit"


def _require_equal(causal_lm: CausalLM, expected: Tensor | None, dtype: torch.dtype, at: Path) -> None:
    """Loads what was written and compares its logits with those of the model in memory, or only loads it where that is sharded."""
    if causal_lm.inner.is_remote_code():
        return  # its code is not run from a folder
    quantisation = _bits(causal_lm.inner)
    is_adapter = (at / "adapter_config.json").exists()
    config = LoadingConfig(path=str(at), dtype=_NAMES[dtype], quantization=quantisation if is_adapter else None)
    # Kernels for weights that were saved quantised may need the device; all else is read on the CPU, which has more room.
    device = causal_lm.device if is_adapter and quantisation is None and quantisation_of(causal_lm.inner.config) else "cpu"
    found = probe_logits(CausalLM(load_model(config, device=device), causal_lm.vocabulary_size)).cpu()
    if expected is None:
        if not torch.isfinite(found).all():
            raise StorageError(f"{at.parent}: the student that was written does not give finite logits; it is not committed")
        return
    distance, allowed = typical_distance(found, expected), max(_TOLERANCE[dtype], _QUANTISED_TOLERANCE if quantisation else 0.0)
    if not distance <= allowed:
        raise StorageError(
            f"{at.parent}: the student that was written gives other logits than the one in memory ({distance:.2g} of their size, "
            f"{allowed:.2g} is rounding); it is not committed"
        )

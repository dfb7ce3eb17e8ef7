"""A checkpoint that is saved in quantised form loads as a teacher and as the base of an adapter (needs compressed-tensors)."""

import pytest
import torch

from potstill.errors import ModelError
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.export import export_student
from potstill.models.loading import load_model
from potstill.models.merging import refuse_unmergeable
from potstill.models.proofs import probe_logits, prove_head, supports_packing, typical_distance
from tiny import save_pair, tiny_llama, tiny_tokenizer

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny Llama in 4 bits, by groups of 32 weights, packed."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
    from safetensors.torch import save_file

    path = save_pair(tmp_path_factory.mktemp("m") / "model", width=64)
    model = tiny_llama(width=64)
    how = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=how)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized"))
    for layer in model.modules():
        if "weight_scale" in dict(layer.named_parameters(recurse=False)):
            groups = layer.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1)
            layer.weight_scale.data.copy_((groups / 7.5).view_as(layer.weight_scale))
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(str(path))
    return path


def test_as_a_teacher(folder):
    teacher = CausalLM(load_model(LoadingConfig(path=str(folder))), 320)
    prove_head(teacher)
    assert supports_packing(teacher)
    plain = CausalLM(tiny_llama(width=64), 320)
    assert 0 < typical_distance(probe_logits(teacher), probe_logits(plain)) < 0.3


def test_as_the_base_of_an_adapter(folder, tmp_path):
    with pytest.raises(ModelError, match="cannot be trained; add lora"):
        load_model(ModelConfig(path=str(folder)), trainable=True)
    student = CausalLM(load_model(ModelConfig(path=str(folder), lora={"rank": 2}), trainable=True), 320)
    prove_head(student)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    with pytest.raises(ModelError, match=r"quantised by compressed-tensors; .* run\.merge_adapter: false"):
        refuse_unmergeable(student.inner)
    export_student(student, tiny_tokenizer(), tmp_path, merge=False)
    again = CausalLM(load_model(LoadingConfig(path=str(tmp_path / "student"))), 320)
    assert typical_distance(probe_logits(again), probe_logits(student)) < 1e-5

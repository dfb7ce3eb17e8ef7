"""Counts and bytes that are predicted from a configuration are those of the model that is then loaded."""

import pytest
import torch

from potstill.batch import Batch
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.footprint import Workload, count_parameters, predict_student, predict_teacher
from potstill.models.loading import load_model
from tiny import save_pair
from tiny_families import FAMILIES, family_model

WORK = Workload(batch_size=2, max_tokens=16)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("m") / "model", width=64, tied=request.param)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_counted_without_being_built(family, tmp_path):
    model = family_model(family)
    model.config.save_pretrained(tmp_path)
    predicted = predict_student(ModelConfig(path=str(tmp_path), weights="random"), WORK)
    assert (predicted.parameters, predicted.trainable) == (sum(p.numel() for p in model.parameters()),) * 2


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"lora": {"rank": 3}}, {"lora": {"rank": 3, "targets": ["q_proj", "lm_head"]}},
        {"lora": {"rank": 3, "targets": ["down_proj"], "modules_to_save": ["lm_head"]}},
        {"lora": {"rank": 3}, "quantization": "4bit"}, {"lora": {"rank": 3}, "quantization": "8bit"},
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_prediction_is_what_is_loaded(folder, changes, precision):
    config = ModelConfig(path=str(folder), **changes)
    predicted = predict_student(config, Workload(2, 16, precision))
    model = load_model(config, precision=precision, trainable=True)
    assert (predicted.parameters, predicted.trainable) == count_parameters(model)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert held <= predicted.weights <= 1.03 * held   # block scales of quantised weights lie outside the parameters
    assert predicted.gradients == 4 * predicted.trainable
    assert predicted.optimizer == 8 * predicted.trainable


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_activations_are_of_the_right_size(folder, checkpointing, precision, lora):
    """Against what autograd really keeps: an estimate, so within a factor of one and a half."""
    config = ModelConfig(path=str(folder), activation_checkpointing=checkpointing, lora=lora)
    work = Workload(2, 64, precision)
    causal_lm = CausalLM(load_model(config, precision=precision, trainable=True), 320).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in causal_lm.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors themselves, so that no address is used twice

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(320, (2, 64))
    batch = Batch(tokens, torch.arange(64).repeat(2, 1), torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    narrow = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with narrow, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = causal_lm.hidden(batch)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    predicted = predict_student(config, work).activations
    assert hidden.requires_grad
    if checkpointing:   # the backward pass computes one of the two layers again
        measured += predict_student(ModelConfig(path=str(folder), lora=lora), work).activations // 2
    assert measured / 1.5 < predicted < 1.5 * measured


def test_checkpointing_and_shards_save_memory(folder):
    plain = predict_student(ModelConfig(path=str(folder)), Workload(2, 256))
    assert predict_student(ModelConfig(path=str(folder), activation_checkpointing=True), Workload(2, 256)).activations < plain.activations
    sharded = predict_student(ModelConfig(path=str(folder)), Workload(2, 256, shards=4))
    assert sharded.total < plain.total
    assert abs(4 * sharded.weights - plain.weights) < 4


def test_a_teacher_has_weights_and_no_gradients(folder):
    predicted = predict_teacher(LoadingConfig(path=str(folder)), Workload(2, 16, "bf16"))
    assert predicted.weights == 2 * predicted.parameters
    assert predicted.trainable == predicted.gradients == predicted.optimizer == 0
    assert predicted.activations > 0


def test_published_sizes(tmp_path):
    from transformers import LlamaConfig, Qwen2Config

    llama = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    LlamaConfig(vocab_size=128256, head_dim=64, tie_word_embeddings=True, **llama).save_pretrained(tmp_path / "llama")
    qwen = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    Qwen2Config(vocab_size=151936, tie_word_embeddings=True, **qwen).save_pretrained(tmp_path / "qwen")
    for name, size in (("llama", 1_235_814_400), ("qwen", 494_032_768)):
        assert predict_teacher(LoadingConfig(path=str(tmp_path / name), weights="random"), WORK).parameters == size

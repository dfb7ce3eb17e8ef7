"""The local generator on models that something is done to: adapters, autocast, quantised weights; and on two trained ones."""

import pytest
import torch

from local_writing import PROMPTS, STOPS, greedy_by_transformers, local_generator
from potstill.models.adapters import add_lora
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoraConfig
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.writing import Prompt, Sampling
from tiny import tiny_llama


def _log_probs_of(model, prompt: Prompt, answer) -> torch.Tensor:
    """Of the drawn tokens by one forward pass over prompt and answer without a cache, float64 from the logits on: [T]."""
    tokens = torch.tensor([prompt.tokens + answer.tokens])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt.tokens) - 1 : -1, :96]
    return logits.double().log_softmax(-1)[range(len(answer.tokens)), list(answer.tokens)]


def _adapted(seed: int):
    torch.manual_seed(seed)
    model = add_lora(tiny_llama(vocabulary_size=128), LoraConfig(rank=4, targets=["q_proj", "v_proj", "lm_head"], dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def test_an_adapter_on_trunk_and_head_is_heard():
    model = _adapted(0).train()
    answers = local_generator(model).generate(PROMPTS, Sampling(max_new_tokens=12))
    model.eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert list(answer.log_probs) == pytest.approx(_log_probs_of(model, prompt, answer).tolist(), abs=1e-5)


@pytest.mark.parametrize("ambient", [True, False])
def test_narrow_weights_are_read_as_training_reads_them(ambient):
    """Under autocast as it stands; where nobody has said it and one layer alone is wide, as in training, to the others' type."""
    from contextlib import nullcontext

    model = tiny_llama(vocabulary_size=96)
    if not ambient:
        model.to(torch.bfloat16)
        model.model.layers[1].mlp.down_proj.float()  # without autocast it refuses what comes from the narrow layers
    with torch.autocast("cpu", torch.bfloat16) if ambient else nullcontext():
        answers = local_generator(model.eval()).generate(PROMPTS, Sampling(max_new_tokens=12))
    with torch.autocast("cpu", torch.bfloat16):
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert list(answer.log_probs) == pytest.approx(_log_probs_of(model, prompt, answer).tolist(), abs=0.05)
    wide = local_generator(tiny_llama(vocabulary_size=96)).generate(PROMPTS, Sampling(max_new_tokens=12))
    assert [answer.log_probs for answer in wide] != [answer.log_probs for answer in answers]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_write_what_a_forward_pass_says(bits, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(vocabulary_size=96, width=64).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.float32)
    answers = local_generator(model).generate(PROMPTS[:3], Sampling(max_new_tokens=8))
    # LLM.int8 rounds activations by what stands beside them in the batch.
    for prompt, answer in zip(PROMPTS, answers, strict=False):
        assert list(answer.log_probs) == pytest.approx(_log_probs_of(model, prompt, answer).tolist(), abs=0.05 if bits == 8 else 1e-3)


@pytest.mark.parametrize("name", ["stories260K-llama-hf", "tinystories-279K-llama-hf"])
def test_trained_models_write_as_transformers_does(name, shared_data):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared_data / "models" / name).eval()
    size = model.config.vocab_size
    prompts = [Prompt(tuple(token % size for token in prompt.tokens), prompt.seed) for prompt in PROMPTS]
    found = LocalGenerator(CausalLM(model, size), stop_ids=STOPS, pad_token=0).generate(prompts, Sampling(temperature=0, max_new_tokens=32))
    assert [list(answer.tokens) for answer in found] == greedy_by_transformers(model, prompts, 32)
    drawn = LocalGenerator(CausalLM(model, size), stop_ids=STOPS, pad_token=0).generate(prompts, Sampling(max_new_tokens=32))
    for prompt, answer in zip(prompts, drawn, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt.tokens + answer.tokens]), use_cache=False).logits[0, len(prompt.tokens) - 1 : -1]
        expected = logits.double().log_softmax(-1)[range(len(answer.tokens)), list(answer.tokens)]
        assert list(answer.log_probs) == pytest.approx(expected.tolist(), abs=3e-5)

"""A quantised teacher is the teacher that its weights mean, at a stated distance from the one in full precision (docs/methods).

Each form is compared twice: with the weights that it must mean, computed here in float64, which it must equal; and with the teacher
in full precision, from which it must differ by as much as is stated, and no more. A form that silently loads full precision fails
both. AWQ and GPTQ need gptqmodel (`make awq`).
"""

import gzip
import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from packed import int8, linears, meaning, nf4, save_awq, save_gptq, save_w4a16, widened
from potstill.batch import Batch
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.footprint import Workload, predict_teacher
from potstill.models.heads import plain_weight
from potstill.models.loading import load_model, read_model_config, stated_quantisation
from potstill.models.proofs import prove_head, supports_packing
from potstill.models.quantisation import describe_quantisation
from potstill.objectives.distribution import DistributionMatching
from potstill.signals import Needs
from potstill.teachers.local import LocalTeacher
from potstill.training.distiller import Distiller
from tiny import tiny_llama

# gptqmodel and what it imports warn of much that is not ours.
NEEDS_GPTQMODEL = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs gptqmodel: make awq"),
]  # fmt: skip
NEEDS_OPTIMUM = pytest.mark.skipif(find_spec("optimum") is None, reason="needs optimum: make awq")
FORMS = [
    "4bit", "8bit", "w4a16", pytest.param("awq", marks=NEEDS_GPTQMODEL), pytest.param("gptq", marks=[*NEEDS_GPTQMODEL, NEEDS_OPTIMUM]),
]  # fmt: skip
SAVED = {"w4a16": save_w4a16, "awq": save_awq, "gptq": save_gptq}
STATED = {
    "4bit": "bitsandbytes, 4 bits, nf4 in blocks of 64, double quantisation, computed in float32",
    "8bit": "bitsandbytes, 8 bits, rows of int8, outliers over 6 apart",
    "w4a16": "compressed-tensors, Linear: weights in 4 bits int symmetric groups of 32, pack-quantized, without lm_head",
    "awq": "awq, 4 bits, groups of 32, with zero points, gemm",
    "gptq": "gptq, 4 bits, groups of 32, with zero points, gptq",
}
# Of the next-token distribution, full against quantised: mean forward KL in nats, the largest of a token, top-1 agreement. The made
# model is random and flat, so its first choice is easily another. Allowed: a tenth more or less of the mean (8 bits: a third).
DISTANCES = {
    ("made", "4bit"): (0.1241, 0.54, 0.43), ("real", "4bit"): (0.1193, 5.9, 0.83),
    ("made", "8bit"): (0.0012, 0.006, 0.93), ("real", "8bit"): (0.0012, 0.08, 0.97),
    ("made", "w4a16"): (0.1263, 0.45, 0.47), ("real", "w4a16"): (0.1262, 2.6, 0.81),
    ("made", "awq"): (0.0902, 0.42, 0.51), ("real", "awq"): (0.0953, 3.0, 0.83),
    ("made", "gptq"): (0.0902, 0.42, 0.51), ("real", "gptq"): (0.0953, 3.0, 0.83),
}  # fmt: skip
# What is computed against what the weights mean, mean forward KL: rounding. LLM.int8 rounds the inputs of its layers too.
ROUNDING = {"4bit": 1e-9, "8bit": 1e-3, "w4a16": 1e-9, "awq": 1e-6, "gptq": 1e-6}


@dataclass(frozen=True)
class Pair:
    """A teacher in full precision, the same quantised, and a plain model with the weights that the quantised one must mean."""

    full: CausalLM
    quantised: CausalLM
    meant: CausalLM
    config: LoadingConfig
    tokens: Tensor


def batch_of(tokens: Tensor) -> Batch:
    return Batch(
        tokens, torch.arange(tokens.shape[1]).expand_as(tokens), torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    )


@torch.no_grad()
def log_probs(causal_lm: CausalLM, tokens: Tensor) -> Tensor:
    rows, head = causal_lm(batch_of(tokens))
    return torch.log_softmax(head.logits(rows)[:, : causal_lm.vocabulary_size].double(), -1)


def distance(expected: CausalLM, got: CausalLM, tokens: Tensor) -> tuple[float, float, float]:
    """Mean and largest forward KL and top-1 agreement."""
    aim, found = log_probs(expected, tokens), log_probs(got, tokens)
    divergence = (aim.exp() * (aim - found)).sum(-1)
    return float(divergence.mean()), float(divergence.max()), float((aim.argmax(-1) == found.argmax(-1)).double().mean())


def stories(shared: Path, tokenizer, count: int, length: int) -> Tensor:
    """The first stories that fill a row, each from its beginning."""
    rows = []
    with gzip.open(shared / "text" / "tinystories.train2085.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"])["input_ids"]
            if len(ids) >= length:
                rows.append(ids[:length])
            if len(rows) == count:
                break
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def pairs(request, tmp_path_factory):
    """(which teacher, which form) -> Pair, each made once."""

    @cache
    def teacher(which: str):
        if which == "made":
            tokens = torch.randint(3, 320, (8, 64), generator=torch.Generator().manual_seed(1))
            return tiny_llama(width=64, initializer_range=0.15), tokens, 320
        from potstill.models.loading import load_tokenizer

        shared = request.getfixturevalue("shared_data")
        config = LoadingConfig(path=str(shared / "models" / "stories260K-llama-hf"))
        return load_model(config), stories(shared, load_tokenizer(config), 12, 192), 512

    @cache
    def make(which: str, form: str) -> Pair:
        full, tokens, vocabulary = teacher(which)
        folder = tmp_path_factory.mktemp(f"{which}-{form}")
        if form in SAVED:
            # Packing wants widths that divide: more units of the MLP, all zero, change no answer.
            full = widened(full, -(-full.config.intermediate_size // 64) * 64)
            meant, config = SAVED[form](full, folder), LoadingConfig(path=str(folder))
        else:
            full.save_pretrained(folder)
            config = LoadingConfig(path=str(folder), quantization=form)
        quantised = load_model(config)
        if form not in SAVED:
            # Which weights those must be is a test of its own.
            meant = meaning(full, {name: plain_weight(quantised.get_submodule(name)).double().numpy() for name, _ in linears(full)})
        return Pair(CausalLM(full, vocabulary), CausalLM(quantised, vocabulary), CausalLM(meant, vocabulary), config, tokens)

    return make


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["made", "real"])
def test_it_is_as_far_from_the_teacher_in_full_precision_as_is_stated(pairs, which, form):
    pair = pairs(which, form)
    mean, largest, agreement = distance(pair.full, pair.quantised, pair.tokens)
    stated, most, least_agreement = DISTANCES[which, form]
    assert mean == pytest.approx(stated, rel=1 / 3 if form == "8bit" else 0.1)
    assert 0.5 * most < largest < 1.1 * most
    assert least_agreement - 0.02 < agreement < 0.999


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["made", "real"])
def test_it_computes_what_its_weights_mean(pairs, which, form):
    pair = pairs(which, form)
    rounded, _, agreement = distance(pair.meant, pair.quantised, pair.tokens)
    assert rounded <= ROUNDING[form]
    assert agreement > (0.95 if form == "8bit" else 0.999)


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_of_the_trunk_is_packed_and_the_rest_is_left_alone(pairs, form):
    pair = pairs("made", form)
    names = [name for name, _ in linears(pair.full.inner)]
    assert len(names) == 2 * 7
    for name in names:
        layer, width = pair.quantised.inner.get_submodule(name), pair.full.inner.get_submodule(name).weight.numel()
        packed = {"4bit": "weight", "8bit": "weight", "awq": "qweight", "gptq": "qweight"}.get(form)
        if packed is not None:
            tensor = getattr(layer, packed)
            assert tensor.nbytes == width // (1 if form == "8bit" else 2), name
            assert not tensor.is_floating_point()
        else:   # compressed-tensors unpacks; a group of 32 then has at most 16 values, where full precision has 32
            assert max(len(group.unique()) for group in layer.weight.reshape(-1, 32)) <= 16
    quantised, full = pair.quantised.inner, pair.full.inner
    assert torch.equal(quantised.get_input_embeddings().weight, full.get_input_embeddings().weight)
    assert torch.equal(pair.quantised.head().weight, full.get_output_embeddings().weight)
    assert torch.equal(quantised.model.norm.weight, full.model.norm.weight)


@pytest.mark.parametrize("which", ["made", "real"])
def test_bitsandbytes_keeps_the_weights_that_the_papers_say(pairs, which):
    """Against levels computed here: quantiles of a normal distribution, and rows of integers."""
    nf4_pair, int8_pair = pairs(which, "4bit"), pairs(which, "8bit")
    for name, layer in linears(nf4_pair.full.inner):
        kept, largest = (torch.from_numpy(part.copy()) for part in nf4(layer.weight))
        found = plain_weight(nf4_pair.quantised.inner.get_submodule(name)).double()
        # Quantised again, a block's scale is off by a little; a weight at another level would be off by a tenth of it.
        assert ((found - kept).abs() <= 0.05 * largest).double().mean() > 0.99, name
        kept = torch.from_numpy(int8(layer.weight))
        found = plain_weight(int8_pair.quantised.inner.get_submodule(name)).double()
        level = layer.weight.abs().amax(1, keepdim=True).double() / 127
        assert ((found - kept).abs() <= 0.01 * level).double().mean() > 0.99, name
        # Scaled in single precision, a few lie on the other side of a half.
        assert ((found - kept).abs() <= 1.01 * level).all()


@pytest.mark.parametrize("form", FORMS)
def test_its_head_is_proved_and_its_documents_stay_apart(pairs, form):
    for which in ("made", "real"):
        quantised = pairs(which, form).quantised
        prove_head(quantised)
        assert supports_packing(quantised)


def test_rounding_in_8_bits_is_told_from_documents_that_see_each_other(pairs, monkeypatch):
    """LLM.int8 rounds by what else is in the batch; positions that do not restart, so that nothing parts the documents, are no rounding."""
    for which in ("made", "real"):
        quantised = pairs(which, "8bit").quantised
        with monkeypatch.context() as patch:
            patch.setattr(quantised, "_takes_positions", False)
            assert not supports_packing(quantised)


@pytest.mark.parametrize("form", FORMS)
def test_a_student_learns_from_it_what_it_would_learn_from_what_its_weights_mean(pairs, form):
    pair = pairs("made", form)
    batch, found = batch_of(pair.tokens), []
    for teacher in (pair.quantised, pair.meant, pair.full):
        student = CausalLM(tiny_llama(7), 320)
        total, _, divergence = Distiller(student, DistributionMatching(kd_ratio=1.0, vocabulary_size=320))(
            batch, LocalTeacher(teacher).score(batch, Needs("full"))
        )
        total.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
        assert torch.isfinite(gradient).all()
        found.append((float(divergence) / batch.num_targets, gradient / gradient.norm()))
    (mine, direction), (meant, aim), (full, _) = found
    assert mine == pytest.approx(meant, rel=2e-3)
    assert float(direction @ aim) > 0.99
    assert mine != pytest.approx(full, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_stated_alike_by_its_configuration_and_by_the_model(pairs, form):
    pair = pairs("made", form)
    assert stated_quantisation(pair.config) == STATED[form]
    assert describe_quantisation(LoadingConfig(path=pair.config.path), pair.quantised.inner.config, torch.float32) == STATED[form]


@pytest.mark.parametrize("form", FORMS)
def test_the_prediction_is_what_lies_in_memory(pairs, form):
    for which in ("made", "real"):
        pair = pairs(which, form)
        predicted = predict_teacher(pair.config, Workload(1, 8)).weights
        inner = pair.quantised.inner
        held = sum(tensor.nbytes for tensor in [*inner.parameters(), *inner.buffers()])
        assert 0.99 * held <= predicted <= 1.05 * held   # scales of bitsandbytes lie beside the parameters
        assert predicted < 4 * sum(parameter.numel() for parameter in pair.full.parameters()) or form == "w4a16"


@pytest.mark.parametrize("form", [form for form in FORMS if not isinstance(form, str)])
def test_below_a_packed_layer_adapters_learn_after_an_evaluation(pairs, form):
    """gptqmodel packs anew in the first evaluation on the CPU, into a layout without a backward pass; it must not."""
    pair = pairs("made", form)
    lora = {"rank": 2, "targets": ["q_proj", "up_proj"]}
    student = CausalLM(load_model(ModelConfig(path=pair.config.path, lora=lora), trainable=True), 320)
    prove_head(student)
    student.train()
    rows, head = student(batch_of(pair.tokens))
    head.logits(rows).square().sum().backward()
    learned = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert learned
    assert all(gradient is not None and (float(gradient.abs().max()) > 0) is ("lora_B" in name) for name, gradient in learned.items())


def test_a_published_checkpoint_in_4_bits_needs_what_its_files_weigh(tmp_path):
    """Qwen1.5-32B in AWQ with groups of 128: 30.96 G weights packed, 1.56 G in embedding and head whole."""
    from transformers import Qwen2Config

    sizes = {"hidden_size": 5120, "intermediate_size": 27392, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    Qwen2Config(vocab_size=152064, tie_word_embeddings=False, quantization_config=settings, **sizes).save_pretrained(tmp_path)
    config = LoadingConfig(path=str(tmp_path), weights="random")
    predicted = predict_teacher(config, Workload(1, 1024, "bf16"))
    assert predicted.parameters == 32_512_218_112
    assert predicted.weights == pytest.approx(19.2e9, rel=0.01)
    assert read_model_config(config).quantization_config == settings

"""Trunk and head apart give what the model's own forward gives: for every family, with adapters, quantised, packed and padded."""

import pytest
import torch

from potstill.batch import Batch
from potstill.errors import ModelError
from potstill.models.adapters import add_lora
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoraConfig
from potstill.models.loading import longest_context
from potstill.models.proofs import prove_head, refuse_leaking_packing, supports_packing
from tiny import tiny_llama
from tiny_families import FAMILIES, family_model

REFUSED = {"minicpm3"}      # divides its states by a number that its configuration derives and does not hold
LEAKING = {"opt", "falcon", "falcon_h1", "bloom", "mamba"}
FITTING = sorted(set(FAMILIES) - REFUSED)


def make_batch(rows: list[list[int]], vocabulary: int = 96, width: int | None = None) -> tuple[Batch, list[list[torch.Tensor]]]:
    """Random documents of the given lengths, packed row by row and padded to the right; and the documents by themselves."""
    generator = torch.Generator().manual_seed(3)
    width = width or max(map(sum, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    positions, documents = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    apart: list[list[torch.Tensor]] = []
    for number, lengths in enumerate(rows):
        apart.append([])
        start = 0
        for document, length in enumerate(lengths):
            span = slice(start, start + length)
            tokens[number, span] = torch.randint(vocabulary, (length,), generator=generator)
            positions[number, span] = torch.arange(length)
            documents[number, span] = document
            apart[-1].append(tokens[number, span].clone())
            start += length
        positions[number, start:] = torch.arange(width - start)
    return Batch(tokens, positions, documents, documents >= 0), apart


def own_logits(model, apart: list[list[torch.Tensor]]) -> torch.Tensor:
    """What the model itself says to each document alone, at the positions that predict a token."""
    return torch.cat([model(input_ids=document[None]).logits[0, :-1] for row in apart for document in row])


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6):
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family", FITTING)
def test_rows_and_head_give_the_logits_of_the_model(family):
    model = family_model(family)
    causal_lm = CausalLM(model, 90)
    prove_head(causal_lm)
    batch, apart = make_batch([[7], [4], [9]])
    with torch.no_grad():
        assert_near(causal_lm.head().logits(causal_lm.rows(batch)), own_logits(model, apart), 1e-5)


@pytest.mark.parametrize("family", sorted(set(FITTING) - LEAKING))
def test_packed_documents_are_as_if_alone(family):
    model = family_model(family)
    causal_lm = CausalLM(model, 90)
    batch, apart = make_batch([[5, 6, 1, 3], [2, 9]], width=17)
    with torch.no_grad():
        assert_near(causal_lm.head().logits(causal_lm.rows(batch)), own_logits(model, apart), 1e-5)
    assert supports_packing(causal_lm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(LEAKING))
def test_a_model_whose_packed_documents_see_each_other_is_refused_with_the_remedy(family, dtype):
    causal_lm = CausalLM(family_model(family).to(dtype), 90)
    assert not supports_packing(causal_lm)
    with pytest.raises(ModelError, match=r"data\.packing: false"):
        refuse_leaking_packing(causal_lm)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_head_that_its_configuration_does_not_describe_is_refused(family):
    with pytest.raises(ModelError, match="does something that its configuration does not tell"):
        prove_head(CausalLM(family_model(family), 90))


@pytest.mark.parametrize(
    ("family", "key", "wrong"),
    [
        ("gemma2", "final_logit_softcapping", None), ("cohere", "logit_scale", 0.07),
        ("granite", "logits_scaling", 1.0), ("falcon_h1", "lm_head_multiplier", 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_proof_sees_every_part_of_the_arithmetic(family, key, wrong, dtype):
    """With the wrong number in our reading alone, the proof must fail, however small the random model's logits are."""
    model = family_model(family).to(dtype)
    right = getattr(model.config, key)
    setattr(model.config, key, wrong)
    causal_lm = CausalLM(model, 90)          # reads the wrong number
    setattr(model.config, key, right)        # the model's forward uses the right one
    for name in ("logit_scale",):            # Cohere keeps its own copy
        if hasattr(model, name):
            setattr(model, name, right)
    if family == "falcon_h1":
        model.model.lm_head_multiplier = right
    with pytest.raises(ModelError):
        prove_head(causal_lm)


def test_the_proof_sees_a_lost_bias():
    model = family_model("phi")
    causal_lm = CausalLM(model, 90)
    prove_head(causal_lm)
    model.lm_head.register_forward_hook(lambda _m, _i, output: output + 1.0)
    with pytest.raises(ModelError):
        prove_head(causal_lm)


def test_the_proof_leaves_the_model_as_it_was():
    causal_lm = CausalLM(tiny_llama(), 320).train()
    prove_head(causal_lm)
    supports_packing(causal_lm)
    assert causal_lm.training
    assert not causal_lm.trunk._forward_hooks


LORAS = {
    "all linear": {},
    "on the head": {"targets": ["q_proj", "lm_head"]},
    "head alone": {"targets": ["lm_head"], "rank_stabilised": True},
    "head whole": {"targets": ["v_proj"], "modules_to_save": ["lm_head"]},
    "embedding whole": {"targets": ["v_proj"], "modules_to_save": ["embed_tokens"]},
}


def lora_model(lora: dict, tied: bool):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = add_lora(tiny_llama(tied=tied).requires_grad_(False), LoraConfig(rank=3, alpha=5, **lora))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_adapters_give_the_logits_and_the_gradients_of_the_model(lora, tied):
    model = lora_model(lora, tied)
    causal_lm = CausalLM(model, 320)
    prove_head(causal_lm)
    batch, apart = make_batch([[7, 5], [9]], vocabulary=320)
    theirs, ours = own_logits(model, apart), causal_lm.head().logits(causal_lm.rows(batch))
    assert_near(ours.detach(), theirs.detach())
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((theirs * direction).sum(), learning)
    got = torch.autograd.grad((ours * direction).sum(), learning)
    assert all(float(gradient.abs().max()) > 0 for gradient in got)
    for mine, other in zip(got, expected, strict=True):
        assert_near(mine, other)


def test_the_head_is_read_anew():
    """An optimizer's step, a disabled adapter: the head is what it is when it is asked for."""
    model = lora_model(LORAS["on the head"], tied=False)
    causal_lm = CausalLM(model, 320)
    before = causal_lm.head()
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].weight.mul_(2)
    assert len(before.low_rank) == 1
    assert torch.equal(causal_lm.head().low_rank[0].up, model.get_base_model().lm_head.lora_B["default"].weight)
    with model.disable_adapter():
        assert causal_lm.head().low_rank == ()
        prove_head(causal_lm)


def test_a_whole_head_beside_an_adapter_is_the_trained_copy():
    model = lora_model(LORAS["head whole"], tied=True)
    wrapper = model.get_base_model().lm_head
    head = CausalLM(model, 320).head()
    assert torch.equal(head.weight, wrapper.modules_to_save["default"].weight)
    assert not torch.equal(head.weight, wrapper.original_module.weight)


def test_dropout_on_the_heads_adapter_is_kept():
    model = lora_model({"targets": ["lm_head"], "dropout": 0.5}, tied=False)
    head, rows = CausalLM(model, 320).head(), torch.randn(4, 32)
    assert head.low_rank[0].dropout == 0.5
    with torch.no_grad():
        assert torch.equal(head.logits(rows), head.logits(rows))
        assert not torch.equal(head.logits(rows, training=True), head.logits(rows, training=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's own calls
def test_dora_on_the_head_is_refused():
    import peft

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="DoRA"):
        CausalLM(model, 320).head()


def test_activation_checkpointing_changes_no_gradient():
    batch, _ = make_batch([[7, 5], [9]], vocabulary=320)
    gradients = []
    for checkpointing in (False, True):
        model = lora_model({}, tied=False).train()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        causal_lm = CausalLM(model, 320)
        causal_lm.head().logits(causal_lm.rows(batch)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_near(checkpointed, plain)


def test_an_encoder_is_refused():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ModelError, match=r"cannot be used|no language-model head"):
        CausalLM(model, 96)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "opt"])
def test_the_context_is_read_under_the_name_that_the_family_gives_it(family):
    assert longest_context(family_model(family).config) == 64


def test_a_model_that_names_no_context_has_none():
    assert longest_context(family_model("bloom").config) is None

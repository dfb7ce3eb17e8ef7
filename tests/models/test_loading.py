"""Loading: what a recipe names is what is in memory, nothing is run or unpickled on the way, and failures show the way out."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from potstill.errors import ModelError
from potstill.models import requirements
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.loading import load_model, load_tokenizer, read_model_config
from potstill.models.proofs import prove_head
from tiny import save_pair, tiny_llama, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("models") / "llama", width=64)


def learning(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_loads_as_it_was_saved(folder):
    model = load_model(LoadingConfig(path=str(folder)))
    for (name, got), expected in zip(model.named_parameters(), tiny_llama(width=64).parameters(), strict=True):
        assert torch.equal(got, expected), name
    assert not learning(model)
    assert not model.training


@pytest.mark.parametrize(
    ("config", "precision", "trainable", "expected"),
    [
        ({}, "float32", True, {torch.float32}),
        ({}, "bf16", True, {torch.float32}),            # the optimizer's own copy is the model
        ({}, "bf16", False, {torch.bfloat16}),
        ({"lora": {"rank": 2}}, "bf16", True, {torch.bfloat16, torch.float32}),
        ({"dtype": "bfloat16"}, "bf16", True, {torch.float32}),
        ({"dtype": "float16"}, "float32", False, {torch.float16}),
    ],
)
def test_dtypes(folder, config, precision, trainable, expected):
    model = load_model(ModelConfig(path=str(folder), **config), precision=precision, trainable=trainable)
    assert {parameter.dtype for parameter in model.parameters()} == expected
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)


def test_attention_kernel_and_checkpointing(folder):
    model = load_model(ModelConfig(path=str(folder), attention="eager", activation_checkpointing=True), trainable=True)
    assert model.config._attn_implementation == "eager"
    assert model.is_activation_checkpointing


def test_random_weights_come_from_the_seed_alone(folder, tmp_path):
    read_model_config(LoadingConfig(path=str(folder))).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), weights="random")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    models = [load_model(config, trainable=True, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.get_input_embeddings().weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], ["layers.0.mlp.up_proj"]])
def test_an_adapter_learns_and_the_base_does_not(folder, targets):
    model = load_model(ModelConfig(path=str(folder), lora={"rank": 2, "targets": targets}), trainable=True, seed=4)
    names = learning(model)
    assert names
    assert all("lora_" in name for name in names)
    assert any("lm_head" in name for name in names) is (targets == ["q_proj", "lm_head"])
    again = load_model(ModelConfig(path=str(folder), lora={"rank": 2, "targets": targets}), trainable=True, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_target_that_is_not_there_is_named_with_those_that_are(folder):
    with pytest.raises(ModelError, match=r"query, which is not in the model; its layers are q_proj, k_proj, .*lm_head"):
        load_model(ModelConfig(path=str(folder), lora={"targets": ["query"]}), trainable=True)


def test_a_saved_adapter_goes_onto_its_base_and_can_learn_on(folder, tmp_path):
    trained = load_model(ModelConfig(path=str(folder), lora={"rank": 2, "targets": ["q_proj", "lm_head"]}), trainable=True)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokens = torch.arange(8)[None]
    expected = trained(input_ids=tokens).logits.detach()
    for path, adapter in ((str(folder), str(tmp_path / "adapter")), (str(tmp_path / "adapter"), None)):
        model = load_model(LoadingConfig(path=path, adapter=adapter))
        assert torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-6)
        assert not learning(model)
    onward = load_model(ModelConfig(path=str(folder), adapter=str(tmp_path / "adapter")), trainable=True)
    assert learning(onward) == learning(trained)
    afresh = load_model(ModelConfig(path=str(folder), adapter=str(tmp_path / "adapter"), lora={"rank": 3}), trainable=True)
    assert torch.allclose(afresh(input_ids=tokens).logits, expected, atol=1e-5), "a new adapter starts where the old one ended"


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_bitsandbytes_quantises_teachers_and_students(folder, bits):
    tokens = torch.arange(8)[None]
    expected = tiny_llama(width=64)(input_ids=tokens).logits.detach()
    teacher = load_model(LoadingConfig(path=str(folder), quantization=bits))
    assert 0 < float((teacher(input_ids=tokens).logits - expected).abs().max()) < 0.3 * float(expected.abs().max())
    prove_head(CausalLM(teacher, 320))
    lora = {"rank": 2, "targets": ["q_proj", "lm_head"]}
    student = load_model(ModelConfig(path=str(folder), quantization=bits, lora=lora), trainable=True)
    causal_lm = CausalLM(student.train(), 320)
    learned = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in learned)

    def gradients():
        return torch.autograd.grad(student(input_ids=tokens).logits.square().sum(), list(learned.values()))

    before = gradients()
    prove_head(causal_lm)  # an evaluation; bitsandbytes would pack the weights anew and lose their backward pass
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    for name, gradient in zip(learned, before, strict=True):
        assert (float(gradient.abs().max()) > 0) is ("lora_B" in name), name


def test_quantised_weights_say_what_they_need(folder, tmp_path, monkeypatch):
    broken = save_pair(tmp_path / "awq", width=64)
    rewrite(broken / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ModelError, match="quantised by awq, which needs the package gptqmodel: pip install gptqmodel"):
        load_model(LoadingConfig(path=str(broken)))
    monkeypatch.setattr(requirements, "is_installed", lambda module: True)
    with pytest.raises(ModelError, match="already quantised by awq"):
        load_model(LoadingConfig(path=str(broken), quantization="4bit"))
    with pytest.raises(ModelError, match="cannot be trained; add lora"):
        load_model(ModelConfig(path=str(broken)), trainable=True)


def test_without_bitsandbytes_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setattr("potstill.models.quantising.is_installed", lambda module: module != "bitsandbytes")
    with pytest.raises(ModelError, match=r"pip install 'potstill\[quant\]'"):
        load_model(LoadingConfig(path=str(folder), quantization="8bit"))


# ---------------------------------------------------------------- what is not there, or not whole


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "/no/such/folder: there is no such folder"),
        ("./nowhere", "there is no such folder"),
        ("runs/a/b/student", "there is no such folder"),
        ("nobody/no-such-model", "nobody/no-such-model: neither a folder here nor a model that the hub gives"),
    ],
)
def test_a_model_that_is_not_there_is_named(path, message):
    for load in (load_model, read_model_config, load_tokenizer):
        with pytest.raises(ModelError, match=message):
            load(LoadingConfig(path=path))


def test_without_a_network_nothing_is_tried_five_times(monkeypatch):
    """Not told to be offline, on a machine where the hub's name does not resolve."""
    from huggingface_hub import constants

    from potstill import hub

    asked = []

    def unresolved(host, port):
        asked.append(host)
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "getaddrinfo", unresolved)
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)
    hub.hub_is_reachable.cache_clear()
    try:
        for config in (LoadingConfig(path="nobody/model"), LoadingConfig(path="not a/name!")):
            for load in (read_model_config, load_tokenizer, load_model):
                with pytest.raises(ModelError, match=r"^(nobody/model|not a/name!): neither .* there is no network"):
                    load(config)
        assert asked == ["huggingface.co"]
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
        hub.hub_is_reachable.cache_clear()
        assert hub.hub_is_reachable()
    finally:
        hub.hub_is_reachable.cache_clear()


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"has no config\.json, so it is not a model; it holds notes\.txt"):
        load_model(LoadingConfig(path=str(tmp_path)))
    with pytest.raises(ModelError, match="is a file"):
        load_model(LoadingConfig(path=str(tmp_path / "notes.txt")))


def test_weights_that_are_missing_are_not_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file

    broken = save_pair(tmp_path, width=64)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of the model's weights, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(LoadingConfig(path=str(broken)))


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not safetensors at all, just text"])
def test_weights_that_do_not_read(tmp_path, content):
    broken = save_pair(tmp_path, width=64)
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=str(broken)):
        load_model(LoadingConfig(path=str(broken)))


def test_a_configuration_that_does_not_read(tmp_path):
    broken = save_pair(tmp_path, width=64)
    for text in ("{", json.dumps({"model_type": "no-such-architecture"}), "{}"):
        (broken / "config.json").write_text(text)
        with pytest.raises(ModelError, match=str(broken)):
            read_model_config(LoadingConfig(path=str(broken)))


@pytest.mark.parametrize(
    ("file", "message"),
    [(None, "there is no adapter"), ("adapter_config.json", "has no adapter_model.safetensors")],
)
def test_an_adapter_that_is_not_there(folder, tmp_path, file, message):
    if file:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=message):
        load_model(LoadingConfig(path=str(folder), adapter=str(tmp_path)))


def test_the_adapter_of_another_model_is_refused(folder, tmp_path):
    other = load_model(ModelConfig(path=str(save_pair(tmp_path / "wide", width=32)), lora={"rank": 2}), trainable=True)
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be put on"):
        load_model(LoadingConfig(path=str(folder), adapter=str(tmp_path / "adapter")))


# ---------------------------------------------------------------- nothing is run


class Canary:
    """A pickle that, when it is read, leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_pickled_weights_are_refused_and_not_read(tmp_path):
    model, mark = save_pair(tmp_path / "model", width=64), tmp_path / "mark"
    (model / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (model / name).write_bytes(pickle.dumps(Canary(mark)))
    with pytest.raises(ModelError, match=r"model\.pt, a pickle|pytorch_model\.bin, a pickle"):
        load_model(LoadingConfig(path=str(model)))
    assert not mark.exists()
    pickle.loads((model / "model.pt").read_bytes())
    assert mark.exists(), "the canary itself works"


def test_a_pickle_beside_or_instead_of_the_weights_is_not_read(tmp_path):
    model, mark = save_pair(tmp_path / "model", width=64), tmp_path / "mark"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(mark)))
    load_model(LoadingConfig(path=str(model)))
    (model / "model.safetensors").write_bytes(pickle.dumps(Canary(mark)))
    with pytest.raises(ModelError):
        load_model(LoadingConfig(path=str(model)))
    assert not mark.exists()


def test_a_pickled_adapter_is_not_read(folder, tmp_path):
    adapter, mark = tmp_path / "adapter", tmp_path / "mark"
    load_model(ModelConfig(path=str(folder), lora={"rank": 2}), trainable=True).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary(mark)))
    for config in (LoadingConfig(path=str(folder), adapter=str(adapter)), LoadingConfig(path=str(adapter))):
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
            load_model(config)
    assert not mark.exists()


@pytest.mark.parametrize("known", [True, False], ids=["known architecture", "its own architecture"])
def test_code_that_ships_with_a_model_is_not_run(tmp_path, known):
    model, mark = save_pair(tmp_path / "model", width=64), tmp_path / "mark"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    for name in ("configuration_canary.py", "modeling_canary.py", "tokenization_canary.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_canary.Canary", "AutoModelForCausalLM": "modeling_canary.Canary"}
    rewrite(model / "config.json", auto_map=auto_map, **({} if known else {"model_type": "llamalike"}))
    rewrite(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_canary.Canary", None]})
    config = LoadingConfig(path=str(model))
    load_tokenizer(config)
    if known:
        load_model(config)
    else:
        with pytest.raises(ModelError, match=r"trust_remote_code: true\s+and revision|llamalike"):
            load_model(config)
    with pytest.raises(ModelError, match="not pinned by anything"):
        load_model(LoadingConfig(path=str(model), trust_remote_code=True, revision=COMMIT))
    with pytest.raises(ModelError, match="not pinned by anything"):
        load_tokenizer(LoadingConfig(path=str(model), trust_remote_code=True, revision=COMMIT))
    assert not mark.exists()


# ---------------------------------------------------------------- tokenizers, and the environment


def test_a_template_and_an_end_replace_the_tokenizers_own(folder, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load_tokenizer(LoadingConfig(path=str(folder))).chat_template == tiny_tokenizer().chat_template
    for template in (str(tmp_path / "t.jinja"), (tmp_path / "t.jinja").read_text()):
        tokenizer = load_tokenizer(LoadingConfig(path=str(folder), chat_template=template, eos_token="<|endoftext|>"))
        assert tokenizer.chat_template == (tmp_path / "t.jinja").read_text()
        assert tokenizer.eos_token_id == 0
    with pytest.raises(ModelError, match="neither a Jinja template nor a file"):
        load_tokenizer(LoadingConfig(path=str(folder), chat_template="no/such/file.jinja"))
    with pytest.raises(ModelError, match="'<end>' is not a token"):
        load_tokenizer(LoadingConfig(path=str(folder), eos_token="<end>"))


def test_a_model_without_a_tokenizer(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer beside the model"):
        load_tokenizer(LoadingConfig(path=str(tmp_path), weights="random"))


def test_a_torchvision_for_another_torch_is_found_out(tmp_path, monkeypatch):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = requirements.broken_torchvision()
    assert message is not None
    assert "nms does not exist" in message
    assert "pip uninstall torchvision" in message


def test_the_story_models_load(shared_data):
    for name in ("stories260K-llama-hf", "tinystories-279K-llama-hf"):
        config = LoadingConfig(path=str(shared_data / "models" / name))
        model, tokenizer = load_model(config), load_tokenizer(config)
        prove_head(CausalLM(model, len(tokenizer)))
        loss = model(**tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt"), labels=None).logits
        assert torch.isfinite(loss).all()

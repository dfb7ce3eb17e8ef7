"""One change, one field: digests of a teacher differ where its answers could, and nowhere else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.test_tokenizers import changed, swap_two_ids
from potstill.errors import ModelError
from potstill.models.config import LoadingConfig
from potstill.models.identity import template_digest, tokenizer_digest, weights_digest
from potstill.models.loading import load_model, load_tokenizer
from potstill.models.tokenizers import vocabulary_size
from tiny import CHATML, CHATML_WITHOUT_MASK, save_pair, tiny_llama, tiny_tokenizer

FIELDS = {"teacher weights", "teacher configuration", "adapter weights", "quantisation"}


@pytest.fixture
def folder(tmp_path):
    return save_pair(tmp_path / "model")


def identity(path, **keys):
    return weights_digest(LoadingConfig(path=str(path), **keys))


def differing(one, other):
    assert set(one) == set(other) == FIELDS
    return {field for field in FIELDS if one[field] != other[field]}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


# ---------------------------------------------------------------- models


def test_another_partition_folder_and_spelling_are_no_difference(folder, tmp_path, monkeypatch):
    before = identity(folder)
    assert (before["adapter weights"], before["quantisation"]) == ("none", "none")
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert identity(tmp_path / "elsewhere" / "copy") == before
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert identity(tmp_path / "parts") == before
    monkeypatch.chdir(tmp_path)
    assert identity("model") == identity("./parts") == before


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Puts a folder into the hub's cache as org/name, on a machine without a network."""
    from huggingface_hub import constants

    from potstill import hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.hub_is_reachable.cache_clear()

    def put(folder, name):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / ("a" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("a" * 40)

    yield put
    hub.hub_is_reachable.cache_clear()


def test_a_snapshot_of_the_hub_is_the_folder_that_it_was_made_from(folder, adapter, hub_cache, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    hub_cache(tmp_path / "parts", "org/name")
    hub_cache(adapter, "org/adapter")
    assert identity("org/name", adapter="org/adapter") == identity(folder, adapter=str(adapter))
    with pytest.raises(ModelError, match="org/other: neither a folder here nor a model that the hub gives"):
        identity("org/other")
    with pytest.raises(ModelError, match="org/other: neither a folder here nor a model"):
        identity(folder, adapter="org/other")


def test_what_lies_beside_the_model_is_no_part_of_it(folder):
    before = identity(folder)
    save_file({"w": torch.zeros(2)}, folder / "consolidated.safetensors")
    (folder / "README.md").write_text("words")
    edit_json(folder / "config.json", transformers_version="5.0.0", use_cache=False, eos_token_id=[1, 2])
    assert identity(folder) == before


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_one_bit_is_a_difference_of_the_weights(folder, name):
    before = identity(folder)

    def flip(weights):
        weights[name].view(torch.int32).view(-1)[-1] ^= 1

    edit_weights(folder / "model.safetensors", flip)
    assert differing(identity(folder), before) == {"teacher weights"}
    edit_weights(folder / "model.safetensors", flip)
    assert identity(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.update({"extra": torch.zeros(0)}),
        lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].view(1, -1)}),
        lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].view(torch.int32)}),
        lambda weights: weights.update({"a": weights.pop("model.norm.weight")}),
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone(),
                                        "model.embed_tokens.weight": weights["lm_head.weight"].clone()}),
    ],
    ids=["one more", "shape", "dtype", "name", "swapped"],
)  # fmt: skip
def test_names_shapes_and_dtypes_count_as_bytes_do(folder, change):
    before = identity(folder)
    edit_weights(folder / "model.safetensors", change)
    assert differing(identity(folder), before) == {"teacher weights"}


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-5), ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
                                            ("final_logit_softcapping", 30.0)])  # fmt: skip
def test_the_same_weights_read_otherwise_are_another_configuration(folder, key, value):
    before = identity(folder)
    edit_json(folder / "config.json", **{key: value})
    assert differing(identity(folder), before) == {"teacher configuration"}


def test_quantisation_is_what_the_recipe_or_the_model_states(folder):
    before = identity(folder)
    found = {quantization: identity(folder, quantization=quantization) for quantization in ("4bit", "8bit")}
    assert all(differing(one, before) == {"quantisation"} for one in found.values())
    assert found["4bit"]["quantisation"].startswith("bitsandbytes, 4 bits, nf4")
    assert found["8bit"]["quantisation"].startswith("bitsandbytes, 8 bits")
    edit_json(folder / "config.json", quantization_config={"quant_method": "compressed-tensors", "bits": 4, "version": "0.1"})
    stated = identity(folder)
    assert differing(stated, before) == {"quantisation"}
    assert stated["quantisation"].startswith("compressed-tensors, ")
    edit_json(folder / "config.json", quantization_config={"quant_method": "compressed-tensors", "bits": 4, "version": "0.2"})
    assert identity(folder) == stated
    edit_json(folder / "config.json", quantization_config={"quant_method": "compressed-tensors", "bits": 8, "version": "0.2"})
    assert differing(identity(folder), stated) == {"quantisation"}


def test_random_weights_are_a_configuration_and_a_seed(folder):
    config = LoadingConfig(path=str(folder), weights="random")
    assert weights_digest(config, seed=0) == weights_digest(config, seed=0)
    assert differing(weights_digest(config, seed=1), weights_digest(config, seed=0)) == {"teacher weights"}
    assert weights_digest(config)["teacher weights"] != identity(folder)["teacher weights"]
    (folder / "model.safetensors").unlink()
    assert weights_digest(config)["teacher weights"] == "random, seed 0"


@pytest.fixture
def adapter(folder, tmp_path):
    from potstill.models.config import ModelConfig

    config = ModelConfig(path=str(folder), lora={"rank": 2, "targets": ["q_proj", "v_proj"]})
    load_model(config, trainable=True).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_its_tensors_and_their_scaling(folder, adapter, tmp_path):
    plain, before = identity(folder), identity(folder, adapter=str(adapter))
    assert differing(before, plain) == {"adapter weights"}
    shutil.copytree(adapter, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "adapter_config.json", base_model_name_or_path="/mnt/another", inference_mode=False,
              target_modules=["v_proj", "q_proj"])  # fmt: skip
    assert identity(folder, adapter=str(tmp_path / "copy")) == before
    edit_json(tmp_path / "copy" / "adapter_config.json", lora_alpha=7)
    assert differing(identity(folder, adapter=str(tmp_path / "copy")), before) == {"adapter weights"}

    def flip(weights):
        first = min(weights)
        weights[first].view(torch.int32).view(-1)[0] ^= 1

    edit_weights(adapter / "adapter_model.safetensors", flip)
    assert differing(identity(folder, adapter=str(adapter)), before) == {"adapter weights"}
    assert identity(adapter) == identity(folder, adapter=str(adapter))  # an adapter's own folder stands for it on its base


def test_what_is_not_there_is_named(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        identity(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors", "b": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"1 of 2 files of weights are not there, the first is gone\.safetensors"):
        identity(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="not beside it"):
        identity(folder)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(ModelError, match=r"model\.safetensors does not read as safetensors"):
        identity(folder)
    with pytest.raises(ModelError, match="there is no adapter"):
        identity(save_pair(tmp_path / "again"), adapter=str(tmp_path))


# ---------------------------------------------------------------- tokenizers and templates


def test_a_tokenizer_stays_itself_through_a_folder_and_through_use(folder, tmp_path):
    before = tokenizer_digest(tiny_tokenizer())
    used = tiny_tokenizer()
    used(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert json.loads(used.backend_tokenizer.to_str())["truncation"] is not None
    used.pad_token, used.padding_side = "<|im_end|>", "left"
    assert tokenizer_digest(used) == before
    used.save_pretrained(tmp_path / "saved")
    assert tokenizer_digest(load_tokenizer(LoadingConfig(path=str(folder)))) == before
    tokenizer = tiny_tokenizer(chat_template=None)
    assert tokenizer_digest(tokenizer) == before  # the template is a field of its own


def _normalised(description):
    description["normalizer"] = {"type": "Lowercase"}


def _without_a_merge(description):
    del description["model"]["merges"][0]


@pytest.mark.parametrize("change", [swap_two_ids, _normalised, _without_a_merge])
def test_another_rule_is_another_tokenizer(change):
    assert tokenizer_digest(changed(change)) != tokenizer_digest(changed(lambda description: None)) == tokenizer_digest(tiny_tokenizer())


def test_added_and_special_tokens_count():
    before = tokenizer_digest(tiny_tokenizer())
    added = tiny_tokenizer()
    added.add_tokens(["<think>"])
    special = tiny_tokenizer()
    special.add_tokens(["<think>"], special_tokens=True)
    other_end = tiny_tokenizer()
    other_end.eos_token = "<|endoftext|>"
    digests = {before, *map(tokenizer_digest, (added, special, other_end))}
    assert len(digests) == 4
    assert vocabulary_size(added) == 321


def test_a_template_is_its_source():
    assert template_digest(tiny_tokenizer(chat_template=CHATML)) == template_digest(CHATML) != template_digest(CHATML_WITHOUT_MASK)
    assert template_digest(None) == template_digest(tiny_tokenizer(chat_template=None)) == "none" != template_digest("none")
    assert template_digest("") != "none"


def test_tensors_are_read_one_at_a_time_and_hashed_in_pieces(folder, monkeypatch):
    from potstill.models import identity as module

    asked: list[int] = []
    hashed = module._bytes_digest
    whole = identity(folder)
    monkeypatch.setattr(module, "_bytes_digest", lambda tensor: asked.append(tensor.nbytes) or hashed(tensor))
    monkeypatch.setattr(module, "_PIECE", 7)
    assert identity(folder) == whole
    assert len(asked) == len(tiny_llama().state_dict())

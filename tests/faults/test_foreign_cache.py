"""F21: each thing that a cache was made from, changed alone in real files, is refused by its name; paths and names are no difference.

The naive comparison, by the model's name and the row's number, takes every one of them.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.test_tokenizers import changed, swap_two_ids
from potstill.cache.records import RecordFormat
from potstill.data.config import DataConfig
from potstill.data.prepare import prepare
from potstill.errors import CacheError
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.identity import template_digest, tokenizer_digest, weights_digest
from potstill.models.loading import load_model, load_tokenizer
from potstill.teachers.cached import CachedTeacher, refuse_foreign
from potstill.teachers.local import LocalTeacher
from recorded import VOCABULARY, record
from tiny import CHATML_WITHOUT_MASK, save_pair

ROWS = [{"instruction": f"Question {i}", "input": "", "output": "An answer. " * (1 + i)} for i in range(6)]


class World:
    """What a run is made of, on disk: a model, its adapter, its tokenizer, the data and how it is cut."""

    def __init__(self, folder):
        self.folder, self.model = folder, {"path": str(save_pair(folder / "model"))}
        self.truncation, self.rows = {"max_tokens": 48, "too_long": "truncate_right"}, list(ROWS)

    def states(self):
        """What this run states of itself, and its examples."""
        data = self.folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        config = LoadingConfig(**self.model)
        tokenizer = load_tokenizer(config)
        examples = prepare(DataConfig(train=str(data), **self.truncation), tokenizer, seed=0).train
        fields = {"tokenizer": tokenizer_digest(tokenizer), "template": template_digest(tokenizer), "truncation": self.truncation}
        return {**weights_digest(config), **fields}, examples


def flip_a_bit(world):
    file = world.folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(weights, file, metadata={"format": "pt"})


def another_rope(world):
    file = world.folder / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}))


def an_adapter(world):
    config = ModelConfig(path=world.model["path"], lora={"rank": 2, "targets": ["q_proj"]})
    load_model(config, trainable=True).save_pretrained(world.folder / "adapter")
    world.model["adapter"] = str(world.folder / "adapter")


def four_bits(world):
    world.model["quantization"] = "4bit"


def another_tokenizer(world):
    changed(swap_two_ids).save_pretrained(world.folder / "model")


def another_template(world):
    world.model["chat_template"] = CHATML_WITHOUT_MASK


def another_limit(world):
    world.truncation = {**world.truncation, "max_tokens": 40}


def another_row(world):
    world.rows[4] = {**ROWS[4], "output": "Another answer."}


def another_place(world):
    (world.folder / "model").rename(world.folder / "mounted elsewhere")
    world.model["path"] = str(world.folder / "mounted elsewhere")


def other_parts(world):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(world.folder / "model").save_pretrained(world.folder / "parts", max_shard_size="30KB")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(world.folder / "model" / file, world.folder / "parts")
    world.model["path"] = str(world.folder / "parts")


def another_order(world):
    world.rows = world.rows[::-1]


FOREIGN = {
    flip_a_bit: "another teacher weights", another_rope: "another teacher configuration", an_adapter: "another adapter weights",
    four_bits: "another quantisation", another_tokenizer: "another tokenizer", another_template: "another template",
    another_limit: r"another truncation\.max_tokens: 40 here, 48 in the cache", another_row: r"1 of 6 .* the first is .*rows\.jsonl:5",
}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """A world and the cache that was captured in it."""
    world = World(tmp_path)
    states, examples = world.states()
    teacher = LocalTeacher(CausalLM(load_model(LoadingConfig(**world.model)), VOCABULARY))
    reader = record(tmp_path / "cache", teacher, examples, RecordFormat("top_k", VOCABULARY, k=8), **states)
    return world, reader, (states, examples)


def refuse(reader, states, examples):
    refuse_foreign(reader.provenance, states, reader.name)
    CachedTeacher(reader, vocabulary_size=VOCABULARY, wanted=states).refuse_missing(examples)


def naive_refuse(world, before, examples, rows_before):
    """What peers compare: the model's name, and that there is an answer for every row number."""
    if world.model["path"] != before or len(examples) > rows_before:
        raise CacheError("another model")


@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: change.__name__)
def test_each_change_alone_is_refused_by_its_name(made, change):
    world, reader, (states, examples) = made
    refuse(reader, states, examples)
    name, count = world.model["path"], len(examples)
    change(world)
    with pytest.raises(CacheError, match=FOREIGN[change]) as caught:
        refuse(reader, *world.states())
    assert "; another " not in str(caught.value)  # this field and no other
    naive_refuse(world, name, world.states()[1], count)


@pytest.mark.parametrize("change", [another_place, other_parts, another_order], ids=lambda change: change.__name__)
def test_a_place_a_partition_and_an_order_are_no_difference(made, change):
    world, reader, _ = made
    change(world)
    assert refuse(reader, *world.states()) is None

"""An exported student is the student: loaded by transformers alone it gives the same logits, and no crash leaves half of one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill import storage
from potstill.errors import ModelError, StorageError
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig, ModelConfig
from potstill.models.export import export_student
from potstill.models.loading import load_model, load_tokenizer
from potstill.models.proofs import probe_logits, typical_distance
from tiny import save_pair, tiny_tokenizer

LORAS = {
    "whole": None,
    "all linear": {"rank": 2},
    "on the head": {"rank": 2, "targets": ["q_proj", "lm_head"]},
    "head whole": {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("base") / "model", width=64, tied=request.param)


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("plain") / "model", width=64)


def trained(base: Path, lora=None, **changes) -> CausalLM:
    """A student whose every learned parameter has moved."""
    model = load_model(ModelConfig(path=str(base), lora=lora, **changes), trainable=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return CausalLM(model, 320)


def reread(folder: Path, **arguments) -> torch.Tensor:
    return probe_logits(CausalLM(AutoModelForCausalLM.from_pretrained(folder, **arguments), 320))


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning", "ignore::FutureWarning")  # transformers and peft, on plain loading
def test_a_merged_student_is_a_plain_model(base, lora, tmp_path):
    student = trained(base, lora)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    folders = export_student(student, tiny_tokenizer(), tmp_path / "run")
    assert folders == [tmp_path / "run" / name for name in (["student"] if lora is None else ["adapter", "student"])]
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.named_parameters()), "the live model is not touched"
    assert not (tmp_path / "run" / "student" / "adapter_config.json").exists()
    apart = lora in (LORAS["on the head"], LORAS["head whole"])
    if apart:  # said in the configuration, so that no reader ties them again
        assert json.loads((tmp_path / "run" / "student" / "config.json").read_text())["tie_word_embeddings"] is False
    expected = probe_logits(student)
    assert typical_distance(reread(tmp_path / "run" / "student"), expected) < 1e-5
    assert typical_distance(expected, reread(base)) > 1e-2, "the training was not a no-op"
    if lora is not None:
        again = load_model(LoadingConfig(path=str(base), adapter=str(tmp_path / "run" / "adapter")))
        assert typical_distance(probe_logits(CausalLM(again, 320)), expected) < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_without_merging_the_student_is_the_adapter_on_its_base(plain_base, tmp_path):
    student = trained(plain_base, LORAS["on the head"])
    export_student(student, tiny_tokenizer(), tmp_path, merge=False)
    assert not list((tmp_path / "student").glob("model*.safetensors"))
    assert typical_distance(reread(tmp_path / "student"), probe_logits(student)) < 1e-6
    for name in ("student", "adapter"):
        config = LoadingConfig(path=str(tmp_path / name))
        assert typical_distance(probe_logits(CausalLM(load_model(config), 320)), probe_logits(student)) < 1e-6
        assert len(load_tokenizer(config)) == 320


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_merged_quantised_student_is_unpacked(plain_base, bits, tmp_path):
    student = trained(plain_base, LORAS["on the head"], quantization=bits)
    probe_logits(student)  # LLM.int8 moves its scales in its first forward
    export_student(student, tiny_tokenizer(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert {type(layer).__name__ for layer in model.modules() if "Linear" in type(layer).__name__} == {"Linear"}
    rounding = 1e-5 if bits == "4bit" else 0.02     # 8-bit layers round what goes in, too
    assert typical_distance(probe_logits(CausalLM(model, 320)), probe_logits(student)) < rounding


def test_tokenizer_template_and_generation_config_come_along(plain_base, tmp_path):
    student = trained(plain_base)
    student.inner.generation_config.eos_token_id = 0
    student.inner.generation_config.temperature = 0.7   # without sampling: a combination that transformers refuses to save
    export_student(student, tiny_tokenizer(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer("Hello")["input_ids"] == tiny_tokenizer()("Hello")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert model.generation_config.eos_token_id == [2, 0]
    prompt = tokenizer("Add 12", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > prompt["input_ids"].shape[1]


def test_the_dtype_is_as_asked(plain_base, tmp_path):
    export_student(trained(plain_base), tiny_tokenizer(), tmp_path, dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").dtype == torch.bfloat16


def test_an_export_that_reads_back_otherwise_is_not_committed(plain_base, tmp_path, monkeypatch):
    student = trained(plain_base, LORAS["all linear"])
    monkeypatch.setattr("potstill.models.merging._delta", lambda layer, adapter: torch.zeros(layer.out_features, layer.in_features))
    with pytest.raises(StorageError, match="gives other logits than the one in memory"):
        export_student(student, tiny_tokenizer(), tmp_path)
    assert not (tmp_path / "student").exists()
    assert (tmp_path / "adapter").exists()


def test_a_second_export_replaces_the_first(plain_base, tmp_path):
    student = trained(plain_base)
    export_student(student, tiny_tokenizer(), tmp_path)
    with torch.no_grad():
        student.inner.get_input_embeddings().weight.mul_(2)
    export_student(student, tiny_tokenizer(), tmp_path)
    assert typical_distance(reread(tmp_path / "student"), probe_logits(student)) < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


class PowerCut(BaseException):
    """Nothing in the package may catch it."""


def test_a_crash_at_any_operation_leaves_a_whole_export_or_none(plain_base, tmp_path, monkeypatch):
    student = trained(plain_base, LORAS["all linear"])
    monkeypatch.setattr("potstill.models.export._require_equal", lambda *_: None)   # what is written, not what is read
    expected = probe_logits(student)
    operations = storage.OPERATIONS
    crashes = 0
    for survive in range(1000):
        run = tmp_path / f"run{survive}"
        count = iter(range(10_000))

        def dying(operation, survive=survive, count=count):
            def perform(*arguments):
                if next(count) >= survive:
                    raise PowerCut
                return operation(*arguments)

            return perform

        names = ("write", "fsync", "rename", "mkdir", "unlink", "sync_folder")
        monkeypatch.setattr(storage, "OPERATIONS", replace(operations, **{name: dying(getattr(operations, name)) for name in names}))
        try:
            export_student(student, tiny_tokenizer(), run)
            break
        except PowerCut:
            crashes += 1
        finally:
            monkeypatch.setattr(storage, "OPERATIONS", operations)
        if (run / "student").exists():
            assert storage.verify_folder(run / "student") == []
            assert typical_distance(reread(run / "student"), expected) < 1e-5
    assert crashes > 20
    assert storage.verify_folder(run / "student") == []


def test_a_dora_adapter_is_not_merged_but_kept(plain_base, tmp_path):
    import peft

    from potstill.models.adapters import _without_noise

    with _without_noise():
        dora = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
        model = peft.get_peft_model(load_model(LoadingConfig(path=str(plain_base))), dora)
    with pytest.raises(ModelError, match=r"variant of LoRA .* run\.merge_adapter: false"):
        export_student(CausalLM(model, 320), tiny_tokenizer(), tmp_path)

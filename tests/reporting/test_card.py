"""The model card: what huggingface_hub reads of it, that it hangs on no clock and no session, and that it gives nothing away."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from potstill import manifest
from potstill.reporting.card import model_cards
from potstill.run_folder import RunFolder

HUB = {
    "student": {"path": "org/Small-1B", "lora": {"rank": 8}}, "teacher": {"kind": "local", "path": "org/Large-8B"},
    "data": {"train": [{"path": "someone/instructions"}, {"path": "/home/me/private/rows.jsonl"}], "format": "instruct"},
    "objective": {"divergence": "forward_kl", "kd_ratio": 0.5}, "training": {"steps": 3, "learning_rate": 1e-4},
    "run": {"seed": 7, "merge_adapter": True},
}  # fmt: skip
FACTS = {"steps": 3, "epochs": 1.5, "tokens": 1200, "target_tokens": 800, "parameters": 1000, "trainable_parameters": 10, "seconds": 1.0}


def make_run(path, recipe=HUB, *, loss: float = 0.5):
    with RunFolder.open(path, recipe) as folder:
        folder.append_metrics({"step": 1, "loss": 2.0, "loss/ce": 3.0, "loss/kd": 1.0, "tokens_per_second": 5.0})
        folder.append_metrics({"step": 3, "loss": loss, "loss/ce": 0.75, "loss/kd": 0.25, "tokens_per_second": 6.0})
        folder.append_metrics({"step": 3, "eval_loss": 0.625, "eval_top1_agreement": 0.875})
    return path


def record(**changes):
    value = {"value": 0.5, "standard_error": 0.05, "low": 0.4, "high": 0.6, "count": 40, "counted": "questions", "num_clusters": 40}
    metric = {"task": "t", "metric": "accuracy", "label": "accuracy", "unit": "", "higher_is_better": True, **value}
    model = {"name": "student", "num_parameters": 1000, "num_seeds": 1, "is_teacher": False, "metrics": {"t/accuracy": metric}}
    task = {"name": "t", "kind": "text", "primary": "t/accuracy", "role": "target", "data": {}}
    return {"kind": "evaluation", "version": 2, "title": "Questions", "data": {}, "warnings": [], "baseline": None, "before": None,
            "tasks": [task], "models": [model], "comparisons": [], "samples": [], "series": [], **changes}  # fmt: skip


def evaluated(run, **changes):
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "t.json").write_text(json.dumps(record(**changes)))
    return run


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    cards = model_cards(make_run(tmp_path / "small-from-large"), FACTS)
    card = ModelCard(cards["student"])
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "org/Small-1B", "base_model_relation": "finetune",
        "datasets": ["someone/instructions"], "tags": ["distillation", "potstill"],
    }  # fmt: skip
    adapter = ModelCard(cards["adapter"]).data
    assert (adapter.library_name, adapter.base_model, adapter.to_dict()["base_model_relation"]) == ("peft", "org/Small-1B", "adapter")
    assert "license" not in card.data.to_dict()
    for part in ("# small-from-large", "org/Small-1B", "org/Large-8B", "0.5 × cross-entropy + 0.5 × forward KL", "- steps: 3",
                 "tokens learned: 800",
                 "1,000, 10 of them trained", "| total | 0.5000 | 0.6250 |", "top-1 agreement with the teacher 0.8750", "No evaluation",
                 "AutoModelForCausalLM", "claims none"):  # fmt: skip
        assert part in card.text


def test_a_run_without_a_teacher_and_one_from_random_weights_claim_no_more_than_they_are(tmp_path):
    recipe = {**HUB, "student": {"path": "org/Small-1B", "weights": "random"}, "data": {"train": "rows.jsonl"}}
    del recipe["teacher"]
    recipe["objective"] = {"divergence": "cross_entropy"}
    data = ModelCard(model_cards(make_run(tmp_path / "run", recipe), FACTS)["student"]).data.to_dict()
    assert data["tags"] == ["fine-tuning", "potstill"]
    assert not {"base_model", "datasets"} & data.keys()


def test_results_come_in_once_they_are_measured(tmp_path):
    run = evaluated(make_run(tmp_path / "run"), warnings=["only 40 questions"])
    card = model_cards(run, FACTS)["student"]
    assert "No evaluation" not in card
    for part in ("### Questions", "| **accuracy ↑** | 0.500 ± 0.050 |", "0.400 to 0.600", "only 40 questions"):
        assert part in card


def test_the_card_of_a_resumed_run_is_that_of_the_unbroken_one(tmp_path):
    straight = make_run(tmp_path / "a" / "run")
    resumed = make_run(tmp_path / "b" / "run")
    make_run(tmp_path / "b" / "run")  # a second session; its lines stand twice
    facts = {**FACTS, "seconds": 99.0, "peak_gib": 3.0, "resumed_from": 2}
    assert model_cards(straight, FACTS) == model_cards(resumed, facts)
    assert model_cards(straight, FACTS) != model_cards(make_run(tmp_path / "c" / "run", loss=0.4), FACTS)


def test_neither_paths_nor_secrets_nor_markup_come_into_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "very-secret-value")
    evil = "x\n---\nlicense: mit\n# <script>alert(1)</script> | [a](javascript:b) very-secret-value"
    recipe = {
        **HUB, "student": {"path": "/home/me/models/small"}, "data": {"train": [{"path": "~/private/rows.jsonl"}, {"path": evil}]},
        "teacher": {"kind": "server", "model": "../models/large", "url": "http://me:pw@machine.internal:8000/v1"},
    }  # fmt: skip
    run = evaluated(make_run(tmp_path / "run", recipe), title=evil, warnings=["see /srv/data/held_out/test.jsonl, 3 km/h"])
    card = model_cards(run, FACTS)["student"]
    for secret in ("/home", "private", "machine.internal", "me:pw", "very-secret-value", "/srv", "held_out/", str(tmp_path),
                   "<script", " [a](javascript"):  # fmt: skip
        assert secret not in card
    for part in ("small", "large", "rows.jsonl", "test.jsonl, 3 km/h"):
        assert part in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["distillation", "potstill"]}
    assert not any(line.startswith(("license", "# <", "---")) for line in card.split("---\n", 2)[2].splitlines())


@pytest.mark.parametrize("name", ["run", "a: b", "#x", "{y}", "ümlaut", "*"])
def test_any_name_of_a_run_makes_a_card(name, tmp_path):
    assert ModelCard(model_cards(make_run(tmp_path / name), FACTS)["student"]).data.library_name == "transformers"


def test_distill_and_export_write_it_before_the_folder_is_committed(tmp_path):
    from small_recipe import potstill, write_small_recipe

    folder = write_small_recipe(tmp_path)
    assert potstill("distill", str(folder / "r.yaml"), "student.lora={rank: 2, alpha: 4, targets: [q_proj, v_proj]}", "--quiet") == 0
    run = folder / "run"
    for part in ("student", "adapter"):
        assert manifest.verify_folder(run / part) == []
        assert "README.md" in manifest.read_manifest(run / part).files
        assert (run / part / "README.md").read_text(encoding="utf-8") == model_cards(run)[part]
    assert ModelCard.load(run / "student" / "README.md").data.library_name == "transformers"
    assert str(tmp_path) not in (run / "student" / "README.md").read_text(encoding="utf-8")
    assert "top-1 agreement" in (run / "student" / "README.md").read_text(encoding="utf-8")
    evaluated(run)
    assert potstill("export", str(run), "--output", str(tmp_path / "out")) == 0
    assert "### Questions" in (tmp_path / "out" / "student" / "README.md").read_text(encoding="utf-8")
    assert manifest.verify_folder(run / "student") == []
    assert manifest.verify_folder(tmp_path / "out" / "student") == []

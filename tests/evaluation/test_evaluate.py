"""`potstill evaluate` from folders and files to one record; what cannot be measured is refused before weights are read."""

import json
import math
import subprocess
import sys

import pytest
import torch

from potstill.errors import ConfigError, DataError, ModelError, UsageError
from potstill.evaluation.config import EvaluationConfig
from potstill.evaluation.evaluate import evaluate
from potstill.evaluation.metrics import METRICS
from potstill.evaluation.record import EvaluationRecord, ModelRecord, TaskRecord, compare_models
from potstill.evaluation.scores import Scores, mean
from potstill.evaluation.task import Outcome
from tiny import save_pair, tiny_llama, tiny_tokenizer

TEXTS = ["The quick brown fox jumps.", "Add 12 and 30: the answer is 42. " * 12, "Ünïcödé, 漢字", "user assistant system"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models with one tokenizer, a third whose tokenizer has two ids exchanged, and a text."""
    place = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("student", "teacher", "stranger")):
        save_pair(place / name, seed)
    tokenizer = place / "stranger" / "tokenizer.json"
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))
    pieces = vocabulary["model"]["vocab"]
    pieces["a"], pieces["b"] = pieces["b"], pieces["a"]
    tokenizer.write_text(json.dumps(vocabulary), encoding="utf-8")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return place


def config(folder, *, model=None, data=None, **changes):
    text = {"train": str(folder / "text.jsonl"), "format": "text", "max_tokens": 64} if data is None else data
    values = {
        "models": {"student": [model or {"path": str(folder / "student")}]}, "teacher": {"path": str(folder / "teacher")}, "device": "cpu",
        "tasks": [{"kind": "text", "data": text}], "store": None,
    }  # fmt: skip
    return EvaluationConfig.model_validate(values | changes)


def only_scores(record, model: int = 0) -> Scores:
    (task,) = record.models[model].outcomes
    (scores,) = record.models[model].scores(task)
    return scores


def test_the_record_holds_every_metric_and_reads_back(folder, tmp_path):
    record = evaluate(config(folder, items=True), output=tmp_path / "deep" / "record.json")
    written = json.loads((tmp_path / "deep" / "record.json").read_text(encoding="utf-8"))
    assert written == record.to_json()
    model = written["models"][0]
    assert set(model["metrics"]) == {f"text/{name}" for name in METRICS}
    assert model["num_parameters"] == sum(weight.numel() for weight in tiny_llama().parameters())
    for metric in model["metrics"].values():
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert metric["num_clusters"] == 4
    assert written["tasks"][0]["data"]["window"] == 64
    assert [item["item"] for item in written["items"] if item["model"] == "student"] == [f"text.jsonl:{line}" for line in range(1, 5)]


def test_bytes_are_those_of_the_text_and_long_text_is_read_whole(folder):
    record = evaluate(config(folder))
    bits = only_scores(record).estimate("bits_per_byte")
    # The first token of a text has no predictor; tokens of this tokenizer begin at the first byte.
    tokenizer = tiny_tokenizer()
    first = sum(len(tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids[0])) for text in TEXTS)
    assert bits.count == sum(len(text.encode()) for text in TEXTS) - first
    tokens = [len(tokenizer(text).input_ids) for text in TEXTS]
    assert max(tokens) > 64
    # An end of text is a target too.
    assert only_scores(record).estimate("perplexity").count == sum(tokens)


def test_the_perplexity_of_short_text_is_that_of_its_log_probabilities(folder, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n", encoding="utf-8")
    found = evaluate(config(folder, teacher=None, data={"train": str(tmp_path / "short.jsonl"), "format": "text"}))
    tokens = torch.tensor([[*tiny_tokenizer()(TEXTS[0]).input_ids, tiny_tokenizer().eos_token_id]])
    loss = tiny_llama(0)(input_ids=tokens, labels=tokens).loss.item()
    assert only_scores(found).estimate("perplexity").value == pytest.approx(math.exp(loss), rel=1e-5)
    assert only_scores(found).estimate("perplexity").standard_error is None
    assert any("one document" in warning for warning in found.to_json()["warnings"])
    assert found.to_json()["models"][0]["metrics"]["short/perplexity"]["standard_error"] is None


def test_beside_a_teacher_with_exchanged_tokens_only_what_needs_no_distance_is_measured(folder):
    record = evaluate(config(folder, teacher={"path": str(folder / "stranger")}))
    alone = only_scores(evaluate(config(folder, teacher=None)))
    found = only_scores(record)
    assert set(found.metrics) == set(alone.metrics)
    assert found.estimate("bits_per_byte") == alone.estimate("bits_per_byte")
    assert only_scores(record, 1).estimate("bits_per_byte").value != found.estimate("bits_per_byte").value
    (warning,) = [warning for warning in record.to_json()["warnings"] if "2 of 320 ids mean different tokens" in warning]
    assert "no distance between them was measured" in warning


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"train": "nowhere.jsonl", "format": "text"}}, DataError, "nowhere.jsonl: no such file"),
        ({"model": {"path": "./nowhere"}}, ModelError, "nowhere"),
        ({"device": "abacus"}, ConfigError, "no device"),
        ({"device": "cuda:7"}, ConfigError, "sees no GPU"),
    ],
)
def test_what_is_not_there_is_said_before_weights_are_read(folder, monkeypatch, changes, error, message):
    monkeypatch.setattr("potstill.evaluation.evaluate.load_model", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        evaluate(config(folder, **changes))


@pytest.mark.parametrize("output", ["record.txt", "record"])
def test_a_record_is_a_json_file(folder, tmp_path, output):
    with pytest.raises(UsageError, match=r"record\.json"):
        evaluate(config(folder), output=tmp_path / output)


def test_rows_that_are_left_out_are_counted(folder, tmp_path):
    lines = [json.dumps({"text": text}) for text in ["", *TEXTS]]
    (tmp_path / "gaps.jsonl").write_text("\n".join(lines) + "\n{broken\n", encoding="utf-8")
    data = {"train": str(tmp_path / "gaps.jsonl"), "format": "text", "on_bad_line": {"skip": 1}}
    warnings = " ".join(evaluate(config(folder, teacher=None, data=data)).to_json()["warnings"])
    assert "1 of 6 rows were empty" in warnings
    assert "1 of 6 rows were malformed" in warnings


def test_an_evaluation_reads_one_text(folder):
    with pytest.raises(ValueError, match="leave validation out"):
        config(folder, data={"train": "a.jsonl", "validation": 0.1})


def test_the_request_is_read_without_torch():
    code = "import sys, potstill.evaluation.config; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def right(answers) -> Outcome:
    totals = [[answer, 1] for answer in answers]
    items = tuple(map(str, range(len(answers))))
    return Outcome(Scores(items, ("right", "questions"), totals, {"exact_match": mean("exact-match accuracy", "right")}))


def test_a_record_explains_its_numbers():
    kd = ModelRecord("KD", {"tasks": [right([1] * 30 + [0] * 10)]}, 7)
    sft = ModelRecord("SFT", {"tasks": [right([0] * 15 + [1] * 15 + [0] * 10)]}, 7)
    task = TaskRecord("tasks", "questions", "exact_match")
    record = EvaluationRecord("Tasks", [task], [kd, sft], compare_models([task], [(kd, sft)]), baseline="SFT").to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    found = record["models"][0]["metrics"]["tasks/exact_match"]
    assert (found["label"], found["counted"], found["value"]) == ("exact-match accuracy", "questions", 0.75)
    compared = record["comparisons"][0]
    assert compared["is_significant"]
    assert compared["method"].startswith("McNemar")
    assert compared["verdict"].startswith("exact-match accuracy: KD is 0.375 higher than SFT, which is better")
    assert "items" not in record

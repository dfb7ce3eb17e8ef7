"""Real questions and real models: the harness's own numbers, exactly; two models compared question by question."""

import gzip
import json
from itertools import islice

import pytest

pytest.importorskip("lm_eval")

from harness_rows import SPLIT, ask_harness, describe, numbers, write_rows
from potstill.evaluation.config import EvaluationConfig
from potstill.evaluation.evaluate import evaluate

MODELS = ("stories260K-llama-hf", "tinystories-279K-llama-hf")
LIMIT = {"truthfulqa_mc2": 6, "hellaswag": 24, "commonsense_qa": 24}


def real_rows(shared_data, task: str) -> list[dict]:
    """Published questions in the columns of the hub's data set; those beside the checkout have others."""
    file = {"truthfulqa_mc2": "truthfulqa", "hellaswag": "hellaswag_val.even5021", "commonsense_qa": "commonsenseqa_dev.shared610"}[task]
    with gzip.open(shared_data / "eval" / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, LIMIT[task])]
    if task == "truthfulqa_mc2":
        return [{"question": row["question"], "mc1_targets": row["mc1"], "mc2_targets": row["mc2"]} for row in rows]
    if task == "hellaswag":
        parts = [row["ctx"].partition(": ") for row in rows]
        return [{"activity_label": activity, "ctx_a": text, "ctx_b": "", "endings": row["endings"], "label": str(row["label"])}
                for row, (activity, _, text) in zip(rows, parts, strict=True)]  # fmt: skip
    return [{"question": row["question"], "choices": {"label": list("ABCDE"), "text": row["choices"]}, "answerKey": "ABCDE"[row["label"]]}
            for row in rows]  # fmt: skip


@pytest.mark.parametrize("task", LIMIT)
def test_real_questions_give_exactly_the_harness_s_own_numbers(task, shared_data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = write_rows(tmp_path / "rows.jsonl", real_rows(shared_data, task))
    models = {name: [{"path": str(shared_data / "models" / name)}] for name in MODELS}
    values = {"models": models, "device": "cpu", "store": None, "tasks": [{"kind": "harness", "task": task, "data": str(rows)}]}
    record = evaluate(EvaluationConfig.model_validate(values), quiet=True)
    folder = describe(tmp_path / "yaml", task, rows, SPLIT[task])
    for model in record.models:
        path = shared_data / "models" / model.name
        theirs = ask_harness(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), folder, task)
        (scores,) = model.scores(task)
        found = numbers(theirs, task)
        assert set(scores.metrics) - {"choice_calibration_error"} == {key.removesuffix(",none") for key in found}
        for key, value in found.items():
            column = scores.column(key.removesuffix(",none")).tolist()
            assert sum(column) / len(column) == value
            assert column == [sample[key.removesuffix(",none")] for sample in theirs["samples"][task]]
            if task != "truthfulqa_mc2":
                assert scores.estimate(key.removesuffix(",none")).value == value
    (primary,) = [pair for pair in record.to_json()["comparisons"] if pair["family"] == "primary"]
    assert primary["method"].startswith("McNemar") == (task != "truthfulqa_mc2")

"""Tasks of lm-evaluation-harness: the same numbers as the harness's own, item by item; by name and offline; what is refused."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from harness_rows import BY_NAME, COMMONSENSE, GSM8K, HELLASWAG, SPLIT, TRUTHFUL, ask_harness, describe, numbers, write_rows
from potstill.evaluation.config import EvaluationConfig
from potstill.evaluation.evaluate import evaluate
from tiny import save_pair, tiny_llama, tiny_tokenizer

LOCAL = {
    "choices": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{options}}"
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
filter_list:
  - {name: first-letter, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
""",
    "drawn": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: true, temperature: 1.0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: ["[^a]"]}
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "likelihood": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
}
ROWS = [
    {"question": f"Add {number} and 2.", "options": ["the dog", "12", "it"], "right": number % 2, "answer": f"The answer is {number + 2}"}
    for number in range(9)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and one row file and one task file for each of the harness's kinds of question."""
    folder = tmp_path_factory.mktemp("harness")
    save_pair(folder / "model", 0)
    save_pair(folder / "other", 1)
    rows = write_rows(folder / "rows.jsonl", ROWS)
    (folder / "tasks").mkdir()
    for name, text in LOCAL.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        (folder / "tasks" / f"{name}.yaml").write_text(head + text, encoding="utf-8")
    for name, made in BY_NAME.items():
        write_rows(folder / f"{name}.jsonl", made)
    return folder


def run(place, *tasks, models=("model",), **changes):
    """The record of models on tasks of the harness, nothing kept."""
    values = {
        "models": {name: [{"path": str(place / name)}] for name in models}, "device": "cpu", "store": None,
        "tasks": [{"kind": "harness", **task} for task in tasks],
    }  # fmt: skip
    return evaluate(EvaluationConfig.model_validate(values | changes), quiet=True)


def outcome(record, model: int = 0):
    (found,) = record.models[model].outcomes.values()
    return found[0]


def as_the_harness_adds(scores, name: str) -> float:
    """A metric from our items, added one after another in Python, as the harness adds."""
    formula = scores.metrics[name].formula
    above, below = (sum(scores.column(column).tolist()) for column in formula.columns[:2])
    return {"ratio": above / below, "perplexity": math.exp(above / below), "bits": above / below / math.log(2)}[formula.kind]


def assert_same(scores, reference: dict[str, float], left_out: tuple[str, ...] = ()):
    ours = {name: scores.estimate(name).value for name in scores.metrics if name != "choice_calibration_error"}
    theirs = {key.replace(",none", "").replace(",", "_"): value for key, value in reference.items()}
    assert set(ours) == set(theirs) - set(left_out)
    for name, value in ours.items():
        if name == "brier_score":  # the harness takes numpy's mean of it
            assert value == pytest.approx(theirs[name], rel=1e-12)
            continue
        assert as_the_harness_adds(scores, name) == theirs[name], name
        assert value == (theirs[name] if scores.is_yes_or_no(name) else pytest.approx(theirs[name], rel=1e-12)), name


@pytest.mark.parametrize("name", LOCAL)
def test_each_kind_of_question_gives_the_harness_s_own_numbers(place, name):
    found = outcome(run(place, {"task": str(place / "tasks" / f"{name}.yaml")}))
    reference = ask_harness(tiny_llama(0), tiny_tokenizer(), place / "tasks", name)
    assert_same(found.scores, numbers(reference, name), left_out=("mcc",))
    assert len(found.scores.items) == len(ROWS)
    assert [item.partition("-")[2] for item in found.scores.items] == list(
        dict.fromkeys(sample["doc_hash"][:8] for sample in reference["samples"][name])
    )
    said = [warning for warning in found.warnings if "no mean over questions" in warning]
    assert bool(said) == (name == "choices")
    if name in ("written", "drawn"):
        answers = {sample["doc_id"]: sample["resps"][0][0] for sample in reference["samples"][name]}
        assert [sample.answer for sample in found.samples] == [answers[number] for number in range(len(ROWS))]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_task_of_the_harness_by_name_with_own_rows(place, tmp_path, name):
    rows = place / f"{name}.jsonl"
    found = outcome(run(place, {"task": name, "data": str(rows)}))
    reference = ask_harness(tiny_llama(0), tiny_tokenizer(), describe(tmp_path / "yaml", name, rows, SPLIT[name]), name)
    assert_same(found.scores, numbers(reference, name))
    assert found.scores.primary == {"hellaswag": "acc_norm"}.get(name, "acc")
    assert found.scores.count("acc") == len(BY_NAME[name])
    assert len(found.samples) == len(BY_NAME[name])
    if name != "truthfulqa_mc2":
        column = found.scores.column(found.scores.primary)
        assert [sample.right for sample in found.samples] == [bool(value) for value in column]
        assert all(sample.right == (sample.answer == sample.reference) for sample in found.samples)


def test_the_calibration_of_choices_is_the_binned_gap(place):
    found = outcome(run(place, {"task": "commonsense_qa", "data": str(place / "commonsense_qa.jsonl")}))
    (series,) = found.series
    gaps = np.abs(np.array(series.y) - np.array(series.x))
    assert series.kind == "calibration"
    assert found.scores.estimate("choice_calibration_error").value <= gaps.max() + 1e-12
    by_bins = sum(abs(found.scores.column(f"calibration {number}").sum()) for number in range(15)) / len(COMMONSENSE)
    assert found.scores.estimate("choice_calibration_error").value == pytest.approx(by_bins)
    # All gaps added without their absolute value: accuracy less mean confidence.
    total = sum(found.scores.column(f"calibration {number}").sum() for number in range(10))
    assert -1 < total / len(COMMONSENSE) - found.scores.estimate("acc").value < 0


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_s_number_is_weighted_as_the_harness_weights(place, tmp_path, by_size):
    folder = tmp_path / "group"
    folder.mkdir()
    rows = write_rows(tmp_path / "mixed.jsonl", [row | {"subject": "odd" if number % 3 else "even"} for number, row in enumerate(ROWS)])
    apart = {
        subject: write_rows(
            tmp_path / f"{subject}.jsonl",
            [json.loads(line) for line in rows.read_text().splitlines() if json.loads(line)["subject"] == subject],
        )
        for subject in ("odd", "even")
    }
    head = LOCAL["choices"].split("  - {metric: brier")[0]
    for subject in ("odd", "even"):
        text = f"task: mine_{subject}\ndataset_path: nowhere/rows\ndataset_name: {subject}\ntest_split: test\n{head}"
        (folder / f"{subject}.yaml").write_text(text, encoding="utf-8")
    said = f"group: mine\ntask: [mine_odd, mine_even]\naggregate_metric_list: [{{metric: acc, weight_by_size: {str(by_size).lower()}}}]\n"
    (folder / "mine.yaml").write_text(said, encoding="utf-8")
    found = outcome(run(place, {"task": str(folder / "mine.yaml"), "data": str(rows)}))
    for subject, file in apart.items():
        text = (
            (folder / f"{subject}.yaml")
            .read_text()
            .replace("nowhere/rows", "json")
            .replace(f"dataset_name: {subject}", "dataset_name: null")
        )
        (folder / f"{subject}.yaml").write_text(text + f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n", encoding="utf-8")
    reference = ask_harness(tiny_llama(0), tiny_tokenizer(), folder, "mine")
    assert found.scores.estimate("acc").value == pytest.approx(numbers(reference, "mine")["acc,none"], rel=1e-12)
    assert len(found.scores.items) == len(ROWS)
    assert {item.partition(":")[0] for item in found.scores.items} == {"mine_odd", "mine_even"}
    assert found.scores.is_yes_or_no("acc") == by_size


def test_examples_come_from_their_own_split_and_a_chat_template_wraps_them(place, tmp_path):
    test, train = write_rows(tmp_path / "test.jsonl", GSM8K[:3]), write_rows(tmp_path / "train.jsonl", GSM8K[3:])
    task = {"task": "gsm8k", "data": {"test": str(test), "train": str(train)}, "few_shot": 2, "limit": 2}
    plain, chat = (outcome(run(place, task | {"chat_template": template})) for template in (False, True))
    assert plain.scores.primary == "exact_match_strict-match"
    assert len(plain.samples) == 2
    for sample, question in zip(plain.samples, GSM8K, strict=False):
        assert sample.prompt.count("####") == 2
        assert sample.prompt.endswith(f"Question: {question['question']}\nAnswer:")
        assert all(row["question"] not in sample.prompt for row in GSM8K[:3] if row is not question)
    assert chat.samples[0].prompt.count("<|im_start|>assistant") == 3


def test_the_same_questions_are_known_by_their_content(place, tmp_path):
    from potstill.evaluation.config import MeasuringConfig
    from potstill.evaluation.tasks import make_tasks
    from potstill.models.config import LoadingConfig

    def identity(rows, **changes):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        task = {"kind": "harness", "task": "hellaswag", "data": str(write_rows(file, rows)), **changes}
        (made,) = make_tasks(MeasuringConfig.model_validate({"tasks": [task]}).tasks)
        return json.dumps(made.prepare(LoadingConfig(path=str(place / "model")), None).identity, sort_keys=True)

    first = identity(HELLASWAG)
    assert identity(HELLASWAG) == first
    assert str(tmp_path) not in first
    changed = [HELLASWAG[0] | {"label": "3"}, *HELLASWAG[1:]]
    assert len({first, identity(changed), identity(HELLASWAG, limit=3), identity(HELLASWAG, chat_template=True)}) == 4


def test_a_result_is_found_again_and_every_request_moves_the_bar(place, tmp_path, monkeypatch, capfd):
    from potstill.evaluation.harness.task import HarnessExam

    moved = []
    measure = HarnessExam.measure

    def counted(self, subject, teacher, advance):
        result = measure(self, subject, teacher, lambda count: (moved.append(count), advance(count)))
        assert sum(moved) == self.size
        return result

    monkeypatch.setattr(HarnessExam, "measure", counted)
    task, store = {"task": "hellaswag", "data": str(place / "hellaswag.jsonl")}, str(tmp_path / "kept")
    first = run(place, task, store=store)
    assert sum(moved) == 4 * len(HELLASWAG)
    shown = capfd.readouterr()
    assert "requests" not in shown.err + shown.out
    monkeypatch.setattr("potstill.evaluation.evaluate.load_model", None)
    assert run(place, task, store=store).to_json() == first.to_json()


def test_two_models_are_compared_question_by_question(place):
    record = run(place, {"task": "hellaswag", "data": str(place / "hellaswag.jsonl")}, models=("model", "other")).to_json()
    (primary,) = [pair for pair in record["comparisons"] if pair["family"] == "primary"]
    assert primary["metric"] == "hellaswag/acc_norm"
    assert primary["method"].startswith("McNemar")
    assert len([entry for entry in record["samples"] if len(entry["answers"]) == 2]) == len(HELLASWAG)


def test_what_was_forgotten_stands_beside_what_was_gained(place):
    tasks = [{"task": "commonsense_qa", "data": str(place / "commonsense_qa.jsonl")},
             {"task": "hellaswag", "data": str(place / "hellaswag.jsonl"), "role": "off_target"}]  # fmt: skip
    record = run(place, *tasks, models=("model", "other"), before="model", baseline="other").to_json()
    assert record["before"] == "model"
    assert {task["name"]: task["role"] for task in record["tasks"]} == {"commonsense_qa": "target", "hellaswag": "off_target"}
    pairs = {(pair["task"], pair["first"], pair["second"]) for pair in record["comparisons"] if pair["family"] == "primary, since before"}
    assert {pair[0] for pair in pairs} == {"commonsense_qa", "hellaswag"}
    assert all({first, second} == {"model", "other"} for _, first, second in pairs)


def test_long_questions_are_said_to_be_cut(place, tmp_path):
    rows = write_rows(tmp_path / "long.jsonl", [TRUTHFUL[0] | {"question": "very " * 300}, TRUTHFUL[1] | {"question": "why " * 300}])
    found = outcome(run(place, {"task": "truthfulqa_mc2", "data": str(rows)}))
    assert any("8 requests were longer than the model reads" in warning for warning in found.warnings)


def test_choices_are_calibrated_over_the_bins_of_every_other_calibration_error():
    """Fifteen equal bins, each with its right edge: by hand, and as `expected_calibration_error` has it."""
    import torch

    from potstill.evaluation.agreement import expected_calibration_error
    from potstill.evaluation.harness.choices import Choice, add_calibration
    from potstill.evaluation.harness.scoring import Table

    sure = [0.6, 0.65, 2 / 3, 0.7, 0.95, 0.97, 1.0]
    right = [1, 0, 1, 1, 0, 1, 1]
    with np.errstate(divide="ignore"):
        choices = [Choice(["a", "b"], np.log([1 - p, p]), frozenset({one})) for p, one in zip(sure, right, strict=True)]
    table = Table([])
    assert add_calibration(table, choices) is not None
    # 0.6 ends the ninth bin and 2/3 the tenth; 14/15 lies below 0.95.
    by_hand = (abs(1 - 0.6) + abs(1 - 0.65 - 2 / 3) + abs(1 - 0.7) + abs(2 - 0.95 - 0.97 - 1.0)) / 7
    assert table.value("choice_calibration_error") == pytest.approx(by_hand)
    assert by_hand == pytest.approx(expected_calibration_error(torch.tensor(sure, dtype=torch.float64), torch.tensor(right)))

"""What cannot be asked of the harness is said in one line before any weights are read; nothing of a hub is run."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

from harness_rows import COMMONSENSE, GSM8K, HELLASWAG, TRUTHFUL, write_rows
from potstill.errors import PotstillError
from potstill.evaluation.config import MeasuringConfig
from potstill.evaluation.harness import catalogue
from potstill.evaluation.harness.quiet import quietly
from potstill.evaluation.tasks import make_tasks
from potstill.models.config import LoadingConfig
from tiny import save_pair, tiny_tokenizer

MINE = (
    'task: mine\ndataset_path: nowhere/rows\ntest_split: test\noutput_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    save_pair(folder / "model", 0)
    for name, rows in (("hellaswag", HELLASWAG), ("commonsense", COMMONSENSE), ("truthful", TRUTHFUL), ("gsm8k", GSM8K)):
        write_rows(folder / f"{name}.jsonl", rows)
    write_rows(folder / "gaps.jsonl", [COMMONSENSE[0], {key: value for key, value in COMMONSENSE[1].items() if key != "question"}])
    write_rows(folder / "flat.jsonl", [row | {"choices": ["a", "b", "c", "d", "e"]} for row in COMMONSENSE])
    write_rows(folder / "renamed.jsonl", [{("key" if key == "answerKey" else key): row[key] for key in row} for row in COMMONSENSE])
    write_rows(folder / "wrong.jsonl", [*COMMONSENSE[:3], COMMONSENSE[3] | {"answerKey": "F"}])
    write_rows(folder / "qa.jsonl", [{"q": "a", "a": "b"}])
    (folder / "broken.jsonl").write_text('{"question": \n', encoding="utf-8")
    (folder / "mine.yaml").write_text(MINE, encoding="utf-8")
    (folder / "hub-metric.yaml").write_text(MINE + "metric_list: [{metric: bertscore_of_the_hub}]\n", encoding="utf-8")
    (folder / "code.yaml").write_text(MINE + "unsafe_code: true\n", encoding="utf-8")
    (folder / "no-questions.yaml").write_text(MINE.replace("test_split: test\n", ""), encoding="utf-8")
    (folder / "other.yaml").write_text("training: {steps: 1}\n", encoding="utf-8")
    (folder / "long.yaml").write_text(MINE + "generation_kwargs: {until: ['x'], max_gen_toks: 512}\n", encoding="utf-8")
    return folder


def prepare(place, **task):
    for key in ("data", "task"):
        if isinstance(task.get(key), str) and task[key].endswith((".jsonl", ".yaml")):
            task[key] = str(place / task[key])
    (made,) = make_tasks(MeasuringConfig.model_validate({"tasks": [{"kind": "harness", **task}]}).tasks)
    return made.prepare(LoadingConfig(path=str(place / "model")), None)


REFUSED = {
    "no such task": ({"task": "helaswag"}, "did you mean hellaswag"),
    "a list of tasks": ({"task": "truthfulqa"}, "name one of them: truthfulqa_gen, truthfulqa_mc1, truthfulqa_mc2"),
    "no such file": ({"task": "absent.yaml"}, "absent.yaml: no such file"),
    "another kind of file": ({"task": "other.yaml"}, "other.yaml: describes no task"),
    "no questions": ({"task": "no-questions.yaml", "data": "qa.jsonl"}, "names neither test_split nor validation_split"),
    "not on this machine": ({"task": "hellaswag"}, r"Rowan/hellaswag is not on this machine.*--task hellaswag=rows.jsonl"),
    "no rows": ({"task": "hellaswag", "data": "absent.jsonl"}, "absent.jsonl: no such file; the rows of hellaswag are"),
    "broken rows": ({"task": "hellaswag", "data": "broken.jsonl"}, "broken.jsonl:1: .*; mend it$"),
    "a column that is used": ({"task": "hellaswag", "data": "commonsense.jsonl"},
                              "hellaswag needs the column 'ctx_a', and the rows have id, .*those of Rowan/hellaswag"),
    "a column of the text": ({"task": "truthfulqa_mc2", "data": "gsm8k.jsonl"}, "needs the column 'mc2_targets'"),
    "a column named alone": ({"task": "commonsense_qa", "data": "renamed.jsonl"}, "needs the column 'answerKey'"),
    "inside a column": ({"task": "commonsense_qa", "data": "flat.jsonl"}, "needs 'text' inside one of its columns"),
    "not in every row": ({"task": "commonsense_qa", "data": "gaps.jsonl"}, "gaps.jsonl:2: the column 'question' is in some rows"),
    "no right answer": ({"task": "commonsense_qa", "data": "wrong.jsonl"}, "question 4: the right answer 'F' is none of its 5 choices"),
    "no examples": ({"task": "gsm8k", "data": "gsm8k.jsonl"}, "asks with 5 solved examples, which are its split train: give them too"),
    "fixed examples": ({"task": "truthfulqa_mc2", "data": "truthful.jsonl", "few_shot": 2}, "few_shot: the task is defined without"),
    "no such split": ({"task": "hellaswag", "data": {"test": "a.jsonl"}}, "the questions are the split validation, which is not"),
    "one split too many": ({"task": "gsm8k", "few_shot": 0, "data": {"test": "a.jsonl", "dev": "b.jsonl"}},
                           "gsm8k reads no split dev; it reads test, train"),
    "whose rows": ({"task": "mmlu", "data": "truthful.jsonl"}, "name it in a column subset or subject"),
    "code of a model": ({"task": "humaneval"}, "runs the code that a model writes"),
    "code of a model in a file": ({"task": "code.yaml", "data": "qa.jsonl"}, "runs the code that a model writes"),
    "code of the hub": ({"task": "hub-metric.yaml", "data": "qa.jsonl"}, "its metric 'bertscore_of_the_hub' would be code downloaded"),
    "no such metric": ({"task": "commonsense_qa", "data": "commonsense.jsonl", "metric": "f1"}, "metric: 'f1' is none of it"),
    "answers too long": ({"task": "long.yaml", "data": "qa.jsonl"}, "reads 512 tokens, and long lets a model write 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_weights_are_read(place, case):
    task, message = REFUSED[case]
    with pytest.raises(PotstillError, match=message) as caught:
        prepare(place, **task)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_more_examples_than_there_are(place):
    with pytest.raises(PotstillError, match="few_shot"):
        prepare(place, task="gsm8k", few_shot=9, data={"test": str(place / "gsm8k.jsonl"), "train": str(place / "gsm8k.jsonl")})


def test_a_tokenizer_without_a_chat_template(place, tmp_path):
    save_pair(tmp_path / "plain", 0)
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    task = {"kind": "harness", "task": "hellaswag", "data": str(place / "hellaswag.jsonl"), "chat_template": True}
    (made,) = make_tasks(MeasuringConfig.model_validate({"tasks": [task]}).tasks)
    with pytest.raises(PotstillError, match="has no chat template"):
        made.prepare(LoadingConfig(path=str(tmp_path / "plain")), None)


def test_without_the_harness_one_line_says_what_to_install(place, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(catalogue, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(PotstillError, match=r"pip install 'potstill\[eval\]'"):
        prepare(place, task="hellaswag")


def test_a_group_is_found_whole_without_the_harness_s_index_of_all_tasks():
    found = catalogue.find("mmlu", None)
    assert len(found.tasks) == 57
    assert set(found.groups) == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}


def test_code_of_the_hub_is_refused_while_the_harness_works_and_no_longer():
    evaluate = pytest.importorskip("evaluate")
    before = evaluate.load
    with quietly(), pytest.raises(PotstillError, match=r"run code of the hub \(evaluate.load\('rouge'\)\)"):
        evaluate.load("rouge")
    assert evaluate.load is before
    assert before.__module__.startswith("evaluate")  # tests before this one left nothing behind


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet", "jsonl.gz"])
def test_rows_in_every_kind_of_file_are_the_same_questions(place, tmp_path, suffix):
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows, file = [{"q": f"Ask {number}", "a": "2020-01-02"} for number in range(3)], tmp_path / f"rows.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == "csv":
        file.write_text("q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in rows), encoding="utf-8")
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    short = MINE + "generation_kwargs: {until: ['x'], max_gen_toks: 4}\n"
    (tmp_path / "short.yaml").write_text(short, encoding="utf-8")
    write_rows(tmp_path / "plain.jsonl", rows)
    exam, same = (prepare(place, task=str(tmp_path / "short.yaml"), data=str(one)) for one in (file, tmp_path / "plain.jsonl"))
    assert exam.identity == same.identity
    assert exam.size == 3


def test_the_command_line_from_a_plan_a_name_and_a_file_to_a_record(place, tmp_path):
    save_pair(tmp_path / "after", 1)
    known = {"kind": "harness", "task": "commonsense_qa", "data": str(place / "commonsense.jsonl"), "role": "off_target"}
    plan = {
        "models": {"before": str(place / "model"), "after": str(tmp_path / "after")},
        "before": "before",
        "device": "cpu",
        "tasks": [known],
    }
    (tmp_path / "plan.yaml").write_text(json.dumps(plan), encoding="utf-8")
    asked = ["--plan", "plan.yaml", "--task", f"hellaswag={place / 'hellaswag.jsonl'}", "--output", "record.json"]
    done = subprocess.run(
        [sys.executable, "-m", "potstill", "evaluate", *asked], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert [(task["name"], task["role"]) for task in written["tasks"]] == [("commonsense_qa", "off_target"), ("hellaswag", "target")]
    primary = {pair["metric"]: (pair["first"], pair["second"]) for pair in written["comparisons"] if pair["family"] == "primary"}
    assert primary == dict.fromkeys(("commonsense_qa/acc", "hellaswag/acc_norm"), ("after", "before"))
    assert "it/s" not in done.stderr


def test_each_task_of_a_group_may_have_a_file_of_its_own(place, tmp_path):
    for number, subset in enumerate(("odd", "even")):
        text = MINE.replace("task: mine", f"task: mine_{subset}") + f"dataset_name: {subset}\ngeneration_kwargs: {{max_gen_toks: 4}}\n"
        (tmp_path / f"{subset}.yaml").write_text(text, encoding="utf-8")
        write_rows(tmp_path / f"{subset}.jsonl", [{"q": f"{subset} {row}", "a": "b"} for row in range(3 + number)])
    group = tmp_path / "group.yaml"
    group.write_text("group: mine\ntask: [mine_odd, mine_even]\naggregate_metric_list: [{metric: exact_match}]\n", encoding="utf-8")
    assert prepare(place, task=str(group), data=str(tmp_path / "{subset}.jsonl")).size == 3 + 4
    (tmp_path / "even.jsonl").unlink()
    with pytest.raises(PotstillError, match=r"even\.jsonl: no such file"):
        prepare(place, task=str(group), data=str(tmp_path / "{subset}.jsonl"))

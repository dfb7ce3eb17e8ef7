"""Results are found again for the same question alone: models that share their weights and differ in what they read or where they stop do
not share a result, and neither do machines that count differently.
"""

import json
import shutil

import pytest

from harness_rows import write_rows
from potstill.evaluation import evaluate as module
from potstill.evaluation.config import EvaluationConfig
from potstill.evaluation.evaluate import _prepare
from potstill.evaluation.judging.kept_lines import KeptLines
from potstill.evaluation.judging.prompts import JudgedPrompt
from potstill.evaluation.judging.settings import WritingConfig
from potstill.evaluation.judging.writing import Author
from potstill.evaluation.store import key_of
from potstill.evaluation.tasks import make_tasks
from potstill.models.config import LoadingConfig
from tiny import CHATML, save_pair


def change(folder, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CHANGES = {
    "template": lambda folder: (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|>the ")),
    "tokenizer's end": lambda folder: change(folder, "tokenizer_config.json", eos_token="<|im_start|>"),
    "configured end": lambda folder: change(folder, "config.json", eos_token_id=9),
    "saved end": lambda folder: change(folder, "generation_config.json", eos_token_id=[2, 9]),
}
WRITING = ("questions", "samples", "own_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("identity")
    save_pair(place / "teacher", 1)
    save_pair(place / "plain")
    for name, put in CHANGES.items():
        shutil.copytree(place / "plain", place / name)
        put(place / name)
    rows = [{"instruction": f"Say {n}", "input": "", "output": "It is 7."} for n in range(4)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def key(folder, task: dict, model: str, device: str = "cpu", teacher: dict | None = None, **more) -> str:
    config = EvaluationConfig.model_validate({
        "models": {"m": [{"path": str(folder / model), **more}]}, "tasks": [task], "store": None,
        "teacher": {"path": str(folder / "teacher")} | (teacher or {}),
    })  # fmt: skip
    sittings = _prepare(config, make_tasks(config.tasks), device, "float32")
    return key_of(next(one for one in sittings if one.row == "m").statement)


def rows_task(folder, kind: str) -> dict:
    data = {"train": str(folder / "rows.jsonl"), "max_tokens": 300}
    return {"kind": kind, "data": data} | ({"max_new_tokens": 12} if kind in ("questions", "samples", "speculation") else {})


# A student with another end reads other tokens than its teacher, and is refused where it must read the same.
REFUSED = ("own_text", "tokenizer's end")


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind in (*WRITING, "text") for change in CHANGES if (kind, change) != REFUSED]
)
def test_models_of_the_same_weights_that_read_or_stop_otherwise_share_no_result(folder, kind, change):
    task = rows_task(folder, kind) | ({"sampling": {"max_new_tokens": 12}} if kind == "own_text" else {})
    if kind == "text" and change.endswith(("configured end", "saved end")):
        assert key(folder, task, "plain") == key(folder, task, change), "nothing is written, and the text is the same"
        return
    assert key(folder, task, "plain") != key(folder, task, change)


@pytest.mark.parametrize("change", ["tokenizer's end", "configured end", "saved end"])
def test_the_harness_lets_a_model_write_with_its_own_settings(folder, change, tmp_path):
    rows = write_rows(tmp_path / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}] * 3)
    task = {"kind": "harness", "task": "gsm8k", "data": str(rows), "few_shot": 0}
    assert key(folder, task, "plain") != key(folder, task, change)


@pytest.mark.parametrize("change", CHANGES)
def test_kept_answers_to_a_judge_are_their_writers_own(folder, change, tmp_path):
    def author(name: str) -> Author:
        kept = KeptLines(tmp_path / "answers.jsonl")
        return Author(name, LoadingConfig(path=str(folder / name)), WritingConfig(), kept, device="cpu", precision="float32")

    prompt = JudgedPrompt("1", "", ("Say 1",))
    assert author("plain")._key(prompt, 0) == author("plain")._key(prompt, 0)
    assert author("plain")._key(prompt, 0) != author(change)._key(prompt, 0)


def test_how_and_where_both_models_compute_is_part_of_a_result(folder, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    task = rows_task(folder, "text")
    asked = [
        key(folder, task, "plain"), key(folder, task, "plain", "cuda"), key(folder, task, "plain", dtype="bfloat16"),
        key(folder, task, "plain", attention="eager"), key(folder, task, "plain", teacher={"dtype": "bfloat16"}),
        key(folder, task, "plain", teacher={"attention": "eager"}),
    ]  # fmt: skip
    assert len(set(asked)) == len(asked)

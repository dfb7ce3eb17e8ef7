"""A text as a task: items that a person finds, pictures that equal what the rows say, and one reading for models that read alike."""

import json
import math

import numpy as np
import pytest
import torch

from potstill.batch import Example
from potstill.data.collation import collate
from potstill.evaluation import text_task
from potstill.evaluation.agreement import log_probs, measure_documents
from potstill.evaluation.by_position import ByPosition
from potstill.evaluation.items import item_names
from potstill.evaluation.metrics import COLUMN, NUM_COLUMNS
from potstill.evaluation.task import Subject
from potstill.evaluation.task_config import TextTaskConfig
from potstill.evaluation.text_task import TextTask, calibration_series
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from tiny import CHATML, save_pair, tiny_llama, tiny_tokenizer

VOCABULARY = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    for seed, name in enumerate(("student", "twin", "teacher")):
        save_pair(place / name, seed)
    turns = (("user", "Add {0} and {0}."), ("assistant", "The answer is {1}. "), ("user", "Again?"), ("assistant", "Yes."))
    rows = [{"messages": [{"role": role, "content": said.format(n, 2 * n) * (n + 1)} for role, said in turns]} for n in range(5)]
    (place / "chats.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "long.jsonl").write_text(json.dumps({"text": "The quick brown fox. " * 20}) + "\n", encoding="utf-8")
    return place


def task(folder, name="chats.jsonl", format="chat", max_tokens=512) -> TextTask:
    return TextTask(TextTaskConfig.model_validate({"data": {"train": str(folder / name), "format": format, "max_tokens": max_tokens}}))


def subject(folder, name: str) -> Subject:
    config = LoadingConfig(path=str(folder / name))
    model = CausalLM(tiny_llama({"student": 0, "twin": 1, "teacher": 2}[name]), VOCABULARY)
    with torch.no_grad():
        model.model.lm_head.weight.mul_(12.0)
    return Subject(name, config, model, tiny_tokenizer(), 2)


def measured(folder, task: TextTask, *, teacher=True):
    student, other = subject(folder, "student"), subject(folder, "teacher")
    exam = task.prepare(student.config, other.config if teacher else None)
    return exam, exam.measure(student, other if teacher else None, lambda count: None)


def rows_of(exam, folder):
    """(item, place in its answer, student's and teacher's float64 probabilities, target) of every row, one whole document at a time."""
    models = [subject(folder, name).model for name in ("student", "teacher")]
    names = item_names([example.origin for example in exam.data.train])
    for example in exam.data.train:
        tokens = torch.tensor([example.tokens])
        student, teacher = (torch.softmax(model.model(input_ids=tokens).logits[0].double(), -1).detach().numpy() for model in models)
        place = 0
        for position in range(1, len(example.tokens)):
            place = place + 1 if example.is_target[position] else 0
            if place:
                yield names[example.index], place, student[position - 1], teacher[position - 1], example.tokens[position]


def test_items_are_named_so_that_a_person_finds_them(folder):
    exam, outcome = measured(folder, task(folder))
    # The first line is blank.
    assert outcome.scores.items == tuple(f"chats.jsonl:{line}" for line in range(2, 7))
    counts = dict.fromkeys(outcome.scores.items, 0)
    for item, *_ in rows_of(exam, folder):
        counts[item] += 1
    np.testing.assert_array_equal(outcome.scores.column("targets"), list(counts.values()))


@pytest.mark.parametrize(
    ("origins", "names"),
    [
        (["/a/b/rows.jsonl:1", "/a/b/rows.jsonl:12"], ["rows.jsonl:1", "rows.jsonl:12"]),
        (["/a/x/rows.jsonl:1", "/a/y/rows.jsonl:1", "/a/y/rows.jsonl:1"], ["x/rows.jsonl:1", "y/rows.jsonl:1", "y/rows.jsonl:1"]),
        (["org/set:4", "rows.jsonl:4", "/deep/rows.jsonl:4"], ["org/set:4", "rows.jsonl:4", "deep/rows.jsonl:4"]),
        ([], []),
    ],
)
def test_as_much_of_a_path_as_tells_files_apart(origins, names):
    assert item_names(origins) == names


def test_a_document_in_windows_is_one_item_and_a_row_drawn_twice_too(folder):
    exam, outcome = measured(folder, task(folder, "long.jsonl", "text", max_tokens=32))
    assert len(exam.windows) > 3
    assert outcome.scores.items == ("long.jsonl:1",)
    twice = [Example([5, 6, 7, 8], [False, True, True, True], number) for number in range(3)]
    model = subject(folder, "student").model
    found = measure_documents(model, [collate([[one] for one in twice], pad_token=0)], names={0: "a:1", 1: "b:1", 2: "a:1"})
    assert found.items == ("a:1", "b:1")
    assert found.column("targets").tolist() == [6, 3]


def test_the_pictures_by_place_equal_the_rows(folder):
    exam, outcome = measured(folder, task(folder))
    pictures = {series.label: series for series in outcome.series if series.kind == "by_position"}
    assert set(pictures) == {"forward KL", "entropy", "cross-entropy", "top-1 agreement"}
    rows = list(rows_of(exam, folder))
    held = sorted({math.floor(math.log2(place)) for _, place, *_ in rows})
    assert len(held) > 4
    expected = {
        "forward KL": lambda p, q, y: (q * np.log(q / p)).sum(), "entropy": lambda p, q, y: -(p * np.log(p)).sum(),
        "cross-entropy": lambda p, q, y: -np.log(p[y]), "top-1 agreement": lambda p, q, y: float(p.argmax() == q.argmax()),
    }  # fmt: skip
    for label, value in expected.items():
        assert pictures[label].x == tuple((2**bucket + 2 ** (bucket + 1) - 1) / 2 for bucket in held)
        for bucket, found in zip(held, pictures[label].y, strict=True):
            inside = [value(p, q, y) for _, place, p, q, y in rows if 2**bucket <= place < 2 ** (bucket + 1)]
            assert found == pytest.approx(np.mean(inside), rel=1e-4), (label, bucket)


def test_an_answer_that_goes_on_in_the_next_window_keeps_its_places(folder):
    long = task(folder, "long.jsonl", "text", max_tokens=32)
    exam, outcome = measured(folder, long)
    (picture,) = [series for series in outcome.series if series.label == "entropy"]
    # Places run on to the end of the text: as many buckets as its length has, not as a window has.
    assert len(picture.x) == math.floor(math.log2(exam.size)) + 1 > 6
    tally = ByPosition(exam.before)
    measure_documents(subject(folder, "student").model, exam.batches(1), by_position=tally)
    counts = tally.sums[:, COLUMN["targets"]]
    assert counts[: len(picture.x) - 1].tolist() == [2**bucket for bucket in range(len(picture.x) - 1)]
    assert tally.sums.shape[1] == NUM_COLUMNS


def test_calibration_is_that_of_scikit_learn_and_adds_up_to_the_error(folder):
    calibration = pytest.importorskip("sklearn.calibration")
    exam, outcome = measured(folder, task(folder))
    model = subject(folder, "student").model
    confidence, correct = [], []
    for batch in exam.batches(3):
        rows, head = model(batch)
        probability, choice = log_probs(head, rows, VOCABULARY).exp().max(dim=-1)
        confidence.append(probability.detach().numpy())
        correct.append((choice == batch.target_rows()[1]).numpy())
    confidence, correct = np.concatenate(confidence), np.concatenate(correct)
    accuracy, mean_confidence = calibration.calibration_curve(correct, confidence, n_bins=15)
    curve, counts = calibration_series(outcome.scores)
    np.testing.assert_allclose(curve.x, mean_confidence, rtol=1e-5)
    np.testing.assert_allclose(curve.y, accuracy, rtol=1e-5, atol=1e-6)
    assert sum(counts.y) == len(correct)
    gaps = np.abs(np.subtract(curve.y, curve.x)) @ np.array(counts.y) / len(correct)
    assert outcome.scores.estimate("expected_calibration_error").value == pytest.approx(gaps, rel=1e-5)
    assert outcome.series[:2] == (curve, counts)


def test_without_a_teacher_there_is_no_picture_of_it(folder):
    _, outcome = measured(folder, task(folder), teacher=False)
    assert {series.label for series in outcome.series if series.kind == "by_position"} == {"entropy", "cross-entropy"}


def test_models_that_read_alike_share_one_reading(folder, monkeypatch):
    made, prepare = [], text_task.prepare
    monkeypatch.setattr(text_task, "prepare", lambda *args, **kwargs: made.append(1) or prepare(*args, **kwargs))
    chats = task(folder)
    exams = [chats.prepare(LoadingConfig(path=str(folder / name)), None) for name in ("student", "twin")]
    assert len(made) == 1
    assert exams[0].identity == exams[1].identity
    # Another template of the same tokenizer is another text.
    template = CHATML.replace("<|im_start|>", "<|im_start|> ")
    other = chats.prepare(LoadingConfig(path=str(folder / "twin"), chat_template=template), None)
    assert len(made) == 2
    assert other.identity != exams[0].identity


def test_a_file_of_another_name_is_measured_anew_and_one_elsewhere_is_not(folder, tmp_path):
    model = LoadingConfig(path=str(folder / "student"))
    text = (folder / "chats.jsonl").read_text(encoding="utf-8")
    identities = []
    for name in ("chats.jsonl", "others.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        identities.append(task(tmp_path, name).prepare(model, None).identity)
    assert identities[0] == task(folder).prepare(model, None).identity != identities[1]

"""Models down, tasks across: what is measured once, what is measured again, and who is compared with whom."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from potstill.errors import ModelError
from potstill.evaluation import evaluate as module
from potstill.evaluation.config import EvaluationConfig
from potstill.evaluation.evaluate import evaluate
from tiny import save_pair

ROWS = ["The quick brown fox jumps.", "Add 12 and 30: the answer is 42.", "Ünïcödé, 漢字", "user assistant system", "one more"]


@pytest.fixture
def place(tmp_path):
    for seed, name in enumerate(("teacher", "sft-0", "sft-1", "kd-0", "kd-1", "before")):
        save_pair(tmp_path / name, seed)
    for name in ("near", "far"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


def request(place, models: dict[str, list[str]], **changes) -> EvaluationConfig:
    """A table of two texts; `models` names folders in `place`."""
    values = {
        "models": {name: [{"path": str(place / one)} for one in seeds] for name, seeds in models.items()},
        "tasks": [
            {"kind": "text", "data": {"train": str(place / "near.jsonl"), "format": "text"}},
            {"kind": "text", "data": {"train": str(place / "far.jsonl"), "format": "text"}, "role": "off_target"},
        ],
        "device": "cpu", "store": str(place / "evaluations"),
    }  # fmt: skip
    return EvaluationConfig.model_validate(values | changes)


@pytest.fixture
def loads(monkeypatch):
    """The paths of models whose weights were loaded."""
    seen = []
    real = module.load_model

    def load(config, **arguments):
        seen.append(config.path.rpartition("/")[2])
        return real(config, **arguments)

    monkeypatch.setattr(module, "load_model", load)
    return seen


SEEDS = {"sft": ["sft-0", "sft-1"], "kd": ["kd-0", "kd-1"]}


def test_seeds_are_one_row_the_first_is_the_baseline_and_the_teacher_has_a_row(place, loads):
    record = evaluate(request(place, SEEDS, teacher={"path": str(place / "teacher")}), quiet=True).to_json()
    assert [(model["name"], model["num_seeds"], model["is_teacher"]) for model in record["models"]] == [
        ("sft", 2, False), ("kd", 2, False), ("teacher", 1, True),
    ]  # fmt: skip
    assert {(pair["first"], pair["second"]) for pair in record["comparisons"]} == {("kd", "sft")}
    assert record["baseline"] == "sft"
    assert "near/forward_kl" in record["models"][0]["metrics"]
    assert "near/forward_kl" not in record["models"][2]["metrics"], "a teacher has no distance from itself"
    assert [(task["name"], task["role"], task["primary"]) for task in record["tasks"]] == [
        ("near", "target", "near/bits_per_byte"), ("far", "off_target", "far/bits_per_byte"),
    ]  # fmt: skip
    assert sorted(loads) == ["kd-0", "kd-1", "sft-0", "sft-1", "teacher"], "each once, the teacher too"


def test_the_mean_over_seeds_is_that_of_the_seeds_alone(place):
    joined = evaluate(request(place, SEEDS), quiet=True).to_json()
    alone = evaluate(request(place, {name: [name] for name in ("kd-0", "kd-1")}), quiet=True).to_json()
    values = [model["metrics"]["near/cross_entropy"]["value"] for model in alone["models"]]
    assert joined["models"][1]["metrics"]["near/cross_entropy"]["value"] == pytest.approx(sum(values) / 2, rel=1e-12)


def test_what_was_measured_is_found_again_wherever_it_lies(place, loads):
    first = evaluate(request(place, SEEDS), quiet=True).to_json()
    shutil.copytree(place / "kd-0", place / "elsewhere" / "copy")
    shutil.copy(place / "near.jsonl", place / "elsewhere" / "near.jsonl")
    loads.clear()
    text = {"train": str(place / "elsewhere" / "near.jsonl"), "format": "text"}
    other = {"kind": "text", "data": {"train": str(place / "far.jsonl"), "format": "text"}, "role": "off_target"}
    tasks = [{"kind": "text", "data": text}, other]
    moved = request(place, {"sft": ["sft-0", "sft-1"], "kd": ["elsewhere/copy", "kd-1"]}, tasks=tasks)
    again = evaluate(moved, quiet=True).to_json()
    assert loads == []
    assert again["comparisons"] == first["comparisons"]
    assert again["models"] == first["models"]


@pytest.mark.parametrize("change", ["text", "weights", "precision", "teacher"])
def test_what_changed_is_measured_again(place, loads, change):
    evaluate(request(place, {"kd": ["kd-0"]}), quiet=True)
    loads.clear()
    changes = {}
    if change == "text":
        (place / "near.jsonl").write_text(json.dumps({"text": "something else"}) + "\n", encoding="utf-8")
    elif change == "weights":
        save_pair(place / "kd-0", 17)
    elif change == "precision":
        changes = {"precision": "bf16"}
    else:
        changes = {"teacher": {"path": str(place / "teacher")}}
    evaluate(request(place, {"kd": ["kd-0"]}, **changes), quiet=True)
    assert "kd-0" in loads


def test_a_damaged_result_is_measured_again(place, loads, caplog):
    first = evaluate(request(place, {"kd": ["kd-0"]}), quiet=True).to_json()
    (victim,) = (place / "evaluations" / "near").glob("*/result.json")
    victim.write_bytes(victim.read_bytes().replace(b"0.", b"1.", 1))
    loads.clear()
    with caplog.at_level("WARNING", "potstill"):
        assert evaluate(request(place, {"kd": ["kd-0"]}), quiet=True).to_json()["models"] == first["models"]
    assert loads == ["kd-0"]
    assert "measured again" in caplog.text


def test_a_result_that_is_there_survives_what_fails_after_it(place, loads, monkeypatch):
    from potstill.evaluation.text_task import TextExam

    real = TextExam.measure
    monkeypatch.setattr(TextExam, "measure", lambda self, *rest: real(self, *rest) if "near" in str(self.config) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(request(place, {"kd": ["kd-0"]}), quiet=True)
    assert len(list((place / "evaluations" / "near").glob("*/result.json"))) == 1


def test_before_and_baseline_choose_the_pairs(place):
    rows = {"before": ["before"], "sft": ["sft-0"], "kd": ["kd-0"]}
    record = evaluate(request(place, rows, baseline="sft", before="before"), quiet=True).to_json()
    pairs = {(pair["first"], pair["second"]) for pair in record["comparisons"]}
    assert pairs == {("kd", "sft"), ("sft", "before"), ("kd", "before")}
    assert record["before"] == "before"
    # What a student is compared with before training is another question, and makes the first one no harder to answer.
    sizes = {}
    for pair in record["comparisons"]:
        sizes.setdefault(pair["family"], set()).add((pair["second"], pair["family_size"]))
    assert sizes["primary"] == {("sft", 2)}
    assert sizes["primary, since before"] == {("before", 4)}
    assert set(sizes) == {"primary", "secondary", "primary, since before", "secondary, since before"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "gkd"}, "'gkd' is no model of the table"),
        ({"before": "x"}, "is no model"),
        ({"models": {"a": ["x"] * 2, "b": ["x"] * 3}}, "equally many"),
        ({"models": {"a": []}}, "names no model"),
        ({"tasks": []}, "at least 1"),
    ],
)
def test_a_request_that_makes_no_table_is_refused(place, changes, message):
    with pytest.raises(ValueError, match=message):
        request(place, **({"models": SEEDS} | changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_weight_that_is_no_number_is_refused_by_name(place, value):
    file = next((place / "kd-1").glob("*.safetensors"))
    weights = load_file(file)
    weights["model.norm.weight"][3] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"kd-1: its weight model\.norm\.weight is not finite everywhere"):
        evaluate(request(place, SEEDS), quiet=True)


def test_two_tasks_of_one_name_are_refused(place):
    task = request(place, SEEDS).tasks[0]
    with pytest.raises(ValueError, match=r"tasks\[1\]\.name: 'near' is tasks\[0\] already"):
        request(place, SEEDS, tasks=[task, task])

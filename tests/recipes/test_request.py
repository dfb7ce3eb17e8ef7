"""What is asked without a recipe: where the record of an evaluation goes."""

from pathlib import Path

import pytest

from potstill.errors import PotstillError, UsageError
from potstill.recipes.request import evaluation_request


@pytest.fixture
def place(tmp_path) -> Path:
    """A run folder, a teacher and rows, as far as can be seen without torch."""
    for model in ("run/student", "teachers/large"):
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "config.json").write_text("{}")
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("model", "teacher", "output", "goes_to"),
    [
        ("run", None, None, "run/evaluation/rows.json"),
        ("run", "teachers/large", None, "run/evaluation/rows-against-large.json"),
        ("run", None, "x.json", "x.json"),
        ("run/student", None, None, None),
    ],
)
def test_a_run_keeps_its_records_and_none_takes_the_place_of_another(place, monkeypatch, model, teacher, output, goes_to):
    monkeypatch.chdir(place)
    assert evaluation_request([model], ["rows.jsonl"], "instruct", teacher, output)[1] == goes_to


@pytest.mark.parametrize("output", [".", "records", "record.txt"])
def test_a_record_that_is_no_json_file_is_refused_before_torch_is_needed(place, monkeypatch, output):
    monkeypatch.chdir(place)
    with pytest.raises(UsageError, match=r"one JSON file; name it so, for instance .*\.json"):
        evaluation_request(["run"], ["rows.jsonl"], "instruct", None, output)


# ---------------------------------------------------------------- tables


def write_plan(place, text: str) -> str:
    (place / "plan.yaml").write_text(text)
    return "plan.yaml"


def test_models_are_rows_by_name_and_the_seeds_of_one_row_stand_together(place, monkeypatch):
    monkeypatch.chdir(place)
    config, output = evaluation_request(["run", "kd=run,teachers/large", "teachers/large"], ["rows.jsonl"], baseline="kd")
    assert {name: [one.path for one in seeds] for name, seeds in config.models.items()} == {
        "run": ["run/student"], "kd": ["run/student", "teachers/large"], "large": ["teachers/large"],
    }  # fmt: skip
    assert output == "run/evaluation/rows-beside-kd-beside-large.json"
    assert config.baseline == "kd"


def test_models_of_one_name_are_told_apart_by_their_paths(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "other" / "run").mkdir(parents=True)
    (place / "other" / "run" / "config.json").write_text("{}")
    config, _ = evaluation_request(["run", "other/run"], ["rows.jsonl"])
    assert list(config.models) == ["run", "other/run"]


def test_a_plan_holds_everything_and_the_command_line_stands_over_it(place, monkeypatch):
    monkeypatch.chdir(place)
    plan = write_plan(place, "models: {a: run, b: [run, teachers/large]}\nteacher: teachers/large\nbefore: a\n"
                      "tasks:\n  - {kind: text, name: held-out, data: {train: rows.jsonl, format: instruct}}\n")  # fmt: skip
    config, output = evaluation_request([], plan=plan, settings=["batch_size=3", "tasks.0.role=off_target"])
    assert (config.batch_size, config.tasks[0].role, config.before, output) == (3, "off_target", "a", None)
    assert [one.path for one in config.models["b"]] == ["run/student", "teachers/large"]
    assert config.teacher is not None
    more, _ = evaluation_request(["c=run"], ["rows.jsonl"], plan=plan, settings=["before=null"])
    assert list(more.models) == ["c"]
    assert [task.label for task in more.tasks] == ["held-out", "rows"]


@pytest.mark.parametrize(
    ("models", "data", "plan", "message"),
    [
        ([], ["rows.jsonl"], None, "no model to measure"),
        (["run"], [], None, "nothing to measure: name a text"),
        (["a=run", "a=run"], ["rows.jsonl"], None, "a: named twice"),
        (["run"], [], "tasks: 3\n", r"plan.yaml:1: tasks: a list of tasks.*found 3"),
        ([], ["rows.jsonl"], "models: [run]\n", r"plan.yaml:1: models: rows by name"),
        ([], [], "- 3\n", "a plan is a mapping"),
        (["run"], [], "tasks: [{kind: text, dat: {}}]\n", r"plan.yaml:1: tasks\[0\]\.dat: unknown key; did you mean data"),
        (["run"], [], "tasks: [{kind: txt}]\n", r"tasks\[0\]\.kind: must be one of text"),
        (["run", "a=run,./nowhere"], ["rows.jsonl"], None, r"models\.a\[1\]\.path: \./nowhere"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_its_key(place, monkeypatch, models, data, plan, message):
    monkeypatch.chdir(place)
    with pytest.raises(PotstillError, match=message):
        evaluation_request(models, data, plan=None if plan is None else write_plan(place, plan))


def test_a_missing_plan_is_named(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UsageError, match=r"nowhere.yaml: no such file; a plan is a YAML file"):
        evaluation_request(["run"], plan="nowhere.yaml")

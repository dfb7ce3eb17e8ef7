"""What is asked without a recipe: where the record of an evaluation goes."""

from pathlib import Path

import pytest

from potstill.errors import UsageError
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

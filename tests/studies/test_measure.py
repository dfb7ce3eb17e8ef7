"""What is measured of a study's cells: those that are there, each against its own twin."""

import pytest
import yaml

from potstill.evaluation.evaluate import _pairs
from potstill.evaluation.record import ModelRecord
from potstill.studies.measure import comparable, measuring
from potstill.studies.plan import make_plan
from potstill.studies.read import read_study
from potstill.studies.schedule import State
from small_recipe import write_small_recipe


@pytest.mark.parametrize(
    ("failed", "baseline", "against"),
    [
        ((), None, {"a": "sft,a", "b": "sft,b"}),
        (("sft,b",), None, {"a": "sft,a"}),
        (("sft,a", "sft,b"), None, {}),
        (("sft,b", "b"), "sft,a", None),
    ],
)
def test_a_cell_whose_twin_is_missing_is_compared_with_no_other(tmp_path, failed, baseline, against):
    rates = {"a": {"training.learning_rate": 1e-3}, "b": {"training.learning_rate": 1e-4}}
    write_small_recipe(tmp_path)
    said = {
        "title": "Which rate?", "base": "r.yaml", "grid": {"objective.kd_ratio": [0.5], "rate": rates}, "folder": str(tmp_path / "out"),
        "evaluation": {"tasks": [{"kind": "text", "data": {"train": str(tmp_path / "rows.jsonl")}}]},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    plan = make_plan(read_study(str(tmp_path / "study.yaml"), ()))
    states = {name: State(job, "failed" if job.cell in failed else "finished") for name, job in plan.jobs.items()}
    found = measuring(plan, comparable(plan, states))
    assert (found.baseline, found.against) == (baseline, against)
    pairs = {(first.name, second.name) for first, second in _pairs(found, [ModelRecord(name, {}) for name in found.models])}
    expected = {("a", "sft,a")} if against is None else set(against.items())
    assert {pair for pair in pairs if pair[1] != found.before} == expected

"""The share of the gap between a student and its teacher that was closed: by hand, by simulation, and where there is no gap."""

import numpy as np
import pytest

from potstill.evaluation.record import EvaluationRecord, ModelRecord, TaskRecord, compare_models
from potstill.evaluation.recovered import gap_recovered
from potstill.evaluation.scores import Scores, mean
from potstill.evaluation.task import Outcome


def table(values, higher_is_better=True):
    values = np.asarray(values, dtype=float)
    items = tuple(str(place) for place in range(values.size))
    metric = mean("m", "sum", higher_is_better=higher_is_better)
    return Scores(items, ("sum", "questions"), np.stack([values, np.ones_like(values)], axis=-1), {"m": metric})


def test_a_share_is_what_it_says():
    start, half, teacher = (table(np.arange(50) + more) for more in (0, 1, 2))
    found = gap_recovered("m", [half], [start], [teacher])
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert gap_recovered("m", [start], [start], [teacher]).value == pytest.approx(0)
    assert gap_recovered("m", [teacher], [start], [teacher]).value == pytest.approx(1)


def test_less_is_better_where_the_metric_says_so():
    start, half, teacher = (table(np.arange(50) - more, higher_is_better=False) for more in (0, 1, 2))
    assert gap_recovered("m", [half], [start], [teacher]).value == pytest.approx(0.5)
    assert gap_recovered("m", [half], [teacher], [start]).value is None


def test_a_gap_within_its_error_is_not_divided_by():
    generator = np.random.default_rng(0)
    models = [table(generator.normal(0, 1, 50)) for _ in range(3)]
    found = gap_recovered("m", *([model] for model in models))
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "not better beyond the error" in str(found.reason)


def test_other_items_are_not_compared():
    found = gap_recovered("m", [table(np.ones(5))], [table(np.zeros(6))], [table(np.ones(5) * 2)])
    assert found.reason == "the models were not asked the same items"


@pytest.mark.parametrize(("num_seeds", "seed_noise"), [(1, 0.0), (3, 0.2)])
def test_the_interval_holds_the_true_share(num_seeds, seed_noise):
    generator, inside, wanted = np.random.default_rng(1), 0, 0
    for _ in range(100):
        hard = generator.normal(0, 2, 80)
        student, start = ([table(hard + more + generator.normal(0, 1, 80) + generator.normal(0, seed_noise)) for _ in range(num_seeds)]
                          for more in (0.6, 0.0))  # fmt: skip
        found = gap_recovered("m", student, start, [table(hard + 1.0 + generator.normal(0, 1, 80))])
        wanted += found.value is not None
        inside += found.value is not None and found.low is not None and found.high is not None and found.low <= 0.6 <= found.high
    assert wanted > 85
    assert inside / wanted >= 0.95 - 3 * np.sqrt(0.0475 / wanted)


def test_a_record_says_it_of_every_student_from_what_it_is_compared_with_or_from_before():
    names = {"plain": 0, "twin": 1, "student": 3}
    models = [ModelRecord(name, {"t": [Outcome(table(np.arange(30) + more))]}) for name, more in names.items()]
    teacher = ModelRecord("teacher", {"t": [Outcome(table(np.arange(30) + 5))]}, is_teacher=True)
    task = TaskRecord("t", "questions", "m")
    pairs = compare_models([task], [(models[2], models[1])])
    record = EvaluationRecord("A table", [task], [*models, teacher], pairs)
    (found,) = record.to_json()["recovered"]
    assert (found["model"], found["start"], found["teacher"], found["metric"]) == ("student", "twin", "teacher", "t/m")
    assert found["value"] == pytest.approx(0.5)
    from_before = EvaluationRecord("A table", [task], [*models, teacher], pairs, before="plain").to_json()["recovered"]
    assert {one["model"]: pytest.approx(one["value"]) for one in from_before} == {"twin": 0.2, "student": 0.6}

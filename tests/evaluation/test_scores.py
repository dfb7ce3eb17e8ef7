"""A table of sums by item: what can be read off it, from memory and from disk, alone and against another."""

import json
import math

import numpy as np
import pytest

from potstill.evaluation.comparison import holm
from potstill.evaluation.record import EvaluationRecord, ModelRecord, TaskRecord, compare_models
from potstill.evaluation.scores import Formula, Metric, Scores, compare_scores, estimate_over_seeds, mean
from potstill.evaluation.task import Outcome, Sample, Series

COLUMNS = ("nats", "other", "targets", "bytes", "bin 0", "bin 1")
TOTALS = np.array([[3.0, 1.0, 2.0, 9.0, 0.5, -0.25], [1.0, 2.5, 4.0, 11.0, -1.0, 0.5], [2.0, 0.5, 1.0, 4.0, 0.25, 0.0]])
# nats 6, other 4, targets 7, bytes 24, bins -0.25 and 0.25.
EXPECTED = {
    "ratio": (("nats", "targets"), 6 / 7),
    "perplexity": (("nats", "targets"), math.exp(6 / 7)),
    "bits": (("nats", "bytes"), 6 / 24 / math.log(2)),
    "complement": (("nats", "targets"), 1 - 6 / 7),
    "gap": (("nats", "other", "targets"), 2 / 7),
    "quotient": (("nats", "targets", "other", "bytes"), (6 / 7) / (4 / 24)),
    "calibration": (("targets", "bin 0", "bin 1"), 0.5 / 7),
}


def table(totals=TOTALS, **metrics) -> Scores:
    chosen = metrics or {kind: Metric(kind, "", Formula(kind, columns)) for kind, (columns, _) in EXPECTED.items()}
    return Scores(tuple(f"row {number}" for number in range(len(totals))), COLUMNS, totals, chosen)


def answers(right, *, shift: int = 0) -> Scores:
    items = tuple(str(number + shift) for number in range(len(right)))
    return Scores(items, ("right", "questions"), np.array([[one, 1] for one in right]), {"accuracy": mean("accuracy", "right")})


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_formula_is_what_its_words_say(kind):
    assert table().estimate(kind).value == pytest.approx(EXPECTED[kind][1], rel=1e-14)


def test_a_table_reads_back_bit_for_bit():
    scores = table(TOTALS / 3)
    again = Scores.from_json(json.loads(json.dumps(scores.to_json())))
    assert (again.items, again.columns, again.primary, dict(again.metrics)) == (
        scores.items, scores.columns, scores.primary, dict(scores.metrics)
    )  # fmt: skip
    assert again.totals.tobytes() == scores.totals.tobytes()
    assert again.estimates() == scores.estimates()


def test_an_outcome_reads_back():
    sample, series = Sample("row 0", "?", "!", right=True), Series("lengths", "l", "x", "y", (1.0,), (2.0,))
    outcome = Outcome(table(), (sample,), (series,), ("careful",), {"rows": 3})
    again = Outcome.from_json(json.loads(json.dumps(outcome.to_json())))
    assert (again.samples, again.series, again.warnings, again.data) == (outcome.samples, outcome.series, outcome.warnings, outcome.data)


@pytest.mark.parametrize("damage", [{"version": 9}, {"totals": [[1.0]]}, {"columns": ["nats"]}, {"items": ["a", "a", "b"]}])
def test_what_was_not_written_so_is_refused(damage):
    with pytest.raises((ValueError, KeyError, TypeError)):
        Scores.from_json(table().to_json() | damage)


def test_a_metric_of_a_column_that_was_not_counted_is_refused():
    with pytest.raises(ValueError, match="needs the column absent"):
        table(absent=Metric("absent", "", Formula("ratio", ("absent", "targets"))))


def test_answers_that_are_right_or_wrong_get_the_exact_test_and_others_the_bootstrap():
    first, second = answers([1] * 9 + [0] * 3), answers([0] * 8 + [1] + [0] * 3)
    assert compare_scores("accuracy", [first], [second]).method.startswith("McNemar")
    halves = answers([0.5] * 12)
    assert compare_scores("accuracy", [first], [halves]).method.startswith("paired bootstrap")
    assert compare_scores("accuracy", [first, second], [second, first]).method.startswith("Student's t")


def sparse(generator, held, num_items=60) -> Scores:
    """A metric of which only some items hold anything."""
    counted = np.zeros(num_items)
    counted[held] = 1
    totals = np.stack([counted * generator.normal(0, 1, num_items), counted], axis=1)
    return Scores(tuple(map(str, range(num_items))), ("sum", "counted"), totals, {"m": mean("m", "sum", counted="counted")})


def test_items_that_hold_nothing_of_a_metric_lend_it_no_certainty():
    generator = np.random.default_rng(0)
    found = [compare_scores("m", [sparse(generator, slice(4))], [sparse(generator, slice(4))]) for _ in range(200)]
    assert np.mean([one.is_significant for one in found]) < 0.09
    assert all(np.isfinite([one.low, one.high, one.smallest_visible]).all() for one in found)
    alone = sparse(generator, slice(4))
    four = Scores(alone.items[:4], alone.columns, alone.totals[:4], alone.metrics)
    assert alone.estimate("m") == four.estimate("m")
    assert estimate_over_seeds("m", [alone, alone]) == estimate_over_seeds("m", [four, four])
    # The other model's items may be others: a draw that misses all of one's says nothing, and is no evidence.
    apart = [compare_scores("m", [sparse(generator, slice(4))], [sparse(generator, slice(30, 60))]) for _ in range(40)]
    assert all(np.isfinite([one.low, one.high]).all() for one in apart)


def test_only_the_same_items_are_compared():
    with pytest.raises(ValueError, match="different items"):
        compare_scores("accuracy", [answers([1, 0, 1])], [answers([1, 0, 1], shift=1)])
    with pytest.raises(ValueError, match="different items"):
        estimate_over_seeds("accuracy", [answers([1, 0, 1]), answers([1, 0])])


# ---------------------------------------------------------------- many comparisons


def test_holm_steps_down_as_published():
    # Worked by hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, then 0.04 which may not be smaller than the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.03]) == [0.03]


def _rows(*right) -> list[ModelRecord]:
    return [ModelRecord(f"m{number}", {"t": [Outcome(answers(one))]}) for number, one in enumerate(right)]


def test_what_one_comparison_alone_would_find_many_must_prove():
    """Six questions right by one model alone: p = 0.031 by itself, and nothing among three."""
    first, *others = _rows([0] * 6 + [1] * 20, [1] * 26, [0] * 6 + [1] * 20, [0] * 6 + [1] * 20)
    task = TaskRecord("t", "questions", "accuracy")
    alone = compare_models([task], [(others[0], first)])
    assert alone[0].p_adjusted == alone[0].comparison.p_value == pytest.approx(2 / 64)
    found = [pair.to_json() for pair in compare_models([task], [(other, first) for other in others])]
    assert found[0]["p_value"] == pytest.approx(2 / 64)
    assert found[0]["p_adjusted"] == pytest.approx(6 / 64)
    assert alone[0].to_json()["is_significant"]
    assert not found[0]["is_significant"]
    assert "Holm's correction over 3 comparisons" in found[0]["verdict"]
    assert "do not tell the two apart" in found[0]["verdict"]


def test_a_tasks_own_metric_and_the_others_are_families_apart():
    def outcome(shift: float) -> Outcome:
        totals = np.stack([np.linspace(0, 1, 30) + shift, np.linspace(1, 2, 30), np.ones(30)], axis=1)
        metrics = {"one": mean("one", "a", counted="n"), "two": mean("two", "b", counted="n")}
        return Outcome(Scores(tuple(map(str, range(30))), ("a", "b", "n"), totals, metrics, "one"))

    rows = [ModelRecord(str(shift), {"t": [outcome(shift)], "u": [outcome(shift)]}) for shift in (0.0, 0.1)]
    pairs = compare_models([TaskRecord("t", "x", "one"), TaskRecord("u", "x", "two")], [(rows[1], rows[0])])
    assert {(pair.task, pair.name): (pair.family, pair.family_size) for pair in pairs} == {
        ("t", "one"): ("primary", 2), ("t", "two"): ("secondary", 2), ("u", "one"): ("secondary", 2), ("u", "two"): ("primary", 2),
    }  # fmt: skip


def test_a_model_without_seeds_is_paired_with_every_seed_of_another():
    one = ModelRecord("one", {"t": [Outcome(answers([1, 0, 1, 1]))]})
    two = ModelRecord("two", {"t": [Outcome(answers([1, 1, 1, 0])), Outcome(answers([0, 0, 1, 1]))]})
    (pair,) = compare_models([TaskRecord("t", "x", "accuracy")], [(one, two)])
    assert pair.comparison.difference.value == pytest.approx(0.75 - (0.75 + 0.5) / 2)


def test_samples_stand_side_by_side_and_no_more_than_asked():
    def outcome(name: str) -> Outcome:
        return Outcome(answers([1, 0, 1]), tuple(Sample(str(item), f"q{item}", f"{name}{item}", right=item != 1) for item in range(3)))

    rows = [ModelRecord(name, {"t": [outcome(name), outcome("another seed")]}) for name in ("a", "b")]
    record = EvaluationRecord("x", [TaskRecord("t", "x", "accuracy")], rows, shown_samples=2).to_json()
    assert [entry["item"] for entry in record["samples"]] == ["0", "1"]
    assert record["samples"][1]["answers"] == [{"model": "a", "text": "a1", "right": False}, {"model": "b", "text": "b1", "right": False}]

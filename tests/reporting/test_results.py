"""The page's tables as data: which value is best, what a comparison says of it, what changed since before the training."""

import pytest

import reported
from potstill.reporting.records import normalise
from potstill.reporting.results import changes_since_before, facts_in_words, judged, recovered_gap, results_tables, signed


def read(**changes):
    return normalise(reported.evaluation() | changes)[0]


def table_of(record):
    (table,) = results_tables([("run", "test", record)])
    return table


def test_primary_metrics_come_first_within_their_task():
    table = table_of(read())
    assert [(task, [column.is_primary for column in columns]) for task, columns in table.tasks] == [
        ("arithmetic", [True, False]), ("held-out", [True, False, False]), ("commonsense", [True]),
    ]  # fmt: skip
    assert [column.is_off_target for column in table.columns] == [False] * 5 + [True]


def marks(table, name):
    place = next(place for place, column in enumerate(table.columns) if column.key == name)
    return {row.name: row.values[place] for row in table.rows}


def test_the_best_student_of_each_direction_is_marked_and_never_the_teacher():
    table = table_of(read())
    for key, best in (("arithmetic/exact_match", "KD 1"), ("held-out/bits_per_byte", "KD 1"), ("commonsense/acc_norm", "before")):
        assert [name for name, value in marks(table, key).items() if value.is_best] == [best], key
    # Neither direction of a length is good in itself.
    assert not any(value.is_best for value in marks(table, "arithmetic/mean_length").values())


def test_a_tie_of_all_marks_nobody():
    record = read()
    for model in record["models"]:
        model["metrics"]["arithmetic/exact_match"]["value"] = 0.5
    assert not any(value.is_best for value in marks(table_of(record), "arithmetic/exact_match").values())


def test_values_carry_what_the_comparison_with_the_baseline_says():
    found = marks(table_of(read()), "arithmetic/exact_match")
    assert (found["SFT"].word, found["teacher"].word) == ("", "")
    assert (found["KD 1"].sign, found["KD 1"].word, found["KD 1"].tone, found["KD 1"].against) == ("▲", "better", "good", "SFT")
    off = marks(table_of(read()), "commonsense/acc_norm")
    assert (off["KD 1"].sign, off["KD 1"].word, off["KD 1"].tone) == ("▼", "worse", "bad")


@pytest.mark.parametrize(
    ("difference", "higher_is_better", "is_significant", "words"),
    [
        (0.1, True, True, ("▲", "better", "good")), (-0.1, True, True, ("▼", "worse", "bad")), (-0.1, False, True, ("▲", "better", "good")),
        (0.1, False, True, ("▼", "worse", "bad")), (0.1, None, True, ("▲", "higher", "")), (-0.1, None, True, ("▼", "lower", "")),
        (0.1, True, False, ("≈", "not told apart", "")), (None, True, True, ("≈", "not told apart", "")),
    ],
)  # fmt: skip
def test_a_comparison_in_a_sign_and_a_word(difference, higher_is_better, is_significant, words):
    assert judged({"difference": difference, "higher_is_better": higher_is_better, "is_significant": is_significant}) == words


def test_a_row_with_a_twin_of_its_own_is_judged_against_it():
    record = read(baseline=None)
    found = marks(table_of(record), "arithmetic/exact_match")
    assert found["KD 1"].against == "SFT"
    # What only stands against the student before its training belongs to another table.
    assert found["SFT"].word == ""


def test_changes_since_before_put_targets_first_and_say_what_was_lost():
    changes = changes_since_before(read())
    assert [column.is_off_target for column in changes.columns] == [False, False, True]
    assert [row.name for row in changes.rows] == ["SFT", "KD 0.5", "KD 1"]
    last = changes.rows[-1].values
    assert last[0].sort == pytest.approx(0.15)
    assert (last[0].text, last[0].interval, last[0].word) == ("+0.150", "0.4100 → 0.5600", "better")
    assert (last[2].text, last[2].interval, last[2].word, last[2].tone) == ("-0.150", "0.4900 → 0.3400", "worse", "bad")


def test_a_change_that_was_not_compared_is_a_difference_and_says_so():
    changes = changes_since_before(read(comparisons=[]))
    assert (changes.rows[0].values[0].text, changes.rows[0].values[0].word) == ("+0.0900", "not compared")


@pytest.mark.parametrize("before", [None, "nobody"])
def test_without_a_row_before_nothing_is_said(before):
    assert changes_since_before(read(before=before)) is None


def test_records_of_other_tasks_or_data_stand_apart():
    other = read()
    other["tasks"][0]["data"] = {"rows": 7}
    assert len(results_tables([("a", "x", read()), ("b", "x", read())])) == 1
    assert len(results_tables([("a", "x", read()), ("b", "x", other)])) == 2
    (joined,) = results_tables([("a", "x", read()), ("b", "x", read())])
    assert len(joined.rows) == 10
    assert {row.source for row in joined.rows} == {"a", "b"}


def test_comparisons_that_were_not_corrected_are_known():
    assert table_of(read()).is_corrected
    record = read()
    for pair in record["comparisons"]:
        pair["p_adjusted"] = None
    assert not table_of(record).is_corrected


def test_facts_and_signs():
    assert facts_in_words({"rows": 1450, "data_set": "x"}) == "1,450 rows · data set: x"
    assert (signed(0.5, 0.01), signed(-0.5, 0.01), signed(None, None)) == ("+0.500", "-0.500", "—")


def test_the_recovered_gap_has_a_row_a_student_and_says_where_there_is_none():
    gap = recovered_gap(read())
    assert (gap.starts, gap.teachers, gap.tasks) == ("before", "teacher", ("arithmetic", "commonsense"))
    assert [(model, values[0].text, values[0].interval) for model, values in gap.rows] == [
        ("SFT", "30%", "20% to 60%"), ("KD 0.5", "40%", "20% to 60%"), ("KD 1", "50%", "20% to 60%"),
    ]  # fmt: skip
    assert [values[1].word for _, values in gap.rows] == ["no gap", "", ""]
    assert gap.reasons == ("commonsense: there is no gap to recover",)
    assert recovered_gap(read(recovered=[])) is None

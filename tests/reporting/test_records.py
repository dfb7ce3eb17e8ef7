"""Records of both versions in one shape; what of them does not read is named, and the rest is kept."""

import json

import pytest

import reported
from potstill.reporting.records import normalise, read_record

FIRST_VERSION = {
    "kind": "evaluation", "version": 1, "title": "Tasks", "data": {"rows": 450}, "warnings": ["odd"],
    "models": [
        {"name": "teacher", "num_parameters": 9, "num_seeds": 1, "metrics": {"bits_per_byte": reported.metric(0.1)}},
        {"name": "SFT", "num_parameters": 9, "num_seeds": 3,
         "metrics": {"bits_per_byte": reported.metric(0.3), "exact_match": reported.metric(0.5)}},
    ],
    "comparisons": [
        {"metric": "exact_match", "first": "KD", "second": "SFT", "difference": 0.1, "is_significant": True, "verdict": "KD is higher."}
    ],
}  # fmt: skip


def test_the_first_version_takes_the_shape_of_the_second():
    record, faults = normalise(FIRST_VERSION, "quickstart")
    assert faults == []
    assert record["tasks"] == [
        {"name": "quickstart", "kind": "", "primary": "quickstart/exact_match", "role": "target", "data": {"rows": 450}}
    ]  # fmt: skip
    assert [model["is_teacher"] for model in record["models"]] == [True, False]
    assert set(record["models"][1]["metrics"]) == {"quickstart/bits_per_byte", "quickstart/exact_match"}
    assert record["models"][1]["metrics"]["quickstart/exact_match"]["task"] == "quickstart"
    assert (record["comparisons"][0]["metric"], record["comparisons"][0]["p_adjusted"]) == ("quickstart/exact_match", None)
    assert (record["baseline"], record["before"], record["samples"], record["series"]) == ("SFT", None, [], [])


def test_a_record_of_the_second_version_stays_what_it_is():
    given = reported.evaluation()
    record, faults = normalise(given)
    assert faults == []
    for key in ("title", "warnings", "baseline", "before", "models", "tasks", "samples", "series", "comparisons"):
        assert record[key] == given[key], key


def test_reading_twice_changes_nothing():
    record, _ = normalise(FIRST_VERSION, "one")
    assert normalise(record, "one") == (record, [])


def test_what_does_not_read_is_named_once_and_the_rest_kept():
    given = reported.evaluation()
    given["models"][1] = {"nonsense": 1}
    given["models"][2]["metrics"]["held-out/forward_kl"] = "a word"
    given["comparisons"] += [{"first": 3}, {"first": 3}]
    given["samples"][0] = {"answers": "none"}
    given["series"][0]["x"] = given["series"][0]["x"][:-1]
    given["series"][1] |= {"x": "no list"}
    record, faults = normalise(given)
    assert [model["name"] for model in record["models"]] == ["teacher", "SFT", "KD 0.5", "KD 1"]
    assert "held-out/forward_kl" not in record["models"][1]["metrics"]
    assert "held-out/bits_per_byte" in record["models"][1]["metrics"]
    assert len(record["comparisons"]) == len(given["comparisons"]) - 2
    assert len(record["samples"]) == len(given["samples"]) - 1
    assert len(record["series"]) == len(given["series"]) - 2
    for part in ("a model does not read", "'held-out/forward_kl' of 'SFT'", "a sample", "a series"):
        assert len([fault for fault in faults if part in fault]) == 1, part


def test_numbers_that_are_not_finite_are_not_known():
    given = reported.evaluation()
    given["models"][2]["metrics"]["held-out/forward_kl"]["value"] = float("nan")
    record, faults = normalise(json.loads(json.dumps(given)))
    assert faults == []
    assert record["models"][2]["metrics"]["held-out/forward_kl"]["value"] is None


def test_a_task_that_only_metrics_name_is_found():
    given = reported.evaluation() | {"tasks": []}
    record, _ = normalise(given)
    assert [task["name"] for task in record["tasks"]] == ["arithmetic", "held-out", "commonsense"]
    assert [task["primary"] for task in record["tasks"]] == ["arithmetic/exact_match", "held-out/bits_per_byte", "commonsense/acc_norm"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "something else"), ('{"kind": "other"}', "not one of Potstill's"), ('{"kind": "evaluation", "version": 3}', "reads up to 2"),
        ("{", "damaged"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_record_is_named(tmp_path, content, words):
    file = tmp_path / "test.json"
    file.write_text(content)
    record, warnings = read_record(file)
    assert record is None
    assert len(warnings) == 1
    assert "evaluation/test.json" in warnings[0]
    assert words in warnings[0]

"""The family of tasks: its splits never meet, its own solutions pass, wrong answers do not."""

import hashlib
import json
from collections import Counter
from itertools import combinations, pairwise

import pytest

from potstill.data.tasks import KINDS, SHARES, check, extract_answer, make, split_of

SPLITS = tuple(SHARES)


@pytest.fixture(scope="module")
def rows():
    return {split: [row for seed in range(3) for row in make(split, 900, seed)] for split in SPLITS}


def test_no_problem_stands_in_two_splits(rows):
    # The words of the input in any order: stricter than the input as it is written.
    problems = {split: {(row["kind"], tuple(sorted(row["input"].replace(",", " ").replace(";", " ").split()))) for row in part}
                for split, part in rows.items()}  # fmt: skip
    for left, right in combinations(SPLITS, 2):
        assert not problems[left] & problems[right]


def test_the_split_follows_from_the_content_alone(rows):
    for split, part in rows.items():
        assert {split_of(row["kind"], row["input"]) for row in part} == {split}
    assert split_of("sum", "17 + 25") == split_of("sum", "25 + 17")


@pytest.mark.parametrize("split", SPLITS)
def test_every_written_solution_passes_its_own_checker(rows, split):
    for row in rows[split]:
        assert check(row, row["output"]), row
        assert extract_answer(row["output"]) == row["answer"]


@pytest.mark.parametrize("split", SPLITS)
def test_wrong_answers_fail(rows, split):
    for row in rows[split]:
        steps = row["output"].rpartition("Answer:")[0]
        for wrong in (f"{row['answer']} x", "", "0 + 0", "no"):
            assert not check(row, f"{steps}Answer: {wrong}"), (row, wrong)
        assert not check(row, steps), "an answer must be marked as one"


def test_an_answer_to_another_problem_of_the_kind_mostly_fails(rows):
    # Answers from a small set may be right by chance; a checker that accepts everything is not.
    for kind in KINDS:
        part = [row for row in rows["test"] if row["kind"] == kind]
        right = sum(check(row, other["output"]) for row, other in pairwise(part))
        assert right < 0.6 * len(part), kind


def test_several_answers_are_right_where_the_kind_says_so():
    above = {"kind": "above", "input": "table: cup 4, hat 9, fox 2, pig 5; 3"}
    assert [word for word in ("cup", "hat", "fox", "pig", "owl") if check(above, f"Answer: {word}")] == ["cup", "hat", "pig"]
    even = {"kind": "even", "input": "list: 3 8 5 2 8"}
    assert [number for number in "358240" if check(even, f"Answer: {number}")] == ["8", "2"]
    common = {"kind": "common", "input": "texts: a b c d; d e b f"}
    assert [letter for letter in "abcdef" if check(common, f"Answer: {letter}")] == ["b", "d"]


@pytest.mark.parametrize(
    ("kind", "text", "right", "wrong"),
    [
        ("sum", "58 + 67", "125", "115"),
        ("look_up", "table: cup 4, hat 9; hat", "9", "4"),
        ("reverse", "list: ant bell boat", "boat bell ant", "ant bell boat"),
        ("next", "list: ant bell boat; bell", "boat", "ant"),
        ("size", "list: ant bell boat", "3", "4"),
        ("replace", "text: a b a c; a to x", "x b x c", "x b a c"),
    ],
)
def test_answers_worked_out_by_hand(kind, text, right, wrong):
    row = {"kind": kind, "input": text}
    assert check(row, f"Answer: {right}")
    assert check(row, f"Some steps. Answer: 0 Answer: {right}."), "the last answer counts, a full stop does not"
    assert not check(row, f"Answer: {wrong}")


def test_the_kinds_are_balanced_and_every_problem_is_new():
    part = make("transfer", 10 * len(KINDS) + 3, 5)
    counts = Counter(row["kind"] for row in part)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({(row["kind"], row["input"]) for row in part}) == len(part)


def test_the_same_arguments_give_the_same_rows_in_any_process():
    assert make("test", 200, 3) == make("test", 200, 3)
    assert make("test", 200, 3) != make("test", 200, 4)
    digest = hashlib.sha256(json.dumps(make("test", 200, 3)).encode()).hexdigest()
    assert digest.startswith("0ad12a2ae59366c5"), "a change of the family is a change of every published number: write it in the changelog"


def test_asking_for_what_there_is_not():
    with pytest.raises(ValueError, match="no split 'dev'"):
        make("dev", 1, 0)
    with pytest.raises(ValueError, match="no further problem"):
        make("test", 100_000, 0)

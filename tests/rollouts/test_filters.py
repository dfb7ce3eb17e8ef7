"""Which answers are kept: each reason alone and in its order, checkers against tables of right and wrong, and a user's function."""

import itertools

import pytest

from potstill.errors import ConfigError
from potstill.rollouts.checkers import CHECKERS, final_part, last_number, make_checker
from potstill.rollouts.filters import REASONS, REFUSALS, Counts, Written, declines, judge, repeated_share
from potstill.rollouts.generate_config import FilterConfig

KEY = "generate.filters.checker"


def written(text: str = "an answer", *, tokens=range(6), ended: bool = True, readable: bool = True) -> Written:
    return Written(list(tokens), text, ended, readable)


def reasons(answers, checker=None, reference="", **config) -> list[str | None]:
    return judge(answers, reference, {}, FilterConfig(**config), checker)


# ---------------------------------------------------------------- checkers

RIGHT_AND_WRONG = {
    "exact": [
        ("42", "42", True), (" The  Cat ", "the cat", True), ("First 2 + 2 = 4. Answer: 4", "The sum. Answer: 4.", True),
        ("so \\boxed{\\frac{1}{2}}", "\\boxed{\\frac{1}{2}}", True), ("ﬁne", "fine", True),
        ("#### 7", "7", True),
        ("42", "43", False), ("the cat sat", "the cat", False), ("", "4", False), ("Answer: 4\nAnswer: 5", "4", False),
    ],
    "contains": [
        ("It is Paris, of course.", "Paris", True), ("PARIS", "Answer: Paris", True), ("12 apples", "12", True),
        ("112 apples", "12", False), ("Parisian", "Paris", False), ("", "Paris", False),
    ],
    "numeric": [
        ("The total is $1,234.50.", "1234.5", True), ("#### 42", "Tom has 42", True), ("\\boxed{\\frac{3}{4}}", "0.75", True),
        ("3/4", ".75", True), ("−7 degrees", "-7", True), ("1e3", "1,000", True), ("It is 50 %", "50", True),
        ("1000000", "1000000.5", True),
        ("12 + 30 = 42.", "The answer is 42", True), ("the answer is 41, not 42", "42", True),
        ("41", "42", False), ("42", "-42", False), ("10,00", "10,00", False), ("none", "42", False), ("1/0", "0", False),
        ("v2", "2", False),
        ("1000000", "1000002", False), ("0.5", "5", False),
    ],
    "choice": [
        ("B", "(b)", True), ("The answer is (C).", "C. Lyon", True), ("I think A is wrong, so D", "D", True), ("So I choose A", "A", True),
        ("\\boxed{B}", "B", True), ("b)", "B", True), ("Option C is right", "C", True),
        ("A dog", "A", False), ("Paris", "B", False), ("B", "C", False), ("", "A", False),
    ],
    "math": [
        ("so it is $\\frac{3}{4}$", "0.75", True), ("\\boxed{(x+1)^2}", "x^2 + 2x + 1", True), ("The answer is $x = 5$.", "5", True),
        ("12 apples", "12", True), ("$\\{2, 1\\}$", "\\{1,2\\}", True), ("\\text{(C)}", "\\text{(C)}", True), ("1,234", "1234", True),
        ("0.76", "\\frac{3}{4}", False), ("$(1, 2)$", "(2, 1)", False), ("x^2", "x^3", False), ("", "4", False), ("4", "", False),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "reference", "right"), [
    pytest.param(name, *case, id=f"{name}-{number}") for name, cases in RIGHT_AND_WRONG.items() for number, case in enumerate(cases)
])  # fmt: skip
def test_a_checker_knows_right_from_wrong(name, answer, reference, right):
    assert CHECKERS[name](answer, reference, {}) is right


def test_every_checker_is_tested_both_ways():
    assert {name: {case[2] for case in cases} for name, cases in RIGHT_AND_WRONG.items()} == {name: {True, False} for name in CHECKERS}


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234,567", 1234567), ("2024-01-05", 5), ("2^10 = 1024", 1024), (".5", 0.5), ("3.", 3), ("5 apples and 6", 6), ("no", None)],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_the_last_box_counts_with_the_braces_inside_it():
    assert final_part("\\boxed{1} and then \\boxed{a{b}c} end") == "a{b}c"
    assert final_part("\\boxed") == "\\boxed"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("The answer is $x + 1$.", "x + 1"), ("Answer: $5.$", "5"), ("$$x$$", "x"), ("$5", "5"), ("5$", "5"),
        ("it comes to $x$", "it comes to $x$"), ("$a$ or $b$", "$a$ or $b$"),
    ],
)  # fmt: skip
def test_dollar_signs_go_where_they_stand_around_everything(text, part):
    assert final_part(text) == part


def test_a_function_of_the_users_decides(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(answer, reference, row):\n    return answer == row['want'] and reference == 'r'\n"
        "def broken(answer, reference, row):\n    return answer / 2\n"
        "def words(answer, reference, row):\n    return 'yes'\n"
        "def two(answer, reference):\n    return True\n"
    )
    mine = make_checker(f"{tmp_path}/mine.py:right", KEY)
    assert judge([written("x"), written("y")], "r", {"want": "y"}, FilterConfig(), mine) == ["wrong", None]
    for name, said in {"broken": "failed: TypeError", "words": "must return True or False"}.items():
        with pytest.raises(ConfigError, match=said):
            reasons([written()], make_checker(f"{tmp_path}/mine.py:{name}", KEY))
    refused = {"mine.py:two": "cannot be called with", "mine.py:absent": "there is no absent", "other.py:right": "no such file"}
    for name, said in refused.items():
        with pytest.raises(ConfigError, match=f"{KEY}.*{said}"):
            make_checker(f"{tmp_path}/{name}", KEY)
    with pytest.raises(ConfigError, match="there is exact, contains, numeric, choice, math"):
        make_checker("exakt", KEY)


# ---------------------------------------------------------------- filters

# For each reason: an answer that has it, the configuration that drops it, and one that does not.
CASES = {
    "empty": (written(" \n", tokens=[5]), {}, None),
    "unreadable": (written(readable=False), {}, None),
    "cut": (written(ended=False), {}, {"cut": "keep"}),
    "short": (written(tokens=[1, 2]), {"min_tokens": 3}, {"min_tokens": 2}),
    "long": (written(tokens=range(9)), {"max_tokens": 8}, {"max_tokens": 9}),
    "refused": (written("I'm sorry, but I cannot."), {"refused": "drop"}, {}),
    "repeated": (written(tokens=[1, 2] * 8), {"repeated": 0.5}, {"repeated": 0.9}),
}


@pytest.mark.parametrize("reason", CASES)
def test_a_reason_drops_what_it_names_and_nothing_else(reason):
    answer, drops, keeps = CASES[reason]
    assert reasons([answer], **drops) == [reason]
    if keeps is not None:
        assert reasons([answer], **keeps) == [None]
        assert reasons([written()], **drops) == [None]


def test_the_first_reason_in_the_stated_order_is_counted():
    everything = {"min_tokens": 3, "max_tokens": 1, "refused": "drop", "repeated": 0.1}
    bad = Written([1, 2], "I cannot", False)
    assert reasons([bad], **everything) == ["cut"]
    assert reasons([bad], **everything, cut="keep") == ["short"]
    assert list(Counts().dropped) == list(REASONS)


def test_equal_answers_and_more_than_wanted_are_dropped_in_the_order_of_the_samples():
    answers = [written("a"), written("a "), written("b"), written("", tokens=[]), written("c"), written("b")]
    assert reasons(answers) == [None, "same", None, "empty", None, "same"]
    assert reasons(answers, most=2) == [None, "same", None, "empty", "surplus", "same"]
    assert reasons(answers, same="keep", most=2) == [None, None, "surplus", "empty", "surplus", "surplus"]


def test_a_wrong_answer_is_not_the_first_of_its_kind():
    flips = itertools.cycle([False, True])
    assert reasons([written("a"), written("a")], lambda *_: next(flips)) == ["wrong", None]


@pytest.mark.parametrize("opening", REFUSALS)
def test_a_refusal_is_known_by_its_opening(opening):
    assert declines(f"  {opening.capitalize().replace(chr(39), '’')} help with that.")
    assert not declines(f"The letter said: {opening} that was long ago.")


@pytest.mark.parametrize("text", ["I'm sorry to hear that. Here is a poem.", "Sorry is a word.", "As an airline pilot", "I cannoted"])
def test_what_only_sounds_like_a_refusal_is_kept(text):
    assert not declines(text)


def test_the_share_of_repeated_4_grams_by_hand():
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share([1, 1, 1, 1, 1]) == 0.5  # two grams, one of them new
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_every_answer_is_counted_once():
    counts = Counts()
    for reason in [None, "cut", None, "cut", "wrong"]:
        counts.add(reason, 7)
    said = counts.as_dict()
    assert (said["answers"], said["kept"], said["kept_tokens"], sum(said["dropped"].values())) == (5, 2, 14, 3)
